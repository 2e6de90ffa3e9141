"""Operations without a rule of ours: PyTorch's own forward mode, on that one operation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from onward.errors import UsageError

aten = torch.ops.aten


def _weight_norm(direction: Tensor, scale: Tensor, dim: int = 0) -> tuple[Tensor, None]:
    return direction * (scale / torch.norm_except_dim(direction, 2, dim)), None


def _recurrent_layer(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, w4: Tensor, hx: Tensor, cx: Tensor, reverse: bool, *options: Any
) -> tuple[Tensor, Tensor, Tensor, None]:
    """One direction of one LSTM layer, time first, out of operations that have a derivative."""
    has_biases = options[4]
    weights = [w1, w2, w3, w4] if has_biases else [w1, w2]
    fused = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        x = x.flip(0) if reverse else x
        start = (hx.unsqueeze(0), cx.unsqueeze(0))
        y, h, c = torch.lstm(x, start, weights, has_biases, 1, 0.0, False, False, False)
    finally:
        torch.backends.mkldnn.enabled = fused
    return (y.flip(0) if reverse else y), h.squeeze(0), c.squeeze(0), None


def _scatter_reduce(*args: Any, **kwargs: Any) -> Tensor:
    if args[4] == "prod":
        raise NotImplementedError("PyTorch's forward mode takes a product for a constant.")
    return aten.scatter_reduce.two(*args, **kwargs)


# Fused kernels without a forward derivative, and the same function out of operations that have one.
_UNFUSED: dict[Any, Callable[..., Any]] = {
    aten._weight_norm_interface: _weight_norm,
    aten.mkldnn_rnn_layer: _recurrent_layer,
    aten.scatter_reduce: _scatter_reduce,
}


def by_forward_ad(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    """The tangent of one operation by PyTorch's own forward mode (which runs the operation a second time)."""

    def dual(a: Any, s: Any) -> Any:
        if isinstance(s, list):
            return [dual(b, r) for b, r in zip(a, s, strict=True)]
        if s is None:
            return a
        # A dual number wants tensor and tangent in one layout (an expanded tensor has none that a tangent could share).
        return forward_ad.make_dual(a.detach() if a.stride() == s.stride() else torch.empty_like(s).copy_(a), s)

    function = _UNFUSED.get(func.overloadpacket, func)
    try:
        # PyTorch turns its forward mode off inside the forward of an autograd.Function.
        with forward_ad._set_fwd_grad_enabled(True), forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's own, when it first loads its derivatives
            result = function(*(dual(a, s) for a, s in zip(args, t, strict=True)), **kwargs)
            tangents = tree_map(lambda r: forward_ad.unpack_dual(r).tangent if isinstance(r, Tensor) else None, result)
    except (NotImplementedError, RuntimeError) as error:
        raise _without_derivative(func, str(error).splitlines()[0]) from error
    if all(tangent is None for tangent in tree_leaves(tangents)) and _is_differentiable(func, args, kwargs, t):
        raise _without_derivative(func, "PyTorch's forward mode loses its tangent.")
    return tangents


def _without_derivative(func: Any, reason: str) -> UsageError:
    return UsageError(
        f"forward mode cannot differentiate the operation {func}: {reason} Replace the module that uses it "
        "(onward.validate(model) names the known ones), or cut the network so that it lies in the first block."
    )


def _is_differentiable(func: Any, args: Sequence[Any], kwargs: dict[str, Any], t: list[Any]) -> bool:
    """Whether the backward pass has a derivative of the operation with respect to an argument that has a tangent."""
    with torch.enable_grad():
        asked = [a.detach().requires_grad_() if isinstance(s, Tensor) else a for a, s in zip(args, t, strict=True)]
        return any(isinstance(r, Tensor) and r.requires_grad for r in tree_leaves(func(*asked, **kwargs)))
