"""Labelled images from a folder: parquet files as the Hugging Face hub stores them, or class folders of images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from onward.errors import UsageError
from onward.lab import memory
from onward.lab.encoded import Sample, from_table
from onward.lab.extra import lab_extra

if TYPE_CHECKING:
    import pyarrow

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}  # of each the first that is there, with labels
SHARE = 4
"""Files, or images, that take more than this part of the machine's memory are left on the disk."""
Labelled = tuple[list[Sample], tuple[str, ...]]
"""Samples, and the names of their classes (none if not stored)."""


def read(folder: Path) -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
    """The samples of each split found (train, and test unless there is none), and the class names (none if not stored).

    Raises:
        UsageError: no such folder, nothing in it, no training part, a file that cannot be read.
    """
    if not folder.exists():
        raise UsageError(f"data folder {folder} does not exist: give a folder of parquet files or class folders of images")
    if not folder.is_dir():
        raise UsageError(f"data folder {folder} is a file: give the folder that holds it")
    try:
        files = sorted(path for path in folder.rglob("*.parquet") if path.is_file())
        return _parquet(folder, files) if files else _class_folders(folder)
    except OSError as error:
        raise UsageError(f"data folder {folder} cannot be read ({error.strerror}): check {error.filename}") from error


def choose_splits(found: Iterable[str], place: str) -> dict[str, list[str]]:
    """Which of the names found may be the training part, and which the test part, the likeliest first.

    >>> choose_splits(["train", "validation", "extra", "test"], "here")
    {'train': ['train'], 'test': ['test', 'validation']}
    """
    found = list(found)
    chosen = {split: [name for name in names if name in found] for split, names in SPLITS.items()}
    if not chosen["train"]:
        raise UsageError(f"{place} has no training part (found: {', '.join(found) or 'nothing'}): name it 'train'")
    return {split: names for split, names in chosen.items() if names}


def first_labelled(parts: Iterable[str], read: Callable[[str], Labelled]) -> Labelled:
    """The first of the parts that has labels."""
    labelled: Labelled = [], ()
    for part in parts:
        labelled = read(part)
        if labelled[0]:
            break
    return labelled


def _parquet(folder: Path, files: list[Path]) -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
    parts: dict[str, list[Path]] = {}
    subsets = set()
    for file in files:  # train-00000-of-00001.parquet or train/0000.parquet, perhaps below a folder for each subset
        parent = file.parent.relative_to(folder)
        parts.setdefault(_part(file.stem) or _part(parent.name) or file.stem, []).append(file)
        subsets.add(parent.parent if _part(parent.name) else parent)
    if len(subsets) > 1:
        names = ", ".join(sorted(str(subset) for subset in subsets))
        raise UsageError(f"data folder {folder} holds several data sets: give one of its folders {names}")
    class_names: dict[Path, tuple[str, ...]] = {}

    def read(part: str) -> Labelled:
        _refuse_missing(parts[part])
        large = sum(file.stat().st_size for file in parts[part]) > memory.physical() // SHARE
        labelled = {file: from_table(_read_parquet(file, mapped=large), str(file)) for file in parts[part]}
        class_names.update({file: names for file, (samples, names) in labelled.items() if samples})
        return [sample for samples, _ in labelled.values() for sample in samples], ()

    chosen = choose_splits(parts, f"data folder {folder}")
    splits = {split: first_labelled(names, read)[0] for split, names in chosen.items()}
    first, names_of_first = next(iter(class_names.items()), (folder, ()))
    for file, names_of_file in class_names.items():
        if names_of_file != names_of_first:
            raise UsageError(f"{first} and {file} name their classes differently: give files of one data set")
    return splits, names_of_first


def _part(name: str) -> str | None:
    """The part of the data set that a file or folder name begins with, if it does.

    >>> _part("train-00000-of-00003"), _part("trainer")
    ('train', None)
    """
    match = re.match(rf"({'|'.join(name for names in SPLITS.values() for name in names)})(?![a-z])", name.lower())
    return match and match[1]


def _read_parquet(file: Path, *, mapped: bool) -> pyarrow.Table:
    """The table in a file; `mapped` leaves it on the disk, in the cache of `datasets`, instead of reading it into memory."""
    with lab_extra():
        import datasets
        import pyarrow.parquet
    try:
        if mapped:
            return datasets.Dataset.from_parquet(str(file)).with_format("arrow")[:]
        table = pyarrow.parquet.read_table(file, page_checksum_verification=True, partitioning=None)
        table.validate(full=True)
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"{file} is not a readable parquet file ({reason}): download or write it again") from error
    return table


def _refuse_missing(shards: list[Path]) -> None:
    """Refuse train-00000-of-00003.parquet without the other two, which a broken download leaves behind."""
    for shard in shards:
        numbers = re.search(r"-of-(\d+)$", shard.stem)
        if numbers and int(numbers[1]) != len(shards):
            raise UsageError(f"{shard} is one of {int(numbers[1])} files, but {len(shards)} are there: fetch the others")


def _class_folders(folder: Path) -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
    inside = {path.name: path for path in _subfolders(folder)}
    if not inside:
        raise UsageError(f"data folder {folder} holds no parquet files and no class folders of images: give one that does")
    parts = {name: path for name, path in inside.items() if any(name in names for names in SPLITS.values())}
    roots = {"train": folder}
    if parts:
        roots = {split: parts[names[0]] for split, names in choose_splits(parts, f"data folder {folder}").items()}
    classes = [path.name for path in _subfolders(roots["train"])]
    if not classes:
        raise UsageError(f"{roots['train']} has no class folders: put the images of each class in a folder of its own")
    splits = {
        split: [sample for path in _subfolders(root) for sample in _class_folder(path, classes)]
        for split, root in roots.items()
    }
    return splits, tuple(classes)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_folder(folder: Path, classes: list[str]) -> list[Sample]:
    with lab_extra():
        from PIL import Image
    if folder.name not in classes:
        raise UsageError(f"class folder {folder} has no counterpart in the training part: add one or remove it")
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in readable and path.is_file()]
    if not files:
        raise UsageError(f"class folder {folder} has no images: add some or remove it")
    label = classes.index(folder.name)
    return [Sample(path, label, str(path)) for path in files]
