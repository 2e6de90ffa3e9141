"""Random directions that can be drawn again: each a function of (seed, step, block, sample), of no generator's state.

A direction that can be redrawn need not be stored, a resumed run draws the same ones, and processes that share a seed agree
on them without a message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onward.errors import unknown

# Samples are drawn in groups of this many, each from its own seed: any shard of a batch can draw its own rows at little cost.
_GROUP = 16


def draw(
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    block: int | str,
    offset: int = 0,
    direction: int = 0,
    noise: str = "gaussian",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A random direction of unit second moment, ``E[u u^T] = I``.

    ``block`` is the index of a block, and then the first dimension of ``shape`` counts samples and row n is a function of
    (seed, step, block, direction, offset + n) alone; or the name of a parameter, and then the tensor is drawn as a whole.
    ``noise`` is ``"gaussian"``, N(0, 1), or ``"rademacher"``, +1 or -1. The same arguments give the same numbers on the same
    kind of device; global generators are neither read nor moved.

    >>> whole = draw((5, 3), seed=0, step=7, block=1)
    >>> torch.equal(whole[2:], draw((3, 3), seed=0, step=7, block=1, offset=2))
    True
    """
    if noise not in NOISES:
        raise unknown("noise", noise, NOISES)
    fill = NOISES[noise]
    key = (seed, step, block, direction)
    generator = torch.Generator(device=device)
    if isinstance(block, str):
        return fill(torch.empty(tuple(shape), dtype=dtype, device=device), generator.manual_seed(seed_of(*key)))
    samples, *rest = shape
    first, last = offset // _GROUP, -(-(offset + samples) // _GROUP)
    if samples == 0 or first == last:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    rows = torch.empty(((last - first) * _GROUP, *rest), dtype=dtype, device=device)
    for index, group in enumerate(rows.split(_GROUP), start=first):
        fill(group, generator.manual_seed(seed_of(*key, index)))
    start = offset - first * _GROUP
    return rows[start : start + samples]


def seed_of(*key: int | str) -> int:
    """A generator's seed out of what it is for: 64 well-mixed bits, the same on every machine.

    >>> seed_of(0, 7, "weight") == seed_of(0, 7, "weight") != seed_of(0, 8, "weight")
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def _gaussian(out: Tensor, generator: torch.Generator) -> Tensor:
    return out.normal_(generator=generator)


def _rademacher(out: Tensor, generator: torch.Generator) -> Tensor:
    """Eight signs out of each random byte, through a table: far cheaper than one random number per sign."""
    count = out.numel()
    words = torch.empty(-(-count // 64), dtype=torch.int64, device=out.device)
    words.random_(-(2**63), None, generator=generator)
    bits = torch.arange(256, device=out.device).unsqueeze(1) >> torch.arange(8, device=out.device)
    signs = (bits & 1).to(out.dtype).mul_(2).sub_(1)
    return out.copy_(signs[words.view(torch.uint8).int()].flatten()[:count].view(out.shape))


NOISES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"gaussian": _gaussian, "rademacher": _rademacher}
