"""Node perturbation against explicit loops, and against the derivative that it approaches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from cases import by_name
from torch import Tensor, nn

import onward
from onward import ForwardGradient, NodePerturbation, UsageError

SEED = 7


def signals(model: nn.Module, x: Any, y: Tensor, cuts: Any, loss: Any, sigma: float, noise: str, count: int) -> list[Tensor]:
    """delta_k by a loop over samples: the loss of the output of which one row is that of a run with noise."""
    _, z, hidden = reference.run(model, x, cuts)
    z = z.detach()
    total = [torch.zeros_like(h) for h in hidden]
    for direction in range(count):
        us = reference.block_directions(hidden, SEED, 0, direction, noise)
        noisy = copy.deepcopy(model)
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            reference.rewritten(noisy, cuts, lambda k, h, us=us: h + sigma * us[k]),
        ):
            torch.manual_seed(reference.MASKS)
            moved = reference.call(noisy, x)
        for n in range(len(z)):
            mixed = z.clone()
            mixed[n] = moved[n]
            for delta, u in zip(total, us, strict=True):
                delta[n] += (loss(mixed, y) - loss(z, y)) / sigma * u[n] / count
    return total


NAMES = ["cnn-batch-norm", "transformer", "tied", "dict-of-inputs", "in-place", "dropout", "regression"]


@pytest.mark.parametrize("name", NAMES)
def test_against_loops(name: str) -> None:
    model, x, y, cuts, loss = by_name(name).build()
    errors = signals(model, x, y, cuts, loss, 1e-2, "rademacher", 2)
    expected = reference.delivered(model, x, y, cuts, loss, errors)
    for low_memory in (False, True):
        mine = copy.deepcopy(model)
        estimator = NodePerturbation(
            mine, cuts, loss=loss, seed=SEED, sigma=1e-2, directions=2, noise="rademacher", low_memory=low_memory
        )
        torch.manual_seed(reference.MASKS)
        estimator.estimate(x, y)
        for parameter, p in mine.named_parameters():
            torch.testing.assert_close(p.grad, expected.get(parameter), rtol=1e-7, atol=1e-9)
        assert all(buffer == 1 for part, buffer in mine.named_buffers() if part.endswith("num_batches_tracked"))


def test_small_noise_gives_the_derivative_of_forward_mode() -> None:
    model, x, y, cuts, loss = by_name("transformer").build()
    found = []
    for make in (ForwardGradient, lambda *a, **o: NodePerturbation(*a, sigma=1e-6, **o)):
        mine = copy.deepcopy(model)
        make(mine, cuts, loss=loss, seed=SEED).estimate(x, y)
        found.append(torch.cat([p.grad.flatten() for p in mine.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_what_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    with pytest.raises(UsageError, match=r"sigma=0.0: use a positive number"):
        NodePerturbation(model, sigma=0.0)
    estimator = onward.capture(NodePerturbation(model), backend="replay")
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    estimator.estimate(x, y)
    with pytest.warns(UserWarning, match="runs eagerly: it compares passes"):
        estimator.estimate(x, y)
