"""Learning rates for a comparison: every algorithm tries a grid of them on held-out training samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from onward.lab.data import Data, held_out
from onward.lab.run import algorithms, record
from onward.lab.run import folder as run_folder
from onward.lab.settings import Compare, Train
from onward.lab.studies.runs import Outcome, failures, folder_of
from onward.lab.system import disk
from onward.lab.tasks import Metric


def trials(config: Compare, runs: Mapping[str, Sequence[Train]], folder: Path) -> dict[str, list[Train]]:
    """For each algorithm whose entry sets no rate, a shorter training with every rate of the grid."""
    found = {}
    for label, (run, *_) in runs.items():
        if not _has_rate(label):
            place = folder / run_folder.TRIALS / folder_of(run).name.removesuffix(f"-s{run.seed}")
            short = replace(run, epochs=config.lr_epochs or config.epochs, subset=replace(run.subset, held_out=True))
            short = replace(short, align_every=0, save_weights=0, wandb=False)
            found[label] = [replace(short, lr=rate, out=f"{place}-lr{rate:g}") for rate in dict.fromkeys(config.lr_grid)]
    return found if config.lr_grid else {}


def data_for(data: Callable[[Train], Data], folder: Path) -> Callable[[Train], Data]:
    """A function that gives trials their data: the training samples, some held out as the test part. All have one seed."""
    held: list[Data] = []

    def of_trial(run: Train) -> Data:
        if not held:
            held.append(held_out(data(run)))
            if not (folder / run_folder.RATES).exists():
                disk.write_text(folder / run_folder.RATES, "{}\n")  # tells a report that the trials are no results
        return held[0]

    return of_trial


def best_rate(tried: Mapping[float, Outcome], metric: Metric) -> float | None:
    """The learning rate with the best metric after the last epoch, of equal ones that with the lowest loss; None if none has.

    >>> from onward.lab.tasks import ACCURACY
    >>> tried = {0.1: "diverged", 1e-2: [{"test_accuracy": 9, "test_loss": 1}], 1e-3: [{"test_accuracy": 8, "test_loss": 1}]}
    >>> best_rate(tried, ACCURACY)
    0.01
    """
    last = {rate: rows[-1] for rate, rows in tried.items() if isinstance(rows, list)}
    best = metric.best([row[metric.key] for row in last.values()]) if last else None
    equal = [rate for rate in last if last[rate][metric.key] == best]
    return min(equal, key=lambda rate: last[rate]["test_loss"], default=None)


def with_best(
    config: Compare, runs: dict[str, list[Train]], found: Mapping[str, Mapping[float, Outcome]], folder: Path, metric: Metric
) -> dict[str, list[Train]]:
    """The runs with the rates that did best; none of an algorithm for which every rate failed. Prints and writes the trials.

    A run there whose rate was chosen by earlier trials, and now is another, is taken away. Raises a UsageError if a run
    with a rate that no trials have chosen is in the way.
    """
    caption = f"{metric.measured.removeprefix('test ')} on held-out training samples; * the best, which is taken"
    printed = Table(title="learning rates", caption=caption)
    rates = sorted(dict.fromkeys(config.lr_grid))
    for column in ("algorithm", *(f"{rate:g}" for rate in rates)):
        printed.add_column(column, justify="left" if column == "algorithm" else "right")
    kept, notes, chosen = {}, [], dict(runs)
    for label, tried in found.items():
        best = best_rate(tried, metric)
        reached = {rate: rows[-1][metric.key] if isinstance(rows := tried[rate], list) else None for rate in rates}
        cells = [
            "failed" if value is None else f"{value:{metric.form}}{'*' * (rate == best)}" for rate, value in reached.items()
        ]
        printed.add_row(label, *cells)
        kept[label] = {"lr": best, metric.name: {f"{rate:g}": value for rate, value in reached.items()}}
        chosen[label] = [] if best is None else [replace(run, lr=best) for run in runs[label]]
        if best in (rates[0], rates[-1]) and len(rates) > 1:
            notes.append(f"{label}: the best rate, {best:g}, is at the end of the grid: widen it to be sure")
    if not config.overwrite:
        notes += _take_away(folder, {label: chosen[label] for label in found})
    disk.write_text(folder / run_folder.RATES, json.dumps(kept, indent=2) + "\n")
    Console(markup=False, emoji=False).print(printed)  # paths are no markup
    for note in [*failures(found, "lr"), *notes]:
        print(note)
    return chosen


def _has_rate(label: str) -> bool:
    """Whether an algorithm's entry in a list says its learning rate.

    >>> _has_rate("fdfa:directions=2,lr=1e-3"), _has_rate("fdfa"), _has_rate("rule.py:Rule:lr=1e-5")
    (True, False, True)
    """
    return "lr" in algorithms.read(label).settings


def _take_away(folder: Path, chosen: Mapping[str, Sequence[Train]]) -> list[str]:
    """Delete the runs whose rates were chosen by earlier trials and are no longer the best; returns a note on each."""
    try:
        before = {label: entry["lr"] for label, entry in json.loads((folder / run_folder.RATES).read_text()).items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        before = {}
    notes, outdated = [], []
    for label, same in chosen.items():
        for run in same:
            there = folder_of(run)
            if record.differing(there, run) == {"lr": (before.get(label), run.lr)}:
                outdated.append(there)
                notes.append(f"{there}: the best rate is {run.lr:g}, no longer {before[label]:g}, so it is trained again")
            else:
                record.check(there, run)
    for there in outdated:  # nothing, if another run is in the way
        run_folder.clear(there)
    return notes
