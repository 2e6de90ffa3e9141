"""Run a network several times in one step as if it ran once: the same random numbers, from the same buffers."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onward.derivatives.graph import is_traced
from onward.errors import UsageError
from onward.network.parts import modules_of, parameters_of

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

    def moved(self) -> bool:
        """Whether a generator, other than PyTorch's own, is no longer in the state that it had at creation."""
        own = (torch.get_rng_state, torch.set_rng_state)
        pairs = zip(self._generators, self._states, strict=True)
        return any(str(read()) != str(state) for (read, restore), state in pairs if (read, restore) != own)

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
    def untouched(self, noise: float = 0.0) -> Iterator[None]:
        """As :meth:`unseen`; and afterwards the modules have the parameters and attributes that they had before the block.

        For a run that only looks: a network may scale itself by its first batch, count its runs, or let weights follow others.
        It works on copies of its parameters, which takes their memory once more; with ``noise`` these are a little off, so
        that branches that start at zero show. What an attribute refers to further in, only :func:`understudy` leaves alone.
        """
        lazy = nn.modules.lazy.LazyModuleMixin  # whose first run gives it its sizes, and another class
        held = [(module, _attributes(module)) for module in self._model.modules() if not isinstance(module, lazy)]
        data = [(p, p.data, p.grad) for p in self._model.parameters() if not is_lazy(p)]
        try:
            for index, (p, before, _) in enumerate(data):
                p.data, p.grad = before.clone(), None
                if noise and before.is_floating_point():
                    generator = torch.Generator(before.device).manual_seed(index)
                    drawn = torch.randn(before.shape, generator=generator, dtype=before.dtype, device=before.device)
                    p.data.add_(drawn * (noise * (before.square().mean().sqrt() + 0.3)))
            torch.clear_autocast_cache()  # it knows a parameter by its object, and not by what that holds
            with self.unseen():
                yield
        finally:
            for p, before, gradient in data:
                p.data, p.grad = before, gradient
            torch.clear_autocast_cache()
            for module, attributes in held:
                vars(module).clear()
                for name, (value, content) in attributes.items():
                    vars(module)[name] = value
                    _put_back(value, content)


def understudy(model: nn.Module) -> nn.Module:
    """A copy of a network, to try things on that leave no trace in it; the network itself where it cannot be copied.

    Nor is it copied where functions are hooked to it or put over a module's forward: these may refer to the network, and those
    of a parameter stay behind.
    """
    if any(p._backward_hooks for p in model.parameters()):
        return model
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return model
    try:
        copied = copy.deepcopy(model)
    except Exception:  # whatever a module's own way of being copied raises
        return model
    for p in copied.parameters():
        p.grad = None
    return copied


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within the block what is compiled runs as it is written: compiling it for a look would take minutes."""
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The attributes of a module, and the content of those that are tensors, lists or dictionaries (of hooks, of children)."""
    return {name: (value, _content(value)) for name, value in vars(module).items()}


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (dict, list, set)) else None


def _put_back(value: Any, content: Any) -> None:
    """Give an attribute the content that it had, in place: handles of hooks refer to the dictionary that they are in."""
    if isinstance(value, Tensor) and value.shape == content.shape:
        value.detach().copy_(content)
    elif isinstance(value, list):
        value[:] = content
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(content)


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
    held = [(module, dict(module._buffers)) for module in modules_of(model) if module._buffers]
    for module, buffers in held:
        for name, buffer in (buffers if start is None else start.get(module, buffers)).items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, buffers in held:
            module._buffers.clear()
            module._buffers.update(buffers)


def check_same_output(first: Iterable[Tensor], second: Iterable[Tensor], remedy: str) -> None:
    """Raise a :class:`onward.UsageError` where two passes of one step have computed different outputs."""
    if is_traced():  # the step before has shown it
        return
    for one, other in zip(first, second, strict=True):
        # Kernels without a graph may round otherwise; a mask that was drawn anew changes more.
        off, size = (one.detach() - other.detach()).norm(), one.detach().norm()
        if off > _rounding(one) * size:  # never where both are NaN, which other checks report
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
    device = next((p.device for p in parameters_of(model)), torch.device("cpu"))
    if device.type == "cuda":
        generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        found.append(_accessors(generator))
    if numpy := sys.modules.get("numpy"):
        found.append((numpy.random.get_state, numpy.random.set_state))
    if model not in _owned:
        held = (value for module in model.modules() for value in vars(module).values())
        _owned[model] = [inner for value in held for inner in _entries(value) if _draws(inner)]
    for generator in _owned[model]:
        found.append(_accessors(generator))
    return found


_owned: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""The generators that the modules of a network keep."""


def _entries(value: Any) -> Iterable[Any]:
    """What is in a list or a dictionary; anything else is itself."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, (list, tuple)) else [value]


def _rounding(tensor: Tensor) -> float:
    """How far two runs of one network may be apart, relative to the length of their output."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return 0.05
    if tensor.device.type != "cpu":  # whose kernels add up in any order, and may use shorter numbers
        return 1e-3
    return 1e-9 if tensor.dtype in (torch.float64, torch.complex128) else 2e-5


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
