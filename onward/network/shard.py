"""The part of a batch that one process sees.

Estimators say where they take means over samples (``shard.mean``). On one process that is the identity, so there is one code
path for one process and for several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from onward.derivatives.per_sample import PerSample
from onward.errors import UsageError
from onward.network.run import samples_of


class Shard:
    """The part of a batch that this process sees: the whole of it, unless :func:`distribute` has made it one of several."""

    first = 0
    """Index in the batch of this shard's first sample."""
    share = 1.0
    """Of the batch's samples."""

    @contextmanager
    def averaging(
        self, x: Any, estimator: nn.Module, *, sums_samples: bool, weight: Callable[[], float | None] | None = None
    ) -> Iterator[None]:
        """Around the estimate from one batch: what it adds to ``.grad`` is averaged over all shards.

        ``sums_samples``: whether it is a mean of what the shard's samples contribute. ``weight``: how much of the loss's mean
        is of this shard, where that is not its number of samples but, say, of labels that count.
        """
        if not samples_of(x):
            raise UsageError("a batch without a sample has no gradient: leave it out")
        yield

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Means over this shard's samples, made means over all samples."""
        return list(tensors)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all shards, in the order of the batch's samples."""
        return rows

    def gather_rows(self, gradients: PerSample, guesses: int) -> PerSample:
        """The samples of all shards: their targets' gradients and those of that many guesses."""
        return gradients

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of what every process has here."""
        return tensor
