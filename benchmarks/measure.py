"""How the benchmarks measure time: candidates in turn within one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def in_turn(candidates: dict[str, Callable[[], object]], turns: int, calls: int = 5) -> dict[str, list[float]]:
    """Seconds per call in each turn; candidates take turns (A B C A B C ...), so that a slow spell of the machine hits all.

    A turn is one call that is not timed, which brings the candidate's own data back into the caches, and ``calls`` that are:
    the conditions of training, where one step follows the other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, candidate in candidates.items():
            candidate()
            start = time.perf_counter()
            for _ in range(calls):
                candidate()
            seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def ratio(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest of the ratios taken pair by pair."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)
