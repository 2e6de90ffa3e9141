"""What a run folder holds: the one reader of what `folder` has written, and whether it is the run that is asked for."""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onward.errors import UsageError
from onward.lab import tasks
from onward.lab.plain import flat, from_dict
from onward.lab.run.folder import ALIGNED, ALIGNMENT, CONFIG, FAILURE, METRICS, NOT_IN_RESULT, check_code, read_config
from onward.lab.settings import Train
from onward.lab.system.extra import reason_of


@dataclass(frozen=True)
class Record:
    """What a run folder holds, as far as it can be read."""

    folder: Path
    config: Train
    unknown: dict[str, Any]
    """Settings that this version does not have, by their names."""
    environment: dict[str, Any]
    task: tasks.Task
    rows: list[dict[str, Any]]
    """One for each epoch, up to the first line that cannot be read."""
    alignment: list[dict[str, Any]]
    """Lines of alignment.jsonl."""
    looks: list[dict[str, Any]]
    """What `onward align` has found out about this run and left in its folder, in lines like those."""
    failure: str
    """Why the run has stopped for good; empty if it has not."""
    notes: list[str]
    """What is not as it should be, in words."""

    @property
    def complete(self) -> bool:
        """Whether the run came to its last epoch."""
        return len(self.rows) == self.config.epochs


def read(folder: Path) -> Record:
    """The run in a folder. Settings that are newer than it have their defaults; lines that are broken are noted. Raises a
    UsageError if there is no run, or its settings cannot be used; the message names the one that is wrong."""
    if not (folder / CONFIG).exists():
        raise UsageError(f"{folder} holds no run: give a folder that `onward train` has written")
    try:
        saved = read_config(folder)
        given = flat(dict(saved["config"]))
        config = from_dict(Train, _with_defaults(saved["config"]))
        environment = dict(saved.get("environment") or {})
    except UsageError as error:
        raise UsageError(f"{folder / CONFIG}: {error}") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {reason_of(error)}"
        raise UsageError(f"{folder / CONFIG} cannot be read ({why}): train it again") from error
    if missing := [name for name in ("algorithm", "model", "data") if name not in given]:
        raise UsageError(f"{folder / CONFIG} names no {missing[0]}: train it again")
    known = flat(Train())
    unknown = {name: value for name, value in given.items() if value and name not in known}
    rows, notes = _lines(folder / METRICS)
    alignment, more = _lines(folder / ALIGNMENT)
    failure = (folder / FAILURE).read_text(encoding="utf-8", errors="replace").strip() if (folder / FAILURE).is_file() else ""
    notes += more
    record = Record(folder, config, unknown, environment, tasks.of(saved), rows, alignment, _looks(folder), failure, notes)
    if rows and not record.complete:
        stopped = f"it stopped after epoch {len(rows)} of {config.epochs}"
        record.notes.append(f"{stopped} ({failure})" if failure else stopped)
    return record


def finished(folder: Path, config: Train) -> list[dict[str, Any]] | str | None:
    """The metrics of a run that is already complete there, one row per epoch; why it stopped for good; or None for neither.
    Raises a UsageError if the run there has other settings, or is of another network."""
    check(folder, config)
    check_code(folder, config)
    try:
        record = read(folder)
    except UsageError:
        return None
    return record.failure or (record.rows if record.complete else None)


def check(folder: Path, config: Train, but: Container[str] = ()) -> None:
    """Raise a UsageError if the run there has other settings than `config`, `but` for some."""
    for name, (there, asked) in differing(folder, config).items():
        if name not in but:
            why = f"{folder} holds a run with {name} {there}, not {asked}"
            raise UsageError(f"{why}: choose another folder with --out, or replace it with --overwrite")


def differing(folder: Path, config: Train) -> dict[str, tuple[Any, Any]]:
    """The settings that make a result and are not the same in the run there, if there is one, and in `config`: both values."""
    try:
        found = asdict(read(folder).config)
    except UsageError:
        return {}
    asked = asdict(config)
    return {name: (found[name], asked[name]) for name in asked if name not in NOT_IN_RESULT and found[name] != asked[name]}


def same(folder: Path, config: Train) -> Record | None:
    """The run there, if it is the one with these settings."""
    try:
        return None if differing(folder, config) else read(folder)
    except UsageError:
        return None


def _with_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The settings in a file: those that it lacks have their defaults, those that this version does not have are left out."""
    settings = asdict(Train())
    for name, default in settings.items():
        found = given.get(name, default)
        nested = isinstance(default, dict) and isinstance(found, dict)
        settings[name] = {inner: found.get(inner, value) for inner, value in default.items()} if nested else found
    return settings


def _lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects in a file, one in each line, up to the first line that holds none; and what is wrong, in words."""
    entries: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        return [], [f"{path.name} cannot be read: {error.strerror}"]
    for at, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            return entries, [f"line {at} of {path.name} is not a JSON object, so it is read up to there"]
        entries.append(entry)
    return entries, []


def _looks(folder: Path) -> list[dict[str, Any]]:
    """What `onward align` has written into a run folder about that run: its label is the end of the folder's path."""
    try:
        found = json.loads((folder / ALIGNED[0]).read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return []
    whole = folder.resolve()
    ends = [str(Path(*whole.parts[-parts:])) for parts in range(1, len(whole.parts))]
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    own = [entry["label"] for entry in entries if entry.get("label") in ends]
    return [entry for entry in entries if own and entry["label"] == max(own, key=len)]
