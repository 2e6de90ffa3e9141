"""The derivative of a function along a direction, beside its value, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten, tree_unflatten

from onward.derivatives.tangents import Tangents
from onward.errors import UsageError


def jvp(function: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """``(y, y')`` of ``y = function(*primals)``: the outputs, and their derivative ``J v`` along the tangents v of the primals.

    Primals are tensors, or nests of tensors (a dict of parameters), and anything else; tangents have their structure, with
    None for what does not move. Outputs come back as the function returns them; in the place of each tensor of real or complex
    numbers its tangent has that tensor's shape and type (zeros where it does not depend on what moves), and None is in the
    place of anything else.

    It is what :func:`torch.func.jvp` computes, where that refuses: fused attention, some queries at a time, so that memory is
    linear in their number (float32 and 64, half precision, causal, masks, ``scale``, grouped heads; no dropout); batch norm in
    train mode, whose statistics move once; in-place operations; and through gradients that the function takes inside
    (:func:`torch.autograd.grad` with ``create_graph=True``). Outputs keep their graph if gradients are enabled; call it within
    ``torch.no_grad()`` to build none. Tangents have no graph. What stops a gradient stops a tangent: ``.detach()``, and
    ``torch.no_grad()`` inside the function.

    Raises :class:`onward.UsageError` for tangents of another structure or shape, and where an operation has no forward
    derivative, naming it.

    >>> x = torch.tensor([0.0, 1.0])
    >>> y, moved = jvp(lambda x: x.exp(), (x,), (torch.tensor([1.0, 0.0]),))
    >>> moved
    tensor([1., 0.])
    """
    if any(isinstance(mode, Tangents) for mode in _get_current_dispatch_mode_stack()):
        raise UsageError("jvp inside of a pass that carries tangents: derivatives of derivatives are not followed that way")
    leaves, structure = tree_flatten(tuple(primals))
    moving = _flat(primals, tangents)
    with Tangents(through_gradients=True) as carried:
        try:
            for i, (leaf, tangent) in enumerate(zip(leaves, moving, strict=True)):
                if tangent is None:
                    continue
                if any(leaf is other for other in leaves[:i]):
                    leaf = leaves[i] = leaf.view_as(leaf)  # the same tensor in two places, each of which has its own tangent
                carried.set(leaf, tangent.clone())  # which in-place operations write to
            y = function(*tree_unflatten(leaves, structure))
            parts, form = tree_flatten(y)
            found = [_tangent(carried, part) for part in parts]
        finally:
            for leaf, tangent in zip(leaves, moving, strict=True):
                if tangent is not None:
                    carried.clear(leaf)
    return y, tree_unflatten(found, form)


def _flat(primals: Sequence[Any], tangents: Sequence[Any]) -> list[Tensor | None]:
    """A tangent, or None, for each leaf of the primals."""
    if len(primals) != len(tangents):
        raise UsageError(f"jvp: {len(tangents)} tangents for {len(primals)} primals: give one for each, or None")
    found: list[Tensor | None] = []
    for primal, tangent in zip(primals, tangents, strict=True):
        leaves, structure = tree_flatten(primal)
        moving, same = ([None] * len(leaves), structure) if tangent is None else tree_flatten(tangent)
        if structure != same:
            raise UsageError(f"jvp: a tangent of the structure {same}, of a primal of {structure}: give them the same one")
        for leaf, one in zip(leaves, moving, strict=True):
            if one is not None and not (_is_continuous(leaf) and isinstance(one, Tensor)):
                what = f"tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise UsageError(f"jvp: a {type(one).__name__} as the tangent of a {what}: give None, or a tensor for a tensor")
            found.append(one)
    return found


def _is_continuous(part: Any) -> bool:
    return isinstance(part, Tensor) and (part.is_floating_point() or part.is_complex())


def _tangent(carried: Tangents, part: Any) -> Tensor | None:
    if not _is_continuous(part):
        return None
    moved = carried.get(part)
    return torch.zeros_like(part) if moved is None else moved
