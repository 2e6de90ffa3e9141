"""Spaces: what a guess is compared with a target over, and how the comparison turns the guess into an estimate.

Target and guess are compared by inner products: of each sample's rows of activations, of each sample's gradients of one
parameter, or of the batch's. In every space but ``span-*`` the estimate is the guess times a weight, ``sum_n w_n U_n``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onward.derivatives.per_sample import PerSample

SPACES = {
    "activation": "per sample at the block's output: the guess scaled to the target's projection on it",
    "activation-2": "the scales of activation, applied to each sample's parameter gradients under the guess",
    "weight": "per sample and parameter: the guess's gradient scaled to the projection of the target's",
    "avg-weight": "per parameter, on gradients of the whole batch",
    "span-activation": "the target's rows projected on the span of the batch's guesses",
    "span-weight": "per parameter: each sample's target projected on the span of the batch's guesses",
    "sign-weight": "per sample and parameter: the guess's gradient with the sign of its inner product with the target's",
    "random-sign-weight": "per sample and parameter: the guess's gradient with a random sign",
    "f-weight": "per parameter: the guess's gradients of those samples whose inner product is positive",
    "f-activation": "the guesses of those samples whose inner product at the block's output is positive",
}
OF_SAMPLES = ("weight", "span-weight", "sign-weight", "random-sign-weight", "f-weight")
"""Spaces of each sample's parameter gradients."""
SCALE_FREE = ("sign-weight", "random-sign-weight", "f-weight", "f-activation")
"""Spaces whose weights do not depend on how long the target is."""


def weights(
    space: str, inner: Tensor, squares: Tensor | None, eps: float, mean: Callable[[Tensor], Tensor] = torch.mean
) -> Tensor:
    """The weight of each sample's guess U_n, from <G_n, U_n> and |U_n|^2 (None for unbiased scaling); all of shape (N,).

    Projections: ``<G,U> / (|U|^2 + eps)``; unbiased: ``<G,U>``; ``sign-``: the sign; ``f-``: N / kept for the kept. ``mean`` is
    the mean over the batch's samples.

    >>> inner, squares = torch.tensor([2.0, -1.0]), torch.tensor([4.0, 1.0])
    >>> weights("weight", inner, squares, 0.0), weights("sign-weight", inner, squares, 0.0)
    (tensor([ 0.5000, -1.0000]), tensor([ 1., -1.]))
    >>> weights("f-weight", inner, squares, 0.0)
    tensor([2., 0.])
    """
    if space.startswith("f-"):
        kept = (inner > 0).to(inner.dtype)
        return torch.where(kept > 0, 1 / mean(kept), kept)
    if space == "sign-weight":
        return inner.sign()
    if squares is None:
        return inner
    divisor = squares + eps
    return torch.where(divisor > 0, inner / divisor, 0)  # nothing lies along a guess that is zero


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
