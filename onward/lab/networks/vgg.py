"""The VGG-like networks of local error signals."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from onward.errors import UsageError
from onward.lab.networks.blocks import Shape, chain, dropped, network, rectifier, scaled

POOL = 0
"""In a list of widths: a 2x2 max-pool."""
HIDDEN = 1024
"""Features of the fully connected layer, whatever the width of the convolutions."""


@network("vgg8b")
def vgg8b(shape: Shape, classes: int, *, width: float = 1.0, dropout: float = 0.0, leaky: bool = False) -> nn.Sequential:
    """Six 3x3 convolutions of 128 to 512 maps and a linear layer of 1024, each with batch norm and ReLU; cut after each ReLU.

    `width` multiplies the convolutions' maps. `dropout` follows every ReLU, in the next block: a head sees what it leaves.

    Source: Nokland & Eidnes 2019, VGG8B.

    >>> len(vgg8b((3, 32, 32), 10, width=0.1))
    8
    """
    return _vgg("vgg8b", [128, 256, POOL, 256, 512, POOL, 512, POOL, 512, POOL], shape, classes, width, dropout, leaky)


@network("vgg11b")
def vgg11b(shape: Shape, classes: int, *, width: float = 1.0, dropout: float = 0.0, leaky: bool = False) -> nn.Sequential:
    """vgg8b with three more convolutions: two of 128 maps at the beginning, one of 512 in the middle.

    Source: Nokland & Eidnes 2019, VGG11B.

    >>> len(vgg11b((3, 32, 32), 10, width=0.1))
    11
    """
    layers = [128, 128, 128, 256, POOL, 256, 512, POOL, 512, 512, POOL, 512, POOL]
    return _vgg("vgg11b", layers, shape, classes, width, dropout, leaky)


def _vgg(
    name: str, layers: Sequence[int], shape: Shape, classes: int, width: float, dropout: float, leaky: bool
) -> nn.Sequential:
    before, *size = shape
    large = min(size) > 64  # such images are halved by the first convolution
    if min(size) < 16:
        raise UsageError(f"{name} on {size[0]}x{size[1]} images: it needs 16x16, enlarge them with --transform.size 32")
    blocks: list[nn.Module] = []
    first: list[nn.Module] = []  # of the next block
    for maps in layers:
        if maps == POOL:
            first.append(nn.MaxPool2d(2))
            size = [edge // 2 for edge in size]
            continue
        after = scaled(maps, width)
        convolution = nn.Conv2d(before, after, 3, padding=1)
        if large and not blocks:
            convolution = nn.Conv2d(before, after, 7, stride=2, padding=3)
            size = [(edge + 1) // 2 for edge in size]
        blocks.append(nn.Sequential(*first, convolution, nn.BatchNorm2d(after), rectifier(leaky)))
        before, first = after, dropped(dropout)
    features = before * size[0] * size[1]
    blocks.append(nn.Sequential(*first, nn.Flatten(), nn.Linear(features, HIDDEN), nn.BatchNorm1d(HIDDEN), rectifier(leaky)))
    output = nn.Linear(HIDDEN, classes)
    return chain(blocks, nn.Sequential(*dropped(dropout), output) if dropout else output)
