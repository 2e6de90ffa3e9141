"""What a folder holds, and what is told of that which is left out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from onward.errors import UsageError
from onward.lab.system.extra import lab_extra

with lab_extra():
    from PIL import Image

LEFTOVERS = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}
"""What file managers leave in folders of images, in small letters: copies of images among it."""


log = logging.getLogger(__name__)


def entries_of(folder: str | Path) -> list[os.DirEntry[str]]:
    """Files and folders, by name, without what is hidden and what file managers leave."""
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in LEFTOVERS]
    return sorted(seen, key=lambda entry: entry.name)


def walk(folder: str | Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder, through links to folders too; a link that leads back to one `above` counts as a file."""
    above |= {identity(folder)}
    for entry in entries_of(folder):
        if entry.is_dir() and not (entry.is_symlink() and identity(entry.path) in above):
            yield from walk(entry.path, above)
        else:
            yield entry


def identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)  # noqa: PTH116 (a Path for each of a million entries is what takes the time)
    return found.st_dev, found.st_ino


def refuse_dangling(entries: Iterable[os.DirEntry[str]]) -> None:
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
            target = os.readlink(entry.path)  # noqa: PTH115
            raise UsageError(f"link {entry.path} leads to {target}, which is not there: fetch that, or remove the link")


def subfolders(folder: Path) -> list[Path]:
    entries = entries_of(folder)
    refuse_dangling(entries)
    return [Path(entry.path) for entry in entries if entry.is_dir()]


def files_in(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in entries_of(folder) if not entry.is_dir()]


def is_image(entry: os.DirEntry[str]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in _endings() and entry.is_file()  # noqa: PTH122 (a million of them)


@cache
def _endings() -> set[str]:
    """The endings of the formats that Pillow reads."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def holds_images(folder: Path) -> bool:
    return any(is_image(entry) for entry in walk(folder))


def some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3])


def tell_left_out(folder: Path, reason: str, left: list[Path], notes: Sequence[str] = ()) -> None:
    told = [f"{len(left)} left out ({reason}): {summary(folder, left)}"] if left else []
    if told := [*told, *notes]:
        log.warning("data folder %s: %s", folder, "; ".join(told))


def summary(folder: Path, left: list[Path]) -> str:
    """How many of each kind, and one of them by name.

    >>> summary(Path("a"), [Path("a/cat/1.HEIC"), Path("a/cat/2.heic"), Path("a/dog/notes")])
    '2 .heic (cat/1.HEIC, ...), 1 without an ending (dog/notes)'
    """
    kinds: dict[str, list[Path]] = {}
    for path in left:
        kind = path.suffix.lower() or "without an ending"
        kinds.setdefault("folder" if path.is_dir() else kind, []).append(path)
    named = {kind: str(paths[0].relative_to(folder)) + ", ..." * (len(paths) > 1) for kind, paths in kinds.items()}
    return ", ".join(f"{len(paths)} {kind} ({named[kind]})" for kind, paths in kinds.items())
