"""How each operation carries a tangent: one small rule per ATen operation.

A rule receives the operation, its arguments, its output and the tangents of its arguments, and returns the tangent of its
output. Three facts make most of them one line, and faster than PyTorch's own forward mode:

* a linear operation acts on the tangent as on the tensor;
* where the Jacobian is symmetric (every elementwise function, softmax, and normalisation without its affine part), the
  Jacobian-vector product *is* the operation's fused backward kernel, applied to the tangent;
* rules see the saved outputs (statistics, indices, masks), so nothing is computed twice.

Any other operation goes through :func:`by_forward_ad`, which runs PyTorch's forward mode on that one operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onward.derivatives.attention import FUSED, attention

aten = torch.ops.aten

Rule = Callable[[Any, Sequence[Any], dict[str, Any], Any, list[Any]], Any]
"""``rule(operation, arguments, keywords, output, tangents) -> tangent`` (a tuple of them for several outputs).

``tangents`` runs parallel to ``arguments``: None where there is none, a list where the argument is a list of tensors.
"""


def _on_tangent(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    """Linear in its first argument (a tensor, or a list of tensors of which some may have no tangent)."""
    first = t[0]
    if isinstance(first, list):
        first = [torch.zeros_like(a) if s is None else s for a, s in zip(args[0], first, strict=True)]
    return None if first is None else func(first, *args[1:], **kwargs)


def _embedding(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    """The row of ``padding_idx`` is a constant: its gradient is left out too."""
    moved = func(t[0], args[1])
    padding = args[2] if len(args) > 2 else kwargs.get("padding_idx", -1)
    return moved if padding < 0 else moved.masked_fill_((args[1] == padding).unsqueeze(-1), 0)


def _pad(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    """The constant that fills in has no tangent."""
    return func(t[0], args[1], 0)


def _bilinear(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    """f(ta, b) + f(a, tb)."""
    left = None if t[0] is None else func(t[0], *args[1:], **kwargs)
    right = None if len(t) < 2 or t[1] is None else func(args[0], t[1], *args[2:], **kwargs)
    return _plus(left, right)


def _plus(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """The sum of two tangents, either of which may be missing; ``left`` is a temporary of ours and is reused."""
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right) if left.shape == right.shape else left + right


def _shaped(tangent: Tensor, like: Tensor) -> Tensor:
    return tangent if tangent.shape == like.shape else tangent.expand(like.shape)


def _add(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any], sign: int = 1) -> Any:
    scale = sign * kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    if len(t) < 2 or t[1] is None:
        return _shaped(t[0], out)
    if t[0] is None:
        return _shaped(t[1] * scale, out)
    return torch.add(t[0], t[1], alpha=scale)


def _sub(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    return _add(func, args, kwargs, out, t, sign=-1)


def _div(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    if kwargs.get("rounding_mode") is not None:
        return None
    left = None if t[0] is None else t[0] / args[1]
    return left if len(t) < 2 or t[1] is None else _plus(left, -(out / args[1]) * t[1])


def _addmm(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    """beta * bias + alpha * (a @ b), for matrices and batches of them."""
    product = aten.bmm.default if func.overloadpacket is aten.baddbmm else aten.mm.default
    inner = _bilinear(product, args[1:3], {}, out, t[1:3])
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    if inner is not None and alpha != 1:
        inner = inner * alpha
    return inner if t[0] is None else _plus(inner, _shaped(t[0] * beta, out))


def _convolution(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    x, weight, _, *geometry = args
    moved = None if t[0] is None else func(t[0], weight, None, *geometry)
    if t[1] is not None:
        return _plus(moved, func(x, t[1], t[2], *geometry))
    return moved if t[2] is None else _plus(moved, _per_channel(t[2], out).expand(out.shape))


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def _batch_norm(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    """Batch norm: its scale is per channel, so it commutes with the (symmetric) Jacobian and the kernel may apply it."""
    x, weight, _, running_mean, running_var, training, _, eps = args
    mean, inverse = out[1], out[2]
    tangent = None
    if t[0] is not None:
        tangent = aten.native_batch_norm_backward(
            t[0], x, weight, running_mean, running_var, mean, inverse, training, eps, [True, False, False]
        )[0]
    if not training:
        mean, inverse = running_mean, torch.rsqrt(running_var + eps)
    if t[1] is not None:
        scale = _per_channel(inverse * t[1], x)
        tangent = x * scale if tangent is None else tangent.addcmul_(x, scale)
        tangent.sub_(_per_channel(mean, x) * scale)
    if t[2] is not None:
        tangent = _plus(tangent, _per_channel(t[2].to(x.dtype), x).expand(x.shape))
    return (tangent, *[None] * (len(out) - 1))


def _layer_norm(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    x, shape, weight, _, _ = args
    tangent = None
    if t[0] is not None:
        moved, x, mean, inverse = _of_one_type(t[0], x, out[1], out[2])
        tangent = aten.native_layer_norm_backward(moved, x, shape, mean, inverse, None, None, [True, False, False])[0]
        tangent = tangent if weight is None else tangent * weight
    if t[2] is not None:
        tangent = _plus(tangent, (x - out[1]) * out[2] * t[2])
    return (tangent if t[3] is None else _plus(tangent, _shaped(t[3], x))), None, None


def _of_one_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the widest of their types: statistics of half precision are in float32, which not every kernel takes."""
    widest = tensors[0].dtype
    for tensor in tensors[1:]:
        widest = torch.promote_types(widest, tensor.dtype)
    return tuple(tensor.to(widest) for tensor in tensors)


def _group_norm(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    x, weight, _, samples, channels, positions, groups, _ = args
    tangent = None
    if t[0] is not None:
        moved, x, mean, inverse = _of_one_type(t[0].contiguous(), x.contiguous(), out[1], out[2])
        tangent = aten.native_group_norm_backward(
            moved, x, mean, inverse, None, samples, channels, positions, groups, [True, False, False]
        )[0]
        tangent = tangent if weight is None else tangent * _per_channel(weight, x)
    if t[1] is not None:
        per_group = (samples, groups, -1)
        normalised = ((x.contiguous().reshape(per_group) - out[1].unsqueeze(-1)) * out[2].unsqueeze(-1)).view_as(x)
        tangent = _plus(tangent, normalised * _per_channel(t[1], x))
    return (tangent if t[2] is None else _plus(tangent, _per_channel(t[2], x).expand(x.shape))), None, None


def _gathered(dims: int) -> Rule:
    """Max pooling over the last ``dims`` dimensions: the tangent of each window's winner."""

    def rule(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
        winners = out[1]
        return t[0].flatten(-dims).gather(-1, winners.flatten(-dims)).view(winners.shape), None

    return rule


def _softmax(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    return aten._softmax_backward_data(t[0].to(out.dtype), out, args[1], out.dtype)


def _log_softmax(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    return t[0] - (out.exp() * t[0]).sum(args[1], keepdim=True)


def _native_dropout(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    probability, training = args[1], args[2] is not False
    return (t[0] * out[1] / ((1 - probability) or 1) if training else t[0]), None


def _where(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    zero = torch.zeros((), dtype=out.dtype, device=out.device)
    return torch.where(args[0], zero if t[1] is None else t[1], zero if t[2] is None else t[2])


def _backward_kernel(kernel: Callable[..., Tensor]) -> Rule:
    """Elementwise functions: the Jacobian is diagonal, so ``kernel(tangent, arguments, output)`` is the derivative."""

    def rule(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
        return kernel(t[0], args, kwargs, out)

    return rule


def _masked_fill(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    kept = torch.zeros_like(out) if t[0] is None else t[0].masked_fill(args[1], 0)
    return kept if t[2] is None else torch.where(args[1], t[2], kept)


def _leaky(t: Tensor, a: Sequence[Any]) -> Tensor:
    """Randomised leaky ReLU: its second argument holds the slopes that were drawn, in training."""
    lower, upper, training = _option(a, 2, 0.125), _option(a, 3, 1 / 3), _option(a, 4, False)
    return t * a[1] if training else aten.leaky_relu_backward(t, a[0], (lower + upper) / 2, False)


def _option(args: Sequence[Any], index: int, default: Any) -> Any:
    return args[index] if len(args) > index else default


# For complex numbers the kernels multiply by the conjugate of the derivative; the conjugate of a real tensor is itself.
_ELEMENTWISE: dict[Any, Callable[..., Tensor]] = {
    aten.relu: lambda t, a, k, out: aten.threshold_backward(t, out, 0),
    aten.threshold: lambda t, a, k, out: aten.threshold_backward(t, a[0], a[1]),
    aten.leaky_relu: lambda t, a, k, out: aten.leaky_relu_backward(t, a[0], _option(a, 1, 0.01), False),
    aten.hardtanh: lambda t, a, k, out: aten.hardtanh_backward(t, a[0], _option(a, 1, -1), _option(a, 2, 1)),
    aten.gelu: lambda t, a, k, out: aten.gelu_backward(t, a[0], **k),
    aten.silu: lambda t, a, k, out: aten.silu_backward(t, a[0]),
    aten.mish: lambda t, a, k, out: aten.mish_backward(t, a[0]),
    aten.hardswish: lambda t, a, k, out: aten.hardswish_backward(t, a[0]),
    aten.hardsigmoid: lambda t, a, k, out: aten.hardsigmoid_backward(t, a[0]),
    aten.tanh: lambda t, a, k, out: aten.tanh_backward(t.conj_physical(), out).conj_physical(),
    aten.sigmoid: lambda t, a, k, out: aten.sigmoid_backward(t.conj_physical(), out).conj_physical(),
    aten.softplus: lambda t, a, k, out: aten.softplus_backward(t, a[0], _option(a, 1, 1), _option(a, 2, 20)),
    aten.elu: lambda t, a, k, out: aten.elu_backward(t, _option(a, 1, 1), _option(a, 2, 1), _option(a, 3, 1), False, a[0]),
    aten.rrelu_with_noise: lambda t, a, k, out: _leaky(t, a),
    aten.exp: lambda t, a, k, out: t * out,
    aten.log: lambda t, a, k, out: t / a[0],
    aten.sqrt: lambda t, a, k, out: t / (2 * out),
    aten.rsqrt: lambda t, a, k, out: t * out.pow(3).mul_(-0.5),
}

_LINEAR = [
    "clone",
    "_to_copy",
    "_unsafe_view",
    "neg",
    "sum",
    "mean",
    "cat",
    "stack",
    "cumsum",
    "flip",
    "roll",
    "repeat",
    "tril",
    "triu",
    "index",
    "index_select",
    "gather",
    "take",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "im2col",
    "col2im",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "unsafe_chunk",
]

# Functions whose output does not depend smoothly on their argument, and `.detach()`, which by its name stops a tangent.
_CONSTANT = [
    "detach",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "randint_like",
    "new_empty",
    "new_empty_strided",
    "new_zeros",
    "new_ones",
    "new_full",
    "bernoulli",
    "normal",
    "poisson",
    "binomial",
    "multinomial",
    "sign",
    "signbit",
    "floor",
    "ceil",
    "round",
    "trunc",
    "isnan",
    "isinf",
    "isfinite",
    "equal",
    "_local_scalar_dense",
    "item",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_not",
    "logical_and",
    "logical_or",
    "argmax",
    "argmin",
]


def constant(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    """The rule of what does not depend on its arguments, or not smoothly: no tangent."""
    return None


RULES: dict[Any, Rule] = {
    **{getattr(aten, name): _on_tangent for name in _LINEAR},
    **{getattr(aten, name): constant for name in _CONSTANT if hasattr(aten, name)},
    **{operation: _backward_kernel(kernel) for operation, kernel in _ELEMENTWISE.items()},
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv, aten.dot, aten.mul), _bilinear),
    **dict.fromkeys((aten.addmm, aten.baddbmm), _addmm),
    aten.constant_pad_nd: _pad,
    aten.embedding: _embedding,
    aten.masked_fill: _masked_fill,
    **dict.fromkeys((aten.native_batch_norm, aten.cudnn_batch_norm), _batch_norm),
    **dict.fromkeys((aten.max_pool2d_with_indices, aten.adaptive_max_pool2d, aten.fractional_max_pool2d), _gathered(2)),
    **dict.fromkeys((aten.max_pool3d_with_indices, aten.adaptive_max_pool3d), _gathered(3)),
    **dict.fromkeys(FUSED, attention),
    aten.add: _add,
    aten.sub: _sub,
    aten.div: _div,
    aten.convolution: _convolution,
    aten.native_layer_norm: _layer_norm,
    aten.native_group_norm: _group_norm,
    aten._softmax: _softmax,
    aten._log_softmax: _log_softmax,
    aten.native_dropout: _native_dropout,
    aten.where: _where,
}
