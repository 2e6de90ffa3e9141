"""What all networks are made with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from onward.errors import UsageError

Shape = Sequence[int]
"""(C, H, W) of an image."""


def scaled(channels: int, width: float) -> int:
    """That many channels times the width, at least one.

    >>> scaled(64, 0.25), scaled(3, 0.1)
    (16, 1)
    """
    if not 0 < width <= 1e4:
        raise UsageError(f"--network.width {width}: use a positive number, at most 10000")
    return max(1, round(channels * width))


def chain(blocks: Sequence[nn.Module], output: nn.Module) -> nn.Sequential:
    """The network `block1`, `block2`, ..., `output`."""
    named = {f"block{number}": block for number, block in enumerate(blocks, start=1)}
    return nn.Sequential(OrderedDict(**named, output=output))
