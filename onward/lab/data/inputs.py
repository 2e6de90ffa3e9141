"""What a network is called with: one tensor, or a tuple or dict of tensors, samples first in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onward.errors import UsageError
from onward.lab.system.extra import reason_of

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""One tensor, positional inputs, or keyword inputs."""
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""Types that PyTorch can compute next to nothing with."""
Batch = tuple[Inputs, Tensor]
"""Inputs, and targets as their task has them."""


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors among inputs, by name or place; one alone has no name.

    >>> list(leaves((torch.zeros(2), torch.ones(2))))
    ['0', '1']
    """
    if isinstance(inputs, Tensor):
        return {"": inputs}
    return dict(inputs) if isinstance(inputs, Mapping) else {str(place): tensor for place, tensor in enumerate(inputs)}


def shape_of(inputs: Any, start: int = 0) -> Any:
    """The shape of a tensor, or those of the parts of a tuple or a dict; without its first `start` sizes.

    >>> shape_of({"a": torch.zeros(2, 3)}), shape_of((torch.zeros(2, 3), torch.zeros(2)), start=1)
    ({'a': (2, 3)}, ((3,), ()))
    """
    if isinstance(inputs, Mapping):
        return {name: shape_of(part, start) for name, part in inputs.items()}
    return tuple(inputs.shape[start:]) if isinstance(inputs, Tensor) else tuple(shape_of(part, start) for part in inputs)


def mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with each of their tensors changed.

    >>> mapped({"a": torch.zeros(2), "b": torch.ones(2)}, lambda tensor: tensor[:1])
    {'a': tensor([0.]), 'b': tensor([1.])}
    """
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: change(tensor) for name, tensor in inputs.items()}
    return tuple(change(tensor) for tensor in inputs)


def tensors(value: Any, what: str) -> Inputs:
    """A value of the user's own as inputs: real numbers become float32, unsigned ones of more than 8 bits int64, and what
    is no tensor becomes one.

    Raises:
        UsageError: it cannot; the message calls it `what`.

    >>> tensors((np.ones(1), [2, 3]), "the inputs")
    (tensor([1.]), tensor([2, 3]))
    """
    if isinstance(value, Mapping):
        if others := [name for name in value if not isinstance(name, str)]:
            why = f"{what} have the key {others[0]!r}, a {type(others[0]).__name__}"
            raise UsageError(f"{why}: let the keys be strings, the names of the network's arguments")
        return {name: tensor(part, f"{what} {name!r}") for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(tensor(part, f"{what} [{place}]") for place, part in enumerate(value))
    return tensor(value, what)


def tensor(value: Any, what: str) -> Tensor:
    """One of them."""
    try:
        found = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        given = f"a {type(value).__name__}, not a tensor ({reason_of(error)})"
        raise UsageError(f"{what} is {given}: return a tensor of numbers") from None
    if found.layout != torch.strided:
        raise UsageError(f"{what} is a sparse tensor: return an ordinary one (tensor.to_dense())")
    if found.dtype in UNSIGNED:
        return found.long()
    return found.float() if found.is_floating_point() else found


def numbers(tensor: Tensor) -> Any:
    """What a tensor holds, as an array whose bytes are the same on every machine."""
    array = np.ascontiguousarray(tensor.cpu().numpy())
    return array.astype(array.dtype.newbyteorder("<"), copy=False)
