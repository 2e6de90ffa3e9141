"""Phases of a step, marked where they happen, so that a stopwatch can tell them apart.

Without a stopwatch a mark is a call that returns a context manager which does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Stopwatch = Callable[[str], AbstractContextManager[object]]
_NOTHING = nullcontext()
_stopwatch: Stopwatch | None = None


def phase(name: str) -> AbstractContextManager[object]:
    """Around work of a phase: ``primal`` (a forward pass), ``tangent``, ``backward``, or ``other``.

    >>> with phase("primal"):
    ...     pass
    """
    return _NOTHING if _stopwatch is None else _stopwatch(name)


def during(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: every call of the function is a phase of that name."""

    def mark(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if _stopwatch is None:
                return function(*args, **kwargs)
            with _stopwatch(name):
                return function(*args, **kwargs)

        return call

    return mark


@contextmanager
def timed(stopwatch: Stopwatch) -> Iterator[None]:
    """Within the block, every phase is entered through ``stopwatch(name)``.

    >>> seen = []
    >>> with timed(lambda name: nullcontext(seen.append(name))), phase("backward"):
    ...     pass
    >>> seen
    ['backward']
    """
    global _stopwatch
    before, _stopwatch = _stopwatch, stopwatch
    try:
        yield
    finally:
        _stopwatch = before
