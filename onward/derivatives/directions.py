"""Random directions that can be drawn again: each a function of (seed, step, block, sample), of no generator's state.

A direction that can be redrawn need not be stored, a resumed run draws the same ones, and processes that share a seed agree
on them without a message.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from onward.errors import unknown
from onward.phases import during, phase

# A direction is drawn in pieces, each from a seed of its own: a shard of a batch can draw its own samples, and pieces can be
# drawn side by side (a generator is serial, and on a processor it would cost as much as a convolution).
_SAMPLES = 16  # samples in a piece
_NUMBERS = 1 << 17  # numbers in a piece of a parameter's direction, and the least worth a thread
_threads = ThreadPoolExecutor(thread_name_prefix="onward-directions")


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
    # Random numbers have no tangent: nobody has to follow how they are made.
    with phase("tangent"), torch._C._DisableTorchDispatch():
        if offset == 0 and not isinstance(block, str) and shape[0] <= _SAMPLES:
            rows = torch.empty((_SAMPLES, *shape[1:]), dtype=dtype, device=device)
            return NOISES[noise](rows, _seeded(device, seed_of(seed, step, block, direction, 0)))[: shape[0]]
        return _drawn(shape, (seed, step, block, direction), block, offset, NOISES[noise], dtype, device)


def _drawn(
    shape: Sequence[int],
    key: tuple[int | str, ...],
    block: int | str,
    offset: int,
    fill: Callable[[Tensor, torch.Generator], Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    if isinstance(block, str):
        out = torch.empty(tuple(shape), dtype=dtype, device=device)
        pieces, first = out.view(-1).split(_NUMBERS), 0
    else:
        first, last = offset // _SAMPLES, -(-(offset + shape[0]) // _SAMPLES)
        rows = torch.empty(((last - first) * _SAMPLES, *shape[1:]), dtype=dtype, device=device)
        start = offset - first * _SAMPLES
        out, pieces = rows[start : start + shape[0]], rows.split(_SAMPLES)

    def fill_piece(index: int, piece: Tensor) -> None:
        fill(piece, _seeded(device, seed_of(*key, index)))

    _each(fill_piece, enumerate(pieces, start=first), out)
    return out


def _each(work: Callable[[int, Tensor], None], numbered: Iterable[tuple[int, Tensor]], whole: Tensor) -> None:
    """Do the work on every piece of a tensor, side by side where that pays."""
    if whole.numel() > _NUMBERS and whole.device.type == "cpu" and torch.get_num_threads() > 1:
        list(_threads.map(lambda job: work(*job), numbered))
    else:
        for job in numbered:
            work(*job)


@during("tangent")
def shift(
    tensor: Tensor,
    *scales: float,
    seed: int,
    step: int,
    block: str,
    direction: int = 0,
    noise: str = "gaussian",
    without: int | None = None,
) -> None:
    """Add a parameter's direction to a tensor of its shape, in place, times each of the ``scales`` one after the other.

    The numbers are those of :func:`draw`, in pieces, so that no second tensor of that size is made. The row ``without`` stays
    as it is.

    >>> tensor = torch.zeros(3)
    >>> shift(tensor, 0.5, seed=0, step=7, block="weight")
    >>> torch.equal(tensor, draw((3,), seed=0, step=7, block="weight") / 2)
    True
    """
    if noise not in NOISES:
        raise unknown("noise", noise, NOISES)
    fill, key = NOISES[noise], (seed, step, block, direction)
    tensor = tensor.detach()  # threads do not know that gradients are off
    kept = None if without is None else tensor[without].clone()

    def move(index: int, piece: Tensor) -> None:
        drawn = fill(torch.empty_like(piece), _seeded(piece.device, seed_of(*key, index)))
        for scale in scales:
            piece.add_(drawn, alpha=scale)

    if tensor.is_contiguous():
        _each(move, enumerate(tensor.view(-1).split(_NUMBERS)), tensor)
    else:
        drawn = _drawn(tensor.shape, key, block, 0, fill, tensor.dtype, tensor.device)
        for scale in scales:
            tensor.add_(drawn, alpha=scale)
    if kept is not None:
        tensor[without] = kept


def _seeded(device: torch.device | str, seed: int) -> torch.Generator:
    """A generator that starts from a seed, for use at once: on a processor each thread has one, and seeds it again."""
    if device != "cpu" and getattr(device, "type", None) != "cpu":
        return torch.Generator(device=device).manual_seed(seed)
    if not hasattr(_own, "generator"):
        _own.generator = torch.Generator()
    return _own.generator.manual_seed(seed)


_own = threading.local()


def without_row(direction: Tensor, row: int | None, dim: int = 0) -> Tensor:
    """A direction that leaves out a row of its parameter, the padding of an embedding, if there is one."""
    if row is not None:
        direction.select(dim, row).zero_()
    return direction


def seed_of(*key: int | str) -> int:
    """A generator's seed out of what it is for: 64 well-mixed bits, the same on every machine.

    >>> seed_of(0, 7, "weight") == seed_of(0, 7, "weight") != seed_of(0, 8, "weight")
    True
    """
    known = [part if type(part) is int or isinstance(part, str) else int(part) for part in key]  # else NumPy's show a type
    return int.from_bytes(hashlib.blake2b(repr(tuple(known)).encode(), digest_size=8).digest(), "little")


def _gaussian(out: Tensor, generator: torch.Generator) -> Tensor:
    return out.normal_(generator=generator)


def _rademacher(out: Tensor, generator: torch.Generator) -> Tensor:
    """Eight signs out of each random byte, through a table: cheaper than one random number for each."""
    count = out.numel()
    words = torch.empty(-(-count // 64), dtype=torch.int64, device=out.device)
    words.random_(-(2**63), None, generator=generator)
    signs = F.embedding(words.view(torch.uint8).int(), _signs(out.dtype, out.device))
    return out.copy_(signs.view(-1)[:count].view(out.shape))


@lru_cache
def _signs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs in each possible byte."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
    return (bits & 1).to(dtype).mul_(2).sub_(1)


NOISES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"gaussian": _gaussian, "rademacher": _rademacher}
