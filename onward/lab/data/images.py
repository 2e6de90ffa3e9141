"""Image classification data sets: uint8 tensors in memory, or files that are decoded batch by batch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from onward.errors import UsageError, unknown
from onward.lab.data import folder, hub
from onward.lab.data.encoded import PATIENCE, Encoded, Sample, decode
from onward.lab.system import memory
from onward.lab.system.extra import lab_extra

DATASETS = {
    "digits": "1,797 handwritten digits, 8x8 grey, 10 classes; comes with scikit-learn, needs no network",
    "mnist": "70,000 handwritten digits, 28x28 grey, 10 classes",
    "fashion-mnist": "70,000 articles of clothing, 28x28 grey, 10 classes",
    "k-mnist": "70,000 cursive Japanese characters, 28x28 grey, 10 classes",
    "svhn": "99,289 house-number digits from photographs, 32x32 colour, 10 classes",
    "cifar10": "60,000 photographs of animals and vehicles, 32x32 colour, 10 classes",
    "cifar100": "60,000 photographs, 32x32 colour, 100 classes",
    "imagenette": "13,394 photographs of 10 of ImageNet's classes, 320 pixels on the short side",
    "imagenet32": "1,331,167 photographs, 32x32 colour, 1,000 classes",
    "imagenet": "1,331,167 photographs of all sizes, 1,000 classes; the hub wants you to accept its terms first",
}

ON_HUB = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "k-mnist": "tanganke/kmnist",
    "svhn": "ufldl-stanford/svhn:cropped_digits",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenette": "frgfm/imagenette:320px",
    "imagenet32": "benjamin-paine/imagenet-1k-32x32",
    "imagenet": "ILSVRC/imagenet-1k",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Images, uint8 (N, C, H, W) or still encoded, and their labels, int64 (N,)."""

    images: Tensor | Encoded
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A training and a test split, labelled 0 .. classes - 1: all images in memory and of one shape, or all still encoded."""

    name: str
    train: Split
    test: Split
    classes: int
    class_names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int | None, int | None]:
        """(channels, height, width) of every image; None where they may differ."""
        if isinstance(self.train.images, Encoded):
            return self.train.images.channels, None, None
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """A hexadecimal number that other class names, labels or images change, and so does another order of any of them.

        Images in memory count by their pixels, encoded ones by file name and size (or size in their row): reading all of them
        takes hours where there are many.
        """
        seen = hashlib.sha256(json.dumps([self.classes, self.class_names]).encode())
        for split in (self.train, self.test):
            seen.update(split.labels.cpu().numpy().astype("<i8").tobytes())
            if isinstance(split.images, Encoded):
                described = [split.images.mode, split.images.sizes()]
            else:
                described = [str(split.images.dtype), split.images.shape]
                seen.update(split.images.cpu().contiguous().numpy())
            seen.update(json.dumps([len(split), *described]).encode())
        return seen.hexdigest()


def load(
    name: str,
    data_dir: str | PathLike[str] | None = None,
    *,
    train_samples: int | None = None,
    test_samples: int | None = None,
    patience: float = PATIENCE,
) -> ImageData:
    """A data set by one of the `DATASETS` names, by its name on the Hugging Face hub, or from a folder of one's own.

    `owner/name` (or `owner/name:subset`) is looked for in the hub's cache, then on the hub. `data_dir` wins over
    `name`: a folder of parquet files as on the hub (train-*.parquet, test-*.parquet), of class folders of images
    (train/cat/1.png, test/cat/2.png, or cat/1.png), or of files that torchvision has downloaded (of several data sets, the one
    called `name`). A part may have any of the hub's names for it (training, validation, dev, ...), and a number. Without a test
    part, a fixed fifth of each class is held out for it. `train_samples`, `test_samples` keep a fixed random subset.

    Images are decoded once, into memory, if they are all of one size and take at most a quarter of the machine's memory. If
    not, each is decoded when a batch needs it. Both ways give the same batches. An image that cannot be read within `patience`
    seconds is given up.

    Raises:
        UsageError: an unknown name, a data set out of reach, data that cannot be used.
        TimeoutError: an image does not come.

    >>> data = load("digits")
    >>> data.shape, data.classes, len(data.train), len(data.test)
    ((1, 8, 8), 10, 1442, 355)
    """
    asked = {"train": train_samples, "test": test_samples}
    if data_dir is not None:
        path = Path(data_dir)
        return _decoded(path.resolve().name, *folder.read(path, name), asked, patience)
    if name == "digits":
        return _digits(asked)
    if name not in ON_HUB and os.path.isdir(name.partition(":")[0]):  # noqa: PTH112 (a name that can be no path is no folder)
        raise UsageError(f"data set {name} is a folder here: give it with --data-dir")
    if name not in ON_HUB and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        raise unknown("data set", name, [*DATASETS, "owner/name on the Hugging Face hub"])
    return _decoded(name, *hub.read(ON_HUB.get(name, name)), asked, patience)


def held_out(data: ImageData) -> ImageData:
    """The training images alone, a fixed fifth of each class of them as the test part: to choose settings by.

    Raises:
        UsageError: no class has 5 images.

    >>> data = held_out(load("digits"))
    >>> len(data.train), len(data.test)
    (1157, 285)
    """
    images, labels = data.train.images, data.train.labels
    parts = _hold_out(labels.tolist())
    if not parts[1]:
        raise UsageError(f"no class of data set {data.name} has 5 training images to hold one out of: use more of them")
    splits = []
    for rows in parts:
        if isinstance(images, Encoded):
            kept: Tensor | Encoded = replace(images, samples=[images.samples[row] for row in rows])
        else:
            kept = images[torch.tensor(rows)]
        splits.append(Split(kept, labels[torch.tensor(rows)]))
    return replace(data, train=splits[0], test=splits[1])


def _digits(asked: dict[str, int | None]) -> ImageData:
    with lab_extra():
        from sklearn.datasets import load_digits
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * 255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    splits = {}
    for split, rows in zip(asked, _hold_out(labels.tolist()), strict=True):
        kept = torch.tensor([rows[i] for i in _keep(len(rows), asked[split], split, "digits")])
        splits[split] = Split(images[kept], labels[kept])
    return ImageData("digits", **splits, classes=10, class_names=tuple(map(str, range(10))))


def _decoded(
    name: str,
    splits: dict[str, list[Sample]],
    class_names: tuple[str, ...],
    asked: dict[str, int | None],
    patience: float,
) -> ImageData:
    """Check the labels of every sample, then decode those that are asked for."""
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
    if "test" not in splits:
        rows, held = _hold_out([sample.label for sample in train])
        if not held:
            raise UsageError(f"data set {name} has no test part, and no class of 5 images to hold one out of: add one")
        splits = {"train": [train[row] for row in rows], "test": [train[row] for row in held]}
        log.warning("data set %s has no test part: %d of its %d images are held out for it", name, len(held), len(train))
    rows = {split: _keep(len(samples), asked[split], split, name) for split, samples in splits.items()}
    kept = {split: [splits[split][row] for row in rows[split]] for split in splits}
    others = [splits[split][row] for split in splits for row in sorted(set(range(len(splits[split]))).difference(rows[split]))]
    images = decode(kept["train"] + kept["test"], memory.physical() // folder.SHARE, patience, others)
    labels = torch.tensor([sample.label for sample in kept["train"] + kept["test"]])
    cut = len(kept["train"])
    if isinstance(images, Encoded):
        parts = [replace(images, samples=samples) for samples in kept.values()]
    else:
        parts = [images[:cut], images[cut:]]
    return ImageData(
        name,
        train=Split(parts[0], labels[:cut]),
        test=Split(parts[1], labels[cut:]),
        classes=classes,
        class_names=class_names or tuple(map(str, range(classes))),
    )


def _numbers(unused: Sequence[int]) -> str:
    """Labels in words.

    >>> _numbers([0]), _numbers([0, 7, 9]), _numbers(range(1, 9))
    ('label 0', 'labels 0, 7, 9', 'labels 1, 2, 3, 4, 5 and 3 more')
    """
    others = f" and {len(unused) - 5} more" * (len(unused) > 5)
    return f"label{'s' * (len(unused) > 1)} {', '.join(map(str, unused[:5]))}{others}"


def _hold_out(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows for training and for test: the same random fifth of each class every time.

    >>> rows, held = _hold_out([0, 1] * 10)
    >>> len(rows), sorted(row % 2 for row in held)
    (16, [0, 0, 1, 1])
    """
    by_class: dict[int, list[int]] = {}
    for row in torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist():
        by_class.setdefault(labels[row], []).append(row)
    held = {row for rows in by_class.values() for row in rows[: len(rows) // 5]}
    return [row for row in range(len(labels)) if row not in held], sorted(held)


def _keep(available: int, asked: int | None, split: str, name: str) -> list[int]:
    """Rows of a fixed random subset, in their order: files are often sorted by class, the first rows would not do."""
    if asked is None:
        return list(range(available))
    if not 1 <= asked <= available:
        raise UsageError(f"--subset.{split} {asked}: data set {name} has {available} {split} images, ask for 1 to {available}")
    return sorted(torch.randperm(available, generator=torch.Generator().manual_seed(0))[:asked].tolist())
