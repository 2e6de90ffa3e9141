"""The random directions of a captured step: small ones are drawn before it, in one go, large ones where they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from onward.derivatives.directions import _NUMBERS, _SAMPLES, NOISES, draw, seed_of
from onward.estimators.base import Estimator
from onward.phases import phase

_LARGE = _NUMBERS


class Request(NamedTuple):
    """A direction that a step draws: all that it is a function of, but for the step."""

    shape: tuple[int, ...]
    block: int | str
    direction: int
    seed: int
    offset: int
    noise: str
    dtype: torch.dtype
    device: torch.device

    def drawn(self, step: int) -> Tensor:
        """What the estimator's own call draws."""
        return draw(step=step, **self._asdict())

    def within(self, step: Tensor) -> Tensor:
        """The same as an operation of a graph."""
        name, number = (self.block, 0) if isinstance(self.block, str) else ("", self.block)
        rest = (self.direction, self.seed, self.offset, self.noise, self.dtype, self.device)
        drawn: Tensor = torch.ops.onward.direction(step, self.shape, name, number, *rest)
        return drawn


class Piece(NamedTuple):
    """Numbers that come from one seed: where they lie in the flat tensor, their shape, and what the seed is of."""

    shape: tuple[int, ...]
    request: Request
    number: int


@library.custom_op("onward::direction", mutates_args=())
def _direction(
    step: Tensor,
    shape: Sequence[int],
    name: str,
    number: int,
    direction: int,
    seed: int,
    offset: int,
    noise: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    request = Request(tuple(shape), name or number, direction, seed, offset, noise, dtype, device)
    return request.drawn(int(step)).clone()  # the operation must own what it returns, and a part of a batch is a view


@_direction.register_fake
def _(step: Tensor, shape: Sequence[int], *rest: Any) -> Tensor:
    *_, dtype, device = rest
    return torch.empty(shape, dtype=dtype, device=device)


class Directions:
    """The directions of a kind of step.

    They are the numbers of :func:`onward.derivatives.directions.draw`. Small ones of one type lie side by side in a flat
    tensor, which is an input of the graph: what ``draw`` spends on each of them (a generator, slices, calls) is spent once.
    Large ones are drawn within the graph, where the eager step draws them, so that they are there no longer than in it.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        small = [request for request in requests if _numbers(request) <= _LARGE]
        self.kinds = list(dict.fromkeys((request.dtype, request.device) for request in small))
        self.small = [[r for r in small if (r.dtype, r.device) == kind] for kind in self.kinds]
        self.pieces = [[piece for request in requests for piece in _pieces(request)] for requests in self.small]
        self.sizes = [[_product(piece.shape) for piece in pieces] for pieces in self.pieces]
        self.generators = [torch.Generator(device) for _, device in self.kinds]
        self.count = 1 + len(self.kinds)
        """Of inputs."""

    def draw(self, step: int) -> list[Tensor]:
        """The inputs of the graph: the number of the step, and the small directions."""
        inputs = [torch.tensor(step, device="cpu")]
        if not self.kinds:
            return inputs
        with phase("tangent"), torch.no_grad():
            for (dtype, device), pieces, sizes, generator in zip(
                self.kinds, self.pieces, self.sizes, self.generators, strict=True
            ):
                flat = torch.empty(sum(sizes), dtype=dtype, device=device)
                for (_, of, number), part in zip(pieces, flat.split_with_sizes(sizes), strict=True):
                    NOISES[of.noise](part, generator.manual_seed(seed_of(of.seed, step, of.block, of.direction, number)))
                inputs.append(flat)
        return inputs

    def of(self, inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
        """A function that takes the place of :func:`onward.derivatives.directions.draw` within the traced step."""
        step, *flats = inputs
        found: dict[Request, Tensor] = {}
        for flat, requests in zip(flats, self.small, strict=True):
            at = 0
            for request in requests:
                first = at + _before(request) * _product(request.shape[1:])
                found[request] = flat[first : first + _product(request.shape)].view(request.shape)
                at += _numbers(request)

        def drawn(**asked: Any) -> Tensor:
            del asked["step"]
            request = Request(**asked)
            return found[request] if request in found else request.within(step)

        return drawn


def _product(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _rows(request: Request) -> tuple[int, int]:
    """The first and the last of the pieces that a block's direction is made of."""
    return request.offset // _SAMPLES, -(-(request.offset + request.shape[0]) // _SAMPLES)


def _before(request: Request) -> int:
    """How many rows of the first piece belong to samples before the first one."""
    return 0 if isinstance(request.block, str) else request.offset % _SAMPLES


def _numbers(request: Request) -> int:
    return sum(_product(piece.shape) for piece in _pieces(request))


def _pieces(request: Request) -> list[Piece]:
    """As :func:`onward.derivatives.directions.draw` draws them."""
    if isinstance(request.block, str):
        count = _product(request.shape)
        whole = range(0, count, _NUMBERS)
        return [Piece((min(_NUMBERS, count - at),), request, index) for index, at in enumerate(whole)]
    first, last = _rows(request)
    return [Piece((_SAMPLES, *request.shape[1:]), request, index) for index in range(first, last)]


@contextmanager
def replaced(estimator: Estimator, drawn: Callable[..., Tensor]) -> Iterator[None]:
    """Within the block the estimator draws its directions by another function."""
    estimator._draws = drawn
    try:
        yield
    finally:
        estimator._draws = None


@contextmanager
def noting(estimator: Estimator, requests: list[Request]) -> Iterator[None]:
    """Within the block, what the estimator draws is noted."""
    requests.clear()

    def drawn(*, step: int, **given: Any) -> Tensor:
        request = Request(**given)
        if request not in requests:
            requests.append(request)
        return request.drawn(step)

    with replaced(estimator, drawn):
        yield
