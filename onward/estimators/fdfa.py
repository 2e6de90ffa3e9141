"""Forward direct feedback alignment: the matrices learn the Jacobian of the outputs, as forward mode measures it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from onward.derivatives.directions import NOISES
from onward.estimators.feedback import DirectFeedback, Feedback
from onward.estimators.settings import AtLeast, OneOf
from onward.estimators.signals import Known


class ForwardFeedback(Feedback):
    """``grad B_k = B_k - (1/N) ydot^T u_k``: B_k follows the Jacobian of the outputs, as forward mode measures it."""

    directions = 1

    def learn(self, k: int, h: Tensor, known: Known) -> None:
        matrix = self.small(k, h, known.e)
        other = type(self).differentiate is not ForwardFeedback.differentiate  # a child's own rule
        if matrix is None or matrix.grad is not None or known.share != 1 or other or not (self.learns and known.tangents):
            super().learn(k, h, known)
            return
        gradient: Tensor = matrix  # the same sum, from its first term on instead of from zeros
        scale = -1 / (known.e.shape[0] * self.directions)
        for tangent, u in zip(known.tangents, known.directions(k, h), strict=True):
            gradient = torch.addmm(gradient, tangent.to(matrix.dtype).T, u.to(matrix.dtype), alpha=scale)
        matrix.grad = gradient

    def differentiate(self, k: int, h: Tensor, known: Known, gradient: Tensor) -> None:
        gradient.add_(self[k], alpha=known.share)
        self.add_jacobian(k, h, known, gradient, -known.share)

    def add_jacobian(self, k: int, h: Tensor, known: Known, to: Tensor, scale: float) -> None:
        """Add that many times what was measured of the Jacobian, (1/N) ydot^T u_k, to a matrix like B_k."""
        layout, count = self.layout(k, h, known), self.directions
        for tangent, u in zip(known.tangents, known.directions(k, h), strict=True):
            rows, columns = layout.rows(tangent).to(to.dtype), layout.columns(u).to(to.dtype)
            if layout.tokens:
                to.addmm_(rows.T, columns * known.weights.to(to.dtype), alpha=scale / count)
            else:
                to.addmm_(rows.T, columns, alpha=scale / (known.e.shape[0] * count))


class FDFA(DirectFeedback, name="fdfa"):
    """Forward direct feedback alignment: B_k learns the Jacobian of the outputs from directional derivatives.

    One forward pass carries a tangent ``u_k ~ N(0, I)`` added at the output of every hidden block; with ydot (N x C) the
    tangent of the outputs, E[ydot_n^T u_{k,n}] is the Jacobian dz_n/dh_{k,n}, and

        grad B_k = B_k - (1/N) ydot^T u_k        (C x d_k),  averaged over ``directions`` tangents,  B_k = 0 at first.

    Where positions share B_k (``positions``), ydot and u are N x T x V and N x T x d, and the mean is over all positions,

        grad B_k = B_k - mean_{n,t} ydot_{n,t} (x) u_{k,n,t}          (V x d),

    whose expectation is B_k less the mean Jacobian dz_{n,t}/dh_{n,t} of outputs and features at the same position: what other
    positions add to ydot has mean 0. The mean is over positions that the loss depends on: no padding, no ignored target. For
    outputs without positions (N x C), and h with T of them,

        grad B_k = B_k - (1/N) sum_n ydot_n (x) sum_t u_{k,n,t}       (C x d),

    whose expectation is B_k less T times the mean Jacobian dz_n/dh_{n,t} over samples and positions: B_k / T, which carries
    the signal, is the mean Jacobian. (With padding, the sum is over a sample's real tokens, and T is their number.)

    With SGD at rate alpha on the feedback this is the moving average of Bacho & Chu, "Low-Variance Forward Gradients using
    Direct Feedback Alignment and Momentum", Neural Networks 2024, equation 13; Adam works as well.

    The matrices follow a Jacobian, which knows nothing of the loss. So a loss that is scaled (``torch.amp.GradScaler``, or
    ``loss / k`` over k accumulated batches), and whose scale is taken back on every ``.grad``, leaves grad B_k too small by
    the scaler's factor, or too large by k. Give the matrices an optimizer of their own, without the scaler, and divide their
    ``.grad`` by k (Adam does not mind either). ``DKP`` learns from e, and follows the loss's scale as the network does.

    Settings:
        directions: tangents in one step, whose findings the matrices learn from on average.
        noise: what tangents are drawn from.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = FDFA(model)
    >>> optimizer = torch.optim.Adam(estimator.parameter_groups(network={"lr": 1e-3}, feedback={"lr": 1e-3}))
    >>> step = estimator.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> estimator.feedback[0].grad.shape
    torch.Size([2, 8])
    """

    engine = "feedback, forward"
    matrices = ForwardFeedback

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        directions: Annotated[int, AtLeast(1)] = 1,
        noise: Annotated[str, OneOf(NOISES)] = "gaussian",
        **options: Any,
    ) -> None:
        super().__init__(model, cuts, **options)
        self.directions = self.feedback.directions = directions
        self.noise = noise
