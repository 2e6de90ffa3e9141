"""LocalMixer: a mixer of patches, made for losses of groups of channels in patches."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from onward.errors import UsageError
from onward.lab.networks.blocks import Shape, chain, network, scaled

PATCHES = 4
"""Along each side of an image."""
GROUPS = 16
"""Of channels, in every second linear layer."""


@network("local-mixer")
def local_mixer(shape: Shape, classes: int, *, width: float = 1.0, layers: int = 2) -> nn.Sequential:
    """A mixer of 4x4 patches, 256 channels in 16 groups: linear layers over patches, channels and groups; cut after each block.

    A block's output is (N, 16 patches, channels). `--heads.kind pieces --heads.groups 16 --heads.patches 16` gives it a loss
    for each group in each patch. Layer norm without parameters stands before and after every linear layer.

    Source: Ren, Kornblith, Liao & Hinton 2023, LocalMixer, whose larger ones have more of everything.

    >>> list(dict(local_mixer((3, 32, 32), 10, width=0.25, layers=2).named_children()))
    ['block1', 'block2', 'output']
    """
    if layers < 1:
        raise UsageError(f"local-mixer with {layers} blocks: use at least 1")
    if any(side % PATCHES for side in shape[1:]):
        raise UsageError(f"local-mixer on {shape[1]}x{shape[2]} images: sides have to be multiples of {PATCHES}")
    channels = GROUPS * max(1, round(scaled(256, width) / GROUPS))
    size = shape[0] * (shape[1] // PATCHES) * (shape[2] // PATCHES)
    first = nn.Sequential(Patches(), Normed(nn.Linear(size, channels)), Grouped(channels), nn.ReLU())
    blocks = [first, *(Mixer(channels) for _ in range(layers - 1))]
    return chain(blocks, nn.Sequential(Mean(), Norm(), nn.Linear(channels, classes)))


class Patches(nn.Module):
    """An image as its patches, (N, patches, numbers in each)."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        cut = x.view(n, c, PATCHES, h // PATCHES, PATCHES, w // PATCHES)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, PATCHES * PATCHES, -1)


class Norm(nn.Module):
    """Layer norm over the last dimension, without parameters."""

    def forward(self, h: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:])


class Normed(nn.Sequential):
    """A linear layer between two norms, then ReLU."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(Norm(), layer, Norm(), nn.ReLU())


class Grouped(nn.Module):
    """A linear layer for each group of channels, between two norms of the groups."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.linear = Norm(), nn.Conv1d(channels, channels, 1, groups=GROUPS)

    def forward(self, h: Tensor) -> Tensor:
        grouped = self.norm(h.unflatten(2, (GROUPS, -1))).flatten(2)
        mixed = self.linear(grouped.transpose(1, 2)).transpose(1, 2)
        return self.norm(mixed.unflatten(2, (GROUPS, -1))).flatten(2)


class Mixer(nn.Module):
    """Linear layers over patches, over channels, and over the channels of each group; then the input is added, and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm()
        self.patches = nn.Linear(PATCHES * PATCHES, PATCHES * PATCHES)
        self.channels = Normed(nn.Linear(channels, channels))
        self.groups = Grouped(channels)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.norm(self.patches(self.norm(x).transpose(1, 2))).relu().transpose(1, 2)
        return (x + self.groups(self.channels(mixed))).relu()


class Mean(nn.Module):
    """The mean over patches."""

    def forward(self, h: Tensor) -> Tensor:
        return h.mean(1)
