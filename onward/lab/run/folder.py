"""The folder of one run: what it was made of, what it measured, and where it stands."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onward.alignment import Alignment
from onward.errors import UsageError
from onward.lab import tasks
from onward.lab.data import Data
from onward.lab.run import algorithms, checkpoint, formats
from onward.lab.run.algorithms import folder_name
from onward.lab.settings import Recipe, Train
from onward.lab.system import disk

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

CONFIG, METRICS, CHECKPOINT, ALIGNMENT = "config.json", "metrics.jsonl", "checkpoint.pt", "alignment.jsonl"
FAILURE = "failed.txt"
RATES, TRIALS = "rates.json", "rates"
"""In the folder of a comparison: which learning rates did best, and the folder of the runs that this was decided by."""
ALIGNED = ("alignment.json", "alignment.png", "alignment-histograms.png")
WRITTEN = (CONFIG, METRICS, CHECKPOINT, checkpoint.previous(Path(CHECKPOINT)).name, ALIGNMENT, *ALIGNED, FAILURE)
"""By name; besides these there are weights and TensorBoard's files."""
NAMES = {*WRITTEN, *(f"{name}.partial" for name in WRITTEN)}
"""These, and what they are called until they are whole."""
OTHERS = re.compile(r"weights-\d+\.pt(\.partial)?|events\.out\.tfevents\..*")
BINS = 40
"""Of a histogram of cosines, all equal, from -1 to 1."""
NOT_IN_RESULT = {"data_timeout", "out", "overwrite", "resume", "wandb", "wandb_project", "wandb_name"}
NOT_IN_RESULT |= {"log_interval", "align_estimates", "checkpoint_every", "recipe"}
"""Settings that a result does not depend on."""
MAY_CHANGE = {"device", "data_dir", *NOT_IN_RESULT} - {"out", "overwrite", "resume", "align_estimates", "recipe"}
"""Settings that a run may be given anew when it is resumed: where it runs, and where the same data are."""


def default_path(config: Recipe, what: str, recipe: str | None = None) -> Path:
    """runs/<data>-<model>-<what>; of a recipe, runs/<recipe>-<what>.

    >>> default_path(Recipe(data="owner/flowers"), "bp-s3").as_posix()
    'runs/owner-flowers-mlp-bp-s3'
    """
    if recipe is not None:
        return Path("runs") / "-".join(map(folder_name, (recipe.removesuffix(".toml"), what)))
    data = config.data if ".py:" in config.data else config.data.replace("/", "-")  # of a file, its name is enough
    data = Path(config.data_dir).resolve().name if config.data_dir else data
    return Path("runs") / "-".join(folder_name(part) for part in (data, config.model, what))


@contextmanager
def claimed(folder: Path, *, overwrite: bool = False) -> Iterator[None]:
    """Create the folder and make sure that it can be written to; if the body fails, new folders that are empty are deleted.
    Raises a UsageError if it cannot be written to, or holds a run and `overwrite` is off."""
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        disk.try_out(folder)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({error.strerror}): choose another folder with --out") from error
    for name in NAMES:
        if (folder / name).is_dir():
            why = f"{folder / name} is a folder, and a run has a file of that name"
            raise UsageError(f"{why}: choose another folder with --out")
    if any(path.suffix != ".partial" for path in _contents(folder)) and not overwrite:
        why = f"{folder} already holds a run: go on with it by onward train --resume {folder}, choose another folder with --out"
        raise UsageError(f"{why}, or replace it with --overwrite")
    try:
        yield
    except BaseException:
        with suppress(OSError):  # a folder that is not empty stays, and with it those it is in
            for path in new:
                path.rmdir()
        raise


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """While the body runs, no other process writes a run there; if one does already, a UsageError is raised. The system
    releases the lock when this process ends, however it ends."""
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = f"another process is training into {folder}"
            raise UsageError(f"{why}: wait for it, stop it, or choose another folder with --out") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(lock)


def check_space(folder: Path, checkpoint_size: int, *, overwrite: bool) -> None:
    """Raise a UsageError if the disk has no space for a checkpoint; the space of a run that is overwritten counts as free."""
    room = disk.space(folder) + sum(path.stat().st_size for path in _contents(folder) if overwrite)
    if room < checkpoint_size:
        why = f"{folder / CHECKPOINT} of {checkpoint_size / 1e6:.3g} MB cannot be written (No space left on device)"
        raise UsageError(f"{why}: make space on its disk, or choose another folder with --out")


def begin(folder: Path, config: Train, data: Data, recipe: Mapping[str, Any] | None = None, **environment: Any) -> None:
    """Take away the files of an earlier run, and write config.json: every setting, the data, what it runs on, and how the
    settings differ from those of a recipe.

    The earlier run is there until the new file is complete.
    """
    found = {"environment": environment, "data": described(data)} | ({"recipe": recipe} if recipe else {})
    settings = {"format": formats.FORMAT, "config": dataclasses.asdict(config), **found}
    disk.write_text(folder / CONFIG, json.dumps(settings, indent=2) + "\n", before=lambda: clear(folder))


def clear(folder: Path) -> None:
    """Take away the files of a run; others stay."""
    for path in _contents(folder):
        path.unlink()


def described(data: Data) -> dict[str, Any]:
    """What tells data from others."""
    samples = {"class_names": list(data.class_names), "train": len(data.train), "test": len(data.test)}
    samples |= {"vocabulary": list(data.vocabulary)} if data.vocabulary else {}
    return samples | {"task": data.task, "noun": data.noun, "in_memory": data.in_memory, "digest": data.digest}


def note(folder: Path, data: dict[str, Any], code: str | None) -> None:
    """Write into config.json what the run is trained on, and the digest of the network's file, unless that is there already."""
    known = read_config(folder)
    environment = {name: value for name, value in known.get("environment", {}).items() if name != "code"}
    now = {**known, "environment": environment | ({"code": code} if code else {}), "data": data}
    if now != known:
        disk.write_text(folder / CONFIG, json.dumps(now, indent=2) + "\n")


def check_code(folder: Path, config: Train, state: dict[str, Any] | None = None) -> None:
    """Raise a UsageError if the run there, or its checkpoint, is of a network or an algorithm whose own file has changed.

    A folder that does not say which file it is of is accepted: it is older than that record, or the file was mended.
    """
    try:
        known = read_config(folder).get("environment", {}).get("code")
    except (OSError, ValueError, AttributeError):
        known = None
    now = algorithms.digest(config)
    if now and any(then not in (None, now) for then in (known, (state or {}).get("code"))):
        why = f"{folder} is a run of another {_files(config)} has changed since"
        raise UsageError(f"{why}; bring that back, choose another folder with --out, or replace the run with --overwrite")


def _files(config: Train) -> str:
    """What is in the user's own files, and where."""
    mine = [file for file in algorithms.files(config) if file]
    kinds = " or ".join("network" if file.flag == "--model" else "algorithm" for file in mine)
    return f"{kinds}: {' or '.join(str(file.path) for file in mine)}"


def check_data(folder: Path, data: Data, state: dict[str, Any] | None = None) -> None:
    """Raise a UsageError that says what is different, if the run there, or its checkpoint, is of other data.

    A folder that does not say which data it is of is accepted: it is older than that record.
    """
    try:
        known = read_config(folder).get("data")
    except (OSError, ValueError, AttributeError):
        known = None
    now = described(data)
    for then in (known, (state or {}).get("data")):
        if isinstance(then, dict) and (differences := _differences(then, now)):
            why = f"{folder} is a run on other data ({'; '.join(differences)})"
            raise UsageError(f"{why}: bring those back, choose another folder with --out, or replace the run with --overwrite")


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two sets of data differ, in words.

    >>> _differences({"class_names": ["cat", "dog"], "train": 120}, {"class_names": ["dog", "zebra"], "train": 220})
    ['class 0 was cat, is dog', '120 training images, now 220']
    """
    found = []
    task, noun = tasks.of({"data": now}), now.get("noun", "images")
    if (earlier := tasks.of({"data": then}).name) != task.name:
        found.append(f"they were for {earlier}, now for {task.name}")
    before, after = (list(map(str, data.get("class_names") or now["class_names"])) for data in (then, now))
    if len(before) != len(after):
        found.append(f"{len(before)} {task.outputs}, now {len(after)}")
    elif before != after:
        at = next(at for at, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
        found.append(f"class {at} was {before[at]}, is {after[at]}")
    for part, word in (("train", "training"), ("test", "test")):
        if then.get(part, now.get(part)) != now.get(part):
            found.append(f"{then[part]} {word} {noun}, now {now[part]}")
    # Where inputs are kept decides what a digest is taken of; and there is none if a sample was broken and is mended.
    comparable = then.get("digest") and then.get("in_memory") == now.get("in_memory")
    if not found and comparable and then["digest"] != now["digest"]:
        what = f"{noun} of the same classes" if task is tasks.CLASSIFICATION else noun
        found.append(f"as many {what}, but not the same, or not in the same order")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """What `begin` wrote, or an older version did: `config`, the settings, and `environment`, what they ran on."""
    return formats.upgraded(json.loads((folder / CONFIG).read_text(encoding="utf-8")))


def write_lines(folder: Path, rows: Sequence[dict[str, Any]], aligned: Sequence[dict[str, Any]]) -> None:
    """metrics.jsonl, one line for each epoch; and alignment.jsonl, if there is anything to write."""
    for name, entries in {METRICS: rows, **({ALIGNMENT: aligned} if aligned else {})}.items():
        disk.write_text(folder / name, "".join(json.dumps(entry) + "\n" for entry in entries))


def alignment_entry(epoch: int, estimates: int, measured: Alignment) -> dict[str, Any]:
    """A line of alignment.jsonl: for each block the agreement of error `signal`, `parameters` and `feedback` with the truth,
    as far as it has them; of the error signals' cosines the `mean`, and how many fall into each bin (`counts`). `descent` is of
    the whole network, by a `step` of that length."""
    blocks: dict[str, dict[str, Any]] = {}
    for name, block in measured.items():
        blocks[name] = {
            what: {key: None if value is None or not math.isfinite(value) else value for key, value in found._asdict().items()}
            for what in ("signal", "parameters", "feedback")
            if (found := getattr(block, what)) is not None
        }
        if block.cosines is not None:
            counts = block.cosines.float().clamp(-1, 1).histc(BINS, -1, 1).int().tolist()
            blocks[name] = {"mean": blocks[name]["signal"]["cosine"], "counts": counts, **blocks[name]}
    bins = {"from": -1, "to": 1}
    worth = {"descent": measured.descent, "step": measured.step}
    return {"epoch": epoch, "estimates": estimates, **worth, **bins, "blocks": blocks}


def note_failure(folder: Path, reason: str | None) -> None:
    """failed.txt: why this run has stopped for good; without a reason it is taken away, because the run goes on after all."""
    if reason is not None:
        disk.write_text(folder / FAILURE, reason + "\n")
        return
    with disk.writing(folder / FAILURE):
        (folder / FAILURE).unlink(missing_ok=True)


def write_weights(folder: Path, epoch: int, weights: dict[str, Tensor]) -> None:
    """weights-<epoch>.pt, the network's own, for `load_state_dict`; `torch.load(path, weights_only=True)` reads it."""
    disk.write_whole(folder / f"weights-{epoch}.pt", lambda file: torch.save(weights, file))


def _contents(folder: Path) -> list[Path]:
    """The files of the run there. Those of `onward align` count only beside others: alone they are about other runs."""
    names = NAMES - {f"{CONFIG}.partial"}  # that one is of the next run
    there = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in there if (path.name in names or OTHERS.fullmatch(path.name)) and not path.is_dir()]
    return found if any(path.name not in ALIGNED for path in found) else []
