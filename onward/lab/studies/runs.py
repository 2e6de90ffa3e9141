"""Several runs: each algorithm with every seed, in folders of their own, trained one after the other or several at once."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from onward.errors import UsageError
from onward.lab import tasks
from onward.lab.data import Data
from onward.lab.data.own import depend_on_seed
from onward.lab.run import algorithms, record
from onward.lab.run import folder as run_folder
from onward.lab.run.failure import TrainingFailed
from onward.lab.run.loop import resume, train
from onward.lab.run.training import Row, load_data, try_out
from onward.lab.settings import Recipe, Train
from onward.lab.studies.jobs import together
from onward.lab.system import interrupt, own

Outcome = list[Row] | str
"""What became of a run: its epochs, or why it failed."""


def runs_of(config: Recipe, labels: Iterable[str], seeds: Iterable[int], folder: Path) -> dict[str, list[Train]]:
    """For each algorithm, as lists name it, a training with every seed, in a folder of its own. Raises a UsageError for an
    algorithm that cannot be, or two whose folders would be the same."""
    shared = {entry.name: getattr(config, entry.name) for entry in fields(Recipe)}
    names: dict[str, str] = {}
    found = {}
    for label in dict.fromkeys(labels):
        name = algorithms.folder_name(label)
        if (other := names.setdefault(name, label)) != label:
            raise UsageError(f"algorithms {other!r} and {label!r} would share the folder {name}: leave one out")
        found[label] = [
            algorithms.variant(label, Train(**{**shared, "seed": seed, "out": str(folder / f"{name}-s{seed}")}))
            for seed in seeds
        ]
    return found


def folder_of(run: Train) -> Path:
    """Where a run is, or will be."""
    return Path(run.out or "")


def _loader(config: Recipe) -> Callable[[Train], Data]:
    """A function that gives the data of a run, loaded once for all runs, or for each seed that they depend on."""
    loaded = cache(lambda seed: load_data(config, seed))
    by_seed = cache(lambda: depend_on_seed(config.data))  # runs the user's file
    return lambda run: loaded(run.seed if by_seed() else 0)


def data_for(runs: Mapping[str, Sequence[Train]], config: Recipe) -> Callable[[Train], Data]:
    """A function that gives the data of a run. They are loaded when they are first asked for. Then each algorithm takes a
    step on trial: one that cannot work is refused before the others have trained for hours.

    Raises, when called:
        UsageError: there are no such data, or an algorithm, which is named, does not work with them or with the network.
        TrainingFailed: no algorithm has a first step with finite numbers.
    """
    data = _loader(config)

    @cache
    def try_all() -> None:
        failed = []
        for label, (first, *_) in runs.items():
            try:
                try_out(first, data(first))
            except UsageError as error:
                raise UsageError(f"{label}: {error}") from error
            except TrainingFailed as error:
                failed.append(f"{label}: {error}")
        if len(failed) == len(runs):
            raise TrainingFailed(f"{'; '.join(failed)}; nothing was written")

    def tried(run: Train) -> Data:
        found = data(run)
        try_all()
        return found

    return tried


def task_of(runs: Mapping[str, Sequence[Train]], data: Callable[[Train], Data]) -> tasks.Task:
    """What the runs are trained for: any of them says it, and their data if none has begun."""
    every = [run for same in runs.values() for run in same]
    for run in every:
        with suppress(UsageError):
            return record.read(folder_of(run)).task
    return tasks.named(data(every[0]).task)


def train_all(
    runs: Mapping[str, Sequence[Train]], differ: str, overwrite: bool, data: Callable[[Train], Data], jobs: int = 1
) -> dict[str, dict[Any, Outcome]]:
    """Train what is not there yet, `jobs` at once, with a progress bar for each label. Returns for each label what became of
    its runs, by the setting that they `differ` in. A run that fails does not stop the others.

    Raises:
        UsageError: a run with other settings or of other data is in the way; nothing has been trained then.
        KeyboardInterrupt: a signal asked to stop; the runs at hand are saved, and the message says how to go on.
    """
    done: dict[str, dict[Any, Outcome]] = {label: {} for label in runs}
    missing: list[tuple[str, Train]] = []
    for label, same in runs.items():
        for run in same:
            outcome = None if overwrite else record.finished(folder_of(run), run)
            if outcome:
                done[label][getattr(run, differ)] = outcome
            else:
                missing.append((label, run))
    if not missing:
        _check_own_data(list(itertools.chain.from_iterable(runs.values())))
        return done
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if there := sum(map(len, done.values())):
        console.print(f"{there} of {there + len(missing)} runs are there already")
    for run in itertools.chain.from_iterable(runs.values()):
        found = data(run)
        if not overwrite:
            run_folder.check_data(folder_of(run), found)
    steps = [run.epochs * -(-len(data(run).train) // run.batch_size) for _, run in missing]
    again = f"the same command{' without --overwrite' if overwrite else ''} goes on with the runs that are missing"
    every = [run for _, run in missing]
    with _board(console, missing, steps) as advance, interrupt.requests() as asked_to_stop:
        if jobs > 1:
            work = partial(_load_and_train, overwrite)
            ended = together(every, min(jobs, len(every)), work, advance, asked_to_stop)
        else:
            ended = _one_by_one(every, data, advance, asked_to_stop, overwrite)
        count = 0
        try:
            for place, outcome in ended:
                label, run = missing[place]
                metric = tasks.named(data(run).task).main
                said = outcome if isinstance(outcome, str) else f"{metric.title} {metric.text(outcome[-1][metric.key])}"
                count += 1
                console.print(f"{count}/{len(missing)}  {label}, {differ} {getattr(run, differ):g}: {said}")
                advance(place, steps[place], "")
                done[label][getattr(run, differ)] = outcome
                if (request := asked_to_stop()) and jobs == 1:
                    raise KeyboardInterrupt(f"{request} after run {count} of {len(missing)}")  # noqa: TRY301 (told below)
        except KeyboardInterrupt as stopped:
            raise KeyboardInterrupt(f"{stopped}; {again}".removeprefix("; ")) from None
    return {label: {getattr(run, differ): done[label][getattr(run, differ)] for run in same} for label, same in runs.items()}


def _check_own_data(runs: Sequence[Train]) -> None:
    """Raise a UsageError if runs that are complete are of other data than the user's file returns now. Other data are not
    loaded for this: it may take long, and they seldom change."""
    if runs and own.named("--data", runs[0].data):
        data = _loader(runs[0])
        for run in runs:
            run_folder.check_data(folder_of(run), data(run))


def _outcome(run: Train, data: Data, step: Callable[[str], None], overwrite: bool) -> Outcome:
    """Train a run, or resume it if it has begun; returns what became of it."""
    try:
        begun = not overwrite and (folder_of(run) / run_folder.CONFIG).exists()
        return resume(folder_of(run), data, step) if begun else train(run, data, step)
    except TrainingFailed as error:
        return str(error)


def _load_and_train(overwrite: bool, run: Train, step: Callable[[str], None]) -> Outcome:
    """The same in a process of its own, which has loaded nothing yet."""
    return _outcome(run, _loader(run)(run), step, overwrite)


def _one_by_one(
    runs: Sequence[Train],
    data: Callable[[Train], Data],
    advance: Callable[[int, int, str], None],
    asked_to_stop: Callable[[], str | None],
    overwrite: bool,
) -> Iterator[tuple[int, Outcome]]:
    """Train the runs here, one after the other; yields each one's place and what became of it."""

    def step(place: int, text: str) -> None:
        advance(place, 1, text)
        if request := asked_to_stop():  # it came before the run began to listen
            signal.raise_signal(signal.Signals[request])

    for place, run in enumerate(runs):
        yield place, _outcome(run, data(run), partial(step, place), overwrite)


@contextmanager
def _board(
    console: Console, missing: Sequence[tuple[str, Train]], steps: Sequence[int]
) -> Iterator[Callable[[int, int, str], None]]:
    """A row for each label, with its runs' steps and the time that they still take, and one for all. Yields a function that
    takes the place of a run, how many steps it has taken since, and what to say of it; no run is counted beyond its steps."""
    said = TextColumn("{task.fields[said]}")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), said)
    left, of_label = list(steps), dict[str, int]()
    for (label, _), count in zip(missing, steps, strict=True):
        of_label[label] = of_label.get(label, 0) + count
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        total = bar.add_task("all", total=sum(steps), said="")
        rows = {label: bar.add_task(label, total=count, said="", start=False) for label, count in of_label.items()}

        def advance(place: int, count: int, said: str) -> None:
            count = min(count, left[place])
            left[place] -= count
            row = rows[missing[place][0]]
            bar.start_task(row)
            bar.update(row, advance=count, said=said)
            bar.update(total, advance=count)

        yield advance


def failures(outcomes: Mapping[str, Mapping[Any, Outcome]], differ: str) -> list[str]:
    """A line for each run that failed, with the reason.

    >>> failures({"bp": {0: [{"epoch": 1}], 1: "the loss is nan"}}, "seed")
    ['bp, seed 1 failed: the loss is nan']
    """
    return [
        f"{label}, {differ} {value:g} failed: {outcome}"
        for label, same in outcomes.items()
        for value, outcome in same.items()
        if isinstance(outcome, str)
    ]
