"""What surrounds an estimator: formats that hold its state, and a compiler around its step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import close
from test_estimators import ALL, all_gradients, built
from torch import Tensor, nn

from onward import DFA, Estimator, UsageError


@ALL
def test_a_state_is_of_tensors_alone(kind: str) -> None:
    """As safetensors and others need it; and what was saved before that was so still loads."""
    estimator, x, y = built(kind)
    estimator.estimate(x, y)
    state = estimator.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    assert state["_extra_state"].tolist() == [1, 7]
    assert state["_extra_state"].dtype == torch.int64
    for saved in (state, {**state, "_extra_state": {"step": 1, "seed": 7}}):
        fresh, _, _ = built(kind, seed=99, network_seed=5)
        fresh.load_state_dict(saved)
        assert (fresh.step, fresh.seed) == (1, 7)
        again, wanted = copy.deepcopy(fresh), copy.deepcopy(estimator)
        again.zero_grad()
        wanted.zero_grad()
        again.estimate(x, y)
        wanted.estimate(x, y)
        for a, b in zip(all_gradients(again), all_gradients(wanted), strict=True):
            close(a, b)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_that_no_state_could_hold(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(UsageError, match=rf"seed={seed}: use a whole number that 64 bits hold, from -2\*\*63 to 2\*\*63 - 1"):
        DFA(model, seed=seed)
    for held in (2**63 - 1, -(2**63)):
        estimator = DFA(model, seed=held)
        estimator.load_state_dict(estimator.state_dict())
        assert estimator.seed == held


@ALL
def test_a_compiled_estimate_runs_as_it_is(kind: str) -> None:
    """The function alone, the whole estimator, and a step of the user's own around it."""
    plain, x, y = built(kind)
    expected = plain.estimate(x, y)

    def step(estimator: Estimator) -> Tensor:
        return 2 * estimator.estimate(x, y).loss / 2

    for way in ("method", "estimator", "step"):
        estimator, _, _ = built(kind)
        match way:
            case "method":
                loss = torch.compile(estimator.estimate, backend="eager")(x, y).loss
            case "estimator":
                loss = torch.compile(estimator, backend="eager").estimate(x, y).loss
            case _:
                loss = torch.compile(step, backend="eager")(estimator)
        assert torch.equal(loss, expected.loss), way
        for a, b in zip(all_gradients(estimator), all_gradients(plain), strict=True):
            close(a, b)


@pytest.mark.parametrize("check", [True, False])
def test_blocks_that_are_compiled_run_compiled(check: bool) -> None:
    """In the first step, which looks at their graphs, and in all others."""
    runs: list[str] = []

    def backend(graph: Any, example: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            runs.append("compiled")
            return graph.forward(*args)

        return run

    block = torch.compile(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), backend=backend)
    estimator = DFA(nn.Sequential(block, nn.Linear(3, 2)), ["0"], check=check)
    for _ in range(2):
        runs.clear()
        estimator.estimate(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
        assert runs
