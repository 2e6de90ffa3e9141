"""Per-sample gradients of each kind of layer, and of whole blocks: one small rule per layer type."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from onward.derivatives.graph import grad, nodes_behind, parameters_behind
from onward.derivatives.per_sample import _COPY, _HELD, Outer, PerSample, Rows, Sum, Tokens, weighted_sum
from onward.errors import UsageError


def linear(layer: nn.Linear, x: Tensor, errors: Sequence[Tensor]) -> dict[str, PerSample]:
    """x (N, ..., I) and errors (N, ..., O)."""
    x = x.reshape(len(x), -1, x.shape[-1])
    errors = [b.reshape(len(b), -1, b.shape[-1]) for b in errors]

    def total(i: int, weights: Tensor) -> Tensor:
        return (errors[i] * weights.to(x.dtype).view(-1, 1, 1)).flatten(0, 1).T @ x.flatten(0, 1)

    held = Outer(
        lambda part: x[part].mT.unsqueeze(1),
        layer.in_features,
        [b.mT.unsqueeze(1) for b in errors],
        layer.weight.shape,
        total,
    )
    return {"weight": held, "bias": Rows([b.sum(1) for b in errors])}


def convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, errors: Sequence[Tensor]) -> dict[str, PerSample]:
    """x (N, C, ...) and errors (N, O, ...)."""
    dims, groups = len(layer.kernel_size), layer.groups
    padding: Any = layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode), (0,) * dims
    features = layer.weight[0].numel()
    size = errors[0].shape[2:]

    def unfold(part: slice) -> Tensor:
        padded = pad(x[part])
        steps = padded.stride()[2:]
        windows = padded.as_strided(
            (*padded.shape[:2], *layer.kernel_size, *size),
            (
                *padded.stride()[:2],
                *(s * d for s, d in zip(steps, layer.dilation, strict=True)),
                *(s * d for s, d in zip(steps, layer.stride, strict=True)),
            ),
        )
        return windows.reshape(len(padded), groups, features, size.numel())

    def between(part: slice) -> Tensor:
        """a^T a as a sum over the kernel's places of shifted Gram matrices of the input."""
        padded = pad(x[part])
        rows = padded.reshape(len(padded), groups, -1, padded[0, 0].numel())
        gram = (rows.mT @ rows).view(len(padded), groups, *padded.shape[2:], *padded.shape[2:])
        total = None
        for place in product(*(range(k) for k in layer.kernel_size)):
            steps = [
                slice(p * d, p * d + s * (n - 1) + 1, s)
                for p, d, s, n in zip(place, layer.dilation, layer.stride, size, strict=True)
            ]
            shifted = gram[(slice(None), slice(None), *steps, *steps)]
            total = shifted.clone() if total is None else total.add_(shifted)
        assert total is not None
        return total.view(len(padded), groups, size.numel(), size.numel())

    def pad(part: Tensor) -> Tensor:
        return F.pad(part, [p for q in reversed(padding) for p in (q, q)])

    grad = (conv1d_weight, conv2d_weight, conv3d_weight)[dims - 1]

    def total(i: int, weights: Tensor) -> Tensor:
        b = errors[i] * weights.to(x.dtype).view(-1, 1, *[1] * dims)
        return grad(x, layer.weight.shape, b, layer.stride, padding, layer.dilation, groups)

    shaped = [b.reshape(len(b), groups, -1, size.numel()) for b in errors]
    inputs = math.prod(n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True))
    places = math.prod(layer.kernel_size)
    cost = inputs**2 * x.shape[1] // groups + places * size.numel() ** 2 * _COPY
    held = Outer(unfold, features, shaped, layer.weight.shape, total, between, cost)
    return {"weight": held, "bias": Rows([b.flatten(2).sum(2) for b in errors])}


def batch_norm(
    layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor, errors: Sequence[Tensor]
) -> dict[str, PerSample]:
    """x and errors (N, C, ...)."""
    of_batch = layer.training or layer.running_mean is None or layer.running_var is None
    mean, variance = (None, None) if of_batch else (layer.running_mean, layer.running_var)
    normalised = F.batch_norm(x, mean, variance, training=of_batch, eps=layer.eps).reshape(*x.shape[:2], -1)
    errors = [b.reshape(normalised.shape) for b in errors]
    weight = [torch.linalg.vecdot(b, normalised) for b in errors]
    return {"weight": Rows(weight), "bias": Rows([b.sum(2) for b in errors])}


def layer_norm(layer: nn.LayerNorm, x: Tensor, errors: Sequence[Tensor]) -> dict[str, PerSample]:
    """x and errors (N, ..., *normalized_shape)."""
    shape = tuple(layer.normalized_shape)
    normalised = F.layer_norm(x, shape, eps=layer.eps)
    weight = [(b * normalised).reshape(len(b), -1, *shape).sum(1) for b in errors]
    return {"weight": Rows(weight), "bias": Rows([b.reshape(len(b), -1, *shape).sum(1) for b in errors])}


def group_norm(layer: nn.GroupNorm, x: Tensor, errors: Sequence[Tensor]) -> dict[str, PerSample]:
    """x and errors (N, C, ...)."""
    normalised = F.group_norm(x, layer.num_groups, eps=layer.eps)
    weight = [(b * normalised).reshape(*b.shape[:2], -1).sum(2) for b in errors]
    return {"weight": Rows(weight), "bias": Rows([b.reshape(*b.shape[:2], -1).sum(2) for b in errors])}


def embedding(layer: nn.Embedding, x: Tensor, errors: Sequence[Tensor]) -> dict[str, PerSample]:
    """x (N, ...) of indices and errors (N, ..., d)."""
    if layer.scale_grad_by_freq or layer.sparse:
        return {}
    indices = x.reshape(len(x), -1)
    errors = [b.reshape(*indices.shape, -1) for b in errors]
    if layer.padding_idx is not None:
        errors = [b * (indices != layer.padding_idx).unsqueeze(2) for b in errors]
    return {"weight": Tokens(indices, errors, layer.weight.shape)}


RULES: dict[type[nn.Module], Callable[[Any, Tensor, Sequence[Tensor]], dict[str, PerSample]]] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
    nn.LayerNorm: layer_norm,
    nn.GroupNorm: group_norm,
    nn.Embedding: embedding,
}


@dataclass(frozen=True)
class Use:
    """One run of a layer, the count-th in a pass: its input, and where in the graph the gradient of its output arrives."""

    layer: nn.Module
    count: int
    x: Tensor
    version: int
    output: GradientEdge
    samples: int


@contextmanager
def record_uses(model: nn.Module) -> Iterator[list[Use]]:
    """Within the block, every run of a layer that has a rule is added to the list (which its owner may empty)."""
    uses: list[Use] = []
    counts: Counter[nn.Module] = Counter()

    def note(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if (
            len(args) == 1
            and isinstance(output, Tensor)
            and output.requires_grad
            and any(True for _ in layer.parameters(recurse=False))
        ):
            x = args[0].detach()
            counts[layer] += 1
            uses.append(Use(layer, counts[layer], x, x._version, get_gradient_edge(output), output.shape[0]))

    handles = [layer.register_forward_hook(note) for layer in model.modules() if type(layer) in RULES and _is_plain(layer)]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def _is_plain(layer: nn.Module) -> bool:
    """Whether what a layer returns, and the gradient that arrives there, are its own: nothing is hooked in or put over it."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return "forward" not in vars(layer) and not any(hooks) and not any(p._backward_hooks for p in layer.parameters())


def per_sample_gradients(
    h: Tensor, uses: Sequence[Use], signals: Sequence[Tensor], arrived: Sequence[Sequence[Tensor | None]]
) -> Iterator[tuple[nn.Parameter, PerSample]]:
    """The per-sample gradients of each parameter of a block, one parameter at a time.

    ``h`` is the block's output, ``signals`` the gradients delivered to it, and ``arrived[i][j]`` what of signal i arrives at
    the output of ``uses[j]``. Where a layer mixes samples, a row is what that row of the layer's input and arriving gradient
    contribute. A parameter with a use that no rule covers is differentiated once for each row of the signals instead.
    """
    places = parameters_behind(h)
    by_layer: dict[nn.Module, list[int]] = {}
    for j, (use, by_sample) in enumerate(zip(uses, _rows_are_samples(h, uses, signals[0], arrived[0]), strict=True)):
        if by_sample:
            by_layer.setdefault(use.layer, []).append(j)
    covered: set[nn.Parameter] = set()
    for layer, indices in by_layer.items():
        of_layer: dict[str, list[PerSample]] = {}
        for j in indices:
            if uses[j].x._version != uses[j].version:
                raise UsageError(
                    f"the input of a {type(layer).__name__} layer is overwritten in place after the layer ran, and its "
                    "per-sample gradient still needs it: use the form of what follows that is not in place"
                )
            dtype = next(layer.parameters()).dtype
            errors = [given[j] for given in arrived]
            if any(b is None for b in errors):  # this run does not reach the block's output
                continue
            x = uses[j].x.to(dtype) if uses[j].x.is_floating_point() else uses[j].x
            for name, gradients in RULES[type(layer)](layer, x, [b.to(dtype) for b in errors if b is not None]).items():
                of_layer.setdefault(name, []).append(gradients)
        for name, found in of_layer.items():
            p = getattr(layer, name)
            if p in places and places[p] == len(found):
                covered.add(p)
                yield p, found[0] if len(found) == 1 else Sum(found)
    rest: list[nn.Parameter] = []
    for p in [p for p in places if p not in covered]:
        if rest and sum(q.numel() for q in (*rest, p)) * len(h) * len(signals) > _HELD:
            yield from by_rows(h, rest, signals)
            rest = []
        rest.append(p)
    if rest:
        yield from by_rows(h, rest, signals)


_seen: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()
"""For each run of each layer, whether its rows are samples, from the first batch that showed it."""


def _rows_are_samples(h: Tensor, uses: Sequence[Use], signal: Tensor, arrived: Sequence[Tensor | None]) -> list[bool]:
    """Whether the rows of each run of a layer are the samples: each row of what arrives is scaled as that sample's signal is.

    A layer that has had another number of rows once (an expert that a part of the batch is handed to) is not asked again.
    """
    for use in uses:
        if not use.samples == len(h) == len(use.x):
            _seen.setdefault(use.layer, {})[use.count] = False
    undecided = [(u, b) for u, b in zip(uses, arrived, strict=True) if b is not None and u.count not in _seen.get(u.layer, {})]
    asks = undecided and len(h) > 1 and not any(map(_of_batch, nodes_behind([h.grad_fn])))
    if asks and (asked := [(use, b) for use, b in undecided if b.abs().max() > 0]):
        scales = torch.linspace(1, 2, len(h), dtype=h.dtype, device=h.device)
        scaled = weighted_sum([signal], [scales])
        found = grad(h, [use.output for use, _ in asked], scaled, retain_graph=True)
        for (use, b), other in zip(asked, found, strict=True):
            wanted = weighted_sum([b], [scales])
            assert other is not None
            alike = bool((other - wanted).abs().max() <= 1e-3 * wanted.abs().max() / len(h))
            if not alike or bool((b.flatten(1) != 0).any(1).all()):  # where nothing arrives (dead units), another batch tells
                _seen.setdefault(use.layer, {})[use.count] = alike
    return [
        b is not None and use.samples == len(h) == len(use.x) and _seen.get(use.layer, {}).get(use.count, True)
        for use, b in zip(uses, arrived, strict=True)
    ]


def _of_batch(node: Any) -> bool:
    """Whether a node of the graph is a batch norm with batch statistics."""
    return "BatchNorm" in node.name() and getattr(node, "_saved_training", True)


def by_rows(h: Tensor, parameters: Sequence[nn.Parameter], signals: Sequence[Tensor]) -> Iterator[tuple[nn.Parameter, Rows]]:
    """What each row of each signal at a block's output contributes to each parameter: one backward pass for every row."""
    held = [[torch.empty(len(h), *p.shape, dtype=p.dtype, device=p.device) for _ in signals] for p in parameters]
    for i, signal in enumerate(signals):
        for n in range(len(h)):
            row = torch.zeros_like(signal)
            row[n] = signal[n]
            # A custom function may return no gradient.
            found = grad(h, parameters, row, retain_graph=True, allow_unused=True)
            for rows, gradient in zip(held, found, strict=True):
                rows[i][n] = 0 if gradient is None else gradient.to_dense() if gradient.is_sparse else gradient
    for p, rows in zip(parameters, held, strict=True):
        yield p, Rows(rows)
