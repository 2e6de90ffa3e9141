"""Kolen-Pollack learning: what carries the error back takes every step that the weight takes, and so becomes the weight."""

from __future__ import annotations

from torch import nn

from onward.errors import UsageError
from onward.estimators.feedback_alignment import FeedbackAlignment


class KolenPollack(FeedbackAlignment, name="kp"):
    """Kolen-Pollack: as ``fa``, and B learns by W's own gradient, ``B.grad = W.grad``; both decay alike, so B becomes W.

    B is a parameter of the role ``network``: the same optimizer, rate and weight decay as W's make the difference of the two
    shrink by the decay in every step (1e-4 to 1e-6), and stay as it is without any: set the optimizer's ``weight_decay``.

    Kolen and Pollack, "Backpropagation without weight transport", 1994; Akrout, Wilson, Humphreys, Lillicrap and Tweed, "Deep
    Learning without Weight Transport", 2019.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = KolenPollack(model)
    >>> step = estimator.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> torch.equal(estimator.feedback[0].grad, model[0].weight.grad)
    True
    """

    engine = "reverse, through learned feedback weights"
    learns = True

    def _learn(self) -> None:
        weights = dict(self.model.named_parameters())
        for name, b in zip(self.carriers.names, self.feedback, strict=True):
            w = weights[name]
            if w._post_accumulate_grad_hooks:
                raise UsageError(
                    f"{name} has hooks on the accumulation of its gradient, which may have used it up before what carries the "
                    "error back could learn from it: take them away, and step the optimizer after estimate"
                )
            b.grad = None if w.grad is None else w.grad.clone()

    def _roles(self) -> dict[str, list[nn.Parameter]]:
        return {"network": [*self.model.parameters(), *self.feedback]}
