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
    """Name the path and a remedy in an error of the body that writes to it: the system's own message leaves out one or both.

    >>> with writing(Path("run/metrics.jsonl")):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    OSError: run/metrics.jsonl cannot be written (No space left on device): make space on its disk
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own where the file has raised an OSError
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
    """Write a file so that nobody ever sees half of it, even if the machine stops in between.

    A file that was there before is kept under the name `keep`, if that is given. `before` is called when the new file is
    complete, just before it takes the place of the old one. A symbolic link is followed. A pipe or a device is written to and
    not replaced, because a program reads from it.

    Raises:
        OSError: the file cannot be written, because the disk is full perhaps; the old file is still there.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            held = io.BytesIO()  # whoever writes a picture goes back in the file, which a pipe cannot
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
            os.fsync(folder)  # so that the new name is on the disk too
        finally:
            os.close(folder)


def write_text(path: Path, text: str, before: Callable[[], object] | None = None) -> None:
    """`write_whole` of a text."""
    write_whole(path, lambda file: file.write(text.encode()), before=before)


def try_out(folder: Path) -> None:
    """Raise an OSError if no file can be written there."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(4096))  # a full disk still takes an empty file


def space(folder: Path) -> float:
    """Bytes that are free on the disk of a folder; infinity where the disk does not say how large it is."""
    usage = shutil.disk_usage(folder)
    return usage.total - usage.used if usage.total else math.inf
