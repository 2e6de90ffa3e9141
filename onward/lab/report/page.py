"""Runs on one page: a single HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import onward
from onward.errors import UsageError
from onward.lab.plain import flat
from onward.lab.report import figures
from onward.lab.report import groups as by
from onward.lab.report.alignment import maps
from onward.lab.report.figures import LOSSES, Looks, Panel, last, spread, total
from onward.lab.report.groups import Group, find, grouped, headline, read, remarks
from onward.lab.run.record import Record
from onward.lab.settings import Report, Train
from onward.lab.system import disk, interrupt
from onward.lab.system.extra import lab_extra
from onward.lab.tasks import Metric, Task


def report(config: Report) -> Path:
    """Put the runs in the given folders, or in folders below them, on one page. What holds no run is named and left out. Raises
    a UsageError if there is no run at all, or the page cannot be written."""
    out = Path(config.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: a page has a name that ends in .html")
    if not config.runs:
        raise UsageError("no run folders are given: name them, or a folder of them, as in onward report runs")
    if not config.watch:
        return _write(config, out)
    with interrupt.requests() as asked_to_stop:
        while not asked_to_stop():
            _write(config, out)
            until = time.monotonic() + config.watch
            while time.monotonic() < until and not asked_to_stop():
                time.sleep(min(0.2, config.watch))
    return _write(config, out)


def _write(config: Report, out: Path) -> Path:
    """Read what there is now, and write the page."""
    runs, skipped = [], []
    for folder in {found.resolve(): found for given in config.runs for found in find(Path(given))}.values():
        try:
            runs.append(read(folder))
        except UsageError as error:
            skipped.append(str(error))
    if not runs:
        raise UsageError(f"there is no run to report: {'; '.join(skipped)}")
    for sentence in (*(f"{reason}: skipped" for reason in skipped), *remarks(runs)):
        print(f"warning: {sentence}", file=sys.stderr)
    text = page(runs, skipped, config.watch)
    try:
        with disk.writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        disk.write_text(out, text)
    except OSError as error:
        raise UsageError(f"--out {error}") from error
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{count} on one page of {out.stat().st_size / 1e6:.1f} MB: {out}", flush=True)
    return out


def page(runs: Sequence[Record], skipped: Sequence[str] = (), watch: float | None = None) -> str:
    """The page, as HTML, which loads itself anew every `watch` seconds. Whatever comes from files is escaped by the template,
    or is data in JSON."""
    with lab_extra():
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup, escape
        from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": figures.duration, "size": figures.size}
    environment.filters["breakable"] = lambda label: Markup(re.sub(r"([,:/._])", r"\1<wbr>", str(escape(label))))
    alike: dict[str, list[Record]] = {}
    for run in runs:
        alike.setdefault(headline(run), []).append(run)
    names = by.short_names([run.folder for run in runs])
    groups = {title: grouped(found) for title, found in alike.items()}
    looks = figures.styles([group.label for found in groups.values() for group in found])
    return environment.from_string(files("onward.lab.report").joinpath("report.html").read_text(encoding="utf-8")).render(
        plotly=get_plotlyjs(),
        watch=watch,
        sections=[section(title, found, names, looks) for title, found in groups.items()],
        skipped=skipped,
        notes=remarks(runs),
        count=len(runs),
        version=onward.__version__,
        today=date.today(),
    )


def section(title: str, groups: Sequence[Group], names: Mapping[Path, str], looks: Looks) -> dict[str, Any]:
    """What the page shows of the runs of one network on one data set, for one task."""
    runs = [run for group in groups for run in group.runs]
    task = runs[0].task
    baseline = next((results_of(group) for group in groups if group.label == "bp"), None)
    return {
        "title": title,
        "groups": [
            {"label": group.label, "place": place, **looks[group.label], **results_of(group, baseline)}
            for place, group in enumerate(groups)
        ],
        "main": task.main,
        "others": task.metrics[1:],
        "baseline": baseline is not None and len(groups) > 1,
        "runs": [{"folder": names[run.folder], "label": group.label, **line_of(run)} for group in groups for run in group.runs],
        **charts(groups, task, looks),
        "alignment": maps({group.label: [run.alignment for run in group.counted if run.alignment] for group in groups}),
        "differences": by.differences(groups),
        "shared": by.shared(runs),
        "environment": {
            name: " / ".join(found)
            for name in by.ENVIRONMENT
            if (found := dict.fromkeys(str(run.environment[name]) for run in runs if name in run.environment))
        },
        "devices": len({str(run.environment.get("device")) for run in runs}),
        "on_cpu": any(str(run.environment.get("device")).startswith("cpu") for run in runs),
    }


def charts(groups: Sequence[Group], task: Task, looks: Looks) -> dict[str, list[Panel]]:
    """Curves of every metric and loss, and what the main metric cost, as far as there are numbers for them."""
    results = {group.label: [run.rows for run in group.counted] for group in groups}
    main, said = task.main, _capital(task.main.title)
    others: list[figures.Measure] = [*task.metrics[1:], *LOSSES]
    learning = [
        (f"{said} over the epochs", figures.curves(results, looks, main)),
        (f"{said} over the time it took", figures.curves(results, looks, main, by_seconds=True)),
        *((_capital(other.axis), figures.curves(results, looks, other)) for other in others),
    ]
    costs = [
        (f"{said} against training time", figures.cost(results, looks, "seconds", "seconds of training", main)),
        (f"{said} against peak memory", figures.cost(results, looks, "peak_memory_bytes", "peak memory (MB)", main)),
    ]
    panels = {"learning": learning, "costs": costs}
    return {name: [(title, figure) for title, figure in found if figure] for name, found in panels.items()}


def results_of(group: Group, baseline: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One row of the table of results; what is missing is None or empty."""
    runs, (main, *others) = [run.rows for run in group.counted], group.runs[0].task.metrics
    reached = _found(last(rows, main.key) for rows in runs)
    seconds = _found(row.get("seconds") for rows in runs for row in rows)
    row: dict[str, Any] = {
        "engine": " / ".join(dict.fromkeys(str(run.environment.get("engine", "")) for run in group.runs)),
        "n": len(runs),
        "left_out": len(group.runs) - len(runs),
        "last": spread(reached, main.form),
        "best": spread((_best(main, rows) for rows in runs), main.form),
        "others": [spread((last(rows, metric.key) for rows in runs), metric.form) for metric in others],
        "mean": statistics.fmean(reached) if reached else None,
        "seconds": statistics.fmean(seconds) if seconds else None,
        "memory": max(_found(total(rows, "peak_memory_bytes") for rows in runs), default=None),
    }
    if baseline:
        both = None not in (row["mean"], baseline["mean"])
        row["above"] = f"{row['mean'] - baseline['mean']:+{main.form}}".replace("-", "−") if both else ""
        for name in ("seconds", "memory"):
            row[f"{name}_ratio"] = row[name] / baseline[name] if row[name] is not None and baseline[name] else None
    return row


def line_of(run: Record) -> dict[str, Any]:
    """One row of the table of runs."""
    main = run.task.main
    others: list[figures.Measure] = [*run.task.metrics[1:], *LOSSES]
    cells = [spread([value], main.form) for value in (last(run.rows, main.key), _best(main, run.rows))]
    cells += [spread([last(run.rows, measure.key)], measure.form) for measure in others]
    return {
        "seed": run.config.seed,
        "epochs": f"{len(run.rows)}" if run.complete else f"{len(run.rows)} of {run.config.epochs}",
        "cells": cells,
        "seconds": total(run.rows, "seconds"),
        "memory": total(run.rows, "peak_memory_bytes"),
        "command": [shlex.quote(word) for word in command(run.config)],
    }


def command(config: Train) -> list[str]:
    """The command that trains the same again, word by word: every setting that is not the default, but for --overwrite and
    --resume, which are about what was there before, and --recipe, whose file may have changed.

    >>> shlex.join(command(Train(algorithm="bp", lr=0.01, out="runs/my run")))
    "onward train --lr 0.01 --out 'runs/my run' --algorithm bp"
    """
    defaults = flat(Train())
    words = ["onward", "train"]
    for name, value in flat(config).items():
        if value == defaults[name] or name in ("overwrite", "resume", "recipe"):  # whose settings are all there
            continue
        flag = f"--{name.replace('_', '-')}"
        values = [] if value is True else [str(entry) for entry in (value if isinstance(value, tuple) else [value])]
        words += [f"{flag}={values[0]}"] if len(values) == 1 and values[0].startswith("-") else [flag, *values]
    return words


def _best(metric: Metric, rows: figures.Rows) -> float | None:
    values = [row[metric.key] for row in rows if metric.key in row]
    return metric.best(values) if values else None


def _found(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
