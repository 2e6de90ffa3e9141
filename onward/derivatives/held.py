"""What a tensor holds beside its numbers, its tangents, and where a tensor lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KEY = "_onward_tangents"
"""The attribute under which a tensor carries (mode, tangents)."""
UNKNOWN: Any = object()
"""Stands for tangents that are there, but were not followed."""


def pick(held: Any, direction: int) -> Any:
    """One direction out of what an argument holds: a tangent, None, or a list of these for a list of tensors."""
    if type(held) is tuple:
        return held[direction]
    if isinstance(held, list):
        picked = [None if entry is None else entry[direction] for entry in held]
        return None if all(p is None for p in picked) else picked
    return None if held is None else held[direction]


def held_by(mode: Any, argument: Any) -> Any:
    """The tangents that an argument of an operation carries: None, UNKNOWN, or those of each tensor of a list."""
    if isinstance(argument, Tensor):
        return mode.held(argument)
    if isinstance(argument, (list, tuple)) and argument and any(isinstance(a, Tensor) for a in argument):
        held = [mode.held(a) if isinstance(a, Tensor) else None for a in argument]
        if any(entry is UNKNOWN for entry in held):
            return UNKNOWN
        return held if any(entry is not None for entry in held) else None
    return None


def is_continuous(tensor: Tensor) -> bool:
    """Whether it holds numbers that may have a tangent."""
    return tensor.is_floating_point() or tensor.is_complex()


def contains(tangents: Any, tangent: Tensor) -> bool:
    """Whether a tangent is that one, or among those of a list of tensors."""
    return tangents is tangent or (isinstance(tangents, list) and any(t is tangent for t in tangents))


def address(tensor: Tensor) -> int:
    """Where a tensor lies, as far as that can be said."""
    return tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)


def place(tensor: Tensor) -> tuple[Any, ...]:
    """A key that only the same part of the same memory has, while that is kept."""
    return address(tensor), tensor.shape, tensor.stride() if tensor.layout is torch.strided else None


def gradients_are_off() -> bool:
    """Whether the network itself has turned gradients off here; a Function's forward, where PyTorch does, does not count."""
    return not torch.is_grad_enabled() and (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def like(tensor: Tensor, tangent: Tensor) -> Tensor:
    """The tangent in the tensor's own shape (a rule may leave it to be broadcast), layout and dtype."""
    if tangent.shape == tensor.shape and tangent.stride() == tensor.stride() and tangent.dtype == tensor.dtype:
        return tangent
    return torch.empty_like(tensor).copy_(tangent)


def same_view(view: Tensor, base: Tensor, tangent: Tensor) -> Tensor:
    """What a view is of its base, of the base's tangent."""
    offset = view.storage_offset() - base.storage_offset() + tangent.storage_offset()
    return tangent.as_strided(view.shape, view.stride(), offset)
