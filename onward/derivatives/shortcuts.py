"""Shortcuts past the dispatcher: functions of small layers that carry tangents themselves.

:class:`onward.derivatives.tangents.Tangents` listens to every operation, which takes PyTorch a few microseconds each to tell:
longer than a small layer takes to run. Within it, ``torch.nn.functional`` has these in the place of its own, which do in one
call what the operations of a layer do one after the other, with the same kernels. Whatever is unusual goes the long way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onward.derivatives.held import KEY, UNKNOWN
from onward.phases import phase

_linear, _relu = F.linear, F.relu
_threshold_backward = torch.ops.aten.threshold_backward.default


def _listening(x: Any) -> Any:
    """The mode that carries tangents here, where it is the only one that listens, and nothing but the layer has to be told."""
    if type(x) is not Tensor or torch._C._len_torch_dispatch_stack() != 1 or torch._C._len_torch_function_stack():
        return None
    mode = torch._C._get_dispatch_stack_at(0)
    if not getattr(mode, "takes_shortcuts", False) or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if mode.stops and not torch.is_grad_enabled():
        return None
    mode.latest = None
    return mode


def _carried(mode: Any, tensor: Tensor) -> Any:
    """The tangents of a tensor, None, or UNKNOWN."""
    return mode.held(tensor) if KEY in tensor.__dict__ or tensor._base is not None else None


def _note_use(mode: Any, *tensors: Tensor | None) -> None:
    """Take note of parameters that are used in whole."""
    if mode.parameters:
        for tensor in tensors:
            if isinstance(tensor, torch.nn.Parameter):
                mode.uses.setdefault(tensor, set()).add(None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In the place of ``torch.nn.functional.linear``: of a matrix, for ``t W^T + x tW^T + tb``."""
    mode = _listening(x)
    if mode is None or x.dim() != 2 or x.layout is not torch.strided or torch.is_autocast_enabled(x.device.type):
        return _linear(x, weight, bias)
    carried = _carried(mode, x), _carried(mode, weight), None if bias is None else _carried(mode, bias)
    if UNKNOWN in carried:
        return _linear(x, weight, bias)
    with torch._C._DisableTorchDispatch():
        out = _linear(x, weight, bias)
        if carried != (None, None, None):
            _note_use(mode, weight, bias)
            _carry(mode, out, _linear_tangent, x, weight, *carried)
    return out


def _linear_tangent(direction: int, out: Tensor, x: Tensor, weight: Tensor, of_x: Any, of_weight: Any, of_bias: Any) -> Any:
    tangent = None if of_x is None or of_x[direction] is None else torch.mm(of_x[direction], weight.t())
    if of_weight is not None and of_weight[direction] is not None:
        right = torch.mm(x, of_weight[direction].t())
        tangent = right if tangent is None else tangent.add_(right)
    if of_bias is not None and (moved := of_bias[direction]) is not None:
        tangent = moved.expand(out.shape).clone() if tangent is None else tangent.add_(moved)
    return tangent


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """In the place of ``torch.nn.functional.relu``."""
    mode = None if inplace else _listening(input)
    if mode is None or (carried := _carried(mode, input)) is UNKNOWN:
        return _relu(input, inplace)
    with torch._C._DisableTorchDispatch():
        out = torch.relu(input)
        if carried is not None:
            _carry(mode, out, _relu_tangent, carried)
    return out


def _relu_tangent(direction: int, out: Tensor, of_x: Any) -> Any:
    return None if of_x[direction] is None else _threshold_backward(of_x[direction], out, 0)


def _carry(mode: Any, out: Tensor, rule: Any, *given: Any) -> None:
    """Give a tensor the tangent that a rule says in each direction, where gradients would else be noted."""
    with_gradients, layout = torch.is_grad_enabled(), out.stride()
    torch._C._set_grad_enabled(False)
    try:
        with phase("tangent"):
            found = []
            for direction in range(mode.directions):
                tangent = rule(direction, out, *given)
                if tangent is not None and tangent.stride() != layout:
                    tangent = torch.empty_like(out).copy_(tangent)
                found.append(tangent)
            out.__dict__[KEY] = (mode, tuple(found))
    finally:
        torch._C._set_grad_enabled(with_gradients)


def install() -> None:
    """Put the shortcuts in their places, where these are PyTorch's own."""
    if F.linear is _linear and F.relu is _relu:
        F.linear, F.relu = linear, relu  # type: ignore[assignment]


def remove() -> None:
    """Put PyTorch's own functions back."""
    if F.linear is linear and F.relu is relu:
        F.linear, F.relu = _linear, _relu
