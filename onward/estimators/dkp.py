"""Direct Kolen-Pollack: the matrices learn from the products that the output layer learns from."""

from __future__ import annotations

from torch import Tensor

from onward.estimators.feedback import DirectFeedback, Feedback
from onward.estimators.signals import Known


class KolenPollackFeedback(Feedback):
    """``grad B_k = e^T h_k``: the forward weights and the feedback learn from the same products and so grow alike."""

    reads_outputs = True

    def differentiate(self, k: int, h: Tensor, known: Known, gradient: Tensor) -> None:
        gradient.addmm_(known.e.to(gradient.dtype).T, h.flatten(1).to(gradient.dtype))


class DKP(DirectFeedback, name="dkp"):
    """Direct Kolen-Pollack: ``delta_k = e B_k``, with ``grad B_k = e^T h_k`` (C x d_k) and B_k = 0 at first.

    The forward weights and the feedback learn from the same products and so grow alike; a small weight decay on both (1e-6)
    helps. Webster, Choi and Ahn, "Learning the Connections in Direct Feedback Alignment", 2021.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = DKP(model)
    >>> step = estimator.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> estimator.feedback[0].grad.shape
    torch.Size([2, 8])
    """

    matrices = KolenPollackFeedback
