"""Convolutional networks: the shallow one of the papers, and a chain of equal blocks."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from onward.errors import UsageError
from onward.lab.networks.blocks import Shape, chain, network, scaled


@network("cnn")
def cnn(shape: Shape, classes: int, *, width: float = 1.0, pool_first: bool = False) -> nn.Sequential:
    """Two 5x5 convolutions, a max-pool, one linear layer, each with batch norm and ReLU; cut after each ReLU.

    `pool_first` also pools after the first convolution: 15C5-P2-40C5-P2-128, as the FDFA paper's README (not its code) has it.

    Source: Bacho & Chu 2024, the shallow convolutional network.

    >>> cnn((3, 32, 32), 10).block3[2].in_features
    5760
    """
    channels, *size = shape
    least = 16 if pool_first else 10
    if min(size) < least:
        raise UsageError(f"cnn on {size[0]}x{size[1]} images: it needs {least}x{least}, enlarge them with --transform.size 28")
    first, second, hidden = scaled(15, width), scaled(40, width), scaled(128, width)
    size = [edge - 4 for edge in size]
    if pool_first:
        size = [edge // 2 for edge in size]
    size = [(edge - 4) // 2 for edge in size]
    features = second * size[0] * size[1]
    blocks = [
        nn.Sequential(nn.Conv2d(channels, first, 5), nn.BatchNorm2d(first), nn.ReLU()),
        nn.Sequential(*([nn.MaxPool2d(2)] * pool_first), nn.Conv2d(first, second, 5), nn.BatchNorm2d(second), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
    ]
    return chain(blocks, nn.Linear(hidden, classes))


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
