"""`onward results`: finished runs of recipes beside what was published, as a table in Markdown."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from onward.errors import UsageError
from onward.lab.recipes.recipe import RECIPES, flags, read
from onward.lab.report.groups import find
from onward.lab.run import record
from onward.lab.run.algorithms import folder_name
from onward.lab.run.folder import CONFIG, read_config
from onward.lab.settings import Results
from onward.lab.system import disk
from onward.lab.system.extra import reason_of
from onward.lab.tasks import TASKS

BEGIN, END = "<!-- onward results: begin -->", "<!-- onward results: end -->"
"""The lines that mark a table's place in a file."""
KEPT: dict[str, type | tuple[type, ...]] = {
    "recipe": str,
    "changed": dict,
    "data": str,
    "seed": int,
    "epochs": int,
    "task": str,
}
KEPT |= {"metric": str, "value": (int, float), "best": (int, float), "device": str, "onward": str, "torch": str, "date": str}
"""What is kept of a run, and of which type."""
LONGEST = 120
"""Characters of a file's name, before a digest tells it from others."""
Entry = dict[str, Any]


def results(config: Results) -> str:
    """Print the table, write what is to be kept, and put it into a file; returns the table.

    Raises:
        UsageError: a path holds no result, two results of one recipe and seed differ, or the file has no marked place.
    """
    folder = Path(config.keep) if config.keep else None
    found = [entry for path in config.runs for entry in _found(Path(path))]
    found += map(_read, sorted(folder.glob("*.json")) if folder else ())
    entries = _once(found)
    text = table(entries)
    page = _page(Path(config.into), text) if config.into else None  # before anything is written
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in entries:
            disk.write_text(folder / _file_name(entry), json.dumps(entry, indent=2) + "\n")
    if config.into and page:
        disk.write_text(Path(config.into), page)
    print(text)
    return text


def _found(path: Path) -> list[Entry]:
    """The results at and below a path."""
    if path.is_file():
        return [_read(path)]
    if not path.is_dir():
        raise UsageError(f"{path} is no folder: give run folders, or files that --keep has written")
    files = [] if (path / CONFIG).exists() else sorted(path.glob("*.json"))
    folders = [run for run in find(path) if (run / CONFIG).exists()]
    if not files and not folders:
        raise UsageError(f"{path} holds no run and no result of one: give run folders, or files that --keep has written")
    return [*map(_read, files), *(entry for run in folders if (entry := _of_run(run)))]


def _read(path: Path) -> Entry:
    """A result in a file that `--keep` has written."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({reason_of(error)}): give a file that --keep has written") from error
    if not isinstance(entry, dict):
        raise UsageError(f"{path} holds no result: give a file that --keep has written")
    for name, kind in KEPT.items():
        value = entry.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
            raise UsageError(f"{path} holds no result, its {name} is {value!r}: give a file that --keep has written")
    if entry["task"] not in TASKS or TASKS[entry["task"]].main.name != entry["metric"]:
        raise UsageError(f"{path} holds a result of {entry['task']!r} in {entry['metric']!r}, which is not its task's metric")
    return {name: entry[name] for name in KEPT}


def _of_run(folder: Path) -> Entry | None:
    """What is kept of the run in a folder; None, with a line that says why, if it is of no recipe or not complete."""
    run = record.read(folder)
    recipe = read_config(folder).get("recipe")
    if not isinstance(recipe, dict) or not run.complete:
        why = "is not complete" if isinstance(recipe, dict) else "is of no recipe"
        print(f"{folder} {why}: left out")
        return None
    metric = run.task.main
    reached = [row[metric.key] for row in run.rows]
    entry: Entry = {"recipe": recipe["name"], "changed": recipe["changed"], "data": run.config.data, "seed": run.config.seed}
    entry |= {"epochs": run.config.epochs, "task": run.task.name, "metric": metric.name}
    entry |= {"value": reached[-1], "best": metric.best(reached), "date": recipe["date"]}
    return entry | {name: str(run.environment.get(name, "")) for name in ("device", "onward", "torch")}


def _once(entries: Iterable[Entry]) -> list[Entry]:
    """Each result once. Raises a UsageError if two of the same recipe, settings and seed differ."""
    found: dict[str, Entry] = {}
    for entry in entries:
        other = found.setdefault(_file_name(entry), entry)
        if (other["value"], other["changed"]) != (entry["value"], entry["changed"]):
            which = f"{other['value']} and {entry['value']} of {entry['recipe']}, seed {entry['seed']}"
            raise UsageError(f"there are two results, {which}: leave one of them out")
    return [found[name] for name in sorted(found)]


def _file_name(entry: Entry) -> str:
    changed = "".join(f"-{name}={' '.join(map(str, _values(value)))}" for name, value in entry["changed"].items())
    name = folder_name(f"{Path(entry['recipe']).stem}-s{entry['seed']}{changed}".replace("/", "-"))
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{name}.json"


def _values(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def table(entries: Sequence[Entry]) -> str:
    """Markdown: a table for each data set, with every recipe that there is; a row for each set of changed settings."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry["recipe"], flags(entry["changed"])), []).append(entry)
    names = dict.fromkeys([*RECIPES, *(entry["recipe"] for entry in entries)])
    of_data: dict[str, list[str]] = {}
    for name in names:
        try:
            data, published = read(name).config.data, read(name).published
        except UsageError:  # a file of somebody else's
            data, published = next(entry["data"] for entry in entries if entry["recipe"] == name), ""
        rows = of_data.setdefault(data, [])
        plain = groups.pop((name, ""), [])
        rows.append(_row(f"onward train --recipe {name}", published, plain))
        for (other, changed), group in groups.items():
            if other == name:
                rows.append(_row(f"onward train --recipe {name} {changed}", "", group))
    head = "\n| command | published | here | seeds | epochs | on | since |\n|---|---|---|---|---|---|---|"
    return "\n\n".join(f"#### {data}\n{head}\n" + "\n".join(rows) for data, rows in sorted(of_data.items()))


def _row(command: str, published: str, group: Sequence[Entry]) -> str:
    command = command.replace("|", "\\|")  # which would end the cell
    if not group:
        return f"| `{command}` | {published} | not run | | | | |"
    metric = TASKS[group[0]["task"]].main
    values = [entry["value"] for entry in group]
    spread = f" ± {statistics.stdev(values):{metric.form}}" if len(values) > 1 else ""
    reached = f"{statistics.fmean(values):{metric.form}}{spread} (n={len(values)})"
    seeds = ", ".join(str(entry["seed"]) for entry in sorted(group, key=lambda entry: entry["seed"]))
    places = " / ".join(dict.fromkeys(f"{e['device']}, onward {e['onward']}, torch {e['torch']}" for e in group))
    dates, epochs = min(entry["date"] for entry in group), " / ".join(dict.fromkeys(str(e["epochs"]) for e in group))
    return f"| `{command}` | {published} | {reached} | {seeds} | {epochs} | {places} | {dates} |"


def _page(path: Path, text: str) -> str:
    """The file with the table in its marked place. Raises a UsageError if it has none."""
    try:
        found = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--into {path} cannot be read ({reason_of(error)}): name a Markdown file") from error
    before, begin, rest = found.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"--into {path} has no place for the table: write the lines {BEGIN} and {END} where it is to be")
    return f"{before}{begin}\n{text}\n{end}{after}"
