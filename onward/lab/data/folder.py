"""Labelled images from a folder: parquet files as on the Hugging Face hub, class folders, or what torchvision downloads."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING

from onward.errors import UsageError
from onward.lab.data import torchvision_files
from onward.lab.data.encoded import Sample, Unlabelled, columns, from_table, image_column, refuse_other_columns
from onward.lab.system import memory
from onward.lab.system.extra import lab_extra

if TYPE_CHECKING:
    import pyarrow

PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"),
}
"""The hub's words for parts, the likeliest first. Of each part, the first that is there and has labels is taken."""
WORDS = "|".join(word for words in PARTS.values() for word in words)
LEFTOVERS = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}
"""What file managers leave in folders of images, in small letters: copies of images among it."""
SHARE = 4
"""Files, or images, that take more than this part of the machine's memory are left on the disk."""
Labelled = tuple[list[Sample], tuple[str, ...]]
"""Samples, and the names of their classes (none if not stored)."""

log = logging.getLogger(__name__)


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
        files = [entry for entry in _walk(folder) if entry.name.lower().endswith(".parquet")]
        return _parquet(folder, files) if files and not _beside_the_images(folder, files) else _class_folders(folder)
    except OSError as error:
        raise UsageError(f"data folder {folder} cannot be read ({error.strerror}): check {error.filename}") from error


def _compare_with_own(folder: Path, downloaded: list[torchvision_files.Downloaded], name: str) -> None:
    """Refuse images of one's own beside what torchvision has downloaded; tell of them if `name` says what is meant."""
    own = [path for path in sorted(torchvision_files.beside(folder, downloaded)) if _holds_data(path)]
    if not own:
        return
    if name not in [one.name for one in downloaded]:
        held = ", ".join(f"{one.name or 'idx files'} in {one.folder}" for one in downloaded)
        raise UsageError(
            f"data folder {folder} holds what torchvision has downloaded ({held}) and other images ({own[0]}): give the folder "
            "of the one that is meant, or move the other away"
        )
    _tell_left_out(folder, f"only {name} is read", own)


def _holds_data(path: Path) -> bool:
    if path.name.startswith(".") or path.name.lower() in LEFTOVERS:
        return False
    if path.is_dir():
        return any(_is_image(entry) or entry.name.lower().endswith(".parquet") for entry in _walk(path))
    return path.suffix.lower() == ".parquet"


# ---- parts


def choose_splits(found: Iterable[str], place: str) -> dict[str, list[str]]:
    """Which of the names found may be the training part, and which the test part, the likeliest first.

    >>> choose_splits(["Train", "validation", "extra", "test_set"], "here")
    {'train': ['Train'], 'test': ['test_set', 'validation']}
    """
    found = list(found)
    chosen = {
        split: sorted((name for name in found if _part(name) in words), key=lambda name: words.index(_part(name)))
        for split, words in PARTS.items()
    }
    if not chosen["train"]:
        raise UsageError(f"{place} has no training part (found: {', '.join(found) or 'nothing'}): name it 'train'")
    if len(chosen["train"]) > 1:
        raise UsageError(f"{place} has {len(chosen['train'])} training parts ({', '.join(chosen['train'])}): keep one of them")
    return {split: names for split, names in chosen.items() if names}


def first_labelled(parts: Sequence[str], read: Callable[[str], Labelled], notes: list[str]) -> Labelled:
    """The first of the parts that has labels. If none has, no samples, or what is wrong with the first.

    The notes get what is to be told of those that are passed over before it, or not used after it.
    """
    refused = None
    for number, part in enumerate(parts):
        try:
            labelled = read(part)
        except Unlabelled as error:
            refused = refused or error
            continue
        if labelled[0]:
            if before := parts[:number]:
                notes.append(
                    f"passed over, without images that are labelled with the training part's classes: {', '.join(before)}"
                )
            if after := parts[number + 1 :]:
                notes.append(f"not used, for {part} is: {', '.join(after)}")
            return labelled
    if refused:
        raise refused
    return [], ()


def _part(name: str) -> str | None:
    """The word for a part of a data set that a name is, if it is one.

    >>> _part("Training"), _part("val-set"), _part("test images"), _part("train2017"), _part("test_1"), _part("test tube")
    ('training', 'val', 'test', 'train', 'test', None)
    """
    match = re.fullmatch(rf"({WORDS})([ _-]?(set|data|images))?([ _-]?\d+)?", name.lower())
    return match and match[1]


def _part_of_file(stem: str) -> str | None:
    """The same of a file's name, or of a folder's above it, which goes on after the word.

    >>> _part_of_file("Train-00000-of-00003"), _part_of_file("testset_1"), _part_of_file("trainer")
    ('train', 'test', None)
    """
    match = re.match(rf"({WORDS})([ _-]?set)?(?![a-z])", stem.lower())
    return match and match[1]


def _goes_on(stem: str) -> bool:
    """Whether other words than those of shards follow the word for a part in a file's name, or a folder's above it.

    >>> [_goes_on(stem) for stem in ("train-00000-of-00002-0a1b2c3d4e5f6071", "test_1", "train_augmented", "test.v2")]
    [False, False, True, True]
    """
    shard = r"([^a-z]|of|part|shard|split|chunk|set|data|images|[0-9a-f]{16})*"
    return re.fullmatch(rf"({WORDS}){shard}", stem.lower()) is None


# ---- what a folder holds


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Files and folders, by name, without what is hidden and what file managers leave."""
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in LEFTOVERS]
    return sorted(seen, key=lambda entry: entry.name)


def _walk(folder: str | Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder, through links to folders too; of a link that leads back to one of those `above`, the link."""
    above |= {_identity(folder)}
    for entry in _entries(folder):
        if entry.is_dir() and not (entry.is_symlink() and _identity(entry.path) in above):
            yield from _walk(entry.path, above)
        else:
            yield entry


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)  # noqa: PTH116 (a Path for each of a million entries is what takes the time)
    return found.st_dev, found.st_ino


def _refuse_dangling(entries: Iterable[os.DirEntry[str]]) -> None:
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
            target = os.readlink(entry.path)  # noqa: PTH115
            raise UsageError(f"link {entry.path} leads to {target}, which is not there: fetch that, or remove the link")


def _subfolders(folder: Path) -> list[Path]:
    entries = _entries(folder)
    _refuse_dangling(entries)
    return [Path(entry.path) for entry in entries if entry.is_dir()]


# ---- parquet files


def _parquet(folder: Path, entries: list[os.DirEntry[str]]) -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
    _refuse_dangling(entries)
    parts: dict[str, list[Path]] = {}
    doubtful: dict[str, list[Path]] = {}
    subsets = set()
    for file in (Path(entry.path) for entry in entries):
        # train-00000-of-00001.parquet or train/0000.parquet, perhaps below a folder for each subset
        parent = file.parent.relative_to(folder)
        word = _part_of_file(file.stem) or _part_of_file(parent.name)
        named = file.stem if _part_of_file(file.stem) else parent.name
        kind = doubtful if word and _goes_on(named) else parts
        kind.setdefault(word or file.stem, []).append(file)
        subsets.add(parent.parent if _part_of_file(parent.name) else parent)
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
    left += [file for part in parts if not _part(part) for file in parts[part]]
    left += [Path(entry.path) for entry in _walk(folder) if _is_image(entry)]
    _tell_left_out(folder, "only parquet files with the name of a part are read", left, notes)
    return splits, names_of_first


def _settle(folder: Path, parts: dict[str, list[Path]], doubtful: dict[str, list[Path]]) -> tuple[list[Path], list[str]]:
    """Add doubtful files (train_augmented.parquet) to a part that has no others. Those that are left out, and what to tell."""
    left, notes = [], []
    for split, words in PARTS.items():
        found = {word: doubtful[word] for word in words if word in doubtful}
        files = [file for files in found.values() for file in files]
        if any(word in parts for word in words):
            left += files
        elif files:
            parts.update(found)
            notes.append(f"taken for the {split} part: {_some({str(file.relative_to(folder)) for file in files})}")
    return left, notes


def _beside_the_images(folder: Path, entries: list[os.DirEntry[str]]) -> bool:
    """Whether the parquet files hold no images, but folders do: those are a table of what the class folders hold, say."""
    with lab_extra():
        import pyarrow.parquet
    try:
        if any(image_column(pyarrow.parquet.read_schema(entry.path), entry.path) for entry in entries):
            return False
    except (pyarrow.ArrowException, OSError, ValueError, UsageError):
        return False  # the sentence comes when it is read
    return any(_holds_images(path) for path in _subfolders(folder))


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


# ---- class folders


def _class_folders(folder: Path) -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
    inside = _subfolders(folder)
    if not inside:
        raise UsageError(f"data folder {folder} holds no parquet files and no class folders of images: give one that does")
    left: list[Path] = []
    notes: list[str] = []
    chosen = {"train": ["."]}  # the folder itself
    if parts := _parts(inside):
        chosen = choose_splits([path.name for path in parts], f"data folder {folder}")
        left = _files(folder) + [path for path in inside if path not in parts]
    train = folder / chosen["train"][0]
    classes = tuple(path.name for path in _subfolders(train))
    if not classes:
        raise UsageError(f"{train} has no class folders: put the images of each class in a folder of its own")

    def read(part: str) -> Labelled:
        folders = {path: classes.index(path.name) for path in _subfolders(folder / part) if path.name in classes}
        if not folders:
            return [], ()
        for path in _subfolders(folder / part):
            if path not in folders:
                raise UsageError(f"class folder {path} has no counterpart in the training part: add one or remove it")
        left.extend(_files(folder / part))
        above = frozenset({_identity(folder), _identity(folder / part)})
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
        raise UsageError(
            f"{' and '.join(str(folder / part) for part in chosen['test'])} has none of the class folders of {train}: sort its "
            "images into such, or move it away, and a part of the training images is held out instead"
        )
    _tell_left_out(folder, "only images in class folders are read, by their endings", left, notes)
    return splits, classes


def _parts(inside: list[Path]) -> list[Path]:
    """The folders that are parts of a data set, each with class folders, or none if all are classes.

    A folder named train may be a class (of vehicles), and one named test a class (of two groups). So beside folders of other
    names that hold images, they are parts only if train holds class folders, and there is a test part or no other folder looks
    like a class; or if both have a number (train2017 and val2017), which no two classes would have.
    """
    parts = [path for path in inside if _part(path.name)]
    others = [path for path in inside if path not in parts]
    numbered = {_part(path.name) in PARTS["train"] for path in parts if path.name[-1].isdigit()}
    if not others or len(numbered) == 2 or (len(parts) > 1 and not any(_holds_images(path) for path in others)):
        return parts
    trains = [path for path in parts if _part(path.name) in PARTS["train"]]
    classes = {name for path in trains for name in _classes(path)}
    rivals = [path for path in others if _holds_images(path) and not classes & _classes(path)]
    return parts if classes and (len(parts) > len(trains) or not rivals) else []


def _classes(part: Path) -> set[str]:
    return {path.name for path in _subfolders(part) if _holds_images(path)}


def _holds_images(folder: Path) -> bool:
    return any(_is_image(entry) for entry in _walk(folder))


class _Empty(UsageError):
    """A class folder has no images."""


def _class_folder(folder: Path, label: int, above: frozenset[tuple[int, int]], left: list[Path]) -> list[Sample]:
    """The images of one class; what else its folder holds is added to what is left out."""
    images, others = [], []
    for entry in _walk(folder, above):
        (images if _is_image(entry) else others).append(entry)
    _refuse_dangling(images + others)
    left.extend(Path(entry.path) for entry in others)
    if not images:
        unread = _summary(folder, [Path(entry.path) for entry in others])
        held = f" (what it holds is not read: {unread})" if others else ""
        raise _Empty(f"class folder {folder} has no images: add some or remove it{held}")
    return [Sample(Path(entry.path), label, entry.path) for entry in images]


def _files(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder) if not entry.is_dir()]


def _is_image(entry: os.DirEntry[str]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in _endings() and entry.is_file()  # noqa: PTH122 (a million of them)


@cache
def _endings() -> set[str]:
    """The endings of the formats that Pillow reads."""
    with lab_extra():
        from PIL import Image
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _refuse_parts_as_classes(root: Path, samples: list[Sample]) -> None:
    """Parts, folds and whole data sets are no classes, whatever their names; what their folders are called tells."""
    first: dict[str, set[str]] = {}  # of each class: the folders in it, and the folders at the bottom, which hold its images
    below: dict[str, set[str]] = {}
    for holder in {os.path.dirname(sample.file) for sample in samples}:  # noqa: PTH120
        name, *inner = Path(holder).relative_to(root).parts
        first.setdefault(name, set()).update(inner[:1])
        below.setdefault(name, set()).update(inner[-1:])
    nested = [name for name in sorted(below) if len(below[name]) > 1]
    for one, other in combinations(nested, 2):
        if below[one] <= below[other] or below[other] <= below[one]:
            same = _some(below[one] & below[other])
            raise UsageError(
                f"{root / one} and {root / other} hold folders of the same names ({same}): name them train and test if they "
                "are parts of a data set, or put the images right into them if they are classes"
            )
    for name in nested:
        if len(beside := below[name] & (below.keys() - {name})) > 1:
            raise UsageError(
                f"{root / name} holds folders of the same names as those beside it ({_some(beside)}): if it is a part of the "
                "data set, put those beside it into a folder called train, or test"
            )
        parts = {part for part in first[name] if _part(part)}
        if len({_part(part) in PARTS["train"] for part in parts}) == 2:
            held = f"{root / name} holds parts of a data set ({_some(parts)})"
            raise UsageError(f"{held}, not the images of a class: give it as the data folder")


def _refuse_masks(root: Path, samples: list[Sample]) -> None:
    """A folder of images and one of their masks are no two classes; the same file names in both tell."""
    stems: dict[str, set[str]] = {}
    for sample in samples:
        path = Path(sample.file).relative_to(root)
        stems.setdefault(path.parts[0], set()).add(re.sub(r"[ _-]*(mask|label|gt|seg\w*)$", "", path.stem.lower()))
    images = [name for name in stems if _named(name, "images?|imgs?|inputs?|jpegimages")]
    masks = [
        name for name in stems if _named(name, "masks?|labels?|annotations?|annots?|seg(mentation)?s?|gt|targets?|trimaps?")
    ]
    for one, other in product(images, masks):
        if same := stems[one] & stems[other]:
            raise UsageError(
                f"{root / one} and {root / other} hold files of the same names ({_some(same)}), as images and their masks do: "
                "segmentation is not learnt here, give images in a folder for each class"
            )


def _named(name: str, words: str) -> bool:
    return re.fullmatch(rf"(({WORDS})[ _-]?)?({words})", name.lower()) is not None


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3])


# ---- what is left out


def _tell_left_out(folder: Path, reason: str, left: list[Path], notes: Sequence[str] = ()) -> None:
    told = [f"{len(left)} left out ({reason}): {_summary(folder, left)}"] if left else []
    if told := [*told, *notes]:
        log.warning("data folder %s: %s", folder, "; ".join(told))


def _summary(folder: Path, left: list[Path]) -> str:
    """How many of each kind, and one of them by name.

    >>> _summary(Path("a"), [Path("a/cat/1.HEIC"), Path("a/cat/2.heic"), Path("a/dog/notes")])
    '2 .heic (cat/1.HEIC, ...), 1 without an ending (dog/notes)'
    """
    kinds: dict[str, list[Path]] = {}
    for path in left:
        kind = path.suffix.lower() or "without an ending"
        kinds.setdefault("folder" if path.is_dir() else kind, []).append(path)
    named = {kind: str(paths[0].relative_to(folder)) + ", ..." * (len(paths) > 1) for kind, paths in kinds.items()}
    return ", ".join(f"{len(paths)} {kind} ({named[kind]})" for kind, paths in kinds.items())
