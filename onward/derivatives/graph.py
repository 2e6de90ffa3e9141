"""Autograd's graph, walked: what is behind an output, and how its parameters are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.autograd.graph
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from onward.phases import phase


def backward(
    roots: Tensor | Sequence[Tensor],
    signals: Tensor | Sequence[Tensor] | None = None,
    *,
    retain_graph: bool = False,
    inputs: Sequence[Any] | None = None,
) -> None:
    """:func:`torch.autograd.backward`, as the phase of that name."""
    with phase("backward"):
        if (ends := _plain(roots, signals)) is None:
            torch.autograd.backward(roots, signals, retain_graph=retain_graph, inputs=inputs)
        else:
            _run(*ends, retain_graph, False, tuple(inputs or ()), allow_unreachable=True, accumulate_grad=True)


def grad(
    roots: Tensor | Sequence[Tensor],
    edges: Sequence[Any],
    signals: Tensor | Sequence[Tensor] | None = None,
    *,
    retain_graph: bool = False,
    allow_unused: bool = False,
) -> Sequence[Tensor | None]:
    """:func:`torch.autograd.grad`, as the phase ``backward``: what arrives at each edge, a tensor or a place in the graph."""
    with phase("backward"):
        if (ends := _plain(roots, signals)) is None:
            return torch.autograd.grad(roots, edges, signals, retain_graph=retain_graph, allow_unused=allow_unused)
        return _run(*ends, retain_graph, False, tuple(edges), allow_unused, accumulate_grad=False)


_run = torch.autograd.graph._engine_run_backward


def _plain(roots: Any, signals: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
    """Roots with their signals as autograd's engine takes them; None where :mod:`torch.autograd` has to look at them first.

    In Python it looks for longer than a small block takes to be differentiated.
    """
    if signals is None:
        return None
    if isinstance(roots, Tensor):
        roots, signals = (roots,), (signals,)
    for root, signal in zip(roots, signals, strict=True):
        if type(root) is not Tensor or type(signal) is not Tensor:
            return None
        if root.shape != signal.shape or root.dtype is not signal.dtype:
            return None
    return tuple(roots), tuple(signals)


def is_traced() -> bool:
    """Whether what runs is being traced (:func:`onward.capture`), so that no number in a tensor can be looked at."""
    return get_proxy_mode() is not None


def nodes_behind(starts: Iterable[Any]) -> Iterator[Any]:
    """The nodes of an autograd graph from some of them on, each once."""
    pending, seen = list(starts), set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(following for following, _ in node.next_functions)


def parameters_behind(*outputs: Tensor) -> dict[nn.Parameter, int]:
    """The parameters in the graph of a block's outputs, and in how many places each is used, itself or a view of it."""
    places: Counter[nn.Parameter] = Counter()
    for node in nodes_behind(output.grad_fn for output in outputs):
        for following, _ in node.next_functions:
            p = _seen_through_views(following)
            if p is not None:
                places[p] += node.name() not in _VIEWS
    return places


def padding_rows(*outputs: Tensor) -> dict[nn.Parameter, int]:
    """The row that the graph behind a block's outputs leaves out of a parameter's gradient: ``padding_idx`` of an embedding.

    None for a parameter that is used in any other way too, through which that row learns.
    """
    rows: dict[nn.Parameter, set[int | None]] = {}
    for node in nodes_behind(output.grad_fn for output in outputs):
        if node.name() in _VIEWS:
            continue
        for following, _ in node.next_functions:
            if (p := _seen_through_views(following)) is not None:
                row = node._saved_padding_idx if node.name() == "EmbeddingBackward0" else -1
                rows.setdefault(p, set()).add(row if 0 <= row < len(p) else None)
    return {p: row for p, (row, *others) in rows.items() if row is not None and not others}


def _seen_through_views(node: Any) -> nn.Parameter | None:
    """The parameter that a node of the graph is, or is a view of."""
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    p = getattr(node, "variable", None)
    return p if type(p) is nn.Parameter or isinstance(p, nn.Parameter) else None  # the second takes long


_VIEWS = {
    f"{name}Backward{version}"
    for name in ("T", "Transpose", "Permute", "View", "UnsafeView", "Expand", "Unsqueeze", "Squeeze", "Alias", "ToCopy")
    for version in range(3)
}
"""What comes between a parameter and an operation that uses it; one view may serve several operations."""
