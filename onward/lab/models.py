"""Networks, as chains of blocks.

Every network is an `nn.Sequential` of named blocks, `block1` ... and `output`, so that the library's default cuts (every child
but the last) are the block boundaries that the papers use. Initial weights are PyTorch's own, but those of `resnets`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from itertools import pairwise

from torch import nn

from onward.errors import UsageError, unknown
from onward.lab.blocks import Shape, chain, scaled
from onward.lab.config import Network
from onward.lab.resnets import initialize, resnet18_2b, resnet18_8b, resnet18_16b, small_net


def mlp(shape: Shape, classes: int, *, width: float = 1.0, layers: int = 2) -> nn.Sequential:
    """Linear layers with batch norm and ReLU: 800 wide for grey images, 1000 for colour; cut after each ReLU.

    Source: Bacho & Chu 2024, the fully connected networks.

    >>> list(dict(mlp((1, 28, 28), 10).named_children()))
    ['block1', 'block2', 'output']
    """
    if layers < 1:
        raise UsageError(f"mlp with {layers} hidden layers: use at least 1")
    channels, height, wide = shape
    hidden = scaled(1000 if channels == 3 else 800, width)
    sizes = [channels * height * wide] + [hidden] * layers
    blocks = [nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()) for before, after in pairwise(sizes)]
    blocks[0].insert(0, nn.Flatten())
    return chain(blocks, nn.Linear(hidden, classes))


def cnn(shape: Shape, classes: int, *, width: float = 1.0, pool_first: bool = False) -> nn.Sequential:
    """Two 5x5 convolutions, a max-pool, one linear layer, each with batch norm and ReLU; cut after each ReLU.

    `pool_first` also pools after the first convolution: 15C5-P2-40C5-P2-128, as the FDFA paper's README writes it (its code
    does not).

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
    return chain(
        [
            nn.Sequential(nn.Conv2d(channels, first, 5), nn.BatchNorm2d(first), nn.ReLU()),
            nn.Sequential(*([nn.MaxPool2d(2)] * pool_first), nn.Conv2d(first, second, 5), nn.BatchNorm2d(second), nn.ReLU()),
            nn.Sequential(
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(second * size[0] * size[1], hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
            ),
        ],
        nn.Linear(hidden, classes),
    )


def alexnet(shape: Shape, classes: int, *, width: float = 1.0) -> nn.Sequential:
    """AlexNet with batch norm and without dropout, for 224x224 images.

    Convolutions 1 and 2 are cut after their pool, 3 and 4 after ReLU, 5 once flattened, the linear layers after ReLU.

    Source: Bacho & Chu 2024, the network for CIFAR-100.

    >>> len(alexnet((3, 224, 224), 100, width=0.1))
    8
    """
    channels, *size = shape
    if min(size) < 63:
        raise UsageError(f"alexnet on {size[0]}x{size[1]} images: it needs 63x63, enlarge them with --transform.size 224")
    a, b, c, d, e = (scaled(n, width) for n in (64, 192, 384, 256, 256))
    hidden = scaled(4096, width)

    def convolution(before: int, after: int, kernel: int, stride: int = 1, padding: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(before, after, kernel, stride, padding), nn.BatchNorm2d(after), nn.ReLU()]

    return chain(
        [
            nn.Sequential(*convolution(channels, a, 11, 4, 2), nn.MaxPool2d(3, 2)),
            nn.Sequential(*convolution(a, b, 5, padding=2), nn.MaxPool2d(3, 2)),
            nn.Sequential(*convolution(b, c, 3)),
            nn.Sequential(*convolution(c, d, 3)),
            nn.Sequential(*convolution(d, e, 3), nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(6), nn.Flatten()),
            nn.Sequential(nn.Linear(e * 36, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
            nn.Sequential(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
        ],
        nn.Linear(hidden, classes),
    )


MODELS: dict[str, Callable[..., nn.Sequential]] = {
    "mlp": mlp,
    "cnn": cnn,
    "alexnet": alexnet,
    "resnet18-8b": resnet18_8b,
    "resnet18-16b": resnet18_16b,
    "resnet18-2b": resnet18_2b,
    "small-net": small_net,
}
IMAGE_SIZE = {"alexnet": 224}
"""Side that images are resized to for a network when nothing else is asked for."""
INITIALIZE = dict.fromkeys(("resnet18-8b", "resnet18-16b", "resnet18-2b", "small-net"), initialize)
"""How the heads of a network start, where not as PyTorch's modules do."""
HEADS_BEHIND = {"resnet18-2b": {"block1": "output.block2"}}
"""Of a network, cuts whose head starts with a copy of another block."""


def check(name: str) -> None:
    """Raise a UsageError if there is no network of that name."""
    if name not in MODELS:
        raise unknown("model", name, MODELS)


def build(name: str, shape: Shape, classes: int, options: Network) -> nn.Sequential:
    """The network of that name for images of `shape` (C, H, W).

    Raises:
        UsageError: an unknown name, an option that this network does not have, images too small for it.

    >>> build("mlp", (1, 8, 8), 10, Network(layers=3)).output
    Linear(in_features=800, out_features=10, bias=True)
    """
    check(name)
    given = {
        entry.name: getattr(options, entry.name)
        for entry in dataclasses.fields(options)
        if getattr(options, entry.name) != entry.default
    }
    for option in given.keys() - inspect.signature(MODELS[name]).parameters.keys():
        raise UsageError(f"--network.{option.replace('_', '-')} {given[option]}: {name} has no such option, leave it out")
    return MODELS[name](shape, classes, **given)
