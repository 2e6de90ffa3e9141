"""What the schema of an ATen operation says of it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


@lru_cache
def out_of_place(func: Any) -> Any:
    """The operation that returns what ``func`` writes into its first argument, or into ``out``."""
    packet = func.overloadpacket if has_out(func) else getattr(torch.ops.aten, func.overloadpacket.__name__[:-1])
    wanted = [str(argument.type) for argument in func._schema.arguments if not argument.is_out]
    overloads = [getattr(packet, name) for name in packet.overloads()]
    types = {o: [str(argument.type) for argument in o._schema.arguments] for o in overloads}
    return next(o for o in overloads if types[o] == wanted and o._schema.arguments[0].alias_info is None)


@lru_cache
def has_out(func: Any) -> bool:
    """Whether it writes into an argument ``out``."""
    return any(argument.is_out for argument in func._schema.arguments)


def is_random(func: Any) -> bool:
    """Whether it draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags
