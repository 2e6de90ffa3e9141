"""Tasks: which one targets are for, their losses, and their metrics beside scikit-learn's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics
from torch import Tensor

from onward.errors import UsageError
from onward.lab import tasks
from onward.lab.settings import TaskSettings
from onward.lab.tasks import (
    CLASSIFICATION,
    MULTI_LABEL,
    NEXT,
    REGRESSION,
    TASKS,
    Metric,
    configured,
    measured_from,
    of,
    of_targets,
)

GENERATOR = torch.Generator().manual_seed(0)


def measured(metric: Metric, output: Tensor, y: Tensor) -> float:
    """The metric from batches of different sizes."""
    parts = zip(output.split([3, 20, len(y) - 23]), y.split([3, 20, len(y) - 23]), strict=True)
    return metric.value(torch.stack([metric.measure(*part) for part in parts]).sum(0), len(y))


def test_accuracy_is_the_share_of_hits() -> None:
    output, y = torch.randn(100, 4, generator=GENERATOR), torch.randint(4, (100,), generator=GENERATOR)
    assert measured(CLASSIFICATION.main, output, y) == pytest.approx(100 * metrics.accuracy_score(y, output.argmax(1)))


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4, 2e6])
def test_regression_is_measured_as_scikit_learn_measures_it(offset: float) -> None:
    y = torch.randn(100, 3, generator=GENERATOR) + offset
    output = y + torch.randn(100, 3, generator=GENERATOR) * torch.tensor([0.1, 1.0, 3.0])
    r2, rmse = measured_from(REGRESSION, y).metrics
    y, output = y.double(), output.double()
    assert measured(r2, output, y) == pytest.approx(metrics.r2_score(y, output), rel=1e-6)
    assert measured(rmse, output, y) == pytest.approx(metrics.mean_squared_error(y, output) ** 0.5, rel=1e-5)
    r2 = measured_from(REGRESSION, y[:, :1]).main
    assert measured(r2, output[:, 0], y[:, :1]) == pytest.approx(metrics.r2_score(y[:, 0], output[:, 0]), rel=1e-6)


def test_a_target_that_never_changes_is_explained_or_not() -> None:
    y = torch.full((30, 1), 0.1)
    assert measured(REGRESSION.main, y, y) == 1
    assert measured(REGRESSION.main, y + 1, y) == 0
    for origin in (y, y + 1e3):
        assert measured(measured_from(REGRESSION, origin).main, y + 1, y) == 0


def test_labels_are_measured_as_scikit_learn_measures_them() -> None:
    output = torch.randn(100, 5, generator=GENERATOR)
    y = (torch.rand(100, 5, generator=GENERATOR) < torch.tensor([0.5, 0.1, 0.9, 0.3, 0.5])).float()
    f1, exact = MULTI_LABEL.metrics
    assert measured(f1, output, y) == pytest.approx(100 * metrics.f1_score(y, output > 0, average="macro"))
    assert measured(exact, output, y) == pytest.approx(100 * metrics.accuracy_score(y, output > 0))
    nowhere = torch.cat([output, torch.full((100, 1), -1.0)], 1), F.pad(y, (0, 1))  # a label that nobody has, nor is given
    assert measured(f1, *nowhere) == measured(f1, output, y)
    assert measured(f1, -torch.ones(30, 2), torch.zeros(30, 2)) == 100


@pytest.mark.parametrize(
    ("y", "task"),
    [
        (torch.tensor([0, 1, 2]), "classification"),
        (torch.tensor([True, False]), "classification"),
        (torch.tensor([1, 0], dtype=torch.uint8), "classification"),
        (torch.tensor([0.0, 1.0]), "regression"),
        (torch.rand(3, 2), "regression"),
        (torch.tensor([[0, 1], [1, 1]]), "multi-label"),
        (torch.tensor([[True], [False]]), "multi-label"),
    ],
)
def test_targets_say_what_they_are_for(y: Tensor, task: str) -> None:
    assert of_targets(y).name == task


@pytest.mark.parametrize("y", [torch.tensor([[0, 2]]), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int64)])
def test_targets_that_look_like_nothing_are_told_with_what_there_is(y: Tensor) -> None:
    with pytest.raises(UsageError, match=rf"targets of shape .*{len(y)}.* look like no task's .*: say which it is with --task"):
        of_targets(y)


def test_a_name_wins_over_what_targets_look_like() -> None:
    assert CLASSIFICATION.read(torch.tensor([0.0, 2.0])).tolist() == [0, 2]
    assert REGRESSION.read(torch.tensor([0, 2])).tolist() == [[0.0], [2.0]]
    assert MULTI_LABEL.read(torch.tensor([[0.0, 1.0]])).dtype == torch.float32
    assert of_targets(torch.tensor([0, 2]), "regression") is REGRESSION
    with pytest.raises(UsageError, match="unknown task 'regresion': did you mean 'regression'"):
        of_targets(torch.tensor([0.0]), "regresion")


@pytest.mark.parametrize(
    ("task", "y", "message"),
    [
        ("classification", torch.tensor([0.5, 1.0]), r"shape \(2,\) and type float32 name no classes"),
        ("classification", torch.tensor([-1, 1]), "name no classes: give the number of each sample's class, from 0"),
        ("classification", torch.zeros(2, 2), "name no classes"),
        ("multi-label", torch.tensor([0, 1]), "are no labels"),
        ("multi-label", torch.tensor([[0.5, 1.0]]), r"shape \(1, 2\) and type float32 are no labels"),
        ("regression", torch.zeros(2, 3, 4), "give one number for each sample"),
    ],
)
def test_targets_that_a_task_cannot_take(task: str, y: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TASKS[task].read(y)


def test_outputs_are_compared_with_targets_one_by_one() -> None:
    y = torch.arange(4.0).view(4, 1)
    assert REGRESSION.loss(y[:, 0], y) == 0  # and not with every other
    assert MULTI_LABEL.loss(torch.zeros(2, 3), torch.zeros(2, 3)).item() == pytest.approx(math.log(2))
    for task, output in ((REGRESSION, torch.zeros(4, 2)), (MULTI_LABEL, torch.zeros(4, 3)), (REGRESSION, {"a": y})):
        for function in (task.loss, *(metric.measure for metric in task.metrics)):
            with pytest.raises(UsageError, match=r"network returned .* for targets of shape \(4, 1\) .*: return one"):
                function(output, y)


def test_class_weights_and_label_smoothing_keep_the_loss_a_mean_over_samples() -> None:
    output, y = torch.randn(7, 3, generator=GENERATOR), torch.randint(3, (7,), generator=GENERATOR)
    loss = configured(CLASSIFICATION, TaskSettings(class_weights=(1.0, 2.0, 0.5), label_smoothing=0.1), 3).loss
    weights = torch.tensor([1.0, 2.0, 0.5])
    wanted = 0.0
    for z, label in zip(output, y, strict=True):
        shares = torch.full((3,), 0.1 / 3)
        shares[label] += 0.9
        wanted -= (shares * weights * z.log_softmax(0)).sum() / 7
    torch.testing.assert_close(loss(output, y), wanted)
    torch.testing.assert_close(loss(output, y), (3 * loss(output[:3], y[:3]) + 4 * loss(output[3:], y[3:])) / 7)
    assert configured(CLASSIFICATION, TaskSettings(), 3).loss is F.cross_entropy


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (CLASSIFICATION, {"class_weights": (1.0, 2.0)}, "--task.class-weights: 2 weights for 3 classes, give one for each"),
        (REGRESSION, {"class_weights": (1.0, 2.0, 3.0)}, "--task.class-weights is for classification, and .* regression"),
        (MULTI_LABEL, {"label_smoothing": 0.1}, "--task.label-smoothing is for classification, and .* multi-label"),
    ],
)
def test_settings_that_do_not_fit_the_task(task: tasks.Task, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        configured(task, TaskSettings(**options), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": -0.1}, "--task.label-smoothing -0.1: use a number from 0 to 1"),
        ({"label_smoothing": 1.5}, "--task.label-smoothing 1.5: use a number from 0 to 1"),
        ({"class_weights": (1.0, -1.0)}, "--task.class-weights 1.0 -1.0: use numbers from 0, and one above it"),
        ({"class_weights": (0.0, 0.0)}, "--task.class-weights 0.0 0.0: use numbers from 0, and one above it"),
    ],
)
def test_settings_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TaskSettings(**options)


def test_a_run_folder_says_its_task_and_an_old_one_classifies() -> None:
    assert of({"data": {"task": "regression"}}) is REGRESSION
    for old in ({}, {"data": None}, {"data": {"train": 3}}, {"data": {"task": "chess"}}):
        assert of(old) is CLASSIFICATION


def test_every_metric_is_a_whole_row() -> None:
    families = [CLASSIFICATION, MULTI_LABEL, REGRESSION, NEXT["token"]]  # the same is measured of characters, bytes and tokens
    names = [metric.name for task in families for metric in task.metrics]
    assert len(set(names)) == len(names)
    for task in TASKS.values():
        assert task.line
        for metric in task.metrics:
            assert metric.title.startswith("test ")
            assert metric.text(0.5).endswith(metric.unit)
            assert metric.best([0.1, 0.7]) == (0.7 if metric.better == "higher" else 0.1)
    assert (REGRESSION.main.axis, CLASSIFICATION.main.axis) == ("test R²", "test accuracy (%)")
