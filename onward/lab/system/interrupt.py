"""Ctrl-C, SIGTERM and a closed terminal ask a run to stop: it finishes its step first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def requests() -> Iterator[Callable[[], str | None]]:
    """Yield a function that returns the name of the signal that asked to stop, or None; a second signal stops at once.

    Outside the main thread it always returns None, because signals arrive in the main thread.

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
    """Let programs that are started in the body ignore Ctrl-C, which a terminal sends to every process: only we answer it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
