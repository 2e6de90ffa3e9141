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

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Pair = tuple[int, int]
_CHUNK = 1 << 21  # numbers formed at a time
_HELD = 1 << 26  # numbers held at a time, where several parameters share the work
_COPY = 16  # moving one number takes as long as so many products


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
