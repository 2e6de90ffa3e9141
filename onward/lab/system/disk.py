"""Files that are written whole or not at all, and one sentence where they cannot be written."""

from __future__ import annotations

import errno
import io
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
TAKEN = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What keeps the body from writing to `path` is told with its name and a remedy: the system leaves out either, or both.

    >>> with writing(Path("run/metrics.jsonl")):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    OSError: run/metrics.jsonl cannot be written (No space left on device): make space on its disk
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save buries what the file has raised in a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        remedy = "check its disk"
        if cause.errno in FULL:
            remedy = "make space on its disk"
        elif cause.errno in FORBIDDEN:
            remedy = "allow writing there, or choose another folder"
        elif cause.errno in TAKEN:
            remedy = "choose another name"
        raise OSError(f"{path} cannot be written ({cause.strerror or cause}): {remedy}") from error


def write_whole(
    path: Path, write: Callable[[BinaryIO], object], keep: Path | None = None, before: Callable[[], object] | None = None
) -> None:
    """Write a file that is never seen half-written, even if the machine stops in between; `keep` takes the old one. `before`
    is called when it is complete and has not taken its place yet.

    A symbolic link is followed. A pipe or a device is not replaced by a file: what reads it would get nothing.

    Raises:
        OSError: it could not be written, for want of space perhaps; what was there is still there.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            held = io.BytesIO()  # a picture is written back and forth
            write(held)
            with path.open("wb") as pipe:
                pipe.write(held.getbuffer())
            return
        target = path.resolve() if keep is None else path
        partial = target.with_name(target.name + ".partial")
        try:
            with partial.open("w+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if before is not None:
                before()
            if keep is not None and target.exists():
                target.replace(keep)
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the renaming too
        finally:
            os.close(folder)


def write_text(path: Path, text: str, before: Callable[[], object] | None = None) -> None:
    """`write_whole` of a text."""
    write_whole(path, lambda file: file.write(text.encode()), before=before)


def read_text(path: Path) -> str:
    """A text that `write_text` has written, whatever encoding the system prefers."""
    return path.read_text(encoding="utf-8")


def try_out(folder: Path) -> None:
    """Raise an OSError if no file can be written there."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(4096))  # a disk that is full still takes a file that is empty


def space(folder: Path) -> float:
    """Bytes that are free on its disk; without end where it does not tell."""
    usage = shutil.disk_usage(folder)
    return usage.total - usage.used if usage.total else math.inf
