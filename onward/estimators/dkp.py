"""Direct Kolen-Pollack: the matrices learn from the products that the output layer learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from torch import Tensor, nn

from onward.estimators.dfa import fill_at_random
from onward.estimators.feedback import DirectFeedback, Feedback
from onward.estimators.settings import OneOf
from onward.estimators.signals import Known


class KolenPollackFeedback(Feedback):
    """``grad B_k = e^T h_k``: the forward weights and the feedback learn from the same products and so grow alike."""

    reads_outputs = True
    start = "zero"

    def initial(self, k: int, matrix: Tensor) -> None:
        if self.start == "random":
            fill_at_random(matrix, self.seed, k)
        else:
            super().initial(k, matrix)

    def differentiate(self, k: int, h: Tensor, known: Known, gradient: Tensor) -> None:
        layout = self.layout(k, h, known)
        columns = layout.columns(h).to(gradient.dtype)
        gradient.addmm_(layout.rows(known.e).to(gradient.dtype).T, columns / layout.places() if layout.pooled else columns)


class DKP(DirectFeedback, name="dkp"):
    """Direct Kolen-Pollack: ``delta_k = e B_k``, with ``grad B_k = e^T h_k`` (C x d_k) and B_k = 0 at first.

    The forward weights and the feedback learn from the same products and so grow alike; a small weight decay on both (1e-6)
    helps. Where positions share B_k (``positions``), ``grad B_k = sum_{n,t} e_{n,t} (x) h_{n,t}`` (V x d), or for outputs
    without positions ``sum_n e_n (x) mean_t h_{n,t}`` (C x d). Webster, Choi and Ahn, "Learning the Connections in Direct
    Feedback Alignment", 2021. Their published code starts from random matrices (``start="random"``), those of ``DFA``; the code
    of forward direct feedback alignment, which compares with it, from zero.

    Settings:
        start: what the matrices are at first: zero, or random as in dfa.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = DKP(model)
    >>> step = estimator.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> estimator.feedback[0].grad.shape
    torch.Size([2, 8])
    """

    matrices = KolenPollackFeedback
    feedback: KolenPollackFeedback

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        start: Annotated[str, OneOf(("zero", "random"))] = "zero",
        **options: Any,
    ) -> None:
        super().__init__(model, cuts, **options)
        self.feedback.start = start
