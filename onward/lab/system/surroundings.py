"""Standard streams and environment variables as a command finds them: none of them may stop a run or lose its work."""

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
"""Columns of a terminal: with fewer than ten, the help would be wrapped in an endless loop."""


@contextmanager
def settled() -> Iterator[None]:
    """Let the body write to its standard streams, whatever state these and the environment are in."""
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
    """The value of COLUMNS. `shutil` takes 0 for no answer, but other programs believe it."""
    try:
        return int(os.environ.get("COLUMNS", NARROWEST))
    except ValueError:
        return NARROWEST


def mend(before: tuple[TextIO | None, TextIO | None, TextIO | None]) -> None:
    """Replace standard streams that have been closed or set to None since the program had those in `before`."""
    names = ("stdin", "stdout", "stderr")
    broken = [at for at, was in enumerate(before) if was is not None and not _works(getattr(sys, names[at]))]
    if broken:
        _occupy(range(len(before)))
    for at in broken:
        setattr(sys, names[at], before[at] if _works(before[at]) else _anew(at))


def flush() -> None:
    """Flush standard output, if there is one."""
    if _works(sys.stdout):
        sys.stdout.flush()


def _works(stream: Any) -> bool:
    return stream is not None and not getattr(stream, "closed", False)


def _anew(number: int) -> TextIO:
    """A stream in place of a closed one, with the same destination."""
    if number == 0:
        return open(os.devnull)  # noqa: PTH123 (it stays open to the end of the program)
    file = io.BufferedWriter(_Forgiving(number, tells_of_readers=number == 1))
    return io.TextIOWrapper(file, errors="replace", line_buffering=True)


def _warn_only() -> None:
    """Keep warnings from being errors if PYTHONWARNINGS makes them so."""
    others = [option for option in sys.warnoptions if not "error".startswith(option.partition(":")[0])]
    if others != sys.warnoptions:
        sys.warnoptions[:] = others
        os.environ.pop("PYTHONWARNINGS", None)
        warnings.simplefilter("default")


def _usable(stream: TextIO | None, number: int) -> TextIO:
    """The standard stream of that number, or one that can be used in its place."""
    if stream is None or stream.closed:
        return open(os.devnull, "w" if number else "r")  # noqa: PTH123 (`settled` closes it)
    if number == 0 or type(stream) is not io.TextIOWrapper:  # of a notebook or a test
        return stream
    if stream.errors in ("strict", "surrogateescape"):  # else ± or ─ would raise an error where the encoding lacks them
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
    """Open the null device under the numbers of closed streams, which the next files to be opened would get otherwise."""
    for number in numbers:
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)


class _Forgiving(io.FileIO):
    """A file whose writes succeed even if its disk is full or its terminal is gone: what cannot be written is dropped."""

    def __init__(self, number: int, *, tells_of_readers: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._tells_of_readers = tells_of_readers

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # another program may have made the file non-blocking
                select.select([], [self], [])
        except BrokenPipeError:  # on standard output, a reader that stops reading ends the program, as usual
            if self._tells_of_readers:
                raise
            return memoryview(data).nbytes
        except OSError:
            return memoryview(data).nbytes
        return written
