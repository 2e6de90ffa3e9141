"""What there is to know of an ATen operation, whatever it is applied to: its rule, and what its schema says of it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from onward.derivatives.rules import RULES, Rule


class Operation(NamedTuple):
    """An operation, and how it carries tangents."""

    func: Any
    rule: Rule | None
    is_view: bool
    writes: bool
    """Whether it changes an argument, and no rule says how."""
    draws: bool
    """Whether it draws random numbers, and no rule knows which."""
    has_out: bool


def operation_of(func: Any) -> Operation:
    """What there is to know of an operation."""
    known = _known.get(id(func))
    if known is None:
        rule = RULES.get(func.overloadpacket) or (_view if func.is_view else None)
        writes, draws = rule is None and func._schema.is_mutable, rule is None and is_random(func)
        known = Operation(func, rule, func.is_view, writes, draws, has_out(func))
        _known[id(func)] = known
    return known


_known: dict[int, Operation] = {}
"""Every operation that has been met, by its id: its own hash takes as long as a small rule."""


def _view(func: Any, args: Any, kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    return func(t[0], *args[1:], **kwargs)


@lru_cache
def out_of_place(func: Any) -> Any:
    """The operation that returns what ``func`` writes into its first argument, or into ``out``."""
    packet = func.overloadpacket if has_out(func) else getattr(torch.ops.aten, func.overloadpacket.__name__[:-1])
    wanted = [str(argument.type) for argument in func._schema.arguments if not argument.is_out]
    overloads = [getattr(packet, name) for name in packet.overloads()]
    types = {o: [str(argument.type) for argument in o._schema.arguments] for o in overloads}
    return next(o for o in overloads if types[o] == wanted and o._schema.arguments[0].alias_info is None)


def has_out(func: Any) -> bool:
    """Whether it writes into an argument ``out``."""
    return any(argument.is_out for argument in func._schema.arguments)


def is_random(func: Any) -> bool:
    """Whether it draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags
