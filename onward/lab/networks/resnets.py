"""ResNet-18 and its relatives, cut into blocks as Fournier et al. cut them.

Every network is an `nn.Sequential` of `block1`, `block2`, ... and `output`: the last block, and with it the last head (batch
norm, global average, linear layer; of resnet18-2b a chosen kind of head). Weights start Kaiming uniform, biases at 0.01.

Source: Fournier et al., "Can Forward Gradient Match Backpropagation?", ICML 2023.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from onward.errors import unknown
from onward.lab.networks.blocks import Shape, chain, network, scaled

DOWNSAMPLING = ("conv", "avg-pool")
STEM_SIZE = 32  # side of the largest images that keep their size in the stem


class Residual(nn.Module):
    """Two 3x3 convolutions, each with batch norm, around which the input is carried (ResNet's basic block).

    With `stride`, or another number of channels, the shortcut around them is a 1x1 convolution with batch norm, which
    `downsample` strides ("conv") or precedes with an average pool ("avg-pool").
    """

    def __init__(self, before: int, after: int, stride: int = 1, downsample: str = "conv") -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(before, after, stride), nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        )
        self.shortcut = nn.Sequential()
        if stride > 1 and downsample == "avg-pool":
            self.shortcut.append(nn.AvgPool2d(stride, ceil_mode=True))
        if stride > 1 or before != after:
            step = 1 if len(self.shortcut) else stride
            self.shortcut.append(nn.Conv2d(before, after, 1, step, bias=False)).append(nn.BatchNorm2d(after))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def initialize(module: nn.Module) -> None:
    """Draw the weights of linear layers and convolutions as the paper's code does: Kaiming uniform, biases 0.01."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, 0.01)


@network("resnet18-8b", initialize=initialize)
def resnet18_8b(shape: Shape, classes: int, *, width: float = 1.0, downsample: str = "conv") -> nn.Sequential:
    """ResNet-18 in 8 blocks, one residual block each; the stem is in the first, the last ends in the classifier.

    >>> list(dict(resnet18_8b((3, 32, 32), 10, width=0.1).named_children()))[-2:]
    ['block7', 'output']
    """
    return _resnet(shape, classes, [64, 64, 128, 128, 256, 256, 512, 512], 1, width, downsample)


@network("resnet18-2b", initialize=initialize, heads_behind={"block1": "output.block2"}, ends_in_head="block2")
def resnet18_2b(shape: Shape, classes: int, *, width: float = 1.0, downsample: str = "conv") -> nn.Sequential:
    """The first half of ResNet-18 in 2 blocks of two residual blocks each, the stem in the first."""
    return _resnet(shape, classes, [64, 128], 2, width, downsample)


@network("resnet18-16b", initialize=initialize)
def resnet18_16b(shape: Shape, classes: int, *, width: float = 1.0) -> nn.Sequential:
    """ResNet-18 without its skip connections, in 16 blocks of one convolution (the first: two, or the stem of larger images).

    >>> list(dict(resnet18_16b((3, 32, 32), 10, width=0.1).named_children()))[-2:]
    ['block15', 'output']
    """
    widths = [scaled(channels, width) for channels in (64, 128, 256, 512) for _ in range(4)]
    small = max(shape[1:]) <= STEM_SIZE
    blocks = [nn.Sequential(*_stem(shape, widths[0]), *(_convolution(widths[0], widths[0]) if small else []))]
    for number, (before, after) in enumerate(pairwise(widths), start=2):
        blocks.append(nn.Sequential(*_convolution(before, after, stride=2 if number in (5, 9, 13) else 1)))
    return _with_classifier(blocks, widths[-1], classes)


@network("small-net", initialize=initialize)
def small_net(shape: Shape, classes: int, *, width: float = 1.0, downsample: str = "conv") -> nn.Sequential:
    """Six convolutions in 6 blocks, at the images' full size; `avg-pool` halves it before the third and the fifth."""
    _check_downsampling(downsample)
    channels = [shape[0], *(scaled(n, width) for n in (64, 64, 128, 128, 256, 256))]
    blocks = [nn.Sequential(*_convolution(before, after)) for before, after in pairwise(channels)]
    if downsample == "avg-pool":
        for number in (3, 5):
            blocks[number - 1].insert(0, nn.AvgPool2d(2, ceil_mode=True))
    return _with_classifier(blocks, channels[-1], classes)


def _resnet(shape: Shape, classes: int, widths: Sequence[int], depth: int, width: float, downsample: str) -> nn.Sequential:
    """For each width a block of `depth` residual blocks; a block wider than the one before halves the image."""
    _check_downsampling(downsample)
    before = scaled(widths[0], width)
    blocks: list[nn.Sequential] = []
    for previous, channels in pairwise([widths[0], *widths]):
        after, stride = scaled(channels, width), 2 if channels > previous else 1
        residuals = [Residual(before, after, stride, downsample)] + [Residual(after, after) for _ in range(depth - 1)]
        blocks.append(nn.Sequential(*residuals))
        before = after
    blocks[0] = nn.Sequential(*_stem(shape, scaled(widths[0], width)), *blocks[0])
    return _with_classifier(blocks, before, classes)


def _stem(shape: Shape, channels: int) -> list[nn.Module]:
    if max(shape[1:]) <= STEM_SIZE:
        return _convolution(shape[0], channels)
    first = nn.Conv2d(shape[0], channels, 7, stride=2, padding=3, bias=False)
    return [first, nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]


def _convolution(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


def _with_classifier(blocks: list[nn.Sequential], channels: int, classes: int) -> nn.Sequential:
    """The network: the last block and the classifier are its output block."""
    last = OrderedDict({f"block{len(blocks)}": blocks[-1], "norm": nn.BatchNorm2d(channels), "pool": nn.AdaptiveAvgPool2d(1)})
    last |= {"flatten": nn.Flatten(), "linear": nn.Linear(channels, classes)}
    model = chain(blocks[:-1], nn.Sequential(last))
    initialize(model)
    return model


def _check_downsampling(name: str) -> None:
    if name not in DOWNSAMPLING:
        raise unknown("downsampling", name, DOWNSAMPLING)
