"""Runs on one page: a single HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console

import onward
from onward.errors import UsageError
from onward.lab.report import figures as plots
from onward.lab.run import algorithms
from onward.lab.run.folder import ALIGNED, ALIGNMENT, CONFIG, FAILURE, METRICS, NOT_IN_RESULT, read_config
from onward.lab.settings import Report, Train, from_dict
from onward.lab.studies.compare import RATES, TRIALS
from onward.lab.system import disk
from onward.lab.system.extra import lab_extra

ENVIRONMENT = ("device", "torch", "onward", "python")
COSINES = {
    "signal.cosine": "Cosine of error signal and true gradient",
    "parameters.cosine": "Cosine of parameter gradient and true gradient",
    "feedback.cosine": "Cosine of feedback matrix and true Jacobian",
}
"""Measures of alignment.jsonl; any other number found there is shown too, folded up."""
WORDS = {
    "signal": "error signal",
    "parameters": "parameter gradient",
    "feedback": "feedback matrix",
    "norm_ratio": "length over the true one's",
    "bias": "bias over the true length",
    "variance": "variance over the true length squared",
    "snr": "signal to noise",
}


@dataclass(frozen=True)
class Run:
    """What was found in a run folder."""

    folder: Path
    config: Train
    unknown: dict[str, Any]
    """Settings that this version does not have, by their names."""
    environment: dict[str, Any]
    rows: list[dict[str, float]]
    alignment: list[dict[str, Any]]
    notes: tuple[str, ...]
    """What is not as it should be, in words."""

    @property
    def complete(self) -> bool:
        """Whether it came to its last epoch."""
        return len(self.rows) >= self.config.epochs


@dataclass(frozen=True)
class Group:
    """Runs that differ only by seed."""

    label: str
    runs: list[Run]

    @property
    def counted(self) -> list[Run]:
        """Those that the means are over: the complete ones, if there are any."""
        return [run for run in self.runs if run.complete] or self.runs


def report(config: Report) -> Path:
    """Put the runs in the given folders, or in folders below them, on one page. What holds no run is named and left out.

    Raises:
        UsageError: there is no run at all, or the page cannot be written.
    """
    out = Path(config.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: a page has a name that ends in .html")
    if not config.runs:
        raise UsageError("no run folders are given: name them, or a folder of them, as in onward report runs")
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
    text = page(runs, skipped)
    try:
        with disk.writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        disk.write_text(out, text)
    except OSError as error:
        raise UsageError(f"--out {error}") from error
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    Console(soft_wrap=True, highlight=False, markup=False).print(
        f"{count} on one page of {out.stat().st_size / 1e6:.1f} MB: {out}"
    )
    return out


def find(path: Path) -> list[Path]:
    """The run folders at and below a path, and the empty ones, meant to be some; the path itself if there is none. The
    trials by which a comparison chose learning rates are no results."""
    found = []
    for folder, below, inside in os.walk(path):
        below[:] = sorted(set(below) - ({TRIALS} if RATES in inside else set()))
        if CONFIG in inside or METRICS in inside:
            found.append(Path(folder))
            below.clear()
        elif not below and not inside:
            found.append(Path(folder))
    return found or [path]


def read(folder: Path) -> Run:
    """A run, as far as it can be read: measures that are missing or no finite numbers are left out.

    Raises:
        UsageError: there is no run, or it has not come to the end of an epoch.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is {'no folder' if folder.exists() else 'not there'}")
    try:
        saved = read_config(folder)
        known, unknown = _split(Train, saved["config"])
        config = from_dict(Train, known)
        environment = dict(saved.get("environment") or {})
    except FileNotFoundError as error:
        raise UsageError(f"{folder} holds no run (it has no {CONFIG})") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = error if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"{folder} has a broken {CONFIG} ({reason})") from error
    if missing := [name for name in ("algorithm", "model", "data") if name not in known]:
        raise UsageError(f"{folder} has a broken {CONFIG} (it names no {missing[0]})")
    entries, notes = _lines(folder / METRICS)
    rows = [{"epoch": at, **_numbers(entry)} for at, entry in enumerate(entries, start=1)]
    failure = f" ({reason.strip()})" if (reason := _text(folder / FAILURE)) else ""
    if not rows:
        why = failure or f" ({notes[0] if notes else f'{METRICS} is empty'})"
        raise UsageError(f"{folder} holds no complete epoch{why}")
    alignment: list[dict[str, Any]] = []
    if (folder / ALIGNMENT).exists():
        alignment, more = _lines(folder / ALIGNMENT)
        notes += more
    alignment = [*_aligned_later(folder), *alignment]
    if len(rows) < config.epochs:
        notes.append(f"it stopped after epoch {len(rows)} of {config.epochs}{failure}")
    return Run(folder, config, unknown, environment, rows, alignment, tuple(f"{folder}: {note}" for note in notes))


def remarks(runs: Sequence[Run]) -> list[str]:
    """What is not as it should be, in words."""
    notes = [note for run in runs for note in run.notes]
    unknown = Counter(name for run in runs for name in run.unknown)
    notes += [
        f"{name} is no setting of this version, so the commands of {count} of the {len(runs)} runs leave it out"
        for name, count in unknown.items()
    ]
    same: dict[str, list[str]] = {}
    for run in runs:
        same.setdefault(_key({**_result(run), "seed": run.config.seed}), []).append(str(run.folder))
    return notes + [
        f"{' and '.join(twins)} have the same settings and seed: each counts" for twins in same.values() if twins[1:]
    ]


def command(config: Train) -> list[str]:
    """The command that trains the same again, word by word: every setting that is not the default, but for --overwrite and
    --resume, which are about what was there before.

    >>> shlex.join(command(Train(algorithm="bp", lr=0.01, out="runs/my run")))
    "onward train --lr 0.01 --out 'runs/my run' --algorithm bp"
    """
    defaults = settings(Train())
    words = ["onward", "train"]
    for name, value in settings(config).items():
        if value == defaults[name] or name in ("overwrite", "resume"):
            continue
        flag = f"--{name.replace('_', '-')}"
        values = [] if value is True else [str(entry) for entry in (value if isinstance(value, tuple) else [value])]
        words += [f"{flag}={values[0]}"] if len(values) == 1 and values[0].startswith("-") else [flag, *values]
    return words


def settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by the name that it has on the command line, but with underscores.

    >>> settings(Train())["network.layers"]
    2
    """
    flat: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        flat |= settings(value, f"{prefix}{entry.name}.") if dataclasses.is_dataclass(value) else {prefix + entry.name: value}
    return flat


def page(runs: Sequence[Run], skipped: Sequence[str] = ()) -> str:
    """The page, as HTML. Whatever comes from files is escaped by the template, or is data in JSON."""
    with lab_extra():
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup, escape
        from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": plots.duration, "size": plots.size}
    environment.filters["breakable"] = lambda label: Markup(re.sub(r"([,:/._])", r"\1<wbr>", str(escape(label))))
    tasks: dict[str, list[Run]] = {}
    for run in runs:
        tasks.setdefault(headline(run.config), []).append(run)
    names = short_names([run.folder for run in runs])
    groups = {title: grouped(found) for title, found in tasks.items()}
    looks = plots.styles([group.label for found in groups.values() for group in found])
    return environment.from_string(files("onward.lab.report").joinpath("report.html").read_text(encoding="utf-8")).render(
        plotly=get_plotlyjs(),
        tasks=[task(title, found, names, looks) for title, found in groups.items()],
        skipped=skipped,
        notes=remarks(runs),
        count=len(runs),
        version=onward.__version__,
        today=date.today(),
    )


def headline(config: Train) -> str:
    """The network and the data, which runs have in common that are held against each other.

    >>> from onward.lab.settings import Network
    >>> headline(Train(network=Network(layers=3)))
    'mlp (layers 3) on digits'
    """

    def apart(part: Any) -> str:
        found = [
            f"{entry.name.replace('_', ' ')} {shown(value)}"
            for entry in dataclasses.fields(part)
            if (value := getattr(part, entry.name)) != entry.default
        ]
        return f" ({', '.join(found)})" if found else ""

    return f"{config.model}{apart(config.network)} on {config.data_dir or config.data}{apart(config.subset)}"


def short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """The folders from where they part.

    >>> short_names([Path("/runs/digits/bp-s0"), Path("/runs/digits/fg-s0")]).values()
    dict_values(['bp-s0', 'fg-s0'])
    """
    whole = {folder: folder.resolve() for folder in folders}
    common = Path(os.path.commonpath([folder.parent for folder in whole.values()]))
    return {folder: str(path.relative_to(common)) for folder, path in whole.items()}


def task(title: str, groups: Sequence[Group], names: Mapping[Path, str], looks: plots.Looks) -> dict[str, Any]:
    """What the page shows of the runs of one network on one data set."""
    runs = [run for group in groups for run in group.runs]
    results = {group.label: [run.rows for run in group.counted] for group in groups}
    baseline = next((results_of(group) for group in groups if group.label == "bp"), None)
    learning = [
        ("Test accuracy over the epochs", plots.curves(results, looks, "test_accuracy", "test accuracy (%)")),
        (
            "Test accuracy over the time it took",
            plots.curves(results, looks, "test_accuracy", "test accuracy (%)", by_seconds=True),
        ),
        ("Training loss", plots.curves(results, looks, "train_loss", "training loss")),
        ("Test loss", plots.curves(results, looks, "test_loss", "test loss")),
    ]
    costs = [
        ("Accuracy against training time", plots.cost(results, looks, "seconds", "seconds of training")),
        ("Accuracy against peak memory", plots.cost(results, looks, "peak_memory_bytes", "peak memory (MB)")),
    ]
    return {
        "title": title,
        "groups": [
            {"label": group.label, "place": place, **looks[group.label], **results_of(group, baseline)}
            for place, group in enumerate(groups)
        ],
        "baseline": baseline is not None and len(groups) > 1,
        "runs": [
            {
                "folder": names[run.folder],
                "label": group.label,
                "seed": run.config.seed,
                "epochs": f"{len(run.rows)}" if run.complete else f"{len(run.rows)} of {run.config.epochs}",
                "accuracy": plots.last(run.rows, "test_accuracy"),
                "best": max((row["test_accuracy"] for row in run.rows if "test_accuracy" in row), default=None),
                "train_loss": plots.last(run.rows, "train_loss"),
                "test_loss": plots.last(run.rows, "test_loss"),
                "seconds": plots.total(run.rows, "seconds"),
                "memory": plots.total(run.rows, "peak_memory_bytes"),
                "command": [shlex.quote(word) for word in command(run.config)],
            }
            for group in groups
            for run in group.runs
        ],
        "learning": [figure for figure in learning if figure[1]],
        "costs": [figure for figure in costs if figure[1]],
        "alignment": alignment(groups),
        "differences": differences(groups),
        "shared": shared(runs),
        "environment": {
            name: " / ".join(found)
            for name in ENVIRONMENT
            if (found := dict.fromkeys(str(run.environment[name]) for run in runs if name in run.environment))
        },
        "devices": len({str(run.environment.get("device")) for run in runs}),
        "on_cpu": any(str(run.environment.get("device")).startswith("cpu") for run in runs),
    }


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs by all but their seed; bp first. A label is the algorithm and what sets it apart, as variants are named."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(_result(run)), []).append(run)
    found = sorted(groups.values(), key=lambda group: group[0].config.algorithm != "bp")
    results = [_result(group[0]) for group in found]
    own = [_label(result, results) for result in results]
    labels: list[str] = []
    for result, label in zip(results, own, strict=True):
        if own.count(label) > 1:
            label = _label(result, results, [other for other, its in zip(results, own, strict=True) if its == label])
        labels.append(label if label not in labels else f"{label} ({len(labels) + 1})")
    return [Group(label, sorted(group, key=lambda run: run.config.seed)) for label, group in zip(labels, found, strict=True)]


def _label(result: Mapping[str, Any], others: Sequence[Mapping[str, Any]], twins: Sequence[Mapping[str, Any]] = ()) -> str:
    """The algorithm with those settings, none of them the default, of its own that vary among the others, or that do so among
    its twins."""
    algorithm, defaults = result["algorithm"], settings(Train())
    owners = {owner: place for place, owner in enumerate(algorithms.SETTINGS.get(algorithm, ("",)))}
    first = f"{next(iter(owners))}."
    parts = [
        f"{name if name.endswith('.lr') else name.removeprefix(first)}={shown(result[name])}"
        for name in sorted(result, key=lambda name: owners.get(name.partition(".")[0], len(owners)))
        if name != "algorithm" and result[name] != defaults.get(name)
        if _varies(name, others if name.partition(".")[0] in owners else twins)
    ]
    return f"{algorithm}:{','.join(parts)}" if parts else algorithm


def results_of(group: Group, baseline: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One row of the table of results; what is missing is None."""
    runs = [run.rows for run in group.counted]
    accuracies = _found(plots.last(rows, "test_accuracy") for rows in runs)
    best = _found(max((row["test_accuracy"] for row in rows if "test_accuracy" in row), default=None) for rows in runs)
    seconds = _found(row.get("seconds") for rows in runs for row in rows)
    memory = _found(plots.total(rows, "peak_memory_bytes") for rows in runs)
    row: dict[str, Any] = {
        "engine": " / ".join(dict.fromkeys(str(run.environment.get("engine", "")) for run in group.runs)),
        "n": len(runs),
        "left_out": len(group.runs) - len(runs),
        "accuracy": plots.spread(accuracies) if accuracies else None,
        "best": plots.spread(best) if best else None,
        "mean": statistics.fmean(accuracies) if accuracies else None,
        "seconds": statistics.fmean(seconds) if seconds else None,
        "memory": max(memory) if memory else None,
    }
    if baseline:
        both = {name: (row[name], baseline[name]) for name in ("mean", "seconds", "memory")}
        row["points"] = row["mean"] - baseline["mean"] if None not in both["mean"] else None
        for name in ("seconds", "memory"):
            row[f"{name}_ratio"] = row[name] / baseline[name] if None not in both[name] and baseline[name] else None
    return row


def alignment(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Maps over blocks and epochs, one for each group, by measure; and how the samples of the last epoch are distributed."""
    measured = {group.label: [_aligned(run) for run in group.counted if run.alignment] for group in groups}
    names = dict.fromkeys(name for found in measured.values() for cells, _ in found for name, *_ in cells)
    maps: list[dict[str, Any]] = []
    for name in [*(name for name in COSINES if name in names), *(name for name in names if name not in COSINES)]:
        cells: dict[str, dict[tuple[str, float], list[float]]] = {}
        for label, found in measured.items():
            for run_cells, _ in found:
                for (measure, block, epoch), value in run_cells.items():
                    if measure == name:
                        cells.setdefault(label, {}).setdefault((block, epoch), []).append(value)
        means = {label: {at: statistics.fmean(found) for at, found in values.items()} for label, values in cells.items()}
        every = [value for values in means.values() for value in values.values()]
        most = max(map(abs, every)) or 1.0
        is_cosine = name in COSINES
        if not is_cosine and len(set(every)) == 1:  # nothing to see
            continue
        limits = (-most, most) if is_cosine or min(every) < 0 else (0.0, most)
        figures = []
        for label, values in means.items():
            blocks, epochs = [*dict.fromkeys(block for block, _ in values)], sorted({epoch for _, epoch in values})
            figure = plots.heat_map(
                [[values.get((block, epoch)) for epoch in epochs] for block in blocks],
                epochs,
                blocks,
                title="epoch",
                hover="epoch %{x}: %{z:.3f}",
                limits=limits,
                form=(".2f" if is_cosine else ".2g") if len(epochs) <= 7 else None,
            )
            figures.append((label, figure))
        words = ": ".join(WORDS.get(word, word.replace("_", " ")) for word in name.split("."))
        maps.append({"title": COSINES.get(name, words[:1].upper() + words[1:]), "figures": figures, "fold": not is_cosine})
    if histograms := _histograms({label: [counts for _, counts in found] for label, found in measured.items()}):
        maps.append(
            {"title": "Samples by the cosine of their error signal, after the last epoch", "figures": histograms, "fold": False}
        )
    return sorted(maps, key=lambda entry: entry["fold"])


def differences(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The settings that are not the same in all groups; of each the value in every group, and whether it is a rare one."""
    results = [_result(group.runs[0]) for group in groups]
    for result, group in zip(results, groups, strict=True):
        result |= {
            f"({name})": " / ".join(dict.fromkeys(str(run.environment.get(name, "?")) for run in group.runs))
            for name in ENVIRONMENT
        }
    table = []
    for name in _names(results):
        if name != "algorithm" and _varies(name, results):
            values = [shown(result.get(name)) for result in results]
            usual = Counter(values).most_common(1)[0][0]
            table.append({"name": name, "cells": [(value, value != usual) for value in values]})
    return table


def shared(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The settings that are the same in all runs and not the default."""
    results, defaults = [_result(run) for run in runs], settings(Train())
    told = {"model", "data", "data_dir", "algorithm"}
    return [
        (name, shown(results[0].get(name)))
        for name in _names(results)
        if name not in told and not _varies(name, results) and results[0].get(name) != defaults.get(name)
    ]


def shown(value: Any) -> str:
    """A setting as the page writes it.

    >>> shown(True), shown(None), shown((0.1, 0.2))
    ('true', 'none', '0.1 0.2')
    """
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value).removesuffix(".0")


def _result(run: Run) -> dict[str, Any]:
    """The settings that the result depends on, but for the seed."""
    beside = NOT_IN_RESULT | {"seed", "save_weights", "align_every", "histogram"}
    return {name: value for name, value in (settings(run.config) | run.unknown).items() if name not in beside}


def _key(result: Mapping[str, Any]) -> str:
    return json.dumps(result, default=str, sort_keys=True)


def _names(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return [*dict.fromkeys(name for result in results for name in result)]


def _varies(name: str, results: Sequence[Mapping[str, Any]]) -> bool:
    return any(result.get(name) != results[0].get(name) for result in results)


def _split(kind: type, values: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of fields that there are, nested as they are, and by their full names the others that are set to anything."""
    hints = get_type_hints(kind)
    known: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            unknown |= {prefix + name: value} if value else {}
        elif dataclasses.is_dataclass(hints[name]):
            known[name], more = _split(hints[name], value, f"{prefix}{name}.")
            unknown |= more
        else:
            known[name] = value
    return known, unknown


def _lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of a file, one in each line, up to the first that is none; and what is wrong, in words."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return [], [f"{path.name} cannot be read: {error.strerror}"]
    entries: list[dict[str, Any]] = []
    for at, line in enumerate(text.splitlines(), start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            return entries, [f"line {at} of {path.name} is not a JSON object, so it is read up to there"]
        entries.append(entry)
    return entries, []


def _aligned_later(folder: Path) -> list[dict[str, Any]]:
    """What `onward align` has left in a run folder of that run, which it calls by the end of its path."""
    try:
        entries = json.loads(_text(folder / ALIGNED[0]) or "[]")
    except ValueError:
        return []
    whole = folder.resolve()
    ends = [str(Path(*whole.parts[-parts:])) for parts in range(1, len(whole.parts))]
    entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    own = [entry["label"] for entry in entries if entry.get("label") in ends]
    return [entry for entry in entries if own and entry.get("label") == max(own, key=len)]


def _numbers(entry: Any, prefix: str = "") -> dict[str, float]:
    """The finite numbers in an entry, by their names; what is nested has names such as signal.cosine."""
    found: dict[str, float] = {}
    for name, value in entry.items() if isinstance(entry, dict) else ():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[prefix + name] = value
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _found(values: Iterator[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _aligned(run: Run) -> tuple[dict[tuple[str, str, float], float], dict[str, list[float]]]:
    """What a run says of its alignment: numbers by (measure, block, epoch), and the last histogram of each block. Of two
    lines on one epoch, that from more estimates counts."""
    cells: dict[tuple[str, str, float], float] = {}
    counts: dict[str, list[float]] = {}
    dated = []
    for at, entry in enumerate(run.alignment, start=1):
        numbers = _numbers(entry)
        dated.append((numbers.get("epoch", at), numbers.get("estimates", 0), entry))
    for epoch, _, entry in sorted(dated, key=lambda line: line[:2]):
        blocks = entry.get("blocks")
        for block, values in blocks.items() if isinstance(blocks, dict) else ():
            numbers = _numbers(values)
            if (mean := numbers.pop("mean", None)) is not None:  # of the cosines: for long the only number here
                numbers.setdefault("signal.cosine", mean)
            cells |= {(name, str(block), epoch): value for name, value in numbers.items()}
            bins = values.get("counts") if isinstance(values, dict) else None
            if isinstance(bins, list) and all(isinstance(count, int | float) for count in bins) and sum(bins) > 0:
                counts[str(block)] = bins
    return cells, counts


def _histograms(found: Mapping[str, Sequence[Mapping[str, list[float]]]]) -> list[tuple[str, Any]]:
    """The distribution of the samples' cosines in each block, for each label over all its runs; all on one scale."""
    shares: dict[str, dict[str, list[float]]] = {}
    for label, runs in found.items():
        bins = max((len(counts) for blocks in runs for counts in blocks.values()), default=0)
        sums: dict[str, list[float]] = {}
        for blocks in runs:
            for block, counts in blocks.items():
                if len(counts) == bins:
                    sums[block] = [a + b for a, b in zip(sums.get(block, [0] * bins), counts, strict=True)]
        if sums:
            shares[label] = {block: [100 * count / sum(counts) for count in counts] for block, counts in sums.items()}
    most = max((share for blocks in shares.values() for block in blocks.values() for share in block), default=0.0)
    figures = []
    for label, blocks in shares.items():
        bins = len(next(iter(blocks.values())))
        middles = [round((2 * at + 1) / bins - 1, 4) for at in range(bins)]
        words = {"title": "cosine (colour: % of samples)", "hover": "cosine %{x:.2f}: %{z:.1f} % of samples"}
        figures.append((label, plots.heat_map([*blocks.values()], middles, [*blocks], limits=(0.0, most), **words)))
    return figures
