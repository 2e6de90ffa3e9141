"""Labelled images, from the hub or a folder: uint8 tensors in memory, or files that are decoded batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onward.errors import UsageError
from onward.lab.data import parquet
from onward.lab.data.encoded import Sample, decode
from onward.lab.data.split import Data, Split, hold_out, keep
from onward.lab.system import memory

log = logging.getLogger(__name__)


def decoded(
    name: str,
    splits: dict[str, list[Sample]],
    class_names: tuple[str, ...],
    asked: dict[str, int | None],
    patience: float,
) -> Data:
    """Check the labels of every sample, then decode those that are asked for.

    Raises:
        UsageError: labels or images that cannot be used.
        TimeoutError: an image does not come.
    """
    classes = _checked_classes(name, splits, class_names)
    train = splits["train"]
    if "test" not in splits:
        rows, held = hold_out([sample.label for sample in train])
        if not held:
            raise UsageError(f"data set {name} has no test part, and no class of 5 images to hold one out of: add one")
        splits = {"train": [train[row] for row in rows], "test": [train[row] for row in held]}
        log.warning("data set %s has no test part: %d of its %d images are held out for it", name, len(held), len(train))
    used = {split: keep(len(samples), asked[split], split, name) for split, samples in splits.items()}
    kept = {split: [splits[split][row] for row in used[split]] for split in splits}
    others = [splits[split][row] for split in splits for row in sorted(set(range(len(splits[split]))).difference(used[split]))]
    images = decode(kept["train"] + kept["test"], memory.physical() // parquet.SHARE, patience, others)
    labels = torch.tensor([sample.label for sample in kept["train"] + kept["test"]])
    cut = len(kept["train"])
    parts: list[Any] = (
        [images[:cut], images[cut:]]
        if isinstance(images, Tensor)
        else [images.part(range(cut)), images.part(range(cut, len(images)))]
    )
    return Data(
        name,
        train=Split(parts[0], labels[:cut]),
        test=Split(parts[1], labels[cut:]),
        outputs=classes,
        class_names=class_names or tuple(map(str, range(classes))),
    )


def _checked_classes(name: str, splits: dict[str, list[Sample]], class_names: tuple[str, ...]) -> int:
    """How many classes there are, if the labels fit them."""
    for split, samples in splits.items():
        if not samples:
            raise UsageError(f"the {split} part of data set {name} has no images with labels: give one that has")
    train = splits["train"]
    last = max(train, key=lambda sample: sample.label)
    classes = len(class_names) or last.label + 1
    if last.label >= classes:
        raise UsageError(f"{last.place} has label {last.label}, but only {classes} classes are named: correct either")
    if not class_names and classes > len(train):
        raise UsageError(f"{last.place} has label {last.label} among {len(train)} images: number the classes from 0")
    if classes < 2:
        raise UsageError(f"data set {name} has a single class: give images of at least two")
    known = {sample.label for sample in train}
    for sample in splits.get("test", []):
        if sample.label not in known:
            raise UsageError(f"{sample.place} has label {sample.label}, which no training image has: drop it or add some")

    if unused := [label for label in range(classes) if not class_names and label not in known]:
        log.warning(
            "data set %s: no image has %s, though labels go up to %d: they count as classes, unless the classes are numbered "
            "from 0 without gaps",
            name,
            _numbers(unused),
            last.label,
        )
    return classes


def _numbers(unused: Sequence[int]) -> str:
    """Labels in words.

    >>> _numbers([0]), _numbers([0, 7, 9]), _numbers(range(1, 9))
    ('label 0', 'labels 0, 7, 9', 'labels 1, 2, 3, 4, 5 and 3 more')
    """
    others = f" and {len(unused) - 5} more" * (len(unused) > 5)
    return f"label{'s' * (len(unused) > 1)} {', '.join(map(str, unused[:5]))}{others}"
