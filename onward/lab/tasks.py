"""Tasks: what a network is trained for. A task is a loss, how targets look, and a table of metric rows.

A metric is said once, here; console, tables, curves, TensorBoard, CSV and the page read its row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from onward.errors import unknown


@dataclass(frozen=True)
class Metric:
    """One number that says how well a network does its task, after each epoch.

    >>> accuracy = CLASSIFICATION.metrics[0]
    >>> accuracy.key, accuracy.text(97.2), accuracy.best([90.0, 97.2])
    ('test_accuracy', '97.20 %', 97.2)
    """

    name: str
    """In a word: of the test data, rows of metrics.jsonl call it `test_<name>`."""
    title: str
    """As the axis of a picture has it, without the unit."""
    unit: str
    """"%", or empty."""
    better: Literal["higher", "lower"]
    form: str
    """How a value is written, such as ".2f"."""
    measure: Callable[[Tensor, Tensor], Tensor]
    """`measure(output, y)`: what a batch adds up to, a vector of sums over samples, in float64."""
    value: Callable[[Tensor, int], float]
    """`value(sums, samples)`: the metric, from the sums over all batches."""

    @property
    def key(self) -> str:
        """Its name in metrics.jsonl."""
        return f"test_{self.name}"

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:{self.form}} {self.unit}".rstrip()

    def best(self, values: list[float]) -> float:
        """The best of several values."""
        return max(values) if self.better == "higher" else min(values)


@dataclass(frozen=True)
class Task:
    """A loss and its metrics; the first metric is the one that tables show and learning rates are chosen by."""

    name: str
    line: str
    """What it is, for `onward list`."""
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: tuple[Metric, ...]

    @property
    def main(self) -> Metric:
        """The metric that says most."""
        return self.metrics[0]


def _hits(output: Tensor, y: Tensor) -> Tensor:
    return (output.argmax(1) == y).sum().double().view(1)


ACCURACY = Metric("accuracy", "test accuracy", "%", "higher", ".2f", _hits, lambda sums, n: 100 * float(sums[0]) / n)
CLASSIFICATION = Task("classification", "one of several classes for each sample", F.cross_entropy, (ACCURACY,))
TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFICATION,)}


def named(name: str) -> Task:
    """The task of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def of(config: Mapping[str, Any]) -> Task:
    """The task of a run, from what its config.json holds; runs from before there were tasks classify."""
    return TASKS.get(str(config.get("task", "")), CLASSIFICATION)
