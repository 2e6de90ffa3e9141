"""DFA, DKP, FDFA and DRTP against explicit loops, in both forms, on every network."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import CASES, DIRECT, Case, by_name
from reference import close
from torch import Tensor, nn

from onward import DFA, DKP, DRTP, FDFA, Backprop, GrAPE, UsageError
from onward.derivatives import directions

SEED = 11
KINDS = {
    **{name: (kind, {}) for name, kind in DIRECT.items()},
    "fdfa-rademacher-3": (FDFA, {"noise": "rademacher", "directions": 3}),
}
STARTS: list[tuple[Any, dict[str, str]]] = [(DKP, {"start": "random"}), (DFA, {})]
RANDOM = (DFA, DRTP, GrAPE)
LOW_MEMORY = pytest.mark.parametrize("low_memory", [False, True], ids=["", "low-memory"])


def randomised(estimator: Any, x: Any) -> Any:
    """Feedback matrices of the right size and of no special value."""
    estimator.initialize(x)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for matrix in estimator.feedback:
            matrix.copy_(torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype))
    return estimator


@LOW_MEMORY
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(case: Case, kind: str, train: bool, low_memory: bool) -> None:
    model, x, y, cuts, loss = case.build(seed=1)
    model.train(train)
    make, options = KINDS[kind]
    estimator = randomised(make(model, cuts, loss=loss, low_memory=low_memory, seed=SEED, **options), x)
    twin = copy.deepcopy(model)
    feedback = [matrix.detach().clone() for matrix in estimator.feedback]
    _, e, hidden = reference.direct_feedback(twin, x, y, cuts, loss, feedback)
    expected = reference.SIGNALS[kind.partition("-")[0]](twin, x, y, cuts, loss, feedback)

    torch.manual_seed(reference.MASKS)
    logits = reference.call(twin, x).detach()  # moves the twin's statistics once
    after = torch.get_rng_state()
    torch.manual_seed(reference.MASKS)
    if case.name == "in-place" and kind == "dkp" and not low_memory:
        with pytest.raises(UsageError, match="overwrites that block's output in place"):
            estimator.estimate(x, y)
        return
    step = estimator.estimate(x, y)

    assert torch.equal(torch.get_rng_state(), after)
    assert not step.loss.requires_grad
    assert not step.output.requires_grad
    torch.testing.assert_close(step.output, logits)
    torch.testing.assert_close(step.loss, loss(logits, y))
    for name, p in model.named_parameters():
        close(p.grad, expected.get(name), name)
    for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)

    if not estimator.feedback.learns:
        gradients: list[Tensor | None] = [None] * len(cuts)
    elif kind == "dkp":
        gradients = [reference.outer_sum(e, h) for h in hidden]
    else:
        gradients = reference.fdfa_feedback(
            case.build(seed=1).model.train(train), x, cuts, feedback, SEED, 0, options.get("directions", 1),
            options.get("noise", "gaussian"),
        )  # fmt: skip
        if kind == "grape":
            gradients = [reference.turned(b, b - gradient) for b, gradient in zip(feedback, gradients, strict=True)]
    for name, matrix, before, gradient in zip(cuts, estimator.feedback, feedback, gradients, strict=True):
        assert torch.equal(matrix, before)
        assert matrix.dtype == torch.float64
        close(matrix.grad, gradient, f"feedback of {name}")


@LOW_MEMORY
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["cnn-batch-norm", "transformer", "dropout"])
def test_the_first_step_needs_no_initialisation(name: str, kind: str, low_memory: bool) -> None:
    """Matrices are made on the way, and the same ones as by `initialize`, which changes nothing else."""
    model, x, y, cuts, loss = by_name(name).build()
    make, options = KINDS[kind]
    estimator = make(model, cuts, loss=loss, low_memory=low_memory, **options)
    ahead = make(copy.deepcopy(model), cuts, loss=loss, low_memory=low_memory, **options)
    assert all(isinstance(matrix, nn.UninitializedParameter) for matrix in estimator.feedback)
    state, rng = copy.deepcopy(ahead.model.state_dict()), torch.get_rng_state()
    ahead.initialize(x)
    assert ahead.step == 0
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), ahead.model.state_dict().values(), strict=True))
    for each in (estimator, ahead):
        torch.manual_seed(3)
        each.estimate(x, y)
    for a, b in zip(estimator.state_dict().values(), ahead.state_dict().values(), strict=True):
        assert (a == b).all() if isinstance(a, Tensor) else a == b
    for a, b in zip(estimator.parameters(), ahead.parameters(), strict=True):
        close(a.grad, b.grad)


@pytest.mark.parametrize("kind", DIRECT.values())
def test_initial_feedback(kind: type) -> None:
    model = nn.Sequential(nn.Linear(5, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10))
    estimator = kind(model, seed=4)
    estimator.initialize(torch.randn(3, 5))
    assert [tuple(matrix.shape) for matrix in estimator.feedback] == [(10, 300), (10, 200)]
    for matrix in estimator.feedback:
        bound = math.sqrt(6 / matrix.shape[1])
        if kind not in RANDOM:
            assert not matrix.any()
            continue
        assert matrix.abs().max() <= bound
        assert matrix.abs().max() > 0.98 * bound
        assert abs(matrix.mean()) < 4 * bound / math.sqrt(3 * matrix.numel())
        assert abs(matrix.var() / (bound**2 / 3) - 1) < 0.1
    if kind in RANDOM:
        same, other = (kind(model, seed=seed) for seed in (4, 5))
        for each in (same, other):
            each.initialize(torch.randn(3, 5))
        assert torch.equal(estimator.feedback[0], same.feedback[0])
        assert not torch.equal(estimator.feedback[0], other.feedback[0])
        assert not torch.equal(estimator.feedback[0][:, :200], estimator.feedback[1])


def test_dkp_may_start_as_its_authors_code_does() -> None:
    model, x, _, cuts, loss = by_name("mlp").build()
    started, random = (kind(copy.deepcopy(model), cuts, loss=loss, seed=4, **options) for kind, options in STARTS)
    for each in (started, random):
        each.initialize(x)
    assert all(torch.equal(a, b) for a, b in zip(started.feedback, random.feedback, strict=True))
    assert all(matrix.requires_grad for matrix in started.feedback)
    with pytest.raises(UsageError, match="unknown start 'ones'"):
        DKP(model, cuts, start="ones")


@LOW_MEMORY
@pytest.mark.parametrize("case", [case for case in CASES if not case.mixes_samples], ids=lambda case: case.name)
def test_feedback_through_the_true_jacobian_is_backprop(case: Case, low_memory: bool) -> None:
    """On one sample, where one matrix can be the Jacobian of all samples."""
    model, x, y, cuts, loss = case.build(seed=3)
    if isinstance(x, tuple):
        x = tuple(part[:1] for part in x)
    elif isinstance(x, dict):
        x = {key: part[:1] if isinstance(part, Tensor) else part for key, part in x.items()}
    else:
        x = x[:1]
    estimator = DFA(model, cuts, loss=loss, low_memory=low_memory)
    estimator.initialize(x)
    for matrix, jacobian in zip(estimator.feedback, reference.jacobians(model, x, cuts), strict=True):
        matrix.data.copy_(jacobian[0])
    expected = reference.backprop(model, x, y[:1], loss)
    torch.manual_seed(reference.MASKS)
    estimator.estimate(x, y[:1])
    for name, p in model.named_parameters():
        close(p.grad, expected.get(name), name)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("name", ["mlp", "group-norm", "mlp-batch-norm"])
def test_fdfa_learns_the_mean_jacobian(name: str, noise: str) -> None:
    """E[B - grad B] = mean_n dz_n/dh_{k,n}: the average of many steps comes within its own standard error."""
    model, x, y, cuts, loss = by_name(name).build(seed=2)
    estimator = FDFA(model.eval(), cuts, loss=loss, noise=noise, directions=8)
    expected = [jacobian.mean(0) for jacobian in reference.jacobians(model, x, cuts)]
    draws: list[list[Tensor]] = [[] for _ in cuts]
    for _ in range(120):
        estimator.zero_grad()
        estimator.estimate(x, y)
        for kept, matrix in zip(draws, estimator.feedback, strict=True):
            assert matrix.grad is not None
            kept.append(-matrix.grad)
    for kept, jacobian in zip(draws, expected, strict=True):
        reference.assert_mean(torch.stack(kept), jacobian, power=0.9)


def test_moving_average_converges_to_the_jacobian() -> None:
    """With SGD at rate alpha the feedback is B <- (1 - alpha) B + alpha mean(ydot (x) u)."""
    model, x, y, cuts, loss = by_name("mlp").build(seed=2)
    estimator = FDFA(model, cuts, loss=loss, directions=8)
    optimizer = torch.optim.SGD(list(estimator.feedback), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        estimator.estimate(x, y)
        optimizer.step()
    for matrix, jacobian in zip(estimator.feedback, reference.jacobians(model, x, cuts), strict=True):
        assert F.cosine_similarity(matrix.flatten(), jacobian.mean(0).flatten(), dim=0) > 0.95
        assert abs(matrix.norm() / jacobian.mean(0).norm() - 1) < 0.2


@pytest.mark.parametrize("kind", DIRECT.values())
def test_learns_beside_backprop(kind: type) -> None:
    """A small problem, solved with an optimizer made before the feedback has a size."""

    def final_loss(make: type, **options: Any) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
        x = torch.randn(128, 10)
        y = (x[:, :3] ** 2).argmax(1)
        estimator = make(model, **options)
        optimizer = torch.optim.Adam(estimator.parameters(), lr=3e-3)
        for _ in range(100):
            optimizer.zero_grad()
            step = estimator.estimate(x, y)
            optimizer.step()
        return step.loss.item()

    assert final_loss(Backprop) < 0.2
    # log 3 = 1.1 at first; the targets are signals that do not fade as the error does
    assert final_loss(kind) < (1.0 if kind is DRTP else 0.8)


def test_branch_that_runs_beside_a_later_cut() -> None:
    """What leaves cut a and rejoins after cut b is part of the Jacobian with respect to a."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Sequential(nn.Linear(5, 6), nn.Tanh())
            self.beside, self.output = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            beside = self.beside(h)
            return self.output(self.b(h) + beside)

    torch.manual_seed(0)
    model = Net().double()
    x, y = torch.randn(2, 4, dtype=torch.float64), torch.tensor([1, 2])
    estimator = FDFA(model, ["a", "b"])
    estimator.estimate(x, y)
    u = [directions.draw((2, d), seed=0, step=0, block=k, dtype=torch.float64) for k, d in enumerate((5, 6))]
    h = model.a(x).detach()
    ydot = torch.func.jvp(lambda a: model.output(model.b(a) + model.beside(a)), (h,), (u[0],))[1] + u[1] @ model.output.weight.T
    close(estimator.feedback[0].grad, -ydot.T @ u[0] / 2)
    close(estimator.feedback[1].grad, -ydot.T @ u[1] / 2)
