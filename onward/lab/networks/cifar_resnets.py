"""The residual networks for CIFAR: three stages of 16, 32 and 64 maps, without weights in their shortcuts."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from onward.lab.networks.blocks import Shape, chain, network, scaled


class Shortcut(nn.Module):
    """Every second pixel, with maps of zeros around the given ones: what goes around a block that halves the image.

    >>> import torch
    >>> Shortcut(2, 4)(torch.ones(1, 2, 4, 4)).sum((0, 2, 3))
    tensor([0., 4., 4., 0.])
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.below = (after - before) // 2
        self.above = after - before - self.below

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.below, self.above))


class Basic(nn.Module):
    """Two 3x3 convolutions, each with batch norm, around which the input is carried; the first may halve the image."""

    def __init__(self, before: int, after: int, *, halves: bool) -> None:
        super().__init__()
        first = nn.Conv2d(before, after, 3, stride=2 if halves else 1, padding=1, bias=False)
        second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.body = nn.Sequential(first, nn.BatchNorm2d(after), nn.ReLU(), second, nn.BatchNorm2d(after))
        self.shortcut = Shortcut(before, after) if halves else nn.Sequential()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def initialize(module: nn.Module) -> None:
    """Draw the weights of convolutions and linear layers from Kaiming's normal distribution, as the paper does."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight)


@network("resnet20", initialize=initialize)
def resnet20(shape: Shape, classes: int, *, width: float = 1.0) -> nn.Sequential:
    """ResNet-20 for CIFAR in 9 blocks, one residual block each; the stem is in the first, the last ends in the classifier.

    Source: He, Zhang, Ren, Sun 2016, section 4.2, with their shortcuts without weights (option A).

    >>> list(dict(resnet20((3, 32, 32), 10).named_children()))[-2:]
    ['block8', 'output']
    """
    return _resnet(3, shape, classes, width)


@network("resnet56", initialize=initialize)
def resnet56(shape: Shape, classes: int, *, width: float = 1.0) -> nn.Sequential:
    """ResNet-56 for CIFAR: as resnet20, in 27 blocks."""
    return _resnet(9, shape, classes, width)


def _resnet(depth: int, shape: Shape, classes: int, width: float) -> nn.Sequential:
    """Three stages of so many residual blocks; the second and the third begin by halving the image."""
    before = scaled(16, width)
    stem = [nn.Conv2d(shape[0], before, 3, padding=1, bias=False), nn.BatchNorm2d(before), nn.ReLU()]
    blocks: list[nn.Module] = []
    for maps in (16, 32, 64):
        for number in range(depth):
            after = scaled(maps, width)
            blocks.append(Basic(before, after, halves=maps > 16 and number == 0))
            before = after
    blocks[0] = nn.Sequential(*stem, blocks[0])
    last = OrderedDict({f"block{len(blocks)}": blocks[-1], "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()})
    last["linear"] = nn.Linear(before, classes)
    model = chain(blocks[:-1], nn.Sequential(last))
    initialize(model)
    return model
