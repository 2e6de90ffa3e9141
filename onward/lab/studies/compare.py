"""Several algorithms and seeds on one network: a table, and the curves behind it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import signal
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onward.errors import UsageError
from onward.lab.data.images import ImageData, held_out
from onward.lab.networks import models
from onward.lab.report.figures import draw, formats, learning_curves
from onward.lab.run import algorithms
from onward.lab.run import folder as run_folder
from onward.lab.run.loop import progress, resume, train
from onward.lab.run.training import Row, TrainingFailed, check_place, load_data, try_out
from onward.lab.settings import Compare, Recipe, Train
from onward.lab.system import disk, interrupt

JSON, CSV, RATES, CURVES = "table.json", "table.csv", "rates.json", "curves.png"
TRIALS = "rates"
"""The folder of the runs that RATES tells of."""
Outcome = list[Row] | str
"""What became of a run: its epochs, or why it failed."""


def compare(config: Compare) -> list[dict[str, Any]]:
    """Train every algorithm with every seed, each run in a folder of its own; print the table and write it, with the curves.

    With a grid of learning rates, each algorithm's is chosen first. A run that is complete there already is not repeated, nor
    is one that failed. Returns the rows of the table, one per algorithm.

    Raises:
        UsageError: something that was asked for cannot work, or a run with other settings is in the way.
    """
    if not config.algorithms or config.seeds < 1:
        raise UsageError(f"{len(config.algorithms)} algorithms with {config.seeds} seeds: compare at least one of each")
    if config.lr_grid and config.subset.held_out:
        raise UsageError(
            "--lr-grid with --subset.held-out: the same images would choose the rates and judge them, leave one out"
        )
    models.check(config.model)
    formats()  # says so now if pictures cannot be drawn
    folder = Path(config.out or run_folder.default_path(config, "compare"))
    runs = runs_of(config, config.algorithms, range(config.seeds), folder)
    trials = {label: _trials(config, runs[label][0], folder) for label in runs if config.lr_grid and not _has_rate(label)}
    data = images_for(runs, config)
    check_place(folder, config)
    with run_folder.claimed(folder, overwrite=True):
        if trials:
            for label in {} if config.overwrite else runs:
                for run in runs[label]:  # before the trials, but for the rate that they choose
                    run_folder.check(Path(run.out), run, but=["lr"] if label in trials else ())

            def images_of_trials() -> ImageData:
                images = held_out(data())
                if not (folder / RATES).exists():
                    disk.write_text(folder / RATES, "{}\n")  # tells a report that the trials are no results
                return images

            found = train_all(trials, "lr", config.overwrite, images_of_trials)
            runs = _with_best_rates(config, runs, found, folder)
        results = train_all(runs, "seed", config.overwrite, data)

    complete = {label: [rows for rows in same.values() if isinstance(rows, list)] for label, same in results.items()}
    table = []
    for label, same in results.items():
        rows = complete[label]
        engine = run_folder.engine(Path(runs[label][0].out), runs[label][0]) if same else None
        rate = runs[label][0].lr if same else None
        table.append({"algorithm": label, "engine": engine, "lr": rate, **summary(rows), "failed": len(same) - len(rows)})
    disk.write_text(folder / JSON, json.dumps(table, indent=2) + "\n")
    lines = io.StringIO()
    writer = csv.DictWriter(lines, table[0].keys())
    writer.writeheader()
    writer.writerows(table)
    disk.write_text(folder / CSV, lines.getvalue())
    seeds = "1 seed" if config.seeds == 1 else f"{config.seeds} seeds"
    title = f"{config.model}, {config.data_dir or config.data}, {config.epochs} epochs, {seeds}"
    show(table, title)
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(*failures(results, "seed"), f"table: {folder / JSON}, {folder / CSV}", sep="\n")
    if drawn := {label: rows for label, rows in complete.items() if rows}:
        draw({folder / CURVES: lambda path: learning_curves(path, drawn, title)})
    return table


def runs_of(config: Recipe, labels: Iterable[str], seeds: Iterable[int], folder: Path) -> dict[str, list[Train]]:
    """For each algorithm, as lists name it, a training with every seed, in a folder of its own.

    Raises:
        UsageError: an algorithm that cannot be, or two whose folders would be the same.
    """
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


def images_for(runs: Mapping[str, Sequence[Train]], config: Recipe) -> Callable[[], ImageData]:
    """The images, loaded when they are first asked for. Each algorithm then takes a step, for nothing: one that cannot work,
    which may be seen only there, is refused before the others have trained for hours.

    Raises, when called:
        UsageError: there are no such images, or an algorithm, which is named, does not work with them or with the network.
        TrainingFailed: no algorithm has a first step with finite numbers.
    """

    @cache
    def images() -> ImageData:
        loaded = load_data(config)
        failed = []
        for label, (first, *_) in runs.items():
            try:
                try_out(first, loaded)
            except UsageError as error:
                raise UsageError(f"{label}: {error}") from error
            except TrainingFailed as error:
                failed.append(f"{label}: {error}")
        if len(failed) == len(runs):
            raise TrainingFailed(f"{'; '.join(failed)}; nothing was written")
        return loaded

    return images


def train_all(
    runs: Mapping[str, Sequence[Train]], differ: str, overwrite: bool, data: Callable[[], ImageData]
) -> dict[str, dict[Any, Outcome]]:
    """Train what is not there yet, under one progress bar. Returns for each label what became of its runs, by the setting that
    they `differ` in. A run that fails does not stop the others.

    Raises:
        UsageError: a run with other settings or of other images is in the way; nothing has been trained then.
        KeyboardInterrupt: a signal asked to stop; the run at hand is saved, and the message says how to go on.
    """
    done: dict[str, dict[Any, Outcome]] = {label: {} for label in runs}
    missing: list[tuple[str, Train]] = []
    for label, same in runs.items():
        for run in same:
            outcome = None if overwrite else run_folder.finished(Path(run.out), run)
            if outcome:
                done[label][getattr(run, differ)] = outcome
            else:
                missing.append((label, run))
    if not missing:
        return done
    console = Console(highlight=False, soft_wrap=True)
    if there := sum(map(len, done.values())):
        console.print(f"{there} of {there + len(missing)} runs are there already")
    images = data()
    for run in () if overwrite else itertools.chain.from_iterable(runs.values()):
        run_folder.check_data(Path(run.out), images)
    steps = [run.epochs * -(-len(images.train) // run.batch_size) for _, run in missing]
    again = f"the same command{' without --overwrite' if overwrite else ''} goes on with the runs that are missing"
    with progress(console, sum(steps)) as advance, interrupt.requests() as asked_to_stop:
        for number, ((label, run), left) in enumerate(zip(missing, steps, strict=True), start=1):
            name = f"{number}/{len(missing)}  {label}, {differ} {getattr(run, differ):g}"
            taken = 0

            def step(text: str, name: str = name) -> None:
                nonlocal taken
                taken += 1
                advance(f"{name}: {text}")
                if request := asked_to_stop():  # before the run listened, which it does now
                    signal.raise_signal(signal.Signals[request])

            outcome: Outcome
            try:
                begun = not overwrite and (Path(run.out) / run_folder.CONFIG).exists()
                outcome = resume(Path(run.out), images, step) if begun else train(run, images, step)
                console.print(f"{name}: test accuracy {outcome[-1]['test_accuracy']:.2f} %", markup=False)
            except TrainingFailed as error:
                outcome = str(error)
                console.print(f"{name}: {error}", markup=False)
            except KeyboardInterrupt as stopped:
                raise KeyboardInterrupt(f"{stopped}; {again}".removeprefix("; ")) from None
            advance(name, left - taken)
            done[label][getattr(run, differ)] = outcome
            if request := asked_to_stop():
                raise KeyboardInterrupt(f"{request} after run {number} of {len(missing)}; {again}")
    return {label: {getattr(run, differ): done[label][getattr(run, differ)] for run in same} for label, same in runs.items()}


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


def best_rate(tried: Mapping[float, Outcome]) -> float | None:
    """The learning rate with the best accuracy after the last epoch, of equal ones that with the lowest loss; None if none has.

    >>> best_rate({0.1: "diverged", 1e-2: [{"test_accuracy": 9, "test_loss": 1}], 1e-3: [{"test_accuracy": 8, "test_loss": 1}]})
    0.01
    """
    reached = {
        rate: (rows[-1]["test_accuracy"], -rows[-1]["test_loss"]) for rate, rows in tried.items() if isinstance(rows, list)
    }
    return max(reached, key=lambda rate: reached[rate], default=None)


def summary(runs: Sequence[Sequence[Row]]) -> dict[str, float | None]:
    """One row of the table: mean and sample standard deviation (None for a single run) over the runs of one algorithm.

    >>> rows = [[{"test_accuracy": a, "seconds": 1.0, "peak_memory_bytes": 5} for a in run] for run in ([90, 80], [91, 84])]
    >>> summary(rows)["accuracy"], summary(rows)["best_accuracy"], summary(rows[:1])["accuracy_std"]
    (82.0, 90.5, None)
    """
    last = [rows[-1]["test_accuracy"] for rows in runs]
    best = [max(row["test_accuracy"] for row in rows) for rows in runs]
    return {
        "runs": len(runs),
        "accuracy": statistics.fmean(last) if runs else None,
        "accuracy_std": statistics.stdev(last) if len(runs) > 1 else None,
        "best_accuracy": statistics.fmean(best) if runs else None,
        "best_accuracy_std": statistics.stdev(best) if len(runs) > 1 else None,
        "seconds_per_epoch": statistics.fmean(row["seconds"] for rows in runs for row in rows) if runs else None,
        "peak_memory_bytes": max((row["peak_memory_bytes"] for rows in runs for row in rows), default=None),
    }


def show(table: Sequence[dict[str, Any]], title: str) -> None:
    """Print the table; what there is no room for is in its file."""

    def spread(row: dict[str, Any], measure: str) -> str:
        mean, std = row[measure], row[f"{measure}_std"]
        return "" if mean is None else f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value * scale, form)

    printed = Table(title=title, caption="test accuracy in % after the last and the best epoch, mean ± standard deviation")
    columns = ["algorithm", "lr", "last", "best", "s/epoch", "MB"]
    failed = any(row["failed"] or not row["runs"] for row in table)
    for column in [*columns, *(["failed"] * failed)]:
        if column == "algorithm":
            printed.add_column(column, overflow="fold", min_width=len(column))
        else:
            printed.add_column(column, justify="right", no_wrap=True)
    for row in table:
        cells = [
            row["algorithm"],
            number(row["lr"], "g"),
            spread(row, "accuracy"),
            spread(row, "best_accuracy"),
            number(row["seconds_per_epoch"], ".2f"),
            number(row["peak_memory_bytes"], ".0f", 1e-6),
        ]
        if failed:
            cells.append(f"{row['failed']} of {row['failed'] + row['runs']}" if row["lr"] is not None else "all rates")
        printed.add_row(*cells)
    Console(markup=False, emoji=False).print(printed)  # paths are no markup


def _has_rate(label: str) -> bool:
    """Whether an algorithm's entry in a list says its learning rate.

    >>> _has_rate("fdfa:directions=2,lr=1e-3"), _has_rate("fdfa")
    (True, False)
    """
    return any(setting.startswith("lr=") for setting in label.partition(":")[2].split(","))


def _trials(config: Compare, run: Train, folder: Path) -> list[Train]:
    """A shorter training with every learning rate of the grid, tested on images that are held out for it."""
    name = Path(run.out).name.removesuffix(f"-s{run.seed}")
    return [
        replace(
            run,
            lr=rate,
            epochs=config.lr_epochs or config.epochs,
            subset=replace(run.subset, held_out=True),
            align_every=0,
            save_weights=0,
            wandb=False,
            out=str(folder / TRIALS / f"{name}-lr{rate:g}"),
        )
        for rate in dict.fromkeys(config.lr_grid)
    ]


def _with_best_rates(
    config: Compare, runs: dict[str, list[Train]], found: Mapping[str, Mapping[float, Outcome]], folder: Path
) -> dict[str, list[Train]]:
    """The runs with the rates that did best; none of an algorithm for which every rate failed. Prints and writes the trials.

    A run there whose rate was chosen by earlier trials, and now is another, is taken away.

    Raises:
        UsageError: a run with a rate that no trials have chosen is in the way.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    printed = Table(title="learning rates", caption="accuracy in % on held-out training images; * the best, which is taken")
    rates = sorted(dict.fromkeys(config.lr_grid))
    for column in ("algorithm", *(f"{rate:g}" for rate in rates)):
        printed.add_column(column, justify="left" if column == "algorithm" else "right")
    kept, notes, chosen = {}, failures(found, "lr"), dict(runs)
    for label, tried in found.items():
        best = best_rate(tried)
        reached = {rate: rows[-1]["test_accuracy"] if isinstance(rows := tried[rate], list) else None for rate in rates}
        cells = ["failed" if value is None else f"{value:.2f}{'*' * (rate == best)}" for rate, value in reached.items()]
        printed.add_row(label, *cells)
        kept[label] = {"lr": best, "accuracy": {f"{rate:g}": value for rate, value in reached.items()}}
        chosen[label] = [] if best is None else [replace(run, lr=best) for run in runs[label]]
        if best in (rates[0], rates[-1]) and len(rates) > 1:
            notes.append(f"{label}: the best rate, {best:g}, is at the end of the grid: widen it to be sure")
    if not config.overwrite:
        notes += _take_away(folder, {label: chosen[label] for label in found})
    disk.write_text(folder / RATES, json.dumps(kept, indent=2) + "\n")
    Console(markup=False, emoji=False).print(printed)  # paths are no markup
    for note in notes:
        console.print(note)
    return chosen


def _take_away(folder: Path, chosen: Mapping[str, Sequence[Train]]) -> list[str]:
    """Take away the runs whose rates, chosen by the trials that the folder's file tells of, are not the best now: in words."""
    try:
        before = {label: entry["lr"] for label, entry in json.loads((folder / RATES).read_text()).items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        before = {}
    notes, outdated = [], []
    for label, same in chosen.items():
        for run in same:
            there = Path(run.out)
            if run_folder.differing(there, run) == {"lr": (before.get(label), run.lr)}:
                outdated.append(there)
                notes.append(f"{there}: the best rate is {run.lr:g}, no longer {before[label]:g}, so it is trained again")
            else:
                run_folder.check(there, run)
    for there in outdated:  # nothing, if another run is in the way
        run_folder.clear(there)
    return notes
