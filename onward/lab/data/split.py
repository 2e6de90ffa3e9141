"""Data in two parts, to train on and to test on; parts of these; and a number that tells data from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from onward.errors import UsageError
from onward.lab.data.encoded import Encoded
from onward.lab.data.inputs import Inputs, leaves, mapped, numbers
from onward.lab.data.items import Items
from onward.lab.tasks import named


@dataclass(frozen=True)
class Split:
    """Inputs and their targets: labels of images are int64 (N,), other targets as their task has them."""

    inputs: Inputs | Encoded | Items
    targets: Tensor
    pixels: bool = True
    """Whether the inputs are images, uint8 (N, C, H, W) or still encoded, which batches normalise; others go in as they are."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def images(self) -> Any:
        """The inputs, if they are images: a tensor, or still encoded."""
        return self.inputs

    @property
    def labels(self) -> Tensor:
        """The targets, if they are labels of images."""
        return self.targets

    def part(self, rows: Sequence[int]) -> Split:
        """Some of the samples, in that order."""
        index = torch.tensor(rows, dtype=torch.int64)

        def taken(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)]

        inputs = self.inputs.part(rows) if isinstance(self.inputs, Encoded | Items) else mapped(self.inputs, taken)
        return replace(self, inputs=inputs, targets=taken(self.targets))


@dataclass(frozen=True)
class Data:
    """A training and a test split: all inputs in memory and of one shape, or all read when they are needed."""

    name: str
    train: Split
    test: Split
    outputs: int
    """Of the network: classes, which labels from 0 number, or the columns of the targets."""
    class_names: tuple[str, ...]
    """What each output stands for."""
    task: str = "classification"
    tokens: int | None = None
    """How many kinds of tokens the inputs are numbers of, where they are such."""
    padding: int | None = None
    """The token that fills up short rows, where there is one."""
    vocabulary: tuple[str, ...] = ()
    """What each token stands for, where outputs are something else."""

    @property
    def noun(self) -> str:
        """What its samples are called."""
        return "images" if self.train.pixels else "samples"

    @property
    def in_memory(self) -> bool:
        """Whether all inputs are in memory."""
        return not isinstance(self.train.inputs, (Encoded, Items))

    @property
    def shape(self) -> tuple[int, int | None, int | None]:
        """(channels, height, width) of every image; None where they may differ."""
        if isinstance(self.train.images, Encoded):
            return self.train.images.channels, None, None
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """A hexadecimal number that differs for other class names, targets or inputs, or another order of them.

        Inputs in memory count by their numbers, encoded images by file name and size (or size in their row): reading all of
        them takes hours where there are many. Items of a Dataset count by their numbers unless these are drawn at random.
        """
        seen = hashlib.sha256(json.dumps([self.outputs, self.class_names, *self.vocabulary]).encode())
        for split in (self.train, self.test):
            seen.update(numbers(split.targets))
            if isinstance(split.inputs, Encoded):
                described: list[Any] = [split.inputs.mode, split.inputs.sizes()]
            elif isinstance(split.inputs, Items):
                described = list(split.inputs.sums)
            else:
                described = []
                for name, tensor in leaves(split.inputs).items():
                    described += [*([name] if name else []), str(tensor.dtype), tensor.shape]
                    seen.update(numbers(tensor))
            seen.update(json.dumps([len(split), *described]).encode())
        return seen.hexdigest()


def held_out(data: Data) -> Data:
    """The training samples alone, a fixed fifth of each class of them as the test part: to choose settings by. Of a text, the
    last fifth.

    Raises:
        UsageError: no class has 5 samples.

    >>> from onward.lab.data import load
    >>> data = held_out(load("digits"))
    >>> len(data.train), len(data.test)
    (1157, 285)
    """
    if named(data.task).of_positions:
        first = len(data.train) - len(data.train) // 5
        parts = list(range(first)), list(range(first, len(data.train)))
        return replace(data, train=data.train.part(parts[0]), test=data.train.part(parts[1]))
    classes = data.task == "classification"
    parts = hold_out(data.train.targets.tolist() if classes else [0] * len(data.train))
    if not parts[1]:
        few = f"no class of data set {data.name} has 5" if classes else f"data set {data.name} has no 5"
        raise UsageError(f"{few} training {data.noun} to hold one out of: use more of them")
    return replace(data, train=data.train.part(parts[0]), test=data.train.part(parts[1]))


def hold_out(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows for training and for test: the same random fifth of each class every time.

    >>> rows, held = hold_out([0, 1] * 10)
    >>> len(rows), sorted(row % 2 for row in held)
    (16, [0, 0, 1, 1])
    """
    by_class: dict[int, list[int]] = {}
    for row in torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist():
        by_class.setdefault(labels[row], []).append(row)
    held = {row for rows in by_class.values() for row in rows[: len(rows) // 5]}
    return [row for row in range(len(labels)) if row not in held], sorted(held)


def keep(available: int, asked: int | None, split: str, name: str, noun: str = "images") -> list[int]:
    """Rows of a fixed random subset, in their order: files are often sorted by class, so the first rows would not do. Raises a
    UsageError if more rows are asked for than there are."""
    if asked is None:
        return list(range(available))
    if not 1 <= asked <= available:
        raise UsageError(f"--subset.{split} {asked}: data set {name} has {available} {split} {noun}, ask for 1 to {available}")
    return sorted(torch.randperm(available, generator=torch.Generator().manual_seed(0))[:asked].tolist())


def subset(data: Data, asked: dict[str, int | None]) -> Data:
    """A fixed random part of the training and of the test samples; all of them where None is asked for."""

    def kept(split: Split, name: str) -> Split:
        if (number := asked[name]) is None:
            return split
        return split.part(keep(len(split), number, name, data.name, data.noun))

    return replace(data, train=kept(data.train, "train"), test=kept(data.test, "test"))
