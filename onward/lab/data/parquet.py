"""Labelled images from parquet files, as the Hugging Face hub has them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from onward.errors import UsageError
from onward.lab.data.encoded import Sample, columns, from_table, refuse_other_columns
from onward.lab.data.parts import PARTS, Labelled, choose_splits, first_labelled, goes_on, part_of, part_of_file
from onward.lab.data.walk import is_image, refuse_dangling, some, tell_left_out, walk
from onward.lab.system import memory
from onward.lab.system.extra import lab_extra, reason_of

if TYPE_CHECKING:
    import pyarrow

SHARE = 4
"""Files, or images, that take more than this part of the machine's memory are left on the disk."""


def read(folder: Path, entries: list[os.DirEntry[str]]) -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
    refuse_dangling(entries)
    parts: dict[str, list[Path]] = {}
    doubtful: dict[str, list[Path]] = {}
    subsets = set()
    for file in (Path(entry.path) for entry in entries):
        # train-00000-of-00001.parquet or train/0000.parquet, perhaps below a folder for each subset
        parent = file.parent.relative_to(folder)
        word = part_of_file(file.stem) or part_of_file(parent.name)
        named = file.stem if part_of_file(file.stem) else parent.name
        kind = doubtful if word and goes_on(named) else parts
        kind.setdefault(word or file.stem, []).append(file)
        subsets.add(parent.parent if part_of_file(parent.name) else parent)
    if len(subsets) > 1:
        names = ", ".join(sorted(str(subset) for subset in subsets))
        raise UsageError(f"data folder {folder} holds several data sets: give one of its folders {names}")
    left, notes = _settle(folder, parts, doubtful)
    class_names: dict[Path, tuple[str, ...]] = {}
    label_columns: dict[str, str] = {}

    def read(part: str) -> Labelled:
        _refuse_missing(parts[part])
        large = sum(file.stat().st_size for file in parts[part]) > memory.physical() // SHARE
        labelled: list[Sample] = []
        for file in parts[part]:
            table = _read_parquet(file, mapped=large)
            samples, class_names_of_file = from_table(table, str(file))
            if samples:
                class_names[file] = class_names_of_file
                label_columns[str(file)] = columns(table.schema, str(file))[1]
            labelled += samples
        return labelled, ()

    chosen = choose_splits(parts, f"data folder {folder}")
    splits = {split: first_labelled(names, read, notes)[0] for split, names in chosen.items()}
    refuse_other_columns(label_columns)
    first, names_of_first = next(iter(class_names.items()), (folder, ()))
    for file, names_of_file in class_names.items():
        if names_of_file != names_of_first:
            raise UsageError(f"{first} and {file} name their classes differently: give files of one data set")
    left += [file for part in parts if not part_of(part) for file in parts[part]]
    left += [Path(entry.path) for entry in walk(folder) if is_image(entry)]
    tell_left_out(folder, "only parquet files with the name of a part are read", left, notes)
    return splits, names_of_first


def _settle(folder: Path, parts: dict[str, list[Path]], doubtful: dict[str, list[Path]]) -> tuple[list[Path], list[str]]:
    """Add doubtful files (train_augmented.parquet) to a part that has no others. Returns those left out, and notes."""
    left, notes = [], []
    for split, words in PARTS.items():
        found = {word: doubtful[word] for word in words if word in doubtful}
        files = [file for files in found.values() for file in files]
        if any(word in parts for word in words):
            left += files
        elif files:
            parts.update(found)
            notes.append(f"taken for the {split} part: {some({str(file.relative_to(folder)) for file in files})}")
    return left, notes


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
        raise UsageError(f"{file} is not a readable parquet file ({reason_of(error)}): download or write it again") from error
    return table


def _refuse_missing(shards: list[Path]) -> None:
    """Refuse train-00000-of-00003.parquet without the other two, which a broken download leaves behind."""
    for shard in shards:
        numbers = re.search(r"-of-(\d+)$", shard.stem)
        if numbers and int(numbers[1]) != len(shards):
            raise UsageError(f"{shard} is one of {int(numbers[1])} files, but {len(shards)} are there: fetch the others")
