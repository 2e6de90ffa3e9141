"""LeNet-5."""

from __future__ import annotations

from torch import nn

from onward.errors import UsageError
from onward.lab.networks.blocks import Shape, chain, network, scaled


@network("lenet", inputs=(1, 32, 32), image_size=32)
def lenet(shape: Shape, classes: int, *, width: float = 1.0) -> nn.Sequential:
    """LeNet-5 with ReLU and max-pools, without batch norm, for 32x32 images; cut after each ReLU.

    Source: LeCun, Bottou, Bengio, Haffner 1998; ReLU and max-pools as biotorch has them.

    >>> sum(p.numel() for p in lenet((1, 32, 32), 10).parameters())
    61706
    """
    channels, *size = shape
    if min(size) < 16:
        raise UsageError(f"lenet on {size[0]}x{size[1]} images: it needs 16x16, enlarge them with --transform.size 32")
    a, b, c, d = (scaled(n, width) for n in (6, 16, 120, 84))
    for _ in range(2):
        size = [(edge - 4) // 2 for edge in size]
    blocks = [
        nn.Sequential(nn.Conv2d(channels, a, 5), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(a, b, 5), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(b * size[0] * size[1], c), nn.ReLU()),
        nn.Sequential(nn.Linear(c, d), nn.ReLU()),
    ]
    return chain(blocks, nn.Linear(d, classes))
