"""Forward-Forward against its formulas, block by block, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cases import CLASSES, by_name
from reference import close
from torch import Tensor, nn

import onward
from onward import ForwardForward, UsageError
from onward.derivatives.directions import draw, seed_of


def written(x: Tensor, y: Tensor, amplitude: float) -> Tensor:
    rows = [
        [amplitude if c == label else 0.0 for c in range(CLASSES)] + row.flatten().tolist()[CLASSES:]
        for row, label in zip(x, y.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=x.dtype).view(x.shape)


def wrong(y: Tensor, seed: int, step: int) -> Tensor:
    drawn = draw((len(y), CLASSES - 1), seed=seed_of(seed, "wrong labels"), step=step, block=0, dtype=torch.float64)
    labels = zip(y.tolist(), drawn.tolist(), strict=True)
    return torch.tensor([(label + 1 + row.index(max(row))) % CLASSES for label, row in labels])


def goodness(h: Tensor) -> list[float]:
    return [sum(v * v for v in row.flatten().tolist()) / row.numel() for row in h]


def evened(h: Tensor) -> Tensor:
    return torch.stack([row / math.sqrt(g) for row, g in zip(h, goodness(h), strict=True)])


@pytest.mark.parametrize("name", ["mlp", "cnn-batch-norm", "group-norm"])
def test_by_its_formulas(name: str) -> None:
    model, x, y, cuts, _ = by_name(name).build(seed=1)
    estimator = ForwardForward(model, cuts, threshold=0.3, amplitude=1.5, seed=5)
    plain = copy.deepcopy(model)
    for step in range(2):
        model.zero_grad()
        found = estimator.estimate(x, y)
        other = wrong(y, 5, step)
        assert (other != y).all()
        h, total, summed = torch.cat([written(x, y, 1.5), written(x, other, 1.5)]), 0.0, [0.0] * (2 * len(x))
        for k, block in enumerate(list(plain)[:-1]):
            out = block(h)
            g, delta = goodness(out.detach()), torch.zeros_like(out)
            for n, (row, value) in enumerate(zip(out.detach(), g, strict=True)):
                side = -1 if n < len(x) else 1
                total += math.log1p(math.exp(side * (value - 0.3))) / len(g)
                slope = side / (1 + math.exp(-side * (value - 0.3))) / len(g)
                delta[n] = slope * 2 * row / row.numel()
                summed[n] += value if k else 0.0
            gradients = torch.autograd.grad(out, list(block.parameters()), delta)
            for p, gradient in zip(model[k].parameters(), gradients, strict=True):
                close(p.grad, gradient)
            h = evened(out.detach())
        assert found.loss.item() == pytest.approx(total)
        close(found.output, torch.tensor(summed, dtype=x.dtype).view(2, -1).T)
    assert all(p.grad is None for p in model[-1].parameters())


def test_a_prediction_is_the_label_of_most_goodness() -> None:
    model, x, _, cuts, _ = by_name("cnn-batch-norm").build(seed=1)
    estimator = ForwardForward(model, cuts).eval()
    before = copy.deepcopy(estimator.state_dict())
    found = estimator(x)
    for label in range(CLASSES):
        h, total = written(x, torch.full((len(x),), label), 1.0), torch.zeros(len(x), dtype=x.dtype)
        for k, block in enumerate(list(model)[:-1]):
            h = block(h).detach()
            total += torch.tensor(goodness(h), dtype=x.dtype) * (k > 0)
            h = evened(h)
        close(found[:, label], total)
    estimator.train()(x)
    for name, tensor in estimator.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_it_learns_and_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(3, 12)[y] + 0.3 * torch.randn(60, 12)

    def fresh() -> tuple[ForwardForward, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
        estimator = ForwardForward(model)
        return estimator, torch.optim.Adam(estimator.parameters(), lr=0.01)

    def train(estimator: ForwardForward, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            estimator.estimate(x, y)
            optimizer.step()

    estimator, optimizer = fresh()
    train(estimator, optimizer, 100)
    state = copy.deepcopy((estimator.state_dict(), optimizer.state_dict()))
    train(estimator, optimizer, 50)
    assert (estimator(x).argmax(1) == y).float().mean() > 0.9
    again, optimizer = fresh()
    again.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(again, optimizer, 50)
    for p, q in zip(estimator.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


X, Y = torch.randn(4, 6), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(4, 6, dtype=torch.long), Y, "one tensor of real numbers"),
        ((X, X), Y, "one tensor of real numbers"),
        (X, torch.randn(4, 3), "give class numbers"),
        (X, Y + 1, "the targets run from 1 to 3, and the network has 3 outputs"),
        (X[:, :2], Y, "no room for one of 3 labels"),
    ],
)
def test_what_it_cannot_take(x: Any, y: Tensor, message: str) -> None:
    size = 2 if isinstance(x, Tensor) and x.shape[1] == 2 else 6
    model = nn.Sequential(nn.Linear(size, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(UsageError, match=message):
        ForwardForward(model, check=False).estimate(x, y)


def test_replayed_it_is_bit_for_bit_the_same() -> None:
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        estimator = ForwardForward(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)), ["2"])
        if captured:
            onward.capture(estimator, backend="replay")
        for _ in range(4):
            step = estimator.estimate(X, Y)
        results.append([step.loss, *(p.grad for p in estimator.parameters() if p.grad is not None)])
    assert estimator.engine.endswith("replayed")
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)
