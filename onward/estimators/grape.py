"""Gradient-aligned projected error: random matrices that turn towards the Jacobian, as forward mode measures it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from onward.derivatives.graph import is_traced
from onward.errors import UsageError
from onward.estimators.base import Step
from onward.estimators.dfa import fill_at_random
from onward.estimators.fdfa import FDFA, ForwardFeedback
from onward.estimators.settings import AtLeast
from onward.estimators.signals import Known
from onward.network.run import call, detached


class AlignedFeedback(ForwardFeedback):
    """B_k random at first; ``grad B_k`` is that of ``1 - cos(B_k, J_k)``, J_k what forward mode measures of the Jacobian."""

    def __init__(self, model: nn.Module, cuts: Sequence[str], seed: int) -> None:
        super().__init__(model, cuts, seed)
        self.parts: dict[int, tuple[float, Tensor]] = {}  # of J_k, where a batch comes in microbatches, and their share

    def initial(self, k: int, matrix: Tensor) -> None:
        fill_at_random(matrix, self.seed, k)

    def differentiate(self, k: int, h: Tensor, known: Known, gradient: Tensor) -> None:
        share, measured = self.parts.pop(k, (0.0, torch.zeros_like(gradient)))
        self.add_jacobian(k, h, known, measured, known.share)
        if share + known.share < 1 - 1e-6:
            self.parts[k] = share + known.share, measured
            return
        (measured,) = known.mean([measured])
        gradient.add_(away(self[k], measured))


def away(b: Tensor, j: Tensor) -> Tensor:
    """The gradient of ``1 - cos(b, j)`` at b, which is orthogonal to b; zero where one of them is.

    >>> away(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    tensor([[ 0.0000, -0.5000]])
    """
    size, other = b.norm(), j.norm()
    cosine = (b * j).sum() / (size * other)
    return ((cosine / size * b - j / other) / size).masked_fill_(size * other == 0, 0)


class GrAPE(FDFA, name="grape"):
    """Gradient-aligned projected error: B_k is random, and turns towards the Jacobian that forward mode measures.

    As ``FDFA``, ``delta_k = e B_k``, and ``J_k = (1/N) ydot^T u_k`` (C x d_k), averaged over ``directions``, estimates the
    Jacobian of the outputs. B_k starts as in ``DFA`` and descends the angle between them:

        L_k = 1 - <B_k, J_k> / (|B_k| |J_k|),    grad B_k = (cos(B_k, J_k) B_k / |B_k| - J_k / |J_k|) / |B_k|.

    The gradient is orthogonal to B_k: its direction learns, not its length, which stays that of a random matrix.

    ``anchor_every=n`` makes every n-th step an exact one, of backpropagation through the whole network, in which B_k rests. It
    is off by default, and named in ``engine``: such a run is not free of backpropagation.

    Caillon, Fagnou, Delattre and Allauzen, "Scaling Direct Feedback Learning with Jacobian Alignment Guarantees", ICLR 2026,
    of which the abstract and summaries were read: it aligns B_k before the step that uses it (here after, as all feedback
    learns), and takes one anchor step in an epoch.

    Settings:
        anchor_every: take every so many steps an exact one, by backpropagation; 0 takes none.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = GrAPE(model, anchor_every=100)
    >>> step = estimator.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> estimator.feedback[0].grad.shape, estimator.engine
    (torch.Size([2, 8]), 'feedback, forward, backpropagation every 100 steps')
    """

    matrices = AlignedFeedback

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        anchor_every: Annotated[int, AtLeast(0)] = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, cuts, **options)
        self.anchor_every = anchor_every
        self.in_one_piece = anchor_every > 0
        if anchor_every:
            self.engine = f"{self.engine}, backpropagation every {anchor_every} steps"

    def _estimate(self, x: Any, y: Any) -> Step:
        if self.anchor_every and is_traced():
            raise UsageError(f"anchor_every={self.anchor_every} makes some steps backpropagation, and a trace is of one kind")
        if not self.anchor_every or (self.step + 1) % self.anchor_every:
            return super()._estimate(x, y)
        output = call(self.model, x)
        return Step(self.learn_last(output, y), detached(output))
