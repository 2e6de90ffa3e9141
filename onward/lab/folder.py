"""Labelled images from a folder: parquet files as the Hugging Face hub stores them, or class folders of images."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from onward.errors import UsageError
from onward.lab.encoded import Sample, from_table
from onward.lab.extra import lab_extra

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}  # of each the first that is there


def read(folder: Path) -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
    """The samples of each split found (train, and test unless there is none), and the class names (none if not stored).

    Raises:
        UsageError: no such folder, nothing in it, no training part, a file that cannot be read.
    """
    if not folder.exists():
        raise UsageError(
            f"data folder {folder} does not exist: give a folder of parquet files or class folders of images"
        )
    if not folder.is_dir():
        raise UsageError(f"data folder {folder} is a file: give the folder that holds it")
    try:
        files = sorted(path for path in folder.rglob("*.parquet") if path.is_file())
        return _parquet(folder, files) if files else _class_folders(folder)
    except OSError as error:
        raise UsageError(f"data folder {folder} cannot be read ({error.strerror}): check {error.filename}") from error


def choose_splits(found: Iterable[str], place: str) -> dict[str, str]:
    """Which of the names found is the training part, and which the test part.

    >>> choose_splits(["train", "validation", "extra"], "here")
    {'train': 'train', 'test': 'validation'}
    """
    found = list(found)
    chosen = {split: next((name for name in names if name in found), None) for split, names in SPLITS.items()}
    if chosen["train"] is None:
        raise UsageError(f"{place} has no training part (found: {', '.join(found) or 'nothing'}): name it 'train'")
    return {split: name for split, name in chosen.items() if name is not None}


def _parquet(folder: Path, files: list[Path]) -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
    parts: dict[str, list[Path]] = {}
    for file in files:  # train-00000-of-00001.parquet, or train/0000.parquet
        parts.setdefault(_part(file.stem) or _part(file.parent.name) or file.stem, []).append(file)
    chosen = choose_splits(parts, f"data folder {folder}")
    subsets = {file.parent.parent if _part(file.parent.name) else file.parent for file in parts[chosen["train"]]}
    if len(subsets) > 1:
        raise UsageError(f"{folder} holds several data sets: give one of {', '.join(map(str, sorted(subsets)))}")
    splits, names = {}, {}
    for split, part in chosen.items():
        tables = {file: _read_parquet(file) for file in parts[part]}
        splits[split] = [sample for samples, _ in tables.values() for sample in samples]
        names |= {file: file_names for file, (_, file_names) in tables.items()}
    first = next(iter(names))
    for file, file_names in names.items():
        if file_names != names[first]:
            raise UsageError(f"{first} and {file} name their classes differently: give files of one data set")
    return splits, names[first]


def _part(name: str) -> str | None:
    """The part of the data set that a file or folder name begins with, if it does.

    >>> _part("train-00000-of-00003"), _part("trainer")
    ('train', None)
    """
    match = re.match(rf"({'|'.join(name for names in SPLITS.values() for name in names)})(?![a-z])", name.lower())
    return match and match[1]


def _read_parquet(file: Path) -> tuple[list[Sample], tuple[str, ...]]:
    with lab_extra():
        import pyarrow.parquet
    try:
        table = pyarrow.parquet.read_table(file, page_checksum_verification=True, partitioning=None)
        table.validate(full=True)
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"{file} is not a readable parquet file ({reason}): download or write it again") from error
    return from_table(table, str(file))


def _class_folders(folder: Path) -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
    inner = _subfolders(folder)
    parts = {
        part: path for path in inner if (part := path.name.lower()) in {n for names in SPLITS.values() for n in names}
    }
    if not inner:
        raise UsageError(
            f"data folder {folder} holds neither parquet files nor class folders of images: fill it or give another"
        )
    roots = (
        {split: parts[part] for split, part in choose_splits(parts, f"data folder {folder}").items()}
        if parts
        else {"train": folder}
    )
    classes = [path.name for path in _subfolders(roots["train"])]
    if not classes:
        raise UsageError(f"{roots['train']} has no class folders: put the images of each class in a folder of its own")
    splits = {}
    for split, root in roots.items():
        splits[split] = [sample for path in _subfolders(root) for sample in _class_folder(path, classes)]
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
