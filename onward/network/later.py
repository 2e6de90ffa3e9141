"""Heads made of later blocks: copies of some of the blocks that follow, so that a block learns what these will need."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from onward.errors import UsageError

SHRINK = 0.5
"""Of the depth of the first head, how much is gone at the last one."""


def auglocal(model: nn.Module, cuts: Sequence[str], outputs: Sequence[Tensor], k: int, depth: int) -> nn.Module:
    """Copies of later blocks, evenly chosen among them, fewer for later cuts; the last is the network's output block.

    Head k (of K - 1, from 0) has ``d_k = floor((1 - 0.5 k / (K - 2)) depth + 0.5)`` copies, at least one, at most all later
    blocks: those of numbers ``round(k + (K - 1 - k) j / d_k)`` for j = 1 ... d_k. They start with the weights of the originals,
    and learn for themselves. Where a copy takes another shape than arrives, an average pool and a linear layer over the
    channels (a 1x1 convolution) stand before it. ``outputs`` are those of the blocks at the cuts.

    Ma, Wu, Zhang, Si, Yu and Tan, "Scaling Supervised Local Learning with Augmented Auxiliary Networks", 2024.

    Raises :class:`onward.UsageError` for a network that is no Sequential cut at its own children.
    """
    blocks = chain_of(model, cuts)
    layers: list[nn.Module] = []
    h = outputs[k]
    for block in later_blocks(k, len(blocks), depth):
        layers += _between(h, outputs[block - 1])
        layers.append(nn.Sequential(*(copy.deepcopy(model.get_submodule(name)) for name in blocks[block])))
        h = outputs[block] if block < len(outputs) else h
    return nn.Sequential(*layers)


def later_blocks(k: int, count: int, depth: int) -> list[int]:
    """The numbers of the blocks that head k copies, of a network of that many blocks.

    >>> later_blocks(0, 8, 4), later_blocks(3, 8, 4), later_blocks(6, 8, 4)
    ([2, 4, 5, 7], [4, 6, 7], [7])
    """
    shrunk = 1 - SHRINK * k / (count - 2) if count > 2 else 1.0
    copies = min(max(1, int(shrunk * depth + 0.5)), count - 1 - k)
    return [round(k + (count - 1 - k) * j / copies) for j in range(1, copies + 1)]


def chain_of(model: nn.Module, cuts: Sequence[str]) -> list[list[str]]:
    """The children of a Sequential in each block."""
    children = dict(model.named_children())
    inside = [name for name in cuts if name not in children]
    if type(model).forward is not nn.Sequential.forward or inside:
        where = f"cut {inside[0]!r} lies inside a child" if inside else f"{type(model).__name__} is not a Sequential"
        raise UsageError(
            f"{where}, and only a Sequential that is cut at its own children says what its later blocks are: use another kind "
            "of head"
        )
    blocks: list[list[str]] = [[]]
    for name in children:
        blocks[-1].append(name)
        if name in cuts:
            blocks.append([])
    return blocks


def _between(h: Tensor, wanted: Tensor) -> list[nn.Module]:
    """What makes outputs like ``h`` inputs of the shape of ``wanted``."""
    if h.shape[1:] == wanted.shape[1:]:
        return []
    layers: list[nn.Module] = []
    if h.dim() == 4:
        if wanted.dim() == 4 and h.shape[2:] != wanted.shape[2:]:
            layers.append(nn.AdaptiveAvgPool2d((wanted.shape[2], wanted.shape[3])))
        if wanted.dim() == 4:
            channels = h.shape[1] != wanted.shape[1]
            return [*layers, nn.Conv2d(h.shape[1], wanted.shape[1], 1, bias=False)] if channels else layers
        if wanted.dim() == 2:
            return [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * h.shape[1], wanted.shape[1])]
    if h.dim() == wanted.dim() and h.shape[1:-1] == wanted.shape[1:-1]:
        return [nn.Linear(h.shape[-1], wanted.shape[-1])]
    raise UsageError(
        f"an output of shape {tuple(h.shape)} cannot be made one of shape {tuple(wanted.shape)}, which a later block takes: "
        "use another kind of head"
    )
