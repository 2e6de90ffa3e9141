"""Labelled images from a folder: parquet files as on the Hugging Face hub, class folders, or what torchvision downloads."""

from __future__ import annotations

import os
from pathlib import Path

from onward.errors import UsageError
from onward.lab.data import class_folders, parquet, torchvision_files
from onward.lab.data.encoded import Sample, image_column
from onward.lab.data.walk import LEFTOVERS, holds_images, is_image, subfolders, tell_left_out, walk
from onward.lab.system.extra import lab_extra


def read(folder: Path, name: str = "") -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
    """The samples of each split found (train, and test unless there is none), and the class names (none if not stored).

    The `name` of a data set chooses among several that torchvision has downloaded into the folder.

    Raises:
        UsageError: no such folder, nothing in it, no training part, a file that cannot be read.
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


def _compare_with_own(folder: Path, downloaded: list[torchvision_files.Downloaded], name: str) -> None:
    """Refuse images of one's own beside what torchvision has downloaded; tell of them if `name` says what is meant."""
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
    """Whether the parquet files hold no images, but folders do: those are a table of what the class folders hold, say."""
    with lab_extra():
        import pyarrow.parquet
    try:
        if any(image_column(pyarrow.parquet.read_schema(entry.path), entry.path) for entry in entries):
            return False
    except (pyarrow.ArrowException, OSError, ValueError, UsageError):
        return False  # the sentence comes when it is read
    return any(holds_images(path) for path in subfolders(folder))
