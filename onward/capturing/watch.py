"""What decides which code a step runs, watched: a traced step is good for as long as all of that is as it was."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

from onward.estimators.base import Estimator

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
COUNTED = ("step", "engine", "captured", "_looked", "_separated_for", "_draws", "_not_wrapped")
"""Attributes of an estimator that change from step to step, or by a look, and decide nothing."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


class Watch:
    """What an estimator's modules are made of, their hooks, their attributes, and what of the parameters requires gradients.

    Of attributes that are no plain values, tensors or functions (lists, dictionaries) only it is watched which object they are.
    """

    def __init__(self, estimator: Estimator, state: list[Tensor]) -> None:
        self.dictionaries: list[dict[str, Any]] = []
        self.empty: list[dict[str, Any]] = []
        self.getters: list[Callable[[Any], tuple[Any, ...]]] = []
        for module in estimator.modules():
            held = vars(module)
            skipped = COUNTED if module is estimator else ()
            self._add(held, [name for name in held if name not in _OF_EVERY_MODULE and name not in skipped])
            for inside in (held["_modules"], held["_parameters"], held["_buffers"]):
                self._add(inside, list(inside))
            self.empty += [held[name] for name in HOOKS]
        self.sizes = list(map(len, self.dictionaries))
        self.values = self._values()
        self.state = state
        self.parameters = [t for t in state if isinstance(t, nn.Parameter)]
        self.kinds = self._kinds()

    def _add(self, held: dict[str, Any], names: list[str]) -> None:
        if names:
            self.dictionaries.append(held)
            self.getters.append(itemgetter(names[0], *names))  # at least two, so that it gives a tuple
        else:
            self.empty.append(held)

    def _values(self) -> list[Any]:
        return list(chain.from_iterable(get(held) for get, held in zip(self.getters, self.dictionaries, strict=True)))

    def _kinds(self) -> list[Any]:
        return [p.requires_grad for p in self.parameters] + [t.dtype for t in self.state]

    def same(self) -> bool:
        """Whether everything is as it was."""
        if any(self.empty) or list(map(len, self.dictionaries)) != self.sizes or self._kinds() != self.kinds:
            return False
        if any(p._post_accumulate_grad_hooks or p._backward_hooks for p in self.parameters):
            return False
        try:
            now = self._values()
        except KeyError:
            return False
        return all(map(is_, now, self.values)) or self._equal(now)

    def _equal(self, now: list[Any]) -> bool:
        """Whether values that are other objects are equal numbers, texts, flags or tuples."""
        for new, old in zip(now, self.values, strict=True):
            if new is old:
                continue
            if isinstance(old, Tensor) or isinstance(new, Tensor) or type(new) is not type(old):
                return False
            try:
                if not bool(new == old):
                    return False
            except (RuntimeError, ValueError, TypeError):  # of objects that cannot be compared
                return False
        self.values = now
        return True

    def put_back(self) -> None:
        """Give every attribute the value that it had."""
        position = 0
        for get, held in zip(self.getters, self.dictionaries, strict=True):
            count = len(get(held))
            names = get({name: name for name in held})
            for name, value in zip(names, self.values[position : position + count], strict=True):
                held[name] = value
            position += count
