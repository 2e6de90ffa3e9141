"""Batches of one epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onward.errors import UsageError
from onward.lab.data import pixels
from onward.lab.data.inputs import Batch, mapped
from onward.lab.data.items import Items
from onward.lab.data.split import Split
from onward.lab.settings import Transform
from onward.lab.system import generators


def batches(
    split: Split,
    batch_size: int,
    *,
    transform: Transform,
    train: bool,
    seed: int = 0,
    epoch: int = 0,
    skip: int = 0,
    device: str | torch.device = "cpu",
    drop_last: bool = False,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Batches (x, y) of one epoch: of images, x is float32 (N, C, H, W) and y int64 (N,); other data are as the split has them.

    With `train`, samples come in an order that depends on (seed, epoch) only, augmented by draws that depend on
    (seed, epoch, number of the batch) only; the global generators are neither read nor moved. Without it
    they come in file order. The first `skip` batches are left out, which changes no other. Each of several processes gets its
    part of every batch, augmented by draws of its own.

    Raises:
        UsageError: a batch size below 1, `drop_last` with no full batch, a mean or std for another number of channels.

    >>> split = Split(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5))
    >>> [(x.shape[0], x.min().item(), y.tolist()) for x, y in batches(split, 3, transform=Transform(), train=False)]
    [(3, -1.0, [0, 1, 2]), (2, -1.0, [3, 4])]
    """
    noun = "images" if split.pixels else "samples"
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size}: use at least 1")
    if drop_last and len(split) < batch_size:
        raise UsageError(f"batch size {batch_size} with only {len(split)} {noun} leaves no full batch: use at most that")
    read = _reader(split, transform, device, train=train)
    stop = len(split) - len(split) % batch_size if drop_last else len(split)

    def produce() -> Iterator[Batch]:
        order = torch.arange(len(split))
        if train:
            order = torch.randperm(len(split), generator=torch.Generator().manual_seed(_key(seed, epoch)))
        for number in range(skip, -(-stop // batch_size)):
            rows = order[number * batch_size : min((number + 1) * batch_size, stop)]
            rows = rows[len(rows) * rank // processes : len(rows) * (rank + 1) // processes]
            if len(rows):
                yield read(rows, _key(seed, epoch, number, *((rank,) if processes > 1 else ())))

    return produce()


def _reader(split: Split, transform: Transform, device: str | torch.device, *, train: bool) -> Callable[[Tensor, int], Batch]:
    """A function of rows and a seed that makes a batch of them."""
    if split.pixels:
        images = pixels.reader(split.images, transform, device, train=train)
        return lambda rows, seed: (images(rows, seed), split.labels[rows.to(split.labels.device)].to(device))

    def read(rows: Tensor, seed: int) -> Batch:
        if isinstance(split.inputs, Items):
            with generators.untouched(torch.device(device)):
                generators.seed(seed)
                x, y = split.inputs[rows]
        else:
            inputs: Any = split.inputs
            x = mapped(inputs, lambda tensor: tensor[rows.to(tensor.device)])
            y = split.targets[rows.to(split.targets.device)]
        return mapped(x, lambda tensor: tensor.to(device)), y.to(device)

    return read


def _key(*numbers: int) -> int:
    """One generator seed from several numbers, distinct for distinct ones and without a pattern."""
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)[0])
