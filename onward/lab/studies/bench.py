"""`onward bench`: what a training step costs with each algorithm, as ratios to backpropagation in the same run.

What a step is, and how its time, memory and arithmetic are measured, is in `step`. The candidates take turns in one process
(A B C A B C ...), so that a slow spell of the machine hits all of them. A turn builds the network anew. Ratios of time are
taken within a turn; the table has their median, least and greatest.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from onward.errors import UsageError, unknown
from onward.lab.networks import models
from onward.lab.networks.blocks import MODELS
from onward.lab.plain import flat
from onward.lab.report.figures import sweep
from onward.lab.report.picture import draw, formats
from onward.lab.report.picture import picture as draw_panels
from onward.lab.run import algorithms, processes
from onward.lab.run.loop import progress
from onward.lab.settings import Bench, Setup, TaskSettings, Train
from onward.lab.studies.step import PHASES, Learner, Turn, memory_of, network_for, take_turn
from onward.lab.system import disk, memory, own

Row = dict[str, Any]
BASELINES = ("bp", "bp:checkpoint=true")
"""Always measured: what every other row is a ratio to."""
SWEEPS = {"depth": "network.layers", "width": "network.width", "batch": "batch_size"}
"""What is swept, and the setting that says it."""
MEASURES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "ms": ("Time of a step", lambda row: 1e3 * row["seconds"]),
    "MB": ("Peak memory", lambda row: row["peak_bytes"] / 1e6),
    "MB above state": (
        "Peak memory above what outlives a step (parameters, gradients, optimizer, feedback)",
        lambda row: (row["peak_bytes"] - row["state_bytes"]) / 1e6,
    ),
}
"""What a sweep fits lines to, by unit: its title, and how a row gives it."""


def bench(config: Bench) -> list[Row]:
    """Measure every algorithm and print a table; returns its rows. With a sweep: at each of its values, with the slopes.

    An algorithm that fails or runs out of memory has a row that says so in `error`. Raises a UsageError if something that was
    asked for cannot work.
    """
    points = _points(config)
    device = processes.choose_device(config.device)
    figures, picture = _files(config)
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)  # a path may have brackets in it
    environment = {**processes.environment(device), "threads": torch.get_num_threads()}
    rows = [row for point in points for row in measure(point, device, console)]
    report: dict[str, Any] = {"config": dataclasses.asdict(config), "environment": environment, "rows": rows}
    if config.sweep:
        report["slopes"] = slopes(rows)
    try:
        if figures:
            disk.write_text(figures, json.dumps(report, indent=2) + "\n")
    finally:  # the table is printed even if the disk is full
        if config.sweep:
            what = config.sweep[0]
            title = f"{config.model} over {what} (--{SWEEPS[what].replace('_', '-')}), {environment['device']}"
            show_sweep(report["slopes"], rows, what, title, console)
        else:
            shape = ",".join(map(str, shape_of(config)))
            show(rows, f"{config.model}, input {shape}, batch {config.batch_size}, {environment['device']}", console)
    if figures:
        console.print(f"figures: {figures}")
    if picture:
        title = config.model if what == "batch" else f"{config.model}, batch {config.batch_size}"
        draw({picture: lambda path: draw_panels(path, [sweep(report["slopes"], rows, MEASURES, what)], title)})
    return rows


def _files(config: Bench) -> tuple[Path | None, Path | None]:
    """Where the figures and the picture of the sweep go, if they are asked for. Checks that they can be written."""
    figures, picture = Path(config.json) if config.json else None, None
    if config.sweep:
        picture = Path(config.plot or f"bench-{algorithms.folder_name(config.model)}-{config.sweep[0]}.png")
    for flag, path in (("--json", figures), ("--plot", picture)):
        if path is None:
            continue
        folder = path.absolute().parent
        if not folder.is_dir():
            raise UsageError(f"{flag} {path}: there is no folder {path.parent}, create it or name another")
        if path.is_dir():
            raise UsageError(f"{flag} {path}: this is a folder, name a file in it")
        if path.is_file() or not path.exists():  # a pipe or a device needs no room in its folder
            try:
                disk.try_out(folder)
            except OSError as error:
                raise UsageError(f"{flag} {path} cannot be written ({error.strerror}): name a file elsewhere") from error
    if picture and picture.suffix.lower() not in (known := formats()):
        raise UsageError(f"--plot {picture}: a picture has a name that ends in one of {', '.join(known)}")
    return figures, picture


def measure(config: Bench, device: torch.device, console: Console) -> list[Row]:
    """One row for each algorithm of the configuration."""
    shape = shape_of(config)
    runs = _with_cuts(candidates(config), shape, config.classes)
    place = {"sweep": config.sweep[0], "value": swept(config, config.sweep[0])} if config.sweep else {}
    rows: dict[str, Row] = {name: {"algorithm": name, "error": None, **place} for name in runs}
    turns: dict[str, list[Turn]] = {name: [] for name in runs}
    steps = config.steps
    gc.collect()
    gc.freeze()  # so that collecting what a candidate leaves behind is quick
    with progress(console, len(runs) * (1 + config.turns)) as advance:
        for name, run in runs.items():
            advance(f"memory of {name}")
            with _failure_into(rows[name]):
                rows[name].update(memory_of(run, shape, config.classes, device))
        memory.keep_freed()
        for index in range(config.turns):
            for name, run in runs.items():
                advance(f"time of {name}")
                if rows[name]["error"]:
                    continue
                with _failure_into(rows[name]), own.errors(algorithms.files(run), " in a step"):
                    turn = take_turn(Learner.of(run, shape, config.classes, device), device, steps, count=index == 0)
                    turns[name].append(turn)
                    steps = steps or turn.steps
    gc.unfreeze()
    bases = [base for base in BASELINES if not rows[base]["error"]]
    for name, row in rows.items():
        if not row["error"]:
            row.update(summary(turns[name], {base: turns[base] for base in bases}))
            row.update({f"memory / {base}": _ratio(row["peak_bytes"], rows[base]["peak_bytes"]) for base in bases})
    return list(rows.values())


@contextmanager
def _failure_into(row: Row) -> Iterator[None]:
    """Collect garbage, then run the block; if it fails, say why in the row's `error`, in one line."""
    gc.collect()
    try:
        yield
    except BrokenProcessPool:
        row["error"] = "its process was killed: out of memory?"
    except Exception as error:
        said = str(error).partition("\n")[0]
        if memory.exhausted(error):
            row["error"] = f"out of memory: {said}"
        else:
            row["error"] = said if isinstance(error, UsageError) else f"{type(error).__name__}: {said}"


def candidates(config: Bench) -> dict[str, Train]:
    """The two baselines and the algorithms asked for, by name."""
    shared = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(Setup)}
    base = Train(**shared, task=TaskSettings(name=config.task))
    return {name: algorithms.variant(name, base) for name in dict.fromkeys((*BASELINES, *config.algorithms))}


def _with_cuts(runs: dict[str, Train], shape: Sequence[int], classes: int) -> dict[str, Train]:
    """The runs with cuts, where a trial run has to propose them: that is no part of what is measured."""
    first = next(iter(runs.values()))
    if first.cuts or not first.model.startswith(models.HUGGING_FACE):
        return runs
    model, x = network_for(replace(first, batch_size=2), shape, classes)
    return {name: algorithms.with_cuts(run, model, x) for name, run in runs.items()}


def shape_of(config: Bench) -> tuple[int, ...]:
    """The shape of one input."""
    if config.input:
        return models.parse_shape(config.input)
    if config.model not in MODELS and not models.facts(config.model).tokens:
        raise UsageError(f"--model {config.model}: say what its inputs look like, such as --input 3,32,32")
    return tuple(models.facts(config.model).inputs)


def _points(config: Bench) -> list[Bench]:
    """The configurations that are measured: one, or one for each value of the sweep. Checks that each can be measured."""
    models.check(config.model)
    points = [config]
    if config.sweep:
        what, *values = config.sweep
        if what not in SWEEPS:
            raise unknown("sweep", what, SWEEPS)
        owner, _, option = SWEEPS[what].rpartition(".")
        if owner and option not in models.options_of(config.model):
            raise UsageError(f"--sweep {what}: {config.model} has no --{SWEEPS[what]}, sweep something else")
        points = [_at(config, what, value) for value in values]
        if len({swept(point, what) for point in points}) < 2:
            raise UsageError(f"--sweep {' '.join(config.sweep)}: a slope takes at least two values, such as {what} 8 16 32 64")
    for point in points:
        run, *_ = candidates(point).values()
        shape = shape_of(point)
        if config.model in MODELS:
            with torch.device("meta"):
                network_for(run, shape, config.classes)
        elif point is points[0]:
            network_for(replace(run, batch_size=2), shape, config.classes)
    return points


def _at(config: Bench, what: str, value: str) -> Bench:
    """The configuration at one value of a sweep."""
    number: Any
    try:
        number = float(value) if what == "width" else int(value)
    except ValueError:
        raise UsageError(f"--sweep {what} {value}: this is no {'number' if what == 'width' else 'whole number'}") from None
    owner, _, option = SWEEPS[what].rpartition(".")
    changes = {owner: dataclasses.replace(config.network, **{option: number})} if owner else {option: number}
    return dataclasses.replace(config, **changes)


def swept(config: Bench, what: str) -> float:
    """The value that this configuration has of the quantity that is swept."""
    return flat(config)[SWEEPS[what]]


def summary(turns: Sequence[Turn], bases: Mapping[str, Sequence[Turn]]) -> Row:
    """A row's figures of time: medians, with least and greatest."""
    seconds = [turn.seconds for turn in turns]
    whole = sum(sum(turn.parts.values()) for turn in turns)
    parts = {phase: sum(turn.parts.get(phase, 0.0) for turn in turns) / whole for phase in PHASES}
    row: Row = {
        "engine": turns[0].engine,
        "steps": turns[0].steps,
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "parts": {phase: share if any(phase in turn.parts for turn in turns) else None for phase, share in parts.items()},
        "flops": turns[0].flops,
    }
    for base, others in bases.items():
        ratios = [turn.seconds / other.seconds for turn, other in zip(turns, others, strict=True)]
        row[f"time / {base}"] = statistics.median(ratios)
        row[f"time / {base} range"] = [min(ratios), max(ratios)]
    return row


def slopes(rows: Sequence[Row]) -> list[Row]:
    """For each algorithm, the least-squares line through each measure, and the ratios of its slope to the baselines'."""
    names = dict.fromkeys(row["algorithm"] for row in rows)
    fits: dict[str, Row] = {}
    for name in names:
        good = [row for row in rows if row["algorithm"] == name and not row["error"]]
        values = [row["value"] for row in good]
        fits[name] = {"algorithm": name}
        if len(good) > 1:
            for unit, (_, measured) in MEASURES.items():
                slope, intercept = statistics.linear_regression(values, [measured(row) for row in good])
                fits[name][unit] = {"slope": slope, "intercept": intercept}
    for fit in fits.values():
        for unit in fit.keys() & MEASURES.keys():
            bases = {base: fits[base][unit]["slope"] for base in BASELINES if unit in fits.get(base, {})}
            fit[unit] |= {f"/ {base}": _ratio(fit[unit]["slope"], slope) for base, slope in bases.items()}
    return list(fits.values())


def _ratio(value: float, base: float) -> float | None:
    return value / base if base else None


def show(rows: Sequence[Row], title: str, console: Console) -> None:
    """Print what a step costs, and its parts."""
    console.print(title, style="bold")
    good = [row for row in rows if not row["error"]]
    heads = ("ms/step", "/ bp", "/ ckpt"), ("peak MB", "/ bp", "/ ckpt", "engine"), ("GFLOP", *PHASES)
    time_of, memory_of, parts_of = (_table("algorithm", *columns) for columns in heads)
    for row in good:
        name = row["algorithm"]
        times = [_spread(row.get(f"time / {base}"), row.get(f"time / {base} range")) for base in BASELINES]
        peaks = [_spread(row.get(f"memory / {base}")) for base in BASELINES]
        shares = ["" if share is None else f"{100 * share:.0f}" for share in row["parts"].values()]
        time_of.add_row(name, f"{1e3 * row['seconds']:.1f}", *times)
        low, high = row["peak_bytes_range"]
        megabytes = f"{row['peak_bytes'] / 1e6:.0f} ({low / 1e6:.0f}–{high / 1e6:.0f})"
        memory_of.add_row(name, megabytes, *peaks, row["engine"])
        parts_of.add_row(name, f"{row['flops'] / 1e9:.3g}", *shares)
    console.print("\nTime; ratios: median (least–greatest) over turns; ckpt: bp:checkpoint=true", time_of)
    console.print("Peak memory; median (least–greatest) over processes", memory_of)
    console.print("Arithmetic, and parts of the time of a step in %", parts_of)
    _show_failures(rows, console)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        named = column in ("algorithm", "engine")
        table.add_column(column, justify="left" if named else "right", no_wrap=not named, overflow="fold")
    return table


def _spread(middle: float | None, extremes: Sequence[float] | None = None) -> str:
    if middle is None:
        return ""
    return f"{middle:.2f}" + (f" ({extremes[0]:.2f}–{extremes[1]:.2f})" if extremes else "")


def _show_failures(rows: Sequence[Row], console: Console) -> None:
    for row in rows:
        if row["error"]:
            at = f" at {row['sweep']} {row['value']:g}" if "sweep" in row else ""
            console.print(f"{row['algorithm']}{at}: {row['error']}", style="red")


def show_sweep(fits: Sequence[Row], rows: Sequence[Row], what: str, title: str, console: Console) -> None:
    """Print every measure over the values of the sweep, with its slope."""
    console.print(title, style="bold")
    values = sorted({row["value"] for row in rows})
    for unit, (title, measured) in MEASURES.items():
        found = {(row["algorithm"], row["value"]): f"{measured(row):.1f}" for row in rows if not row["error"]}
        table = _table("algorithm", *(f"{value:g}" for value in values), f"per {what}", "/ bp", "/ ckpt")
        for fit in fits:
            name = fit["algorithm"]
            line = fit.get(unit, {})
            slope = f"{line['slope']:.3g}" if line else ""
            ratios = [_spread(line.get(f"/ {base}")) for base in BASELINES]
            table.add_row(name, *(found.get((name, value), "failed") for value in values), slope, *ratios)
        console.print(f"\n{title} in {unit.partition(' ')[0]}; slope by least squares", table)
    _show_failures(rows, console)
