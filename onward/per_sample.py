"""Per-sample gradients of parameters: their inner products and weighted sums, without holding them.

A layer's per-sample gradient is made of its input x_n and of the gradient b_n that arrives at its output. For a linear layer
or a convolution it is a sum of outer products over positions, ``G_n = sum_p b_{n,p} (x) a_{n,p}``, a the unfolded input: so

    <G_n, U_n> = sum_{p,q} (a_p . a_q) (b^G_p . b^U_q)     (Gram form: positions^2 terms, cheap in late layers)

or G_n and U_n are formed for a few samples at a time (direct form: cheap in early layers), and ``sum_n w_n G_n`` is the layer's
ordinary weight gradient for errors rescaled by w_n. One rule for each type of layer, in ``RULES``. Parameters of anything else
are differentiated sample by sample (:func:`by_rows`).

A layer's rows need not be the samples, even where there are as many: the input of a positional embedding may be
``arange(T)`` with T = N. So a layer is seen to keep samples apart before its rule is used (:func:`_rows_are_samples`). A block
with batch statistics keeps nothing apart, and there a layer with N rows is taken to have one for each sample.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from onward.errors import UsageError
from onward.run import nodes_behind

Pair = tuple[int, int]
_CHUNK = 1 << 21  # numbers formed at a time
_HELD = 1 << 26  # numbers held at a time, where several parameters share the work
_COPY = 16  # products that one number costs to move


class PerSample:
    """The gradients of one parameter, one for each sample and each of several error signals: G^i_n.

    A child class says what :meth:`rows` are, and does the rest faster where it can.
    """

    samples: int
    shape: torch.Size
    """Of the parameter."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the gradients."""
        return self.rows(0, slice(0, 1)).dtype

    def rows(self, i: int, part: slice) -> Tensor:
        """G^i_n for a range of samples n, of shape (samples, *shape)."""
        raise NotImplementedError

    def inner(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """<G^i_n, G^j_n> for each pair (i, j), each of shape (N,)."""
        signals = {i for pair in pairs for i in pair}
        return self._in_chunks(lambda part: {i: self.rows(i, part) for i in signals}, pairs)

    def gram(self, i: int, j: int) -> Tensor:
        """<G^i_n, G^j_m> for all n and m, of shape (N, N), in float64."""
        left, right = (self.rows(k, slice(0, self.samples)).reshape(self.samples, -1).double() for k in (i, j))
        return left @ right.T

    def total(self, i: int, weights: Tensor) -> Tensor:
        """sum_n weights_n G^i_n, of the parameter's shape."""
        total = None
        for part in self.parts():
            rows = self.rows(i, part)
            chunk = torch.tensordot(weights[part].to(rows.dtype), rows, 1)
            total = chunk if total is None else total.add_(chunk)
        assert total is not None
        return total

    def weighed(
        self, pairs: Sequence[Pair], weigh: Callable[[Sequence[Tensor]], Sequence[Tensor]], *, by_sample: bool = True
    ) -> Tensor:
        """``sum_n sum_i w^i_n G^{1+i}_n``, with the weights w that ``weigh`` makes of the inner products of ``pairs``.

        ``by_sample``: a sample's weight depends on its own inner products alone, so they may come a few samples at a time.
        """
        return self.totals(weigh(self.inner(pairs)))

    def totals(self, weights: Sequence[Tensor], first: int = 1) -> Tensor:
        """``sum_n sum_i weights^i_n G^{first+i}_n``."""
        total = self.total(first, weights[0])
        for i, others in enumerate(weights[1:], start=first + 1):
            total += self.total(i, others)
        return total

    def parts(self, numbers: int | None = None) -> Iterator[slice]:
        """Ranges of samples of which ``numbers`` (default: the parameter's) each make a chunk of tolerable size."""
        size = max(1, _CHUNK // max(1, numbers or self.shape.numel()))
        yield from (slice(start, min(start + size, self.samples)) for start in range(0, self.samples, size))

    def _in_chunks(
        self, rows: Callable[[slice], Mapping[int, Tensor]], pairs: Sequence[Pair], numbers: int | None = None
    ) -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in pairs]
        for part in self.parts(numbers):
            formed = rows(part)
            for products, (i, j) in zip(found, pairs, strict=True):
                products.append(dots(formed[i], formed[j]))
        return [torch.cat(products) for products in found]


class Rows(PerSample):
    """Gradients small enough, or strange enough, to be held: one (N, *shape) tensor for each signal."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        self.held = held
        self.samples, self.shape = held[0].shape[0], held[0].shape[1:]

    def rows(self, i: int, part: slice) -> Tensor:
        return self.held[i][part]


class Outer(PerSample):
    """Sums of outer products over P positions in g groups: ``rows = b a^T``, with a (N, g, I, P) and b (N, g, O, P).

    ``unfold(part)`` gives a for a range of samples; ``between(part)`` its Gram matrices a^T a (N, g, P, P), at a cost of
    ``between_cost`` products for each sample and group, where that is cheaper than from a; ``total(i, weights)`` the weighted
    sum. ``gram_form`` None chooses the cheaper form of inner products.
    """

    def __init__(
        self,
        unfold: Callable[[slice], Tensor],
        features: int,
        errors: Sequence[Tensor],
        shape: torch.Size,
        total: Callable[[int, Tensor], Tensor],
        between: Callable[[slice], Tensor] | None = None,
        between_cost: int = 0,
        gram_form: bool | None = None,
    ) -> None:
        self.unfold, self.features, self.errors, self.shape, self._total = unfold, features, errors, shape, total
        self.samples, self.groups, self.outputs, self.positions = errors[0].shape
        from_unfolded = self.positions * features * (self.positions + _COPY)
        if between is None or from_unfolded < between_cost:
            between, between_cost = None, from_unfolded
        self._cheaper_between, self.between_cost = between, between_cost
        self.gram_form = gram_form

    def rows(self, i: int, part: slice) -> Tensor:
        return (self.errors[i][part] @ self.unfold(part).mT).reshape(-1, *self.shape)

    def inner(self, pairs: Sequence[Pair]) -> list[Tensor]:
        if not self._prefers_gram(pairs):
            return self._in_chunks(lambda part: self._formed(pairs, part), pairs, self._direct_numbers(pairs))
        found: list[list[Tensor]] = [[] for _ in pairs]
        for part in self.parts(self.groups * (self.features * self.positions + 3 * self.positions**2)):
            between = self._between(part)
            for products, (i, j) in zip(found, pairs, strict=True):
                products.append(dots(between, self.errors[i][part].mT @ self.errors[j][part]))
        return [torch.cat(products) for products in found]

    def weighed(
        self, pairs: Sequence[Pair], weigh: Callable[[Sequence[Tensor]], Sequence[Tensor]], *, by_sample: bool = True
    ) -> Tensor:
        if not by_sample or not pairs or self._prefers_gram(pairs):
            return super().weighed(pairs, weigh, by_sample=by_sample)
        total = self.errors[0].new_zeros(self.shape).flatten()
        for part in self.parts(self._direct_numbers(pairs)):
            formed = self._formed(pairs, part)
            for i, weights in enumerate(weigh([dots(formed[i], formed[j]) for i, j in pairs]), start=1):
                total.addmv_(formed[i].flatten(1).T, weights.to(total.dtype))
        return total.view(self.shape)

    def gram(self, i: int, j: int) -> Tensor:
        if self.positions == 1:
            everything = self.unfold(slice(0, self.samples)), self.errors[i], self.errors[j]
            a, b, c = (t.squeeze(3).transpose(0, 1).double() for t in everything)
            return ((a @ a.mT) * (b @ c.mT)).sum(0)
        # A few of the layer's outputs at a time, for all samples.
        size = max(1, _HELD // (8 * self.samples * self.groups * self.features))
        gram = self.errors[i].new_zeros(self.samples, self.samples, dtype=torch.float64)
        for start in range(0, self.outputs, size):
            left = self._some_outputs(i, slice(start, start + size))
            gram += left @ (left if i == j else self._some_outputs(j, slice(start, start + size))).T
        return gram

    def total(self, i: int, weights: Tensor) -> Tensor:
        return self._total(i, weights)

    def _some_outputs(self, i: int, outputs: slice) -> Tensor:
        parts = self.parts(self.groups * self.features * self.positions)
        return torch.cat([(self.errors[i][part, :, outputs] @ self.unfold(part).mT).flatten(1).double() for part in parts])

    def _between(self, part: slice) -> Tensor:
        if self._cheaper_between is not None:
            return self._cheaper_between(part)
        a = self.unfold(part)
        return a.mT @ a

    def _formed(self, pairs: Sequence[Pair], part: slice) -> dict[int, Tensor]:
        a = self.unfold(part).mT
        return {i: self.errors[i][part] @ a for i in sorted({i for pair in pairs for i in pair})}

    def _direct_numbers(self, pairs: Sequence[Pair]) -> int:
        signals = len({i for pair in pairs for i in pair})
        return self.groups * self.features * (self.positions + signals * self.outputs)

    def _prefers_gram(self, pairs: Sequence[Pair]) -> bool:
        if self.gram_form is not None:
            return self.gram_form
        signals = len({i for pair in pairs for i in pair})
        direct = self.positions * self.features * (self.outputs * signals + _COPY)
        return self.between_cost + self.positions**2 * (self.outputs * len(pairs) + _COPY) < direct


class Tokens(PerSample):
    """The gradients of an embedding: rows of errors b (N, T, d) added up at the indices (N, T) of their tokens."""

    def __init__(self, indices: Tensor, errors: Sequence[Tensor], shape: torch.Size) -> None:
        self.indices, self.errors, self.shape = indices, errors, shape
        self.samples = indices.shape[0]

    def rows(self, i: int, part: slice) -> Tensor:
        indices, b = self.indices[part], self.errors[i][part]
        made = b.new_zeros(len(indices), *self.shape)
        return made.scatter_add_(1, indices.unsqueeze(2).expand_as(b), b)

    def inner(self, pairs: Sequence[Pair]) -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in pairs]
        for part in self.parts(3 * self.indices.shape[1] ** 2):
            same = self.indices[part].unsqueeze(2) == self.indices[part].unsqueeze(1)
            for products, (i, j) in zip(found, pairs, strict=True):
                b = self.errors[i][part] @ self.errors[j][part].mT
                products.append((b * same).sum((1, 2)))
        return [torch.cat(products) for products in found]

    def total(self, i: int, weights: Tensor) -> Tensor:
        b = self.errors[i] * weights.to(self.errors[i].dtype).view(-1, 1, 1)
        return b.new_zeros(self.shape).index_add_(0, self.indices.flatten(), b.flatten(0, 1))


class Drawn(PerSample):
    """A target's gradients as signal 0, and random directions as signals 1 to m, drawn again each time they are needed."""

    def __init__(self, target: PerSample, draw: Callable[[int, slice], Tensor]) -> None:
        self.target, self.draw = target, draw
        self.samples, self.shape = target.samples, target.shape

    def rows(self, i: int, part: slice) -> Tensor:
        return self.target.rows(0, part) if i == 0 else self.draw(i - 1, part)


class Sum(PerSample):
    """A parameter that is used several times: the sum of what each use contributes."""

    def __init__(self, uses: Sequence[PerSample]) -> None:
        self.uses = uses
        self.samples, self.shape = uses[0].samples, uses[0].shape

    def rows(self, i: int, part: slice) -> Tensor:
        return torch.stack([use.rows(i, part) for use in self.uses]).sum(0)

    def total(self, i: int, weights: Tensor) -> Tensor:
        return torch.stack([use.total(i, weights) for use in self.uses]).sum(0)


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


def parameters_behind(*outputs: Tensor) -> dict[nn.Parameter, int]:
    """The parameters in the graph of a block's outputs, and in how many places each is used, itself or a view of it."""
    places: Counter[nn.Parameter] = Counter()
    for node in _graph(*outputs):
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
    for node in _graph(*outputs):
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


def _graph(*outputs: Tensor) -> Iterator[Any]:
    """The nodes of the graph behind tensors."""
    return nodes_behind(output.grad_fn for output in outputs)


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
"""Of each layer and count of its runs, whether its rows are samples, from the first batch that showed it."""


def _rows_are_samples(h: Tensor, uses: Sequence[Use], signal: Tensor, arrived: Sequence[Tensor | None]) -> list[bool]:
    """Whether the rows of each run of a layer are the samples: each row of what arrives is scaled as that sample's signal is.

    A layer that has had another number of rows once (an expert that a part of the batch is handed to) is not asked again.
    """
    for use in uses:
        if not use.samples == len(h) == len(use.x):
            _seen.setdefault(use.layer, {})[use.count] = False
    asked = [
        (use, b)
        for use, b in zip(uses, arrived, strict=True)
        if b is not None and use.count not in _seen.get(use.layer, {}) and b.abs().max() > 0
    ]
    if asked and len(h) > 1 and not any(map(_of_batch, _graph(h))):
        scales = torch.linspace(1, 2, len(h), dtype=h.dtype, device=h.device)
        scaled = weighted_sum([signal], [scales])
        found = torch.autograd.grad(h, [use.output for use, _ in asked], scaled, retain_graph=True)
        for (use, b), other in zip(asked, found, strict=True):
            wanted = weighted_sum([b], [scales])
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
            found = torch.autograd.grad(h, parameters, row, retain_graph=True, allow_unused=True, materialize_grads=True)
            for rows, gradient in zip(held, found, strict=True):
                rows[i][n] = gradient.to_dense() if gradient.is_sparse else gradient
    for p, rows in zip(parameters, held, strict=True):
        yield p, Rows(rows)


def dots(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of the rows of each sample, <a, b>_n of shape (N,), in float32 at least."""
    if left.dtype in (torch.float16, torch.bfloat16):
        left, right = left.float(), right.float()
    return torch.linalg.vecdot(left.reshape(len(left), -1), right.reshape(len(right), -1))


def weighted_sum(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """sum_i weights^i_n times row n of rows^i, for each sample n."""
    shape = (-1, *[1] * (rows[0].dim() - 1))
    total = rows[0] * weights[0].to(rows[0].dtype).view(shape)
    for more, others in zip(rows[1:], weights[1:], strict=True):
        total.addcmul_(more, others.to(more.dtype).view(shape))
    return total
