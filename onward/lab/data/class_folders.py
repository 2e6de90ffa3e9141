"""Labelled images from folders, one for each class."""

from __future__ import annotations

import os
import re
from itertools import combinations, product
from pathlib import Path

from onward.errors import UsageError
from onward.lab.data import walk
from onward.lab.data.encoded import Sample, Unlabelled
from onward.lab.data.parts import PARTS, WORDS, Labelled, choose_splits, first_labelled, part_of


def read(folder: Path) -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
    inside = walk.subfolders(folder)
    if not inside:
        raise UsageError(f"data folder {folder} holds no parquet files and no class folders of images: give one that does")
    left: list[Path] = []
    notes: list[str] = []
    chosen = {"train": ["."]}  # the folder itself
    if parts := _parts(inside):
        chosen = choose_splits([path.name for path in parts], f"data folder {folder}")
        left = walk.files_in(folder) + [path for path in inside if path not in parts]
    train = folder / chosen["train"][0]
    classes = tuple(path.name for path in walk.subfolders(train))
    if not classes:
        raise UsageError(f"{train} has no class folders: put the images of each class in a folder of its own")

    def read(part: str) -> Labelled:
        folders = {path: classes.index(path.name) for path in walk.subfolders(folder / part) if path.name in classes}
        if not folders:
            return [], ()
        for path in walk.subfolders(folder / part):
            if path not in folders:
                raise UsageError(f"class folder {path} has no counterpart in the training part: add one or remove it")
        left.extend(walk.files_in(folder / part))
        above = frozenset({walk.identity(folder), walk.identity(folder / part)})
        samples: list[Sample] = []
        empty: list[_Empty] = []
        for path, label in folders.items():
            try:
                samples += _class_folder(path, label, above, left)
            except _Empty as error:
                empty.append(error)
        if empty:
            raise empty[0] if samples else Unlabelled(str(empty[0]))
        return samples, classes

    splits = {split: first_labelled(names, read, notes)[0] for split, names in chosen.items()}
    _refuse_parts_as_classes(train, splits["train"])
    _refuse_masks(train, splits["train"])
    if not splits.get("test", True):
        tests = " and ".join(str(folder / part) for part in chosen["test"])
        remedy = "sort its images into such, or move it away, and a part of the training images is held out instead"
        raise UsageError(f"{tests} has none of the class folders of {train}: {remedy}")
    walk.tell_left_out(folder, "only images in class folders are read, by their endings", left, notes)
    return splits, classes


def _parts(inside: list[Path]) -> list[Path]:
    """The folders that are parts of a data set, each with class folders, or none if all are classes.

    A folder named train may be a class (of vehicles), and one named test a class (of two groups). So beside folders of other
    names that hold images, they are parts only if train holds class folders, and there is a test part or no other folder looks
    like a class; or if both have a number (train2017 and val2017), which no two classes would have.
    """
    parts = [path for path in inside if part_of(path.name)]
    others = [path for path in inside if path not in parts]
    numbered = {part_of(path.name) in PARTS["train"] for path in parts if path.name[-1].isdigit()}
    if not others or len(numbered) == 2 or (len(parts) > 1 and not any(walk.holds_images(path) for path in others)):
        return parts
    trains = [path for path in parts if part_of(path.name) in PARTS["train"]]
    classes = {name for path in trains for name in _classes(path)}
    rivals = [path for path in others if walk.holds_images(path) and not classes & _classes(path)]
    return parts if classes and (len(parts) > len(trains) or not rivals) else []


def _classes(part: Path) -> set[str]:
    return {path.name for path in walk.subfolders(part) if walk.holds_images(path)}


class _Empty(UsageError):
    """A class folder has no images."""


def _class_folder(folder: Path, label: int, above: frozenset[tuple[int, int]], left: list[Path]) -> list[Sample]:
    """The images of one class; other files in its folder are added to `left`."""
    images: list[os.DirEntry[str]] = []
    others: list[os.DirEntry[str]] = []
    for entry in walk.walk(folder, above):
        (images if walk.is_image(entry) else others).append(entry)
    walk.refuse_dangling(images + others)
    left.extend(Path(entry.path) for entry in others)
    if not images:
        unread = walk.summary(folder, [Path(entry.path) for entry in others])
        held = f" (what it holds is not read: {unread})" if others else ""
        raise _Empty(f"class folder {folder} has no images: add some or remove it{held}")
    return [Sample(Path(entry.path), label, entry.path) for entry in images]


def _refuse_parts_as_classes(root: Path, samples: list[Sample]) -> None:
    """Refuse parts, folds and whole data sets as classes: the names of the folders in them tell."""
    first: dict[str, set[str]] = {}  # of each class: the folders in it, and the folders at the bottom, which hold its images
    below: dict[str, set[str]] = {}
    for holder in {os.path.dirname(sample.file) for sample in samples}:  # noqa: PTH120
        name, *inner = Path(holder).relative_to(root).parts
        first.setdefault(name, set()).update(inner[:1])
        below.setdefault(name, set()).update(inner[-1:])
    nested = [name for name in sorted(below) if len(below[name]) > 1]
    for one, other in combinations(nested, 2):
        if below[one] <= below[other] or below[other] <= below[one]:
            why = f"{root / one} and {root / other} hold folders of the same names ({walk.some(below[one] & below[other])})"
            remedy = "name them train and test if they are parts of a data set"
            raise UsageError(f"{why}: {remedy}, or put the images right into them if they are classes")
    for name in nested:
        if len(beside := below[name] & (below.keys() - {name})) > 1:
            why = f"{root / name} holds folders of the same names as those beside it ({walk.some(beside)})"
            raise UsageError(f"{why}: if it is a part of the data set, put those beside it into a folder called train, or test")
        parts = {part for part in first[name] if part_of(part)}
        if len({part_of(part) in PARTS["train"] for part in parts}) == 2:
            held = f"{root / name} holds parts of a data set ({walk.some(parts)})"
            raise UsageError(f"{held}, not the images of a class: give it as the data folder")


def _refuse_masks(root: Path, samples: list[Sample]) -> None:
    """Refuse a folder of images and one of their masks as two classes: both hold files of the same names."""
    stems: dict[str, set[str]] = {}
    for sample in samples:
        path = Path(sample.file).relative_to(root)
        stems.setdefault(path.parts[0], set()).add(re.sub(r"[ _-]*(mask|label|gt|seg\w*)$", "", path.stem.lower()))
    images = [name for name in stems if _named(name, "images?|imgs?|inputs?|jpegimages")]
    of_masks = "masks?|labels?|annotations?|annots?|seg(mentation)?s?|gt|targets?|trimaps?"
    masks = [name for name in stems if _named(name, of_masks)]
    for one, other in product(images, masks):
        if same := stems[one] & stems[other]:
            pair = f"{root / one} and {root / other}"
            why = f"{pair} hold files of the same names ({walk.some(same)}), as images and their masks do"
            raise UsageError(f"{why}: segmentation is not learnt here, give images in a folder for each class")


def _named(name: str, words: str) -> bool:
    return re.fullmatch(rf"(({WORDS})[ _-]?)?({words})", name.lower()) is not None
