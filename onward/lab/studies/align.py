"""How well estimated gradients agree with the true one, block by block: from checkpoints, or over a training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onward.errors import UsageError
from onward.lab.networks import models
from onward.lab.plain import flat
from onward.lab.report.alignment import COSINES, HISTOGRAM, WORDS, maps
from onward.lab.report.figures import Panel
from onward.lab.report.groups import short_names, shown
from onward.lab.report.picture import draw, formats, picture
from onward.lab.run import checkpoint, record
from onward.lab.run import folder as run_folder
from onward.lab.run.failure import TrainingFailed
from onward.lab.run.training import align as align_run
from onward.lab.run.training import check_place, load_data, prepare, standing
from onward.lab.settings import Align
from onward.lab.studies.runs import data_for, failures, runs_of, train_all
from onward.lab.system import disk
from onward.lab.system.extra import reason_of

JSON, MAP, HISTOGRAMS = run_folder.ALIGNED
COLUMNS = {"cosine": "cosine", "norm_ratio": "length", "bias": "bias", "variance": "variance", "snr": "SNR"}
Entry = dict[str, Any]
"""A line of alignment.jsonl, with the `label` of its run."""


def align(config: Align) -> list[Entry]:
    """Look at the runs of `config`, or train its algorithms and look on the way; print tables, write them, draw two pictures.

    Returns what was measured, each run's at one epoch after the other.

    Raises:
        UsageError: something that was asked for cannot work.
        TrainingFailed: every training failed before there was anything to show.
    """
    if not config.runs and not config.algorithms:
        raise UsageError("--algorithms: name at least one, or a run folder to look at")
    formats()  # says so now if pictures cannot be drawn
    failed: list[str] = []
    if config.runs:
        _refuse_without_effect(config)
        runs = list({Path(run).resolve(): Path(run) for run in config.runs}.values())
        folder = Path(config.out) if config.out else _default_folder(runs)
        names = short_names(runs)
        with run_folder.claimed(folder, overwrite=True):
            found = [{"label": names[run], **line} for run in runs for line in _of_checkpoint(run, config)]
    else:
        folder = Path(config.out or run_folder.default_path(config, "align"))
        found, failed = _of_training(config, folder)
    if not found:
        raise TrainingFailed(f"no training came to the end of an epoch: {'; '.join(failed)}")
    disk.write_text(folder / JSON, json.dumps(found) + "\n")
    latest = {entry["label"]: entry for entry in found}
    for entry in latest.values():
        show(entry)
    print(*failed, f"table: {folder / JSON}", sep="\n")
    draw({folder / name: partial(picture_of, name, found) for name in (MAP, HISTOGRAMS)})
    return found


def _refuse_without_effect(config: Align) -> None:
    """Raise a UsageError for options that say how to train: the runs that are looked at have been trained already."""
    heeded = ("runs", "out", "device", "align_estimates")
    given, defaults = flat(config), flat(Align())
    if others := [name for name in given if name not in heeded and given[name] != defaults[name]]:
        flags = " ".join(f"--{name.replace('_', '-')} {shown(given[name])}" for name in others)
        why = f"{flags}: a run that is looked at keeps its own settings, leave that out"
        raise UsageError(f"{why}, or leave out the run folders to train")


def _default_folder(runs: Sequence[Path]) -> Path:
    """The run's own folder; of several, one that is named after what they have in common."""
    if len(runs) == 1:
        return runs[0]
    names = {run_folder.default_path(record.read(run).config, "align") for run in runs}
    return names.pop() if len(names) == 1 else Path("runs/align")


def _of_checkpoint(folder: Path, config: Align) -> list[dict[str, Any]]:
    """What was measured while the run trained, and now at its checkpoint."""
    kept = record.read(folder)
    settings = replace(kept.config, device=config.device, align_estimates=config.align_estimates)
    saved = checkpoint.load(folder / run_folder.CHECKPOINT)
    if saved is None:
        raise UsageError(f"{folder} has no {run_folder.CHECKPOINT} yet: go on with the run by onward train --resume {folder}")
    data = load_data(settings)
    run_folder.check_data(folder, data, saved)
    run_folder.check_code(folder, settings, saved)
    run = prepare(settings, data)
    try:
        epoch = len(standing(saved, settings).rows)
        run.estimator.load_state_dict(saved["estimator"])
    except (UsageError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        why = reason_of(error)
        raise UsageError(f"the checkpoint of {folder} does not fit its settings ({why}): train it again") from error
    entry = run_folder.alignment_entry(epoch, config.align_estimates, align_run(run))
    earlier = [line for line in kept.alignment if line["epoch"] != epoch]
    return [*earlier, entry]


def _of_training(config: Align, folder: Path) -> tuple[list[Entry], list[str]]:
    """What is measured while every algorithm trains the network, each run in a folder of its own; and which runs failed."""
    models.check(config.model)
    runs = runs_of(config, config.algorithms, [config.seed], folder)
    check_place(folder, config)
    with run_folder.claimed(folder, overwrite=True):
        outcomes = train_all(runs, "seed", config.overwrite, data_for(runs, config))
    found = [
        {"label": label, **line}
        for label, (run,) in runs.items()
        if (there := record.same(Path(str(run.out)), run))  # a run that failed at once has left another in its place, or none
        for line in there.alignment
    ]
    return found, failures(outcomes, "seed")


def show(entry: Entry) -> None:
    """Print what was measured of one run at one epoch."""
    what = "estimate" if entry["estimates"] == 1 else "estimates"
    descent = entry.get("descent")  # which measurements of older versions lack
    worth = "" if descent is None else f"; a small step brings {descent:.3g} of what one along the gradient does"
    printed = Table(
        title=f"{entry['label']}, epoch {entry['epoch']}",
        caption=f"against the true gradient, in units of its length; {entry['estimates']} {what} on one batch{worth}",
    )
    for column in ("block", "of its", *COLUMNS.values()):
        printed.add_column(column, justify="left" if column in ("block", "of its") else "right")
    for block, found in entry["blocks"].items():
        for kind in ("signal", "parameters", "feedback"):
            if kind in found:
                printed.add_row(block, WORDS[kind], *(_cell(found[kind], key) for key in COLUMNS))
    Console(markup=False, emoji=False).print(printed)  # names are no markup


def _cell(agreement: Mapping[str, float | None], key: str) -> str:
    """A number of the table; a bias that the noise of the mean could be is given as a bound.

    >>> _cell({"bias": 0.1, "bias_noise": 0.5}, "bias"), _cell({"snr": None, "variance": 0.0}, "snr")
    ('< 0.5', '∞')
    """
    value = agreement[key]
    if key == "snr" and agreement["variance"] == 0:
        return "∞"
    if value is None:
        return ""
    if key == "bias" and value < (agreement["bias_noise"] or 0):
        return f"< {agreement['bias_noise']:.3g}"
    return f"{value:.3f}" if key == "cosine" else f"{value:.3g}"


def picture_of(name: str, found: Sequence[Entry], path: Path) -> None:
    """Draw one of the two pictures: maps of the cosines, a row for each run, or the distribution of the samples' cosines."""
    labels = dict.fromkeys(entry["label"] for entry in found)
    measured = maps({label: [[entry for entry in found if entry["label"] == label]] for label in labels})
    if name == HISTOGRAMS:
        title = "Samples by the cosine of their error signal, after the last epoch"
        figures: list[Panel | None] = [figure for one in measured if one.measure == HISTOGRAM for figure in one.figures]
        grid = [figures[at : at + 3] for at in range(0, len(figures), 3)]
    else:
        title = "Cosine with the true gradient"
        of = {one.measure.partition(".")[0]: dict(one.figures) for one in measured if one.measure in COSINES}
        grid = [
            [(f"{label}: {WORDS[kind]}", of[kind][label]) if label in of[kind] else None for kind in of] for label in labels
        ]
    picture(path, grid, title)
