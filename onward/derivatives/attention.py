"""The tangent of fused attention, some queries at a time: no matrix of all queries by all keys is ever held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onward.errors import UsageError

aten = torch.ops.aten

_NUMBERS = 1 << 20
"""Scores held at once, of some queries and of all keys."""
_LEAST = 64  # queries at once, however many keys there are

FUSED = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
"""PyTorch's fused kernels, none of which has a forward derivative."""


def attention(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    """The rule of fused attention ``softmax(S) v``, S = scale q k^T + mask, with P = softmax(S):

    ``P * (S' - rowsum(P * S')) v + P v'``, where S' = scale (q' k^T + q k'^T) + mask'.
    """
    given, moving = _by_name(func, args, kwargs), _by_name(func, t, {})
    if given["dropout_p"]:
        raise UsageError(
            f"forward mode cannot differentiate {func} with dropout: run the step within "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )
    heads, scale, causal = args[0].shape[:-2], given["scale"], given["is_causal"]
    scale = args[0].shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (_rows(a, heads) for a in args[:3])
    tq, tk, tv = (None if a is None else _rows(a, heads) for a in t[:3])
    both = None if tq is None or tk is None else (torch.cat([tq, q], -1), torch.cat([k, tk], -1))
    whole = (*heads, q.shape[1], k.shape[1])
    mask, moving_mask = (names.get("attn_mask", names.get("attn_bias")) for names in (given, moving))
    mask, moving_mask = (None if a is None else a.expand(whole) for a in (mask, moving_mask))
    tangent = q.new_empty(*q.shape[:2], v.shape[-1])
    for some, queries in _parts(len(q), q.shape[1], k.shape[1]):
        seen = slice(0, min(queries.stop, k.shape[1]) if causal else k.shape[1])
        scores = _product(q[some, queries], k[some, seen], scale)
        if mask is not None:
            scores += _part(mask, some, queries, seen)
        if causal:
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1 + queries.start)
            scores.masked_fill_(ahead, float("-inf"))
        weights = aten._safe_softmax(scores, -1)  # zero, as in the kernels, where the mask lets nothing through
        moved: Tensor | None = None
        for a, b in (both,) if both is not None else ((tq, k), (q, tk)):
            if a is not None and b is not None:
                moved = _product(a[some, queries], b[some, seen], scale)
        if moving_mask is not None:
            other = _part(moving_mask, some, queries, seen)
            moved = other if moved is None else moved.add_(other)
        part = None if tv is None else torch.bmm(weights.to(v.dtype), tv[some, seen])
        if moved is not None:
            moved = aten._softmax_backward_data(moved.to(weights.dtype), weights, -1, weights.dtype).to(v.dtype)
            part = torch.bmm(moved, v[some, seen]) if part is None else part.baddbmm_(moved, v[some, seen])
        assert part is not None
        tangent[some, queries] = part
    return (tangent.view(*heads, *tangent.shape[1:]), *[None] * (len(out) - 1))


def _rows(a: Tensor, heads: Sequence[int]) -> Tensor:
    """Of shape (batch and heads, positions, features); heads of keys and of values may each serve several of queries."""
    if a.shape[-3] != heads[-1]:
        a = a.repeat_interleave(heads[-1] // a.shape[-3], -3)
    return a.reshape(-1, *a.shape[-2:])


def _parts(heads: int, queries: int, keys: int) -> list[tuple[slice, slice]]:
    """Which heads and which queries are computed at once."""
    rows = max(1, min(queries, max(_LEAST, _NUMBERS // max(1, keys))))
    together = max(1, _NUMBERS // max(1, rows * keys))
    return [
        (slice(h, min(h + together, heads)), slice(first, min(first + rows, queries)))
        for h in range(0, heads, together)
        for first in range(0, queries, rows)
    ]


def _part(mask: Tensor, some: slice, queries: slice, seen: slice) -> Tensor:
    """A mask of shape (batch, heads, queries, keys), by expansion, for some of all heads in a row."""
    index = torch.arange(some.start, some.stop, device=mask.device)
    return mask[:, :, queries, seen][index // mask.shape[1], index % mask.shape[1]]


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale a b^T``, the scores, which kernels for half precision keep in float32 too."""
    if a.dtype in (torch.float16, torch.bfloat16):
        if a.is_cuda:
            return torch.bmm(a, b.mT, out_dtype=torch.float32).mul_(scale)
        a, b = a.float(), b.float()
    return torch.baddbmm(a.new_empty(()), a, b.mT, beta=0, alpha=scale)


def _by_name(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name: dispatch leaves out the last ones where they equal their defaults."""
    parameters = func._schema.arguments
    defaults = {p.name: p.default_value for p in parameters if p.has_default_value()}
    return defaults | {p.name: a for p, a in zip(parameters, args, strict=False)} | kwargs
