"""Labelled images from a folder, and those of a folder or the hub as data: in memory, or decoded batch by batch."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from onward.errors import UsageError
from onward.lab.data import class_folders, parquet, torchvision_files
from onward.lab.data.encoded import Sample, decode, image_column
from onward.lab.data.split import Data, Split, hold_out, keep
from onward.lab.data.walk import LEFTOVERS, holds_images, is_image, subfolders, tell_left_out, walk
from onward.lab.system import memory
from onward.lab.system.extra import lab_extra

log = logging.getLogger(__name__)


def from_folder(folder: Path, name: str = "") -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
    """The samples of each split found (train, and test unless there is none), and the class names (none if not stored).

    The `name` of a data set chooses among several that torchvision has downloaded into the folder. Raises a UsageError if
    there is no such folder, nothing in it, no training part, or a file that cannot be read.
    """
    if not folder.exists():
        raise UsageError(f"data folder {folder} does not exist: give a folder of parquet files or class folders of images")
    if not folder.is_dir():
        raise UsageError(f"data folder {folder} is a file: give the folder that holds it")
    try:
        if downloaded := torchvision_files.find(folder):
            _compare_with_own(folder, downloaded, name)
            return torchvision_files.read(folder, downloaded, name)
        files = [entry for entry in walk(folder) if entry.name.lower().endswith(".parquet")]
        return parquet.read(folder, files) if files and not _beside_the_images(folder, files) else class_folders.read(folder)
    except OSError as error:
        raise UsageError(f"data folder {folder} cannot be read ({error.strerror}): check {error.filename}") from error


def decoded(
    name: str, splits: dict[str, list[Sample]], class_names: tuple[str, ...], asked: dict[str, int | None], patience: float
) -> Data:
    """Check the labels of every sample, then decode those that are asked for. Raises a UsageError for labels or images that
    cannot be used, and a TimeoutError if an image does not come."""
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
    both = kept["train"] + kept["test"]
    images = decode(both, memory.physical() // parquet.SHARE, patience, others)
    labels, cut = torch.tensor([sample.label for sample in both]), len(kept["train"])
    if isinstance(images, Tensor):
        train_part, test_part = Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:])
    else:
        train_part, test_part = (Split(images, labels).part(rows) for rows in (range(cut), range(cut, len(both))))
    return Data(name, train_part, test_part, classes, class_names or tuple(map(str, range(classes))))


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
        gaps = f"no image has {_numbers(unused)}, though labels go up to {last.label}"
        log.warning("data set %s: %s: they count as classes, unless the classes are numbered from 0 without gaps", name, gaps)
    return classes


def _numbers(unused: Sequence[int]) -> str:
    """Labels in words.

    >>> _numbers([0]), _numbers([0, 7, 9]), _numbers(range(1, 9))
    ('label 0', 'labels 0, 7, 9', 'labels 1, 2, 3, 4, 5 and 3 more')
    """
    others = f" and {len(unused) - 5} more" * (len(unused) > 5)
    return f"label{'s' * (len(unused) > 1)} {', '.join(map(str, unused[:5]))}{others}"


def _compare_with_own(folder: Path, downloaded: list[torchvision_files.Downloaded], name: str) -> None:
    """Refuse other images beside what torchvision has downloaded; only warn of them if `name` says which is meant."""
    own = [path for path in sorted(torchvision_files.beside(folder, downloaded)) if _holds_data(path)]
    if not own:
        return
    if name not in [one.name for one in downloaded]:
        held = ", ".join(f"{one.name or 'idx files'} in {one.folder}" for one in downloaded)
        why = f"data folder {folder} holds what torchvision has downloaded ({held}) and other images ({own[0]})"
        raise UsageError(f"{why}: give the folder of the one that is meant, or move the other away")
    tell_left_out(folder, f"only {name} is read", own)


def _holds_data(path: Path) -> bool:
    if path.name.startswith(".") or path.name.lower() in LEFTOVERS:
        return False
    if path.is_dir():
        return any(is_image(entry) or entry.name.lower().endswith(".parquet") for entry in walk(path))
    return path.suffix.lower() == ".parquet"


def _beside_the_images(folder: Path, entries: list[os.DirEntry[str]]) -> bool:
    """Whether the parquet files hold no images, but folders do: they may be a table of what the class folders hold."""
    with lab_extra():
        import pyarrow.parquet
    try:
        if any(image_column(pyarrow.parquet.read_schema(entry.path), entry.path) for entry in entries):
            return False
    except (pyarrow.ArrowException, OSError, ValueError, UsageError):
        return False  # the sentence comes when it is read
    return any(holds_images(path) for path in subfolders(folder))
