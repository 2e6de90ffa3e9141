"""Run a network several times in one step as if it ran once: the same random numbers, from the same buffers."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onward.errors import UsageError

_Generator = tuple[Callable[[], Any], Callable[[Any], None]]
"""How to read the state of a generator, and how to put it back."""


class Replay:
    """Let several passes of a network draw the same random numbers and start from the same buffers.

    Each ``with again:`` block starts from the states that the generators had at creation: PyTorch's, Python's, NumPy's, and
    those that a module of the network keeps as an attribute. With ``start_of_buffers`` every :meth:`frozen` pass starts from
    the buffers as they were at creation too, which is what a pass after the one that moves them needs.

    >>> import torch
    >>> again = Replay(torch.nn.Dropout())
    >>> with again:
    ...     first = torch.rand(2)
    >>> with again:
    ...     second = torch.rand(2)
    >>> torch.equal(first, second)
    True
    """

    def __init__(self, model: nn.Module, *, start_of_buffers: bool = False) -> None:
        self._model = model
        self._generators = _generators(model)
        self._states = [read() for read, _ in self._generators]
        self._buffers = _copies(model) if start_of_buffers else None

    def __enter__(self) -> None:
        for (_, restore), state in zip(self._generators, self._states, strict=True):
            restore(state)

    def __exit__(self, *failure: Any) -> None:
        pass

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the block the network draws the same numbers, and works on copies of its buffers, which the block discards."""
        with self, frozen_statistics(self._model, self._buffers):
            yield

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """As :meth:`frozen`; and afterwards the generators go on from where they were before the block.

        For a run that repeats another one.
        """
        before = [read() for read, _ in self._generators]
        try:
            with self.frozen():
                yield
        finally:
            for (_, restore), state in zip(self._generators, before, strict=True):
                restore(state)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """As :meth:`unseen`; and afterwards the modules have the parameters and attributes that they had before the block.

        For a run that only looks: a network may scale itself by its first batch, count its runs, or let weights follow others.
        It works on copies of its parameters, which takes their memory once more. What is inside an attribute (the entries of
        a list) is not looked at.
        """
        lazy = nn.modules.lazy.LazyModuleMixin  # whose first run gives it its sizes, and another class
        held = [(module, _attributes(module)) for module in self._model.modules() if not isinstance(module, lazy)]
        data = [(p, p.data) for p in self._model.parameters() if not is_lazy(p)]
        try:
            for p, before in data:
                p.data = before.clone()
            with self.unseen():
                yield
        finally:
            for p, before in data:
                p.data = before
            for module, attributes in held:
                vars(module).clear()
                for name, (value, entries) in attributes.items():
                    vars(module)[name] = value
                    if entries is not None:  # in place: handles of hooks refer to the dictionary that they are in
                        value.clear()
                        value.update(entries)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
    """The attributes of a module, and what is in those that are dictionaries: of parameters, buffers, children, hooks."""
    return {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in vars(module).items()}


@contextmanager
def frozen_statistics(model: nn.Module, start: dict[nn.Module, dict[str, Tensor | None]] | None = None) -> Iterator[None]:
    """Within the block the network works on copies of its buffers: a second pass that must not move running statistics.

    The copies are of ``start``, if that is given, which holds buffers by module and name.

    >>> import torch
    >>> norm = torch.nn.BatchNorm1d(2)
    >>> with frozen_statistics(norm):
    ...     _ = norm(torch.randn(4, 2))
    >>> int(norm.num_batches_tracked)
    0
    """
    held = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    for module, buffers in held:
        for name, buffer in (buffers if start is None else start[module]).items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, buffers in held:
            module._buffers.clear()
            module._buffers.update(buffers)


def check_same_output(first: Iterable[Tensor], second: Iterable[Tensor], remedy: str) -> None:
    """Raise a :class:`onward.UsageError` where two passes of one step have computed different outputs."""
    for one, other in zip(first, second, strict=True):
        # Kernels without a graph may round otherwise; a mask that was drawn anew changes much more.
        coarse = one.dtype in (torch.float16, torch.bfloat16)
        off = (one.detach() - other.detach()).float().norm()
        if off > (0.05 if coarse else 1e-3) * one.detach().float().norm():  # never where both are NaN, which others tell
            raise UsageError(
                "the network's second run in this step gave another output than its first, so it is another network: something "
                "in it draws from a generator that is out of sight (of a module of Python's), or counts its own runs. Keep the "
                f"generator as an attribute of the module that draws, what it counts in a buffer, or {remedy}"
            )


def _copies(model: nn.Module) -> dict[nn.Module, dict[str, Tensor | None]]:
    return {
        module: {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
        for module in model.modules()
        if module._buffers
    }


def _generators(model: nn.Module) -> list[_Generator]:
    """Every generator that the network may draw from."""
    found: list[_Generator] = [(torch.get_rng_state, torch.set_rng_state), (random.getstate, random.setstate)]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        found.append(_accessors(generator))
    if numpy := sys.modules.get("numpy"):
        found.append((numpy.random.get_state, numpy.random.set_state))
    if model not in _owned:
        _owned[model] = [value for module in model.modules() for value in vars(module).values() if _draws(value)]
    for generator in _owned[model]:
        found.append(_accessors(generator))
    return found


_owned: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""The generators that the modules of a network keep."""


def _draws(value: Any) -> bool:
    """Whether an attribute of a module is a generator of random numbers."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def _accessors(generator: Any) -> _Generator:
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    if hasattr(generator, "bit_generator"):  # NumPy's
        bits = generator.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return generator.get_state, generator.set_state
