"""GrAPE: matrices that turn and keep their length; anchors that are backpropagation, and say so."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import by_name
from reference import close

from onward import GrAPE, UsageError, capture
from onward.estimators.grape import away


def test_only_the_direction_learns_and_it_finds_the_jacobian() -> None:
    model, x, y, cuts, loss = by_name("mlp").build(seed=2)
    estimator = GrAPE(model, cuts, loss=loss, directions=8)
    exact = [jacobian.mean(0).flatten() for jacobian in reference.jacobians(model, x, cuts)]
    estimator.initialize(x)
    start = [matrix.detach().clone() for matrix in estimator.feedback]
    before = [F.cosine_similarity(b.flatten(), j, dim=0) for b, j in zip(start, exact, strict=True)]
    optimizer = torch.optim.SGD(list(estimator.feedback), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        estimator.estimate(x, y)
        for matrix in estimator.feedback:
            assert abs((matrix * matrix.grad).sum()) < 1e-12 * matrix.norm() * matrix.grad.norm() + 1e-15
        optimizer.step()
    for matrix, j, b, cosine in zip(estimator.feedback, exact, start, before, strict=True):
        assert F.cosine_similarity(matrix.flatten(), j, dim=0) > max(0.9, cosine + 0.2)
        assert abs(matrix.norm() / b.norm() - 1) < 0.3


def test_nothing_to_turn_to_turns_nothing() -> None:
    b = torch.randn(3, 4, dtype=torch.float64)
    assert not away(b, torch.zeros_like(b)).any()
    assert not away(torch.zeros_like(b), b).any()
    close(away(b, b.roll(1, 0)), reference.turned(b, b.roll(1, 0)))


def test_anchors_are_backpropagation_and_say_so() -> None:
    model, x, y, cuts, loss = by_name("residual").build(seed=2)
    estimator = GrAPE(model, cuts, loss=loss, anchor_every=3)
    assert estimator.engine == "feedback, forward, backpropagation every 3 steps"
    assert GrAPE(copy.deepcopy(model), cuts).engine == "feedback, forward"
    exact = []
    for _ in range(6):
        estimator.zero_grad()
        expected = reference.backprop(model, x, y, loss)
        step = estimator.estimate(x, y)
        assert not step.output.requires_grad
        exact.append(all(torch.allclose(p.grad, expected[name]) for name, p in model.named_parameters()))
        rests = all(matrix.grad is None for matrix in estimator.feedback)
        assert rests == exact[-1]
    assert exact == [False, False, True] * 2
    with pytest.raises(UsageError, match="anchor_every=-1: use at least 0"):
        GrAPE(model, cuts, anchor_every=-1)


def test_anchors_are_never_left_out_of_a_captured_run() -> None:
    model, x, y, cuts, loss = by_name("mlp").build(seed=2)
    estimator = capture(GrAPE(model, cuts, loss=loss, anchor_every=2), backend="replay")
    estimator.estimate(x, y)
    with pytest.warns(UserWarning, match="runs eagerly: .*anchor_every=2 makes some steps backpropagation"):
        estimator.estimate(x, y)
    estimator.estimate(x, y)
    estimator.zero_grad()
    estimator.estimate(x, y)
    for name, gradient in reference.backprop(model, x, y, loss).items():
        close(model.get_parameter(name).grad, gradient, name)
