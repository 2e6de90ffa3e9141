"""Several algorithms and seeds on one network: a table, and the curves behind it."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onward.errors import UsageError
from onward.lab import algorithms, models, run_folder
from onward.lab.config import Compare
from onward.lab.plots import learning_curves
from onward.lab.train import Row, load_data, train

JSON, CSV, CURVES = "table.json", "table.csv", "curves.png"


def compare(config: Compare) -> list[dict[str, Any]]:
    """Train every algorithm with every seed, each run in a folder of its own; print the table and write it, with the curves.

    A run that is complete there already is not repeated. Returns the rows of the table, one per algorithm.

    Raises:
        UsageError: something that was asked for cannot work, or a run with other settings is in the way.
    """
    for name in config.algorithms:
        algorithms.check(name)
    models.check(config.model)
    if not config.algorithms or config.seeds < 1:
        raise UsageError(f"{len(config.algorithms)} algorithms with {config.seeds} seeds: compare at least one of each")
    folder = Path(config.out or run_folder.default_path(config, "compare"))
    runs = [replace(run, out=str(folder / f"{run.algorithm}-s{run.seed}")) for run in config.runs()]
    results: dict[str, list[list[Row]]] = {}
    with run_folder.claimed(folder, overwrite=True):
        done = {} if config.overwrite else {run: run_folder.finished(Path(run.out), run) for run in runs}
        data = None if all(done.get(run) for run in runs) else load_data(config)
        for run in runs:
            rows = done.get(run) or train(replace(run, overwrite=True), data)
            results.setdefault(run.algorithm, []).append(rows)

    engines = {run.algorithm: run_folder.read_config(Path(run.out))["environment"]["engine"] for run in runs}
    table = [{"algorithm": name, "engine": engines[name], **summary(rows)} for name, rows in results.items()]
    (folder / JSON).write_text(json.dumps(table, indent=2) + "\n")
    with (folder / CSV).open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(table)
    seeds = "1 seed" if config.seeds == 1 else f"{config.seeds} seeds"
    title = f"{config.model}, {config.data_dir or config.data}, {config.epochs} epochs, {seeds}"
    learning_curves(folder / CURVES, results, title)
    show(table, title)
    Console(soft_wrap=True, highlight=False).print(f"table: {folder / JSON}, {folder / CSV}\npicture: {folder / CURVES}")
    return table


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
        "accuracy": statistics.fmean(last),
        "accuracy_std": statistics.stdev(last) if len(runs) > 1 else None,
        "best_accuracy": statistics.fmean(best),
        "best_accuracy_std": statistics.stdev(best) if len(runs) > 1 else None,
        "seconds_per_epoch": statistics.fmean(row["seconds"] for rows in runs for row in rows),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for rows in runs for row in rows),
    }


def show(table: Sequence[dict[str, Any]], title: str) -> None:
    """Print the table."""

    def spread(row: dict[str, Any], measure: str) -> str:
        std = row[f"{measure}_std"]
        return f"{row[measure]:.2f}" + ("" if std is None else f" ± {std:.2f}")

    printed = Table(title=title, caption="test accuracy in %, mean ± standard deviation over seeds")
    for column in ("algorithm", "engine", "last epoch", "best epoch", "s/epoch", "peak MB"):
        printed.add_column(column, justify="left" if column in ("algorithm", "engine") else "right")
    for row in table:
        printed.add_row(
            row["algorithm"],
            row["engine"],
            spread(row, "accuracy"),
            spread(row, "best_accuracy"),
            f"{row['seconds_per_epoch']:.2f}",
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
        )
    Console().print(printed)
