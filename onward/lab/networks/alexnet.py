"""AlexNet."""

from __future__ import annotations

from torch import nn

from onward.errors import UsageError
from onward.lab.networks.blocks import Shape, chain, network, scaled


@network("alexnet", inputs=(3, 224, 224), image_size=224)
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

    blocks = [
        nn.Sequential(*convolution(channels, a, 11, 4, 2), nn.MaxPool2d(3, 2)),
        nn.Sequential(*convolution(a, b, 5, padding=2), nn.MaxPool2d(3, 2)),
        nn.Sequential(*convolution(b, c, 3)),
        nn.Sequential(*convolution(c, d, 3)),
        nn.Sequential(*convolution(d, e, 3), nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(6), nn.Flatten()),
        nn.Sequential(nn.Linear(e * 36, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
        nn.Sequential(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
    ]
    return chain(blocks, nn.Linear(hidden, classes))
