"""What a command finds where it is started: no work is lost for a line on the screen, whatever the streams are."""

from __future__ import annotations

import io
import os
import select
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

NARROWEST = 20
"""Columns of a terminal: with fewer than ten, the help would be broken into lines for ever."""


@contextmanager
def settled() -> Iterator[None]:
    """While the body runs, it can write to its standard streams; what others have left in the environment does not stop it."""
    if shutil.get_terminal_size().columns < NARROWEST or _asked_columns() < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    _warn_only()
    before = sys.stdin, sys.stdout, sys.stderr
    _occupy(range(len(before)))
    sys.stdin, sys.stdout, sys.stderr = (_usable(stream, number) for number, stream in enumerate(before))
    ours = [stream for stream in (sys.stdin, sys.stdout, sys.stderr) if stream not in before]
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        for stream in ours:
            with suppress(OSError):  # a reader that has gone
                stream.close()


def _asked_columns() -> int:
    """What COLUMNS says; others than `shutil` take a 0 at its word."""
    try:
        return int(os.environ.get("COLUMNS", NARROWEST))
    except ValueError:
        return NARROWEST


def mend(before: tuple[TextIO | None, TextIO | None, TextIO | None]) -> None:
    """Give the program standard streams again where others have closed them or taken them away since it had these."""
    names = ("stdin", "stdout", "stderr")
    if all(was is None or _works(getattr(sys, name)) for name, was in zip(names, before, strict=True)):
        return
    _occupy(range(len(before)))
    for number, (name, was) in enumerate(zip(names, before, strict=True)):
        if was is not None and not _works(getattr(sys, name)):
            setattr(sys, name, was if _works(was) else _anew(number))


def flush() -> None:
    """Write what standard output still holds, if there is any."""
    if _works(sys.stdout):
        sys.stdout.flush()


def _works(stream: Any) -> bool:
    return stream is not None and not getattr(stream, "closed", False)


def _anew(number: int) -> TextIO:
    """A stream in place of one that was closed: to where that one went."""
    if number == 0:
        return open(os.devnull)  # noqa: PTH123 (for as long as the program runs)
    file = io.BufferedWriter(_Forgiving(number, tells_of_readers=number == 1))
    return io.TextIOWrapper(file, errors="replace", line_buffering=True)


def _warn_only() -> None:
    """Let a warning be a warning where PYTHONWARNINGS makes it an error."""
    others = [option for option in sys.warnoptions if not "error".startswith(option.partition(":")[0])]
    if others != sys.warnoptions:
        sys.warnoptions[:] = others
        os.environ.pop("PYTHONWARNINGS", None)
        warnings.simplefilter("default")


def _usable(stream: TextIO | None, number: int) -> TextIO:
    """The standard stream of that number, or one that can be used in its place."""
    if stream is None or stream.closed:
        return open(os.devnull, "w" if number else "r")  # noqa: PTH123 (it is closed where the others are given back)
    if number == 0 or type(stream) is not io.TextIOWrapper:  # a notebook's, a test's
        return stream
    if stream.errors in ("strict", "surrogateescape"):  # else a ± or ─ ends a program whose encoding has none
        stream.reconfigure(errors="replace")
    file = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(file, io.FileIO):
        return stream
    with suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(file.fileno(), tells_of_readers=number == 1)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )


def _occupy(numbers: Iterable[int]) -> None:
    """Keep the numbers of streams that are closed from being given to the next files that are opened."""
    for number in numbers:
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)


class _Forgiving(io.FileIO):
    """A file that takes what it is given, also where its disk is full or its terminal has gone."""

    def __init__(self, number: int, *, tells_of_readers: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._tells_of_readers = tells_of_readers

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # another program has made it non-blocking
                select.select([], [self], [])
        except BrokenPipeError:  # a reader who has heard enough ends the program, as ever
            if self._tells_of_readers:
                raise
            return memoryview(data).nbytes
        except OSError:
            return memoryview(data).nbytes
        return written
