"""Autograd's graph, walked: what is behind an output, and how its parameters are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from onward.phases import phase


def backward(*args: Any, **kwargs: Any) -> None:
    """:func:`torch.autograd.backward`, as the phase of that name."""
    with phase("backward"):
        torch.autograd.backward(*args, **kwargs)


def grad(*args: Any, **kwargs: Any) -> Any:
    """:func:`torch.autograd.grad`, as the phase ``backward``."""
    with phase("backward"):
        return torch.autograd.grad(*args, **kwargs)


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
    return p if isinstance(p, nn.Parameter) else None


_VIEWS = {
    f"{name}Backward{version}"
    for name in ("T", "Transpose", "Permute", "View", "UnsafeView", "Expand", "Unsqueeze", "Squeeze", "Alias", "ToCopy")
    for version in range(3)
}
"""What comes between a parameter and an operation that uses it; one view may serve several operations."""
