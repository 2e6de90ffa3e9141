"""Positions: a sample's tokens or pixels, each with features of its own, and how one matrix serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.network.labels import cross_entropy
from onward.network.padding import without_padding

LAST, FIRST = -1, 1
"""Which dimension has the features: of N x T x d the last, of N x d x H x W the first after the samples'."""
_OF_CLASSES = (F.cross_entropy, F.nll_loss, cross_entropy)


def positions_of(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """The dimensions that are positions: all but that of the samples, and that of the features.

    >>> positions_of((2, 5, 8), LAST), positions_of((2, 3, 6, 7), FIRST), positions_of((2, 3), LAST)
    ((5,), (6, 7), ())
    """
    return tuple(shape[1:-1] if axis == LAST else shape[2:])


def by_position(t: Tensor, axis: int) -> Tensor:
    """t as N x positions x features."""
    return t.flatten(1, -2) if axis == LAST else t.flatten(2).transpose(1, 2)


def feature_axis(shapes: Sequence[Sequence[int]], y: Any, loss: Callable[..., Any]) -> int:
    """Which dimension of a network's output has the features, as the targets say, or the loss; else by the usual layouts.

    Class numbers have the output's shape without it. PyTorch's own cross entropy has the classes first. Else they are last in
    N x T x V, and first in maps (N x C x H x W).

    >>> feature_axis([(2, 5, 8)], torch.zeros(2, 5, dtype=torch.int64), loss=lambda z, y: None)
    -1
    >>> feature_axis([(2, 8, 5)], None, loss=F.cross_entropy)
    1
    """
    shape = next((tuple(shape) for shape in shapes if len(shape) > 2), ())
    if not shape:
        return LAST
    y = y.get("labels") if isinstance(y, Mapping) else y
    if isinstance(y, Tensor) and not y.is_floating_point():
        first, last = y.shape == (shape[0], *shape[2:]), y.shape == shape[:-1]
        if first != last:
            return FIRST if first else LAST
    while isinstance(loss, partial):
        loss = loss.func
    if loss in _OF_CLASSES or isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)):
        return FIRST
    return LAST if len(shape) == 3 else FIRST


class Outputs(NamedTuple):
    """The shapes of those tensors of a network's output that its loss depends on, and which dimension has their features."""

    shapes: tuple[tuple[int, ...], ...]
    axis: int = LAST

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions that all of them have; () where they have none, or not the same."""
        found = {positions_of(shape, self.axis) if len(shape) > 2 else () for shape in self.shapes}
        return found.pop() if len(found) == 1 else ()

    @property
    def features(self) -> int:
        """How many features they have together, at each position."""
        return sum(shape[self.axis] for shape in self.shapes)

    @property
    def numbers(self) -> int:
        """How many numbers they have together, in each sample."""
        return sum(prod(shape[1:]) for shape in self.shapes)

    def split(self, rows: Tensor) -> Tensor:
        """N x P x V of rows that have the outputs side by side, one for each sample."""
        parts = rows.split([prod(shape[1:]) for shape in self.shapes], 1)
        laid = [
            by_position(part.view(len(rows), *shape[1:]), self.axis) for part, shape in zip(parts, self.shapes, strict=True)
        ]
        return laid[0] if len(laid) == 1 else torch.cat(laid, 2)

    def joined(self, laid: Tensor) -> Tensor:
        """What :meth:`split` has divided, as rows again."""
        parts = laid.split([shape[self.axis] for shape in self.shapes], 2)
        return torch.cat([(part if self.axis == LAST else part.transpose(1, 2)).flatten(1) for part in parts], 1)


class Layout(NamedTuple):
    """How one matrix B (V x d) leads from the network's outputs to the output h of a block: M rows of each, side by side.

    ======================  ======================  ==========================================  ==========================
    what has positions      rows of the outputs     of h                                        B
    ======================  ======================  ==========================================  ==========================
    nothing, or not asked   N, all outputs (V = C)  N, all features                             one over all positions
    outputs and h (tokens)  N P, of one position    N P, of one position                        shared by the positions
    h alone (``pooled``)    N, all outputs (V = C)  N, features of one position, summed over P  shared by the positions
    ======================  ======================  ==========================================  ==========================
    """

    outputs: Outputs
    shape: tuple[int, ...]
    """Of h."""
    axis: int | None = None
    """The dimension of h that has the features; None where all its numbers are features."""
    pooled: bool = False
    real: Tensor | None = None
    """N x T: which positions of h are no padding, where a batch says so."""

    @property
    def tokens(self) -> bool:
        """Whether rows are positions."""
        return self.axis is not None and not self.pooled

    @property
    def size(self) -> tuple[int, int]:
        """V x d, of the matrix."""
        if self.axis is None:
            return self.outputs.numbers, prod(self.shape[1:])
        return self.outputs.numbers if self.pooled else self.outputs.features, self.shape[self.axis]

    def rows(self, rows: Tensor) -> Tensor:
        """M x V, of rows of all outputs (N x C)."""
        return self.outputs.split(rows).flatten(0, 1) if self.tokens else rows

    def columns(self, h: Tensor) -> Tensor:
        """M x d, of what has the shape of h; padding is zero."""
        h = self._without_padding(h)
        if self.axis is None:
            return h.flatten(1)
        laid = by_position(h, self.axis)
        return laid.sum(1) if self.pooled else laid.flatten(0, 1)

    def spread(self, signal: Tensor) -> Tensor:
        """What has the shape of h, of M x d: where pooled, an equal part of a row for each position; zero at padding."""
        if self.axis is None:
            return self._without_padding(signal.view(self.shape))
        positions = positions_of(self.shape, self.axis)
        if self.pooled:
            signal = (signal / self.places()).unsqueeze(1).expand(-1, prod(positions), -1)
        laid = signal.reshape(self.shape[0], prod(positions), -1)
        return self._without_padding((laid if self.axis == LAST else laid.transpose(1, 2)).reshape(self.shape).contiguous())

    def places(self) -> float | Tensor:
        """How many positions of h belong to a row: one number, or N x 1."""
        if not self.pooled:
            return 1
        if self._masked:
            assert self.real is not None
            return self.real.sum(1, keepdim=True).clamp(min=1)
        assert self.axis is not None
        return prod(positions_of(self.shape, self.axis))

    @property
    def _masked(self) -> bool:
        return self.real is not None and self.axis != FIRST and len(self.shape) > 2 and self.shape[:2] == self.real.shape

    def _without_padding(self, h: Tensor) -> Tensor:
        return without_padding(h, self.real) if self._masked else h
