"""Several algorithms and seeds on one network: a table, and the curves behind it."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onward.errors import UsageError
from onward.lab.networks import models
from onward.lab.report.figures import learning_curves
from onward.lab.report.picture import draw, formats, picture
from onward.lab.run import folder as run_folder
from onward.lab.run import record
from onward.lab.run.training import Row, check_place
from onward.lab.settings import Compare
from onward.lab.studies import rates
from onward.lab.studies.runs import data_for, failures, folder_of, runs_of, task_of, train_all
from onward.lab.system import disk
from onward.lab.tasks import Metric, Task

JSON, CSV, CURVES = "table.json", "table.csv", "curves.png"


def compare(config: Compare) -> list[dict[str, Any]]:
    """Train every algorithm with every seed, each run in a folder of its own; print the table and write it, with the curves.

    With a grid of learning rates, each algorithm's is chosen first. A run that is complete there already is not repeated, nor
    is one that failed. Returns the rows of the table, one per algorithm. Raises a UsageError if something that was
    asked for cannot work, or a run with other settings is in the way.
    """
    if not config.algorithms or config.seeds < 1:
        raise UsageError(f"{len(config.algorithms)} algorithms with {config.seeds} seeds: compare at least one of each")
    if config.lr_grid and config.subset.held_out:
        why = "--lr-grid with --subset.held-out"
        raise UsageError(f"{why}: the same images would choose the rates and judge them, leave one out")
    models.check(config.model)
    formats()  # says so now if pictures cannot be drawn
    folder = Path(config.out or run_folder.default_path(config, "compare"))
    runs = runs_of(config, config.algorithms, range(config.seeds), folder)
    trials = rates.trials(config, runs, folder)
    data = data_for(runs, config)
    check_place(folder, config)
    with run_folder.claimed(folder, overwrite=True):
        if trials:
            for label in {} if config.overwrite else runs:
                for run in runs[label]:  # before the trials, but for the rate that they choose
                    record.check(folder_of(run), run, but=["lr"] if label in trials else ())
            found = train_all(trials, "lr", config.overwrite, rates.data_for(data, folder), config.jobs)
            runs = rates.with_best(config, runs, found, folder, task_of(trials, data).main)
        results = train_all(runs, "seed", config.overwrite, data, config.jobs)
        task = task_of(runs | trials, data)
    complete = {label: [rows for rows in same.values() if isinstance(rows, list)] for label, same in results.items()}
    table = []
    for label, rows in complete.items():
        first = next(iter(runs[label]), None)  # none if every rate failed
        there = record.same(folder_of(first), first) if first else None
        engine = there.environment.get("engine") if there else None
        told = {"algorithm": label, "engine": engine, "lr": first.lr if first else None}
        table.append({**told, **summary(rows, task), "failed": len(results[label]) - len(rows)})
    _write(folder, table)
    seeds = "1 seed" if config.seeds == 1 else f"{config.seeds} seeds"
    title = f"{config.model}, {config.data_dir or config.data}, {config.epochs} epochs, {seeds}"
    show(table, title, task.main)
    print(*failures(results, "seed"), f"table: {folder / JSON}, {folder / CSV}", sep="\n")
    if drawn := {label: rows for label, rows in complete.items() if rows}:
        draw({folder / CURVES: lambda path: picture(path, [learning_curves(drawn, task)], title)})
    return table


def summary(runs: Sequence[Sequence[Row]], task: Task) -> dict[str, float | None]:
    """One row of the table: mean and sample standard deviation (None for a single run) over the runs of one algorithm.

    >>> rows = [[{"test_accuracy": a, "seconds": 1.0, "peak_memory_bytes": 5} for a in run] for run in ([90, 80], [91, 84])]
    >>> from onward.lab.tasks import CLASSIFICATION
    >>> found = summary(rows, CLASSIFICATION)
    >>> found["accuracy"], found["best_accuracy"], summary(rows[:1], CLASSIFICATION)["accuracy_std"]
    (82.0, 90.5, None)
    """
    found: dict[str, float | None] = {"runs": len(runs)}
    for metric in task.metrics:
        reached = [[row[metric.key] for row in rows] for rows in runs]
        last, best = [values[-1] for values in reached], [metric.best(values) for values in reached]
        for name, values in ((metric.name, last), (f"best_{metric.name}", best)):
            found[name] = statistics.fmean(values) if values else None
            found[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return found | {
        "seconds_per_epoch": statistics.fmean(row["seconds"] for rows in runs for row in rows) if runs else None,
        "peak_memory_bytes": max((row["peak_memory_bytes"] for rows in runs for row in rows), default=None),
    }


def _write(folder: Path, table: Sequence[dict[str, Any]]) -> None:
    disk.write_text(folder / JSON, json.dumps(table, indent=2) + "\n")
    lines = io.StringIO()
    writer = csv.DictWriter(lines, table[0].keys())
    writer.writeheader()
    writer.writerows(table)
    disk.write_text(folder / CSV, lines.getvalue())


def show(table: Sequence[dict[str, Any]], title: str, metric: Metric) -> None:
    """Print the table; what there is no room for is in its file."""

    def spread(row: dict[str, Any], name: str) -> str:
        mean, std = row[name], row[f"{name}_std"]
        return "" if mean is None else f"{mean:{metric.form}}" + ("" if std is None else f" ± {std:{metric.form}}")

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value * scale, form)

    printed = Table(title=title, caption=f"{metric.measured} after the last and the best epoch, mean ± standard deviation")
    printed.add_column("algorithm", overflow="fold", min_width=len("algorithm"))
    failed = any(row["failed"] or not row["runs"] for row in table)
    for column in ("lr", "last", "best", "s/epoch", "MB", *(["failed"] * failed)):
        printed.add_column(column, justify="right", no_wrap=True)
    for row in table:
        cells = [
            row["algorithm"],
            number(row["lr"], "g"),
            spread(row, metric.name),
            spread(row, f"best_{metric.name}"),
            number(row["seconds_per_epoch"], ".2f"),
            number(row["peak_memory_bytes"], ".0f", 1e-6),
        ]
        if failed:
            cells.append(f"{row['failed']} of {row['failed'] + row['runs']}" if row["lr"] is not None else "all rates")
        printed.add_row(*cells)
    Console(markup=False, emoji=False).print(printed)  # paths are no markup
