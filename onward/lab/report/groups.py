"""Runs in groups that differ only by seed, and the settings that tell groups apart."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from onward.errors import UsageError
from onward.lab.plain import flat
from onward.lab.report.alignment import numbers
from onward.lab.run import record
from onward.lab.run.folder import CONFIG, METRICS, NOT_IN_RESULT, RATES, TRIALS
from onward.lab.run.record import Record
from onward.lab.settings import Train
from onward.lab.tasks import CLASSIFICATION

ENVIRONMENT = ("device", "torch", "onward", "python")


@dataclass(frozen=True)
class Group:
    """Runs that differ only by seed."""

    label: str
    runs: list[Record]

    @property
    def counted(self) -> list[Record]:
        """Those that the means are over: the complete ones, if there are any."""
        return [run for run in self.runs if run.complete] or self.runs


def find(path: Path) -> list[Path]:
    """The run folders at and below a path; the path itself if there is none.

    An empty folder counts as one: it was meant to hold a run, and the page says that it does not. The trials by which a
    comparison chose learning rates are no results.
    """
    found = []
    for folder, below, inside in os.walk(path):
        below[:] = sorted(set(below) - ({TRIALS} if RATES in inside else set()))
        if CONFIG in inside or METRICS in inside:
            found.append(Path(folder))
            below.clear()
        elif not below and not inside:
            found.append(Path(folder))
    return found or [path]


def read(folder: Path) -> Record:
    """A run with its finite numbers, epoch by epoch. Raises a UsageError if there is no run, or none of its epochs is
    complete."""
    found = record.read(folder)
    if not found.rows:
        why = found.failure or next(iter(found.notes), f"{METRICS} is empty")
        raise UsageError(f"{folder} holds no complete epoch ({why})")
    rows = [{"epoch": at, **numbers(row)} for at, row in enumerate(found.rows, start=1)]
    notes = [f"{folder}: {note}" for note in found.notes]
    return replace(found, rows=rows, alignment=[*found.looks, *found.alignment], notes=notes)


def headline(run: Record) -> str:
    """The network, the data and the task (unless it is classification): runs that have these in common are compared.

    >>> from onward.lab.settings import Network
    >>> config = Train(network=Network(layers=3))
    >>> headline(Record(Path(), config, {}, {}, CLASSIFICATION, [], [], [], "", []))
    'mlp (layers 3) on digits'
    """

    def apart(part: Any) -> str:
        found = [
            f"{entry.name.replace('_', ' ')} {shown(value)}"
            for entry in fields(part)
            if (value := getattr(part, entry.name)) != entry.default
        ]
        return f" ({', '.join(found)})" if found else ""

    config, task = run.config, "" if run.task.name == CLASSIFICATION.name else f", {run.task.name}"
    return f"{config.model}{apart(config.network)} on {config.data_dir or config.data}{apart(config.subset)}{task}"


def short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """The folders from where they part.

    >>> short_names([Path("/runs/digits/bp-s0"), Path("/runs/digits/fg-s0")]).values()
    dict_values(['bp-s0', 'fg-s0'])
    """
    whole = {folder: folder.resolve() for folder in folders}
    common = Path(os.path.commonpath([folder.parent for folder in whole.values()]))
    return {folder: str(path.relative_to(common)) for folder, path in whole.items()}


def grouped(runs: Sequence[Record]) -> list[Group]:
    """The runs by all but their seed; bp first. A label is the algorithm and what sets it apart, as variants are named."""
    groups: dict[str, list[Record]] = {}
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
    """The algorithm, with those settings of its feedback and heads that are not the default and vary among the others. To tell
    it from its twins, which would have the same label, every setting that varies among these is named too."""
    algorithm, defaults = result["algorithm"], flat(Train())
    parts = [
        f"{name}={shown(value)}"
        for name, value in result.items()
        if name != "algorithm" and value != defaults.get(name)
        if _varies(name, others if name.startswith(("feedback.", "heads.")) else twins)
    ]
    return f"{algorithm}{',' if '=' in algorithm else ':'}{','.join(parts)}" if parts else algorithm


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


def shared(runs: Sequence[Record]) -> list[tuple[str, str]]:
    """The settings that are the same in all runs and not the default."""
    results, defaults = [_result(run) for run in runs], flat(Train())
    told = {"model", "data", "data_dir", "algorithm"}
    return [
        (name, shown(results[0].get(name)))
        for name in _names(results)
        if name not in told and not _varies(name, results) and results[0].get(name) != defaults.get(name)
    ]


def remarks(runs: Sequence[Record]) -> list[str]:
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


def shown(value: Any) -> str:
    """A setting as the page writes it.

    >>> shown(True), shown(None), shown((0.1, 0.2))
    ('true', 'none', '0.1 0.2')
    """
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value).removesuffix(".0")


def _result(run: Record) -> dict[str, Any]:
    """The settings that the result depends on, but for the seed."""
    beside = NOT_IN_RESULT | {"seed", "save_weights", "align_every", "histogram"}
    return {name: value for name, value in (flat(run.config) | run.unknown).items() if name not in beside}


def _key(result: Mapping[str, Any]) -> str:
    return json.dumps(result, default=str, sort_keys=True)


def _names(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return [*dict.fromkeys(name for result in results for name in result)]


def _varies(name: str, results: Sequence[Mapping[str, Any]]) -> bool:
    return any(result.get(name) != results[0].get(name) for result in results)
