"""Several runs at once, each in a process of its own, with its share of the threads."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection
from typing import Any, NamedTuple

import torch

from onward.errors import UsageError
from onward.lab.run.failure import TrainingFailed
from onward.lab.settings import Train
from onward.lab.system import interrupt

Work = Callable[[Train, Callable[[str], None]], Any]
"""Trains a run, calling what it is given after each step with what to say of it; returns what became of the run."""


class Ended(NamedTuple):
    """What a process says last: what became of its run, or the error that ended it."""

    outcome: Any
    error: BaseException | None = None


def together(
    runs: Sequence[Train],
    jobs: int,
    work: Work,
    step: Callable[[int, int, str], None],
    asked_to_stop: Callable[[], str | None],
) -> Iterator[tuple[int, Any]]:
    """Do the ``work`` of the runs, so many at once; yields each one's place and outcome as it ends.

    ``step`` is told the place of a run, how many steps it has taken since, and what to say of it. ``work`` is a function of a
    module, since other processes have to find it.

    Raises whatever ended a run, after the others have stopped. After a request to stop, all are asked to, each is saved, and a
    KeyboardInterrupt is raised.
    """
    waiting, at_work = list(enumerate(runs)), dict[connection.Connection, tuple[int, Any]]()
    threads = max(1, torch.get_num_threads() // jobs)
    failed: BaseException | None = None
    told = False
    while at_work or (waiting and failed is None and not asked_to_stop()):
        while waiting and len(at_work) < jobs and failed is None and not asked_to_stop():
            place, run = waiting.pop(0)
            ours, theirs = multiprocessing.Pipe(duplex=False)
            with interrupt.ours_alone():  # we pass it on, once
                process = multiprocessing.get_context("spawn").Process(target=_child, args=(run, threads, work, theirs))
                process.start()
            theirs.close()
            at_work[ours] = place, process
        for ready in connection.wait(list(at_work), timeout=0.2):
            assert isinstance(ready, connection.Connection)
            ours, (place, process) = ready, at_work[ready]
            try:
                said = ours.recv()
            except EOFError:
                process.join()
                said = Ended(f"its process ended without a word (exit code {process.exitcode})")
            if not isinstance(said, Ended):
                step(place, *said)
                continue
            del at_work[ours]
            process.join()
            if said.error is None:
                yield place, said.outcome
            elif failed is None:
                failed = said.error
        if (failed is not None or asked_to_stop()) and not told:
            told = True
            for _, process in at_work.values():
                process.terminate()  # SIGTERM: the run at hand is saved
    if failed is not None and not isinstance(failed, KeyboardInterrupt):
        raise failed
    if request := asked_to_stop():
        raise KeyboardInterrupt(request)


def _child(run: Train, threads: int, work: Work, sent: connection.Connection) -> None:
    torch.set_num_threads(threads)
    count, last = 0, time.monotonic()

    def step(text: str) -> None:
        nonlocal count, last
        count += 1
        if time.monotonic() - last > 0.1:
            try:
                sent.send((count, text))
            except OSError:  # nobody listens any more
                signal.raise_signal(signal.SIGTERM)
            count, last = 0, time.monotonic()

    try:
        ended = Ended(work(run, step))
    except (UsageError, TrainingFailed, OSError, KeyboardInterrupt) as error:
        ended = Ended(None, error)
    with suppress(OSError):
        sent.send(ended)
