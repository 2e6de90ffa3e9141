"""Fully connected networks."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from torch import nn

from onward.errors import UsageError
from onward.lab.networks.blocks import Shape, chain, dropped, network, rectifier, scaled


@network("mlp", inputs=(1, 28, 28), images=False)
def mlp(
    shape: Shape, classes: int, *, width: float = 1.0, layers: int = 2, dropout: float = 0.0, leaky: bool = False
) -> nn.Sequential:
    """Linear layers with batch norm and ReLU: 800 wide for grey images, 1000 for colour; cut after each ReLU.

    It takes inputs of any shape, flattened. `dropout` follows every ReLU, in the next block: a head sees what it leaves.

    Source: Bacho & Chu 2024, the fully connected networks.

    >>> list(dict(mlp((1, 28, 28), 10).named_children()))
    ['block1', 'block2', 'output']
    """
    if layers < 1:
        raise UsageError(f"mlp with {layers} hidden layers: use at least 1")
    hidden = scaled(1000 if len(shape) == 3 and shape[0] == 3 else 800, width)
    sizes = [prod(shape)] + [hidden] * layers
    blocks = [
        nn.Sequential(*(dropped(dropout) if number else []), nn.Linear(before, after), nn.BatchNorm1d(after), rectifier(leaky))
        for number, (before, after) in enumerate(pairwise(sizes))
    ]
    blocks[0].insert(0, nn.Flatten())
    output = nn.Linear(hidden, classes)
    return chain(blocks, nn.Sequential(*dropped(dropout), output) if dropout else output)
