"""The folder of one run: what it was made of, what it measured, and where it stands."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from onward.errors import UsageError
from onward.lab.config import Recipe, Train

CONFIG, METRICS, CHECKPOINT, ALIGNMENT = "config.json", "metrics.jsonl", "checkpoint.pt", "alignment.jsonl"
CONTENTS = (CONFIG, METRICS, CHECKPOINT, ALIGNMENT, "weights-*.pt", "*.partial", "events.out.tfevents.*")
BINS = 40
"""Of a histogram of cosines, all equal, from -1 to 1."""
NOT_IN_RESULT = {"out", "overwrite", "wandb", "wandb_project", "wandb_name", "log_interval"}


def default_path(config: Recipe, what: str) -> Path:
    """runs/<data>-<model>-<what>.

    >>> default_path(Recipe(data="owner/flowers"), "bp-s3").as_posix()
    'runs/owner-flowers-mlp-bp-s3'
    """
    data = Path(config.data_dir).resolve().name if config.data_dir else config.data.replace("/", "-")
    return Path("runs") / f"{data}-{config.model}-{what}"


@contextmanager
def claimed(folder: Path, *, overwrite: bool = False) -> Iterator[None]:
    """Create the folder and make sure that it can be written to; if the body fails and wrote nothing, it goes again.

    Raises:
        UsageError: it cannot be written to, or it holds a run and `overwrite` is off.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "writable.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({error.strerror}): choose another folder with --out") from error
    if _contents(folder) and not overwrite:
        raise UsageError(f"{folder} already holds a run: choose another folder with --out, or replace it with --overwrite")
    try:
        yield
    except BaseException:
        with suppress(OSError):  # a folder that is not empty stays
            folder.rmdir()
        raise


def begin(folder: Path, config: Train, **environment: Any) -> None:
    """Take away the files of an earlier run, and write config.json: every setting, and what it runs on."""
    for path in _contents(folder):
        path.unlink()
    settings = {"config": dataclasses.asdict(config), "environment": environment}
    _write_whole(folder / CONFIG, lambda file: file.write((json.dumps(settings, indent=2) + "\n").encode()))


def read_config(folder: Path) -> dict[str, Any]:
    """What `begin` wrote: `config`, the settings, and `environment`, what they ran on."""
    return json.loads((folder / CONFIG).read_text())


def add_metrics(folder: Path, row: dict[str, Any]) -> None:
    """One more line of metrics.jsonl."""
    _add_line(folder / METRICS, row)


def add_alignment(folder: Path, epoch: int, cosines: Mapping[str, Tensor]) -> None:
    """One more line of alignment.jsonl: for each cut the mean of its samples' cosines, and how many fall into each bin."""
    blocks = {
        cut: {"mean": values.mean().item(), "counts": values.float().histc(BINS, -1, 1).int().tolist()}
        for cut, values in cosines.items()
    }
    _add_line(folder / ALIGNMENT, {"epoch": epoch, "from": -1, "to": 1, "blocks": blocks})


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """checkpoint.pt, whole or not at all; `torch.load(path, weights_only=True)` reads it."""
    _write_whole(folder / CHECKPOINT, lambda file: torch.save(state, file))


def write_weights(folder: Path, epoch: int, weights: dict[str, Tensor]) -> None:
    """weights-<epoch>.pt, the network's own, for `load_state_dict`; `torch.load(path, weights_only=True)` reads it."""
    _write_whole(folder / f"weights-{epoch}.pt", lambda file: torch.save(weights, file))


def finished(folder: Path, config: Train) -> list[dict[str, Any]] | None:
    """The metrics of a run that is already complete there, one row per epoch; None if there is none.

    Raises:
        UsageError: the run there has other settings.
    """
    try:
        found = read_config(folder)["config"]
        rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    except (OSError, ValueError, KeyError):
        return None
    asked = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in asked.keys() - NOT_IN_RESULT:
        if found.get(name) != asked[name]:
            raise UsageError(
                f"{folder} holds a run with {name} {found.get(name)}, not {asked[name]}: choose another folder with --out, "
                "or replace it with --overwrite"
            )
    return rows if len(rows) == config.epochs else None


def _contents(folder: Path) -> list[Path]:
    return [path for pattern in CONTENTS for path in folder.glob(pattern)]


def _add_line(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that is never seen half-written, even if the machine stops in between."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
