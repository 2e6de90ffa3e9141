"""Tasks: what a network is trained for. A task is a loss, how targets look, and a table of metric rows.

A metric is said once, here; console, tables, curves, TensorBoard, CSV and the page read its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from onward.errors import UsageError, unknown
from onward.lab.settings import TaskSettings
from onward.network.run import Loss

Shape = Sequence[int]


@dataclass(frozen=True)
class Metric:
    """One number that says how well a network does its task, after each epoch.

    >>> accuracy = CLASSIFICATION.metrics[0]
    >>> accuracy.key, accuracy.text(97.2), accuracy.best([90.0, 97.2])
    ('test_accuracy', '97.20 %', 97.2)
    """

    name: str
    """One word; metrics.jsonl calls the value on test data `test_<name>`."""
    title: str
    """What the axis of a picture says, without the unit."""
    unit: str
    """"%", or empty."""
    better: Literal["higher", "lower"]
    form: str
    """How a value is written, such as ".2f"."""
    measure: Callable[[Any, Any], Tensor]
    """`measure(output, y)`: what a batch adds up to, a vector of sums in float64. The output is what the network returns."""
    value: Callable[[Tensor, int], float]
    """`value(sums, samples)`: the metric, from the sums over all batches."""

    @property
    def key(self) -> str:
        """Its name in metrics.jsonl."""
        return f"test_{self.name}"

    @property
    def axis(self) -> str:
        """Its title with the unit, as an axis has it."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def measured(self) -> str:
        """The same in words."""
        return f"{self.title} in {self.unit}" if self.unit else self.title

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
    outputs: str
    """What its outputs stand for, such as "classes"."""
    loss: Loss
    """`loss(output, y)`, the mean over samples."""
    metrics: tuple[Metric, ...]
    looks: Callable[[Tensor], bool]
    """Whether targets look like this task's, where nobody has said which it is."""
    read: Callable[[Tensor], Tensor]
    """The targets as the loss takes them, samples first. It raises a UsageError for those that cannot be."""
    count: Callable[[Tensor], int]
    """How many outputs targets ask for."""
    draw: Callable[[Shape, int], Tensor]
    """`draw(shape, outputs)`: random targets for inputs of that shape, samples first, to measure what a step costs."""
    of_positions: bool = False
    """Whether targets (N, T) have one of their outputs for each position of a sequence, (N, T, outputs)."""

    @property
    def main(self) -> Metric:
        """The metric that says most."""
        return self.metrics[0]


def _shown(y: Tensor) -> str:
    return f"targets of shape {tuple(y.shape)} and type {str(y.dtype).removeprefix('torch.')}"


def _paired(output: Any, y: Tensor) -> Tensor:
    """The output, with a number for each of the targets (N, numbers): torch would stretch (N,) to fit (N, 1)."""
    shape = getattr(output, "shape", None)
    if shape == y.shape:
        return output
    if shape == y.shape[:1] and y.shape[1] == 1:
        return output.unsqueeze(1)
    found = f"a {type(output).__name__}" if shape is None else f"shape {tuple(shape)}"
    raise UsageError(f"the network returned {found} for {_shown(y)}: return one number for each target")


def _hits(output: Tensor, y: Tensor) -> Tensor:
    return (output.argmax(1) == y).sum().double().view(1)


def _classes(y: Tensor) -> Tensor:
    if y.dim() != 1 or (y.is_floating_point() and (y != y.round()).any()) or (len(y) and y.min() < 0):
        raise UsageError(f"{_shown(y)} name no classes: give the number of each sample's class, from 0, in shape (N,)")
    return y.long()


ACCURACY = Metric("accuracy", "test accuracy", "%", "higher", ".2f", _hits, lambda sums, n: 100 * float(sums[0]) / n)
CLASSIFICATION = Task(
    "classification",
    "one of several classes for each sample; targets are whole numbers (N,)",
    "classes",
    F.cross_entropy,
    (ACCURACY,),
    looks=lambda y: y.dim() == 1 and not y.is_floating_point(),
    read=_classes,
    count=lambda y: int(y.max()) + 1,
    draw=lambda shape, outputs: torch.randint(outputs, tuple(shape[:1])),
)


def _labels(y: Tensor) -> Tensor:
    if y.dim() != 2 or not ((y == 0) | (y == 1)).all():
        raise UsageError(f"{_shown(y)} are no labels: give 1 for each label that a sample has and 0 for others, (N, labels)")
    return y.float()


def _found(output: Tensor, y: Tensor) -> Tensor:
    """For each label the true positives, and twice these plus the false positives and false negatives."""
    found, there = _paired(output, y) > 0, y > 0
    return torch.cat([(found & there).sum(0), found.sum(0) + there.sum(0)]).double()


def _f1(sums: Tensor, n: int) -> float:
    right, of = sums.chunk(2)
    known = of > 0
    return 100 * float((2 * right[known] / of[known]).mean()) if known.any() else 100.0


def _exact(output: Tensor, y: Tensor) -> Tensor:
    return ((_paired(output, y) > 0) == (y > 0)).all(1).sum().double().view(1)


F1 = Metric("f1", "test F1", "%", "higher", ".2f", _found, _f1)
EXACT = Metric("exact", "test exact match", "%", "higher", ".2f", _exact, ACCURACY.value)
MULTI_LABEL = Task(
    "multi-label",
    "any number of labels for each sample; targets are whole numbers 0 or 1 (N, labels)",
    "labels",
    lambda output, y: F.binary_cross_entropy_with_logits(_paired(output, y), y),
    (F1, EXACT),
    looks=lambda y: y.dim() == 2 and not y.is_floating_point() and bool(((y == 0) | (y == 1)).all()),
    read=_labels,
    count=lambda y: y.shape[1],
    draw=lambda shape, outputs: torch.randint(2, (shape[0], outputs)).float(),
)


def _numbers(y: Tensor) -> Tensor:
    if y.dim() not in (1, 2):
        raise UsageError(f"{_shown(y)}: give one number for each sample, (N,), or a row of them, (N, numbers)")
    return y.float().view(len(y), -1)


def _squares(output: Tensor, y: Tensor, origin: Tensor | None = None) -> Tensor:
    """Of each target the sums of its squared errors, of its distance from the origin and of that squared."""
    errors, y = (_paired(output, y) - y).double(), y.double()
    y = y if origin is None else y - origin.to(y)
    return torch.cat([errors.square().sum(0), y.sum(0), y.square().sum(0)])


def _r2(sums: Tensor, n: int) -> float:
    """1 - (squared error) / (squared error of the mean), averaged over targets; a constant target counts 1 if met, else 0."""
    errors, total, squares = sums.chunk(3)
    spread = squares - total.square() / n
    moves = spread > 1e-12 * squares
    shares = torch.where(moves, errors / spread.where(moves, 1), (errors > 0).double())
    return float((1 - shares).mean())


def _rmse(sums: Tensor, n: int) -> float:
    return math.sqrt(float(sums.chunk(3)[0].mean()) / n)


R2 = Metric("r2", "test R²", "", "higher", ".4f", _squares, _r2)
RMSE = Metric("rmse", "test RMSE", "", "lower", ".4g", _squares, _rmse)
REGRESSION = Task(
    "regression",
    "numbers for each sample; targets are real, (N,) or (N, numbers)",
    "targets",
    lambda output, y: F.mse_loss(_paired(output, y), y),
    (R2, RMSE),
    looks=lambda y: y.dim() in (1, 2) and y.is_floating_point(),
    read=_numbers,
    count=lambda y: y.shape[1],
    draw=lambda shape, outputs: torch.randn(shape[0], outputs),
)


def measured_from(task: Task, y: Tensor) -> Task:
    """The task with an R² that measures targets from the first of `y`: far from 0, their squares would hide how they differ.

    >>> task, y = measured_from(REGRESSION, torch.tensor([[2e9], [2e9 + 512]])), torch.tensor([[2e9], [2e9 + 512]])
    >>> [round(one.main.value(one.main.measure(y + 128, y), 2), 2) for one in (REGRESSION, task)]
    [0.0, 0.75]
    """
    if task.name != REGRESSION.name:
        return task
    return replace(task, metrics=(replace(R2, measure=partial(_squares, origin=y[0].double())), *task.metrics[1:]))


def _tokens(y: Tensor) -> Tensor:
    if y.dim() != 2 or y.shape[1] < 1 or (y.is_floating_point() and (y != y.round()).any()) or (len(y) and y.min() < 0):
        raise UsageError(f"{_shown(y)} are no tokens: give the number of the token that follows each position, from 0, (N, T)")
    return y.long()


def _of_positions(output: Any, y: Tensor) -> Tensor:
    """The output (N, T, tokens) as rows, one for each position."""
    shape = tuple(getattr(output, "shape", ()))
    if shape[:-1] != tuple(y.shape):
        found = f"shape {shape}" if shape else f"a {type(output).__name__}"
        raise UsageError(f"the network returned {found} for {_shown(y)}: return (N, T, tokens), numbers for each position")
    return output.flatten(0, -2)


def _surprise(output: Tensor, y: Tensor) -> Tensor:
    """The sum of -log p of what followed, in nats, and how many positions there are."""
    nats = F.cross_entropy(_of_positions(output, y).float(), y.flatten(), reduction="none").double()
    return torch.stack([nats.sum(), nats.new_tensor(y.numel())])


def _guessed(output: Tensor, y: Tensor) -> Tensor:
    right = (_of_positions(output, y).argmax(1) == y.flatten()).sum().double()
    return torch.stack([right, right.new_tensor(y.numel())])


def next_of(unit: str) -> Task:
    """Next-token prediction; a token is a `unit` of the text, in whose bits it is measured.

    >>> task, y = next_of("character"), torch.tensor([[0, 1], [1, 0]])
    >>> [round(one.value(one.measure(torch.zeros(2, 2, 2), y), 2), 3) for one in task.metrics]
    [1.0, 2.0, 50.0]
    """
    bits = Metric(
        "bits", f"test bits per {unit}", "", "lower", ".4f", _surprise, lambda sums, n: float(sums[0] / sums[1]) / math.log(2)
    )
    perplexity = Metric(
        "perplexity", "test perplexity", "", "lower", ".4g", _surprise, lambda sums, n: float((sums[0] / sums[1]).exp())
    )
    guessed = Metric(
        "token_accuracy", "test token accuracy", "%", "higher", ".2f", _guessed, lambda sums, n: 100 * float(sums[0] / sums[1])
    )
    return Task(
        f"next-{unit}",
        f"the {unit} that follows, at every position of a text; targets are whole numbers (N, T)",
        f"{unit}s",
        lambda output, y: F.cross_entropy(_of_positions(output, y), y.flatten()),
        (bits, perplexity, guessed),
        looks=lambda y: False,  # rows of whole numbers may be other things: it has to be said
        read=_tokens,
        count=lambda y: int(y.max()) + 1,
        draw=lambda shape, outputs: torch.randint(outputs, tuple(shape[:2])),
        of_positions=True,
    )


NEXT = {unit: next_of(unit) for unit in ("character", "byte", "token")}
"""Next-token prediction, by what a token is."""
TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFICATION, MULTI_LABEL, REGRESSION, *NEXT.values())}


def named(name: str) -> Task:
    """The task of that name. Raises a UsageError if there is none."""
    if name not in TASKS:
        raise unknown("task", name, ["auto", *TASKS])
    return TASKS[name]


def of_targets(y: Tensor, name: str = "auto") -> Task:
    """The task of that name, or with `auto` the one that targets look like.

    Raises:
        UsageError: there is no such task, or the targets look like none.

    >>> of_targets(torch.tensor([0, 2, 1])).name, of_targets(torch.tensor([0.5, 2.0])).name
    ('classification', 'regression')
    """
    if name != "auto":
        return named(name)
    for task in TASKS.values():
        if task.looks(y):
            return task
    kinds = "; ".join(f"{task.name}: {task.line}" for task in TASKS.values())
    raise UsageError(f"{_shown(y)} look like no task's ({kinds}): say which it is with --task")


def configured(task: Task, options: TaskSettings, outputs: int) -> Task:
    """The task with the loss that its settings ask for, of a network with so many outputs.

    Class weights keep the loss a mean over samples: each counts as its class's weight says, whatever else is in its batch.

    Raises:
        UsageError: a setting that the task does not have, or weights for other classes than there are.

    >>> task = configured(CLASSIFICATION, TaskSettings(class_weights=(1.0, 3.0)), 2)
    >>> [round(one.loss(torch.zeros(2, 2), torch.tensor([0, 1])).item() / math.log(2), 3) for one in (CLASSIFICATION, task)]
    [1.0, 2.0]
    """
    weights, smoothing = options.class_weights, options.label_smoothing
    if not weights and not smoothing:
        return task
    if task.name != CLASSIFICATION.name:
        setting = "class-weights" if weights else "label-smoothing"
        raise UsageError(f"--task.{setting} is for classification, and these data are for {task.name}: leave it out")
    if weights and len(weights) != outputs:
        raise UsageError(f"--task.class-weights: {len(weights)} weights for {outputs} classes, give one for each")

    def loss(output: Tensor, y: Tensor) -> Tensor:
        weight = torch.tensor(weights, dtype=output.dtype, device=output.device) if weights else None
        return F.cross_entropy(output, y, weight, reduction="none", label_smoothing=smoothing).mean()

    return replace(task, loss=loss)


def of(config: Mapping[str, Any]) -> Task:
    """The task of a run, from what its config.json holds; runs from before there were tasks classify."""
    data = config.get("data")
    return TASKS.get(str(data.get("task", "")) if isinstance(data, Mapping) else "", CLASSIFICATION)
