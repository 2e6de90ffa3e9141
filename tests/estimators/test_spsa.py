"""SPSA: the derivative along a direction by differences of the loss, and weights that are back afterwards, whatever happens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import CASES, by_name
from torch import Tensor, nn

import onward
from onward import SPSA, ForwardGradient, Lean, UsageError
from onward.derivatives.directions import draw, shift

SEED = 7


def gradients(estimator: onward.Estimator, x: Any, y: Tensor) -> Tensor:
    """Of one step, as one row; dropout draws the same masks each time."""
    torch.manual_seed(reference.MASKS)
    estimator.zero_grad()
    estimator.estimate(x, y)
    return torch.cat([p.grad.to_dense().flatten() for p in estimator.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_small_moves_give_the_derivative_of_forward_mode(case: Any) -> None:
    """With the same direction, in every case network; running statistics move once; the loss and output are the network's."""
    model, x, y, cuts, loss = case.build()
    exact, mine = copy.deepcopy(model), copy.deepcopy(model)
    options: dict[str, Any] = {"loss": loss, "seed": SEED, "directions": 2, "noise": "rademacher"}
    fg = ForwardGradient(exact, space="avg-weight", **options)
    expected = gradients(fg, x, y)
    spsa = SPSA(mine, cuts, eps=1e-6, **options)
    torch.testing.assert_close(gradients(spsa, x, y), expected, rtol=1e-6, atol=1e-7)
    for a, b in zip(exact.buffers(), mine.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(model.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("sided", "order"), [("two", 2), ("one", 1)])
def test_the_error_falls_as_it_should(sided: str, order: int) -> None:
    model, x, y, _, loss = by_name("transformer").build()
    expected = gradients(ForwardGradient(copy.deepcopy(model), loss=loss, space="avg-weight", seed=SEED), x, y)
    errors = [
        (gradients(SPSA(copy.deepcopy(model), loss=loss, seed=SEED, eps=eps, sided=sided), x, y) - expected).norm()
        for eps in (1e-2, 1e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(10**order, rel=0.2)


def by_hand(model: nn.Module, x: Any, y: Tensor, loss: Any, seed: int, steps: int, lr: float, decay: float) -> None:
    """MeZO, algorithm 1."""
    eps = 1e-3

    def perturb(step: int, scale: float) -> None:
        for name, p in model.named_parameters():
            if p.requires_grad:
                z = draw(p.shape, seed=seed, step=step, block=name, dtype=p.dtype)
                p.data = p.data + scale * eps * z

    for step in range(steps):
        with torch.no_grad():
            perturb(step, 1)
            above = loss(model(x), y)
            perturb(step, -2)
            below = loss(model(x), y)
            perturb(step, 1)
            slope = (above - below) / (2 * eps)
            for name, p in model.named_parameters():
                if p.requires_grad:
                    z = draw(p.shape, seed=seed, step=step, block=name, dtype=p.dtype)
                    p.data = p.data - lr * (slope * z + decay * p.data)


@pytest.mark.parametrize("lean", [False, True])
def test_is_mezo_written_out(lean: bool) -> None:
    model, x, y, _, loss = by_name("attention").build()
    model[0].norm.requires_grad_(False)
    expected = copy.deepcopy(model)
    settings = {"lr": 0.05, "weight_decay": 0.1}
    by_hand(expected, x, y, loss, seed=SEED, steps=5, lr=0.05, decay=0.1)
    estimator = SPSA(model, loss=loss, seed=SEED)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = Lean(estimator, **settings) if lean else torch.optim.SGD(trained, **settings)
    for _ in range(5):
        optimizer.zero_grad()
        estimator.estimate(x, y)
        optimizer.step()
    for a, b in zip(expected.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert all((p.grad is None) == (lean or not p.requires_grad) for p in model.parameters())


def test_weights_are_back_after_a_thousand_steps() -> None:
    """In float32; two moves back by eps are off by much less than one by 2 eps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 3))
    before = model[0].weight.detach().clone()
    naive = before.clone()
    estimator = SPSA(model, seed=SEED)
    Lean(estimator, lr=0.0)
    x, y = torch.randn(8, 20), torch.randint(3, (8,))
    for step in range(1000):
        estimator.estimate(x, y)
        v = draw(before.shape, seed=SEED, step=step, block="0.weight")
        naive.add_(v, alpha=1e-3).add_(v, alpha=-2e-3).add_(v, alpha=1e-3)
    error = model[0].weight.detach() - before
    assert error.abs().max() < 1e-6
    assert error.norm() < (naive - before).norm() / 5


class Words(nn.Module):
    """An embedding with a padding row that also gives the outputs, by a function of its own; another that does not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4, padding_idx=0, sparse=not tied)
        self.places, self.tied = nn.Embedding(5, 4, padding_idx=2), tied
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.inner(self.words(tokens) + self.places(torch.arange(tokens.shape[1]) % 5)).tanh().mean(1)
        return h @ self.words.weight.t() if self.tied else self.out(h)


MAKERS: dict[str, Callable[..., onward.Estimator]] = {
    "spsa": SPSA,
    "spsa-one-sided": partial(SPSA, directions=3, sided="one", noise="rademacher"),
    "fg": partial(ForwardGradient, space="avg-weight"),
    "fg-three": partial(ForwardGradient, space="avg-weight", directions=3, noise="rademacher"),
    "fg-orthogonal": partial(ForwardGradient, space="avg-weight", directions=3, orthogonal=True),
    "fg-projection": partial(ForwardGradient, space="avg-weight", directions=2, scaling="projection", passes="block"),
}


@pytest.mark.parametrize(("kind", "tied"), [*zip(MAKERS, [True, False] * 3, strict=True), ("fg", False), ("spsa", False)])
def test_lean_is_sgd_without_a_gradient(kind: str, tied: bool) -> None:
    """With a schedule, several estimates for one step, a frozen part, padding rows, sparse layers; and resumed in between."""
    torch.manual_seed(0)
    model = Words(tied).double()
    model.inner.bias.requires_grad_(False)
    tokens, y = torch.randint(9, (6, 5)), torch.randint(1, 9, (6,))
    results = []
    for lean in (False, True):
        estimator = MAKERS[kind](copy.deepcopy(model), seed=SEED)
        make: Any = partial(Lean, estimator) if lean else partial(torch.optim.SGD, list(estimator.parameters()))
        optimizer = make(lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for n in range(4):
            optimizer.zero_grad()
            for _ in range(1 + n % 2):
                estimator.estimate(tokens, y)
            optimizer.step()
            schedule.step()
            if n == 1:
                state = copy.deepcopy((estimator.state_dict(), optimizer.state_dict()))
                estimator = MAKERS[kind](Words(tied).double(), seed=0)
                estimator.model.inner.bias.requires_grad_(False)
                estimator.load_state_dict(state[0])
                make = partial(Lean, estimator) if lean else partial(torch.optim.SGD, list(estimator.parameters()))
                optimizer = make(lr=1.0)
                optimizer.load_state_dict(state[1])
                schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5, last_epoch=1)
        assert not lean or all(p.grad is None for p in estimator.parameters())
        results.append(estimator.model)
    for (name, a), b in zip(results[0].named_parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    for table, row, learns in (("places", 2, False), ("words", 0, tied)):
        assert results[1].get_submodule(table).weight[row].any() == learns, table
    assert torch.equal(results[1].inner.bias, model.inner.bias)


def test_a_loss_that_fails_leaves_the_weights_as_they_were() -> None:
    model, x, y, _, _ = by_name("cnn-batch-norm").build()
    for failing in range(1, 5):
        calls: list[int] = []

        def loss(z: Tensor, y: Tensor, calls: list[int] = calls, failing: int = failing) -> Tensor:
            calls.append(1)
            if len(calls) == failing:
                raise KeyboardInterrupt
            return F.cross_entropy(z, y)

        estimator = SPSA(copy.deepcopy(model), loss=loss, directions=2)
        optimizer = Lean(estimator, lr=1.0)
        with pytest.raises(KeyboardInterrupt):
            estimator.estimate(x, y)
        optimizer.step()
        assert estimator.step == 0
        for a, b in zip(model.parameters(), estimator.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-15)
            assert b.requires_grad
        estimator.estimate(x, y)  # and nothing is in the way of the next step


def test_an_interrupt_between_two_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, _, _ = by_name("mlp").build()
    estimator, moves = SPSA(copy.deepcopy(model)), iter(range(100))

    def interrupted(*arguments: Any, **options: Any) -> None:
        if next(moves) == 9:  # on the way from the one side to the other
            raise KeyboardInterrupt
        shift(*arguments, **options)

    monkeypatch.setattr("onward.estimators.spsa.shift", interrupted)
    with pytest.raises(KeyboardInterrupt):
        estimator.estimate(x, y)
    for a, b in zip(model.parameters(), estimator.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_the_loss_may_be_any_number() -> None:
    model, x, y, _, _ = by_name("mlp").build()

    def right(z: Tensor, y: Tensor) -> Tensor:
        return (z.argmax(1) == y).float().mean()

    numbers: dict[str, Callable[[Any, Tensor], Any]] = {
        "Python": lambda z, y: right(z, y).item(),
        "NumPy": lambda z, y: right(z, y).numpy()[()],
        "whole": lambda z, y: (z.argmax(1) == y).sum(),
        "half": lambda z, y: right(z, y).half(),
    }
    for name, loss in numbers.items():
        found = gradients(SPSA(copy.deepcopy(model), loss=loss, eps=1.0, seed=SEED), x, y)
        whole = gradients(SPSA(copy.deepcopy(model), loss=right, eps=1.0, seed=SEED), x, y)
        assert whole.any()
        torch.testing.assert_close(found, whole * (len(y) if name == "whole" else 1), rtol=1e-6, atol=0)

    class Decoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, x: Tensor) -> list[str]:
            return ["abc"[i] for i in self.inner(x).argmax(1).tolist()]

    def score(text: list[str], y: Tensor) -> float:
        return sum(letter == "abc"[i] for letter, i in zip(text, y.tolist(), strict=True)) / len(text)

    estimator = SPSA(Decoded(), loss=score, eps=1.0, seed=SEED)
    step = estimator.estimate(x, y)
    assert isinstance(step.output, list)
    assert any(p.grad.any() for p in estimator.parameters())
    for wrong, said in ((lambda z, y: "0.5", "a str: it must return a number"), (lambda z, y: z, r"shape \(4, 3\)")):
        with pytest.raises(UsageError, match=said):
            SPSA(copy.deepcopy(model), loss=wrong).estimate(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, x, y, _, loss = by_name("mlp").build()
    model.to(dtype)
    estimator = SPSA(copy.deepcopy(model), loss=loss, eps=0.05)
    step = estimator.estimate(x.to(dtype), y)
    for a, b in zip(model.parameters(), estimator.model.parameters(), strict=True):
        assert b.grad.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    exact = SPSA(copy.deepcopy(model).double(), loss=loss, eps=0.05).estimate(x, y)
    assert step.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)


@pytest.mark.parametrize("kind", ["spsa", "fg"])
def test_a_lean_step_needs_the_memory_of_a_pass(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.ReLU())), nn.Linear(256, 3))
    x, y = torch.randn(2000, 256), torch.randint(3, (2000,))
    weights = sum(p.nbytes for p in model.parameters())

    def peak(work: Callable[[], object]) -> int:
        with reference.PeakBytes() as seen:
            work()
        return seen.peak + weights

    def step(optimizer: Any, estimator: onward.Estimator) -> None:
        optimizer.zero_grad()
        estimator.estimate(x, y)
        optimizer.step()

    with torch.no_grad():
        inference = peak(lambda: F.cross_entropy(model(x), y))
    estimator = MAKERS[kind](model, check=False)
    lean = peak(partial(step, Lean(estimator, lr=1e-3), estimator))
    backprop = onward.Backprop(model)
    assert lean < {"spsa": 1.05, "fg": 2.2}[kind] * inference
    assert peak(partial(step, torch.optim.SGD(model.parameters(), lr=1e-3), backprop)) > 3 * inference


def test_pieces_are_those_of_the_whole() -> None:
    for shape in ((3,), (400, 700), (0,)):
        for noise in ("gaussian", "rademacher"):
            key: dict[str, Any] = {"seed": 3, "step": 4, "block": "w", "direction": 2, "noise": noise}
            drawn = draw(shape, **key)
            tensor = torch.zeros(shape)
            shift(tensor, 2.0, **key)
            assert torch.equal(tensor, 2 * drawn)
            across = torch.zeros(shape[::-1]).t()
            shift(across, 2.0, **key)
            assert torch.equal(across, 2 * drawn)
    tensor = torch.ones(4, 2)
    shift(tensor, 1.0, -3.0, seed=0, step=0, block="w", without=1)
    assert torch.equal(tensor[1], torch.ones(2))
    assert not torch.equal(tensor[0], torch.ones(2))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.runs = nn.Linear(3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.inner(x) * self.runs


def test_what_is_refused_or_settled() -> None:
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(UsageError, match=r"eps=0.0: use a positive number"):
        SPSA(nn.Linear(3, 3), eps=0.0)
    with pytest.raises(UsageError, match=r"unknown sided 'both'"):
        SPSA(nn.Linear(3, 3), sided="both")
    with pytest.raises(UsageError, match=r"weight is complex"):
        SPSA(nn.Linear(3, 3, dtype=torch.cdouble))
    with pytest.raises(UsageError, match=r"no parameter of the network requires a gradient"):
        SPSA(nn.Linear(3, 3).requires_grad_(False)).estimate(x, y)
    with pytest.raises(UsageError, match=r"second run in this step gave another output"):
        SPSA(Counts()).estimate(x, y)
    with pytest.raises(UsageError, match=r"DFA .* has gradients to store: the lean optimizer is for"):
        Lean(onward.DFA(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))), lr=0.1)
    with pytest.raises(UsageError, match=r"ForwardGradient .* has gradients to store"):
        Lean(ForwardGradient(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))), lr=0.1)
    lazy = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 3))
    estimator = SPSA(lazy)
    with torch.no_grad():
        estimator.estimate(x, y)
    assert lazy[0].weight.grad.shape == (5, 3)
    assert lazy[1].num_batches_tracked == 1
