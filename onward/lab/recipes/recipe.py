"""A recipe: the settings of a published result, what was reached with them, and where that is said."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onward.errors import UsageError, unknown
from onward.lab.plain import flat, from_dict
from onward.lab.settings import Train
from onward.lab.system.extra import reason_of

RECIPES: dict[str, Path] = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}
"""The files beside this one, by name."""
TEXTS = ("title", "published", "source", "note")
OF_PLACE = {"recipe", "seed", "device", "data_dir", "data_timeout", "out", "overwrite", "resume", "wandb", "wandb_project"}
OF_PLACE |= {"wandb_name", "log_interval", "checkpoint_every", "save_weights", "align_every", "align_estimates"}
"""Settings that say where a run is and what is kept of it: no recipe has them, and no result depends on them."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe's file says."""

    name: str
    """As it was given: the name of a file in this package, or the path of one."""
    title: str
    """Network, data and algorithm, in a line."""
    published: str
    """What the source reports for it, in the unit of the task's main metric; empty where it reports nothing."""
    source: str
    """Who has published it, and where."""
    note: str
    """In what the run is not as the source's; empty where no difference is known."""
    config: Train

    @property
    def line(self) -> str:
        """What it is, for `onward list`."""
        return self.title


def read(name: str) -> Recipe:
    """The recipe of that name, or in the file of that path.

    Raises:
        UsageError: there is none, or the file is not one; the message names what is wrong in it.

    >>> read("fdfa-mlp-fashion-mnist").config.algorithm
    'fdfa'
    """
    path = RECIPES.get(name, Path(name))
    if name not in RECIPES and not name.endswith(".toml"):
        raise unknown("recipe", name, [*RECIPES, "path/to/file.toml"])
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--recipe {name} cannot be read ({reason_of(error)}): give a file of TOML") from error
    try:
        config = _settings(found)
    except UsageError as error:
        raise UsageError(f"--recipe {name}: {error}") from error
    return Recipe(name, config=replace(config, recipe=name), **{key: found.get(key, "") for key in TEXTS})


def _settings(found: Mapping[str, Any]) -> Train:
    """The configuration in what a file holds. Raises a UsageError if it is no recipe."""
    settings = found.get("settings")
    if not isinstance(settings, dict):
        raise UsageError("it has no table [settings]: write there what `onward train` is to be told")
    for key, value in found.items():
        if key != "settings" and (key not in TEXTS or not isinstance(value, str)):
            raise UsageError(f"{key} is no text that a recipe has: give {', '.join(TEXTS)}, and settings in [settings]")
    for key in ("title", "source"):
        if not found.get(key):
            raise UsageError(f"it has no {key}: write one")
    settings = _dashed(settings)
    for key in flat(settings):
        if key in OF_PLACE:
            raise UsageError(f"settings.{key} is of a run and not of a recipe: leave it out")
    return from_dict(Train, settings)


def _dashed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings may be spelled as on the command line: batch-size."""
    return {name.replace("-", "_"): _dashed(value) if isinstance(value, dict) else value for name, value in settings.items()}


def asked_for(words: Sequence[str]) -> Recipe | None:
    """The recipe that a command line names, which is read before the rest of it.

    >>> asked_for(["train", "--recipe=fdfa-mlp-mnist", "--epochs", "3"]).name
    'fdfa-mlp-mnist'
    """
    if words[:1] != ["train"]:
        return None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, equals, name = word.partition("=")
        if flag == "--recipe" and (name if equals else following):
            return read(name if equals else following)
    return None


def followed(config: Train) -> dict[str, Any] | None:
    """What is kept of the recipe that a run names: its name, the settings that are `changed` from it, and the day."""
    if config.recipe is None:
        return None
    asked = flat(read(config.recipe).config)
    changed = {name: value for name, value in flat(config).items() if name not in OF_PLACE and value != asked[name]}
    return {"name": config.recipe, "changed": changed, "date": datetime.now(UTC).date().isoformat()}


def said(recipe: Mapping[str, Any]) -> str:
    """That in words.

    >>> said({"name": "fdfa-mlp-mnist", "changed": {"epochs": 3}})
    'recipe fdfa-mlp-mnist, but for --epochs 3'
    """
    return f"recipe {recipe['name']}" + (f", but for {flags(recipe['changed'])}" if recipe["changed"] else "")


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as they are given on the command line.

    >>> flags({"subset.train": 500, "network.leaky": False, "schedule.milestones": [1, 2]})
    '--subset.train 500 --network.no-leaky --schedule.milestones 1 2'
    """
    words = []
    for name, value in settings.items():
        owner, dot, own = name.replace("_", "-").rpartition(".")
        values = value if isinstance(value, (tuple, list)) else [] if isinstance(value, bool) else [value]
        words += [f"--{owner}{dot}{'no-' if value is False else ''}{own}", *map(str, values)]
    return shlex.join(words)
