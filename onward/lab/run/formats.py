"""The format of a run's files: its number is in config.json and in the checkpoint, and older files are read as newer ones.

1: before there was a number; settings of algorithms were fields of their own. 2: `algorithm` holds them, as fdfa:directions=4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onward.errors import UsageError
from onward.estimators.base import ALGORITHMS
from onward.estimators.settings import settings_of
from onward.lab.run.algorithms import spelled

FORMAT = 2
"""What is written now."""


def check(number: Any) -> int:
    """The number of a format that can be read.

    Raises:
        UsageError: it is of a newer version, or none at all.

    >>> check(3)
    Traceback (most recent call last):
    onward.errors.UsageError: it has format 3, and this version of onward reads formats up to 2: install a newer one
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UsageError(f"its format is {number!r}, which is no format of onward's: train it again")
    if number > FORMAT:
        why = f"it has format {number}, and this version of onward reads formats up to {FORMAT}"
        raise UsageError(f"{why}: install a newer one")
    return number


def upgraded(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds, in the format of now.

    Raises:
        UsageError: it is of a newer version.

    >>> upgraded({"config": {"algorithm": "fdfa", "feedback": {"directions": 4}}})["config"]
    {'algorithm': 'fdfa:directions=4', 'feedback': {}}
    """
    number = check(saved.get("format", 1))
    config = dict(saved["config"])
    return {**saved, "format": FORMAT, "config": _with_algorithm(config) if number == 1 else config}


def _with_algorithm(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of format 1: those of the algorithm go into its entry."""
    owners = [config.get(owner, {}) for owner in ("feedback", "backprop", "forward_gradient")]
    if not isinstance(config.get("algorithm"), str) or not all(isinstance(owner, Mapping) for owner in owners):
        return config  # the reader of the settings names the one that is wrong
    feedback = dict(config.get("feedback", {}))
    found = {
        "bp": dict(config.pop("backprop", {})),
        "fg": dict(config.pop("forward_gradient", {})),
        "fdfa": {"directions": feedback.pop("directions", 1)},
    }
    low_memory = config.pop("low_memory", False)
    name = config.get("algorithm")
    if name in ALGORITHMS:
        known = settings_of(ALGORITHMS[name])
        given = {"low_memory": low_memory, **found.get(name, {})}
        config["algorithm"] = spelled(name, ALGORITHMS[name], {key: value for key, value in given.items() if key in known})
    return {**config, "feedback": feedback} if "feedback" in config else config
