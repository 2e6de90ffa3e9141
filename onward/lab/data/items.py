"""Items of a `torch.utils.data.Dataset` of the user's own: a batch asks for each anew, for it may be random."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from onward.errors import UsageError
from onward.lab.data.inputs import Batch, Inputs, leaves, mapped, numbers, tensor, tensors
from onward.lab.system import generators, own
from onward.lab.tasks import Task

AT_ONCE = 256
"""Items that are looked at together as a run begins."""
TWICE = 8
"""Items that are asked for twice, to find out if they are drawn at random."""


@dataclass(frozen=True)
class Items:
    """Some rows of a Dataset. `items[rows]` is a batch; without a task, its targets are as the Dataset has them."""

    dataset: Dataset[Any]
    rows: Sequence[int]
    owner: own.Own
    task: Task | None = None
    sums: Sequence[str] = ()
    """Of each item a number that tells it from others; none where items are drawn at random."""

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, rows: Sequence[int]) -> Items:
        """Some of the rows."""
        return replace(self, rows=[self.rows[row] for row in rows], sums=[self.sums[row] for row in rows if self.sums])

    def __getitem__(self, rows: Tensor) -> Batch:
        asked = [self.rows[row] for row in rows.tolist()]
        pairs = [self._pair(row) for row in asked]
        self._check_alike(asked, pairs)
        first = pairs[0][0]
        y = torch.stack([y for _, y in pairs])
        columns = {name: torch.stack([leaves(x)[name] for x, _ in pairs]) for name in leaves(first)}
        x: Inputs = columns if isinstance(first, dict) else tuple(columns.values())
        return columns[""] if isinstance(first, Tensor) else x, self.task.read(y) if self.task else y

    def _pair(self, row: int) -> tuple[Inputs, Tensor]:
        with own.errors(self.owner, f" at item {row}", elsewhere=True):
            item = self.dataset[row]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise UsageError(f"{self.owner}: item {row} of its Dataset is a {type(item).__name__}: return (input, target)")
        what = f"{self.owner}: of item {row} the"
        return tensors(item[0], f"{what} input"), tensor(item[1], f"{what} target")

    def _check_alike(self, asked: Sequence[int], pairs: Sequence[Batch]) -> None:
        """Refuse items that cannot be put together in a batch."""
        parts = [{**{name or "input": part for name, part in leaves(x).items()}, "target": y} for x, y in pairs]
        shapes = [{name: (*part.shape,) for name, part in named.items()} for named in parts]
        for row, shape in zip(asked, shapes, strict=True):
            if shape != shapes[0]:
                said = [", ".join(f"{name} {size}" for name, size in one.items()) for one in (shapes[0], shape)]
                why = f"{self.owner}: item {asked[0]} has other shapes ({said[0]}) than item {row} ({said[1]})"
                raise UsageError(f"{why}: return items that can be put together in a batch")

    def looked_through(self, check: Callable[[Inputs, Tensor, int], None]) -> tuple[Items, Tensor]:
        """The items with their sums, and all targets. `check` sees them batch by batch, with the number of the first item."""
        found: list[Tensor] = []
        firsts: list[Batch] = []
        sums: list[str] = []
        for start in range(0, len(self), AT_ONCE):
            x, y = self[torch.arange(start, min(start + AT_ONCE, len(self)))]
            firsts.append((mapped(x, lambda part: part[0]), y[0]))
            self._check_alike([self.rows[0], self.rows[start]], [firsts[0], firsts[-1]])
            check(x, y, start)
            found.append(y)
            sums += _sums(x, y)
        generators.seed(1)
        again = _sums(*self[torch.arange(min(TWICE, len(self)))])
        return replace(self, sums=sums if again == sums[: len(again)] else ()), torch.cat(found)


def _sums(x: Inputs, y: Tensor) -> list[str]:
    columns = [numbers(part) for part in (*leaves(x).values(), y)]
    return [hashlib.blake2b(b"".join(part.tobytes() for part in row), digest_size=8).hexdigest() for row in zip(*columns)]  # noqa: B905
