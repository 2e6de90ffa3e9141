"""Ctrl-C, SIGTERM and the end of a terminal as a request: the step at hand is finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def requests() -> Iterator[Callable[[], str | None]]:
    """A function that names the signal which asked to stop, or None; a second signal stops at once.

    Outside the main thread, where signals do not arrive, it is always None.

    >>> with requests() as asked:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     asked()
    'SIGTERM'
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    arrived: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        if arrived:
            raise KeyboardInterrupt
        arrived.append(signal.Signals(number).name)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    asked = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in asked}
    try:
        yield lambda: arrived[0] if arrived else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ours_alone() -> Iterator[None]:
    """A program started in the body does not hear Ctrl-C, which a terminal sends to every process: only we tell of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
