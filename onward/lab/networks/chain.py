"""A chain of equal blocks."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from onward.errors import UsageError
from onward.lab.networks.blocks import Shape, chain, network, scaled


@network("chain")
def conv_chain(shape: Shape, classes: int, *, width: float = 1.0, layers: int = 2) -> nn.Sequential:
    """Equal blocks of a 3x3 convolution, batch norm and ReLU, 16 wide, then an average pool: for what depth costs.

    >>> list(dict(conv_chain((3, 8, 8), 10, layers=3).named_children()))
    ['block1', 'block2', 'block3', 'output']
    """
    if layers < 1:
        raise UsageError(f"chain of {layers} blocks: use at least 1")
    hidden = scaled(16, width)
    sizes = [shape[0]] + [hidden] * layers
    blocks = [
        nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())
        for before, after in pairwise(sizes)
    ]
    return chain(blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, classes)))
