"""Forward gradients: each draw against an explicit reference, and their mean and variance against the exact gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from cases import CASES, SAMPLES, Case, by_name
from family_reference import Family
from reference import close
from test_feedback import SEED
from torch import Tensor

from onward import ForwardGradient

NOISES = pytest.mark.parametrize(("noise", "count"), [("gaussian", 1), ("rademacher", 1), ("gaussian", 3)])
ALL = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@NOISES
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@ALL
def test_activation_space(case: Case, train: bool, noise: str, count: int) -> None:
    model, x, y, cuts, loss = case.build(seed=1)
    model.train(train)
    twin = copy.deepcopy(model)
    errors = reference.activation_errors(twin, x, y, cuts, loss, SEED, 0, count, noise)
    expected = reference.delivered(twin, x, y, cuts, loss, errors)
    estimator = ForwardGradient(model, cuts, loss=loss, noise=noise, directions=count, seed=SEED)
    check_one_step(estimator, twin, x, y, expected)


@NOISES
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@ALL
def test_weight_space_without_cuts(case: Case, train: bool, noise: str, count: int) -> None:
    """One direction for all parameters of the network."""
    model, x, y, _, loss = case.build(seed=1)
    model.train(train)
    twin = copy.deepcopy(model)
    expected = reference.weight_forward_gradient(twin, x, y, loss, SEED, 0, count, noise)
    estimator = ForwardGradient(model, loss=loss, noise=noise, directions=count, space="avg-weight", seed=SEED)
    check_one_step(estimator, twin, x, y, expected)


@NOISES
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@ALL
def test_weight_space(case: Case, train: bool, noise: str, count: int) -> None:
    """One direction for all parameters of the hidden blocks; the last block gets its exact gradient.

    Only what a parameter does in hidden blocks is estimated: a weight that is also used in the last one has both parts.
    """
    built = case.build(seed=1)
    model, x, y, cuts, loss = built
    model.train(train)
    twin = copy.deepcopy(model)
    signals = reference.true_errors(twin, x, y, cuts, loss)
    exact = reference.delivered(twin, x, y, cuts, loss, signals)
    last = reference.delivered(twin, x, y, cuts, loss, [torch.zeros_like(signal) for signal in signals])
    family = Family(built._replace(model=twin), {})
    members = {name for k, signal in enumerate(signals) for name in family.batch(k, signal)}
    expected = dict(family.last_block)
    for direction in range(count):
        vs = {name: v for name, v in reference.parameter_directions(twin, SEED, 0, direction, noise).items() if name in members}
        slope = sum(((exact[name] - last[name]) * v).sum() for name, v in vs.items())
        for name, v in vs.items():
            expected[name] = expected.get(name, 0) + slope * v / count
    estimator = ForwardGradient(model, cuts, loss=loss, noise=noise, directions=count, space="avg-weight", seed=SEED)
    check_one_step(estimator, twin, x, y, expected)


def check_one_step(estimator: ForwardGradient, twin: torch.nn.Module, x: Any, y: Tensor, expected: dict[str, Tensor]) -> None:
    torch.manual_seed(reference.MASKS)
    logits = reference.call(twin, x).detach()  # moves the twin's statistics once
    after = torch.get_rng_state()
    torch.manual_seed(reference.MASKS)
    step = estimator.estimate(x, y)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(step.output, logits)
    torch.testing.assert_close(step.loss, estimator.loss(logits, y))
    assert not step.loss.requires_grad
    assert not step.output.requires_grad
    for name, p in estimator.model.named_parameters():
        close(p.grad, expected.get(name), name)
    for (name, buffer), other in zip(estimator.model.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, other[1], msg=name)


def test_each_step_draws_afresh() -> None:
    model, x, y, cuts, loss = by_name("mlp").build(seed=1)
    estimator = ForwardGradient(model, cuts, loss=loss, seed=SEED)
    for step in range(3):
        assert estimator.step == step
        estimator.zero_grad()
        estimator.estimate(x, y)
        errors = reference.activation_errors(model, x, y, cuts, loss, SEED, step, 1, "gaussian")
        expected = reference.delivered(model, x, y, cuts, loss, errors)
        for name, p in model.named_parameters():
            close(p.grad, expected.get(name), name)


def gradients(estimator: ForwardGradient, x: Any, y: Tensor, steps: int) -> Tensor:
    """One row per step: all gradients, flattened."""
    rows = []
    for _ in range(steps):
        estimator.zero_grad()
        torch.manual_seed(reference.MASKS)
        estimator.estimate(x, y)
        rows.append(flat(estimator.model, {name: p.grad for name, p in estimator.model.named_parameters()}))
    return torch.stack(rows)


def flat(model: torch.nn.Module, by_parameter: dict[str, Tensor | None]) -> Tensor:
    parts = [(by_parameter.get(name), p) for name, p in model.named_parameters()]
    return torch.cat([(torch.zeros_like(p) if g is None else g).detach().flatten() for g, p in parts])


def repeated(value: Any, times: int) -> Any:
    if isinstance(value, tuple):
        return tuple(repeated(part, times) for part in value)
    if isinstance(value, dict):
        return {key: repeated(part, times) for key, part in value.items()}
    return value.repeat(times, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@ALL
def test_activation_space_is_unbiased(case: Case, noise: str) -> None:
    """With batch statistics: of each sample's own part, e_n^T dz_n/dh_n."""
    model, x, y, cuts, loss = case.build(seed=4)
    estimator = ForwardGradient(model, cuts, loss=loss, noise=noise)
    if case.mixes_samples:
        own = reference.own_part(model, x, y, cuts, loss)
        expected, steps = reference.delivered(model, x, y, cuts, loss, own), 160
    else:  # every copy of a sample has its own direction: one step is many draws
        x, y, steps = repeated(x, 16), repeated(y, 16), 30
        expected = reference.backprop(model, x, y, loss)
    last = {name for name, p in model.named_parameters() if name.startswith("head")}
    draws = gradients(estimator, x, y, steps)
    hidden = torch.cat([torch.full((p.numel(),), name not in last) for name, p in model.named_parameters()])
    reference.assert_mean(draws[:, hidden], flat(model, expected)[hidden], power=1.2)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@ALL
def test_weight_space_is_unbiased_and_has_the_stated_variance(case: Case, noise: str) -> None:
    """E|est - G|^2 = (d + 1) |G|^2 for one Gaussian direction, (d - 1) |G|^2 for one of signs."""
    model, x, y, _, loss = case.build(seed=4)
    exact = flat(model, reference.backprop(model, x, y, loss))
    draws = gradients(ForwardGradient(model, loss=loss, noise=noise, space="avg-weight"), x, y, 80)
    reference.assert_mean(draws, exact, power=float("inf"))
    d = len(exact)
    squares = (draws - exact).square().sum(1) / exact.square().sum()
    stated = d + 1 if noise == "gaussian" else d - 1
    assert abs(squares.mean() - stated) < 4 * squares.std() / len(squares) ** 0.5


@pytest.mark.parametrize("count", [4, 16])
def test_directions_divide_the_variance(count: int) -> None:
    model, x, y, _, loss = by_name("mlp").build(seed=4)
    exact = flat(model, reference.backprop(model, x, y, loss))
    estimator = ForwardGradient(model, loss=loss, space="avg-weight", directions=count)
    squares = (gradients(estimator, x, y, 150) - exact).square().sum(1) / exact.square().sum()
    assert abs(squares.mean() - (len(exact) + 1) / count) < 4 * squares.std() / 150**0.5


def test_activation_space_has_less_variance_than_weight_space() -> None:
    model, x, y, cuts, loss = by_name("mlp").build(seed=4)
    exact = flat(model, reference.backprop(model, x, y, loss))
    errors = {
        space: (gradients(ForwardGradient(model, cuts, loss=loss, space=space), x, y, 100) - exact).square().sum(1).mean()
        for space in ("activation", "avg-weight")
    }
    assert errors["activation"] < 0.5 * errors["avg-weight"]


def test_weight_space_needs_no_cuts() -> None:
    model, x, y, _, loss = by_name("residual").build()
    estimator = ForwardGradient(model, loss=loss, space="avg-weight")
    estimator.estimate(x, y)
    assert all(p.grad is not None for p in model.parameters())


def test_weight_space_of_tied_weights_and_scalars() -> None:
    """A parameter under two names has one direction; a learned temperature has one number."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = torch.nn.Linear(3, 3, bias=False)
            self.temperature = torch.nn.Parameter(torch.tensor(0.7))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh()) * self.temperature

    torch.manual_seed(0)
    model, x, y = Net().double(), torch.randn(SAMPLES, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    loss = torch.nn.functional.cross_entropy
    expected = reference.weight_forward_gradient(model, x, y, loss, SEED, 0, 1, "gaussian")
    ForwardGradient(model, space="avg-weight", seed=SEED).estimate(x, y)
    for name, p in model.named_parameters():
        close(p.grad, expected[name], name)
