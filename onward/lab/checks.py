"""What settings may be: numbers that can be computed with, paths that start at home."""

from __future__ import annotations

import os
from typing import Any

import torch

from onward.errors import UsageError

LARGEST = 2**31 - 1
"""Of whole numbers: what every part of PyTorch takes."""
FROM_1 = {
    "schedule.milestones",
    "batch_size",
    "network.layers",
    "heads.width",
    "epochs",
    "test_batch_size",
    "log_interval",
    "align_estimates",
}
FROM_1 |= {"heads.depth", "heads.groups", "heads.patches", "network.heads", "network.lora", "text.window"}
FROM_1 |= {"schedule.step_size", "subset.train", "subset.test", "lr_epochs", "jobs", "turns", "steps", "classes"}
FROM_0 = {
    "lr",
    "heads.lr",
    "heads.decay",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "feedback.lr",
    "feedback.decay",
    "save_weights",
    "align_every",
}
FROM_0 |= {"schedule.patience", "schedule.start", "schedule.end", "seed"}
POSITIVE = {"network.width", "watch", "data_timeout", "schedule.gamma", "lr_grid"}
"""The numbers among the settings, by the least that they may be; each may be None or a tuple too."""


def at_home(config: object) -> None:
    """Put the home folder in the place of a ~ at the beginning of paths: no shell does that in --out=~/runs.

    >>> from onward.lab.settings import Train
    >>> Train(out="~/runs").out == os.path.expanduser("~/runs")
    True
    >>> Train(data_dir="~nobody-of-that-name/images")
    Traceback (most recent call last):
    onward.errors.UsageError: --data-dir ~nobody-of-that-name/images: there is no such home folder, write the whole path
    """

    def whole(name: str, path: Any) -> Any:
        if isinstance(path, tuple):
            return tuple(whole(name, part) for part in path)
        if not isinstance(path, str) or not path.startswith("~"):
            return path
        found = os.path.expanduser(path)  # noqa: PTH111 (a model's name is more than a path)
        if found.startswith("~") and not os.path.exists(path.partition("/")[0]):  # noqa: PTH110
            raise UsageError(f"--{name.replace('_', '-')} {path}: there is no such home folder, write the whole path")
        return found

    for name in ("model", "algorithm", "algorithms", "out", "data", "data_dir", "resume", "runs", "plot", "json"):
        if hasattr(config, name):
            object.__setattr__(config, name, whole(name, getattr(config, name)))


def check_number(name: str, value: float | None, least: int = 0, *, above: bool = False) -> None:
    """Raise a UsageError for an option that is smaller (`above`: or equal), or no number that can be computed with.

    >>> check_number("batch_size", 0, least=1)
    Traceback (most recent call last):
    onward.errors.UsageError: --batch-size 0: use at least 1
    """
    if value is None:
        return
    whole, remedy = isinstance(value, int), ""
    if above and value <= least:
        remedy = "use a positive number"
    elif not least <= value <= (LARGEST if whole else torch.finfo(torch.float32).max):
        too_large = f"use at most {LARGEST}" if whole else "use a finite number, of 32 bits"
        remedy = f"use at least {least}" if value < least else too_large
    if remedy:
        raise UsageError(f"--{name.replace('_', '-')} {value}: {remedy}")
