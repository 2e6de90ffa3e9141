"""Spaces: what a guess is compared with a target over, and how the comparison turns the guess into an estimate.

Target and guess are compared by inner products: of each sample's rows of activations, of each sample's gradients of one
parameter, or of the batch's. In every space but ``span-*`` the estimate is the guess times a weight, ``sum_n w_n U_n``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from onward.derivatives.per_sample import PerSample

Weigh = Callable[[Tensor, Tensor | None, float, Callable[[Tensor], Tensor]], Tensor]
"""``weigh(inner, squares, eps, mean)``: the weight of each sample's guess U_n, from <G_n, U_n> and |U_n|^2 (None for unbiased
scaling), all of shape (N,). ``mean`` is the mean over the batch's samples."""


def projection(inner: Tensor, squares: Tensor | None, eps: float, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """``<G,U> / (|U|^2 + eps)``, or ``<G,U>`` where guesses are unbiased.

    >>> projection(torch.tensor([2.0, -1.0]), torch.tensor([4.0, 1.0]), 0.0, torch.mean)
    tensor([ 0.5000, -1.0000])
    """
    if squares is None:
        return inner
    divisor = squares + eps
    return torch.where(divisor > 0, inner / divisor, 0)  # nothing lies along a guess that is zero


def sign(inner: Tensor, squares: Tensor | None, eps: float, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """The sign of ``<G,U>``."""
    return inner.sign()


def filtered(inner: Tensor, squares: Tensor | None, eps: float, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """N / kept for the samples that are kept, those with ``<G,U> > 0``, and 0 for the others.

    >>> filtered(torch.tensor([2.0, -1.0]), None, 0.0, torch.mean)
    tensor([2., 0.])
    """
    kept = (inner > 0).to(inner.dtype)
    return torch.where(kept > 0, 1 / mean(kept), kept)


class Space(NamedTuple):
    """What target and guess are compared over, and how the guess is weighed by the comparison."""

    line: str
    of: Literal["rows", "samples", "batch"]
    """What is compared: each sample's rows at the block's output, each sample's gradients of a parameter, or the batch's."""
    weigh: Weigh | None
    """How weights are made; None where the guess is not weighed by what is compared."""
    scale_free: bool = False
    """Whether weights do not depend on how long the target is."""
    spans: bool = False
    """Whether each sample's target is projected on the span of the guesses of all samples."""
    in_samples: bool = False
    """Whether each sample's gradients of parameters are needed: to be compared, or to be weighed."""

    @property
    def projects(self) -> bool:
        """Whether it projects on single directions, so that lengths of guesses count."""
        return self.weigh is projection


SPACES = {
    "activation": Space(
        "per sample at the block's output: the guess scaled to the target's projection on it", "rows", projection
    ),
    "activation-2": Space(
        "the scales of activation, applied to each sample's parameter gradients under the guess",
        "rows",
        projection,
        in_samples=True,
    ),
    "weight": Space(
        "per sample and parameter: the guess's gradient scaled to the projection of the target's",
        "samples",
        projection,
        in_samples=True,
    ),
    "avg-weight": Space("per parameter, on gradients of the whole batch", "batch", projection),
    "span-activation": Space("the target's rows projected on the span of the batch's guesses", "rows", None, spans=True),
    "span-weight": Space(
        "per parameter: each sample's target projected on the span of the batch's guesses",
        "samples",
        None,
        spans=True,
        in_samples=True,
    ),
    "sign-weight": Space(
        "per sample and parameter: the guess's gradient with the sign of its inner product with the target's",
        "samples",
        sign,
        scale_free=True,
        in_samples=True,
    ),
    "random-sign-weight": Space(
        "per sample and parameter: the guess's gradient with a random sign", "samples", None, scale_free=True, in_samples=True
    ),
    "f-weight": Space(
        "per parameter: the guess's gradients of those samples whose inner product is positive",
        "samples",
        filtered,
        scale_free=True,
        in_samples=True,
    ),
    "f-activation": Space(
        "the guesses of those samples whose inner product at the block's output is positive", "rows", filtered, scale_free=True
    ),
}


def onto_span(inner: Tensor, gram: Tensor, precision: torch.dtype) -> Tensor:
    """Coefficients of the projection on a span: c with ``sum_i c_i U_i`` nearest to G, from <G, U_i> and <U_i, U_j>.

    ``inner`` (..., m) and ``gram`` (..., m, m); directions that depend on one another share the minimum-norm solution. What
    the U_i's own ``precision`` could have left in their span by rounding does not count.

    >>> onto_span(torch.tensor([3.0, 3.0]), torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.float32)
    tensor([1.5000, 1.5000])
    """
    m = gram.shape[-1]
    least = max(m * torch.finfo(torch.float64).eps, (m * torch.finfo(precision).eps) ** 2)
    inverse = torch.linalg.pinv(gram.double(), hermitian=True, rtol=least)
    return (inner.double().unsqueeze(-2) @ inverse).squeeze(-2).to(inner.dtype)


def span_rows(target: Tensor, guess: Tensor) -> Tensor:
    """``G U^+ U``: each row of the target projected on the span of all rows of the guess; both (N, ...)."""
    g, u = target.flatten(1).double(), guess.flatten(1).double()
    return (onto_span(g @ u.T, u @ u.T, guess.dtype) @ u).to(target.dtype).view(target.shape)


def span_total(gradients: PerSample, i: int) -> Tensor:
    """``sum_n`` of the projections of G^0_n on the span of the G^i_m."""
    return gradients.total(i, onto_span(gradients.gram(0, i).sum(0), gradients.gram(i, i), gradients.dtype))


def average(inner: Sequence[Tensor], gram: Tensor | None) -> list[Tensor]:
    """Weights for m random directions, out of m weights of shape (N,): their mean.

    Given the directions' Gram matrices (N, m, m), and inner products for weights, those of the projection on their span.
    """
    if gram is None:
        return [one / len(inner) for one in inner]
    return list(onto_span(torch.stack(list(inner), -1), gram, inner[0].dtype).unbind(-1))
