"""How well estimated gradients agree with the true one, block by block: from checkpoints, or over a training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onward.errors import UsageError
from onward.lab.networks import models
from onward.lab.report import page as report
from onward.lab.report.figures import draw, empty, formats, save
from onward.lab.report.page import short_names
from onward.lab.run import folder as run_folder
from onward.lab.run.training import TrainingFailed, check_place, load_data, prepare, standing
from onward.lab.run.training import align as align_run
from onward.lab.settings import Align
from onward.lab.studies.compare import failures, images_for, runs_of, train_all
from onward.lab.system import disk

JSON, MAP, HISTOGRAMS = run_folder.ALIGNED
KINDS = {"signal": "error signal", "parameters": "parameter gradient", "feedback": "feedback matrix"}
COLUMNS = {
    "cosine": "cosine",
    "norm_ratio": "length",
    "bias": "bias",
    "variance": "variance",
    "snr": "SNR",
}
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
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(*failed, f"table: {folder / JSON}", sep="\n")
    draw({folder / MAP: lambda path: heat_map(path, found), folder / HISTOGRAMS: lambda path: histograms(path, latest)})
    return found


def _refuse_without_effect(config: Align) -> None:
    """Raise a UsageError for options that say how to train: the runs that are looked at have been trained already."""
    heeded = ("runs", "out", "device", "align_estimates")
    given, defaults = report.settings(config), report.settings(Align())
    if others := [name for name in given if name not in heeded and given[name] != defaults[name]]:
        flags = " ".join(f"--{name.replace('_', '-')} {report.shown(given[name])}" for name in others)
        raise UsageError(
            f"{flags}: a run that is looked at keeps its own settings, leave that out, or leave out the run folders to train"
        )


def _default_folder(runs: Sequence[Path]) -> Path:
    """The run's own folder; of several, one that is named after what they have in common."""
    if len(runs) == 1:
        return runs[0]
    names = {run_folder.default_path(run_folder.settings(run), "align") for run in runs}
    return names.pop() if len(names) == 1 else Path("runs/align")


def _of_checkpoint(folder: Path, config: Align) -> list[dict[str, Any]]:
    """What was measured while the run trained, and now at its checkpoint."""
    settings, saved = run_folder.load(folder)
    settings = replace(settings, device=config.device, align_estimates=config.align_estimates)
    data = load_data(settings)
    run_folder.check_data(folder, data, saved)
    run_folder.check_code(folder, settings, saved)
    run = prepare(settings, data)
    try:
        epoch = len(standing(saved, settings).rows)
        run.estimator.load_state_dict(saved["estimator"])
    except (UsageError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"the checkpoint of {folder} does not fit its settings ({reason}): train it again") from error
    entry = run_folder.alignment_entry(epoch, config.align_estimates, align_run(run))
    earlier = [line for line in run_folder.read_alignment(folder) if line["epoch"] != epoch]
    return [*earlier, entry]


def _of_training(config: Align, folder: Path) -> tuple[list[Entry], list[str]]:
    """What is measured while every algorithm trains the network, each run in a folder of its own; and which runs failed."""
    models.check(config.model)
    runs = runs_of(config, config.algorithms, [config.seed], folder)
    check_place(folder, config)
    with run_folder.claimed(folder, overwrite=True):
        outcomes = train_all(runs, "seed", config.overwrite, images_for(runs, config))
    found = [
        {"label": label, **line}
        for label, (run,) in runs.items()
        if not run_folder.differing(Path(run.out), run)  # one that failed at once has left another in its place
        for line in run_folder.read_alignment(Path(run.out))
    ]
    return found, failures(outcomes, "seed")


def show(entry: Entry) -> None:
    """Print what was measured of one run at one epoch."""
    what = "estimate" if entry["estimates"] == 1 else "estimates"
    printed = Table(
        title=f"{entry['label']}, epoch {entry['epoch']}",
        caption=f"against the true gradient, in units of its length; {entry['estimates']} {what} on one batch",
    )
    for column in ("block", "of its", *COLUMNS.values()):
        printed.add_column(column, justify="left" if column in ("block", "of its") else "right")
    for block, found in entry["blocks"].items():
        for kind, name in KINDS.items():
            if kind in found:
                printed.add_row(block, name, *(_cell(found[kind], key) for key in COLUMNS))
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


def heat_map(path: Path, found: Sequence[Entry]) -> None:
    """The cosines over blocks and epochs: a row of maps for each run, of its error signals and of its parameter gradients."""
    labels = list(dict.fromkeys(entry["label"] for entry in found))
    kinds = ("signal", "parameters")
    most = max(len(entry["blocks"]) for entry in found)
    figure = empty(11, len(labels) * (0.9 + 0.28 * most))
    grid = figure.subplots(len(labels), len(kinds), squeeze=False)
    for row, label in zip(grid, labels, strict=True):
        entries = sorted((entry for entry in found if entry["label"] == label), key=lambda entry: entry["epoch"])
        for axes, kind in zip(row, kinds, strict=True):
            blocks = [
                block for block in entries[-1]["blocks"] if kind == "parameters" or block != list(entries[-1]["blocks"])[-1]
            ]
            if not blocks:
                axes.set_visible(False)
                continue
            values = [[_cosine(entry, block, kind) for entry in entries] for block in blocks]
            picture = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu", aspect="auto", interpolation="nearest")
            axes.set_facecolor("0.85")
            axes.set(title=f"{label}: {KINDS[kind]}", xlabel="epoch" if label == labels[-1] else "")
            axes.set_xticks(range(len(entries)), [str(entry["epoch"]) for entry in entries])
            axes.set_yticks(range(len(blocks)), blocks)
            if len(entries) > 12:
                axes.locator_params(axis="x", nbins=12)
            else:
                for y, line in enumerate(values):
                    for x, value in enumerate(line):
                        said = f"{value:.2f}" if value == value else "none"
                        axes.text(x, y, said, ha="center", va="center", fontsize=8, color="w" if abs(value) > 0.6 else "k")
    figure.colorbar(picture, ax=grid, label="cosine with the true gradient", shrink=min(1.0, 4 / len(labels)))
    save(figure, path, dpi=120)


def _cosine(entry: Entry, block: str, kind: str) -> float:
    value = entry["blocks"].get(block, {}).get(kind, {}).get("cosine")
    return float("nan") if value is None else value


def histograms(path: Path, latest: Mapping[str, Entry]) -> None:
    """For each block, how the samples' cosines are distributed at the last epoch of every run."""
    blocks = list(
        dict.fromkeys(name for entry in latest.values() for name, block in entry["blocks"].items() if "counts" in block)
    )
    columns = max(1, min(3, len(blocks)))
    rows = max(1, -(-len(blocks) // columns))
    figure = empty(4.5 * columns, 3 * rows + 0.6)
    figure.suptitle("cosine of each sample's error signal with the true gradient")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.set_visible(False)
    lines: dict[str, Any] = {}
    for axes, block in zip(grid, blocks, strict=False):
        axes.set_visible(True)
        axes.set(title=block, xlim=(-1.05, 1.05), ylabel="part of the samples")
        for number, (label, entry) in enumerate(latest.items()):
            if counts := entry["blocks"].get(block, {}).get("counts"):
                width = (entry["to"] - entry["from"]) / len(counts)
                edges = [entry["from"] + width * i for i in range(len(counts) + 1)]
                parts = [count / sum(counts) for count in counts]
                lines[label] = axes.stairs(parts, edges, label=label, color=f"C{number % 10}", linewidth=1.5)
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8)
    save(figure, path, dpi=120)
