from __future__ import annotations

import math

import pytest
import torch

from onward.errors import UsageError
from onward.lab.run.optimizers import SCHEDULERS, Rate
from onward.lab.settings import Recipe, Schedule


def rates(schedule: Schedule, epochs: int, steps: int, losses: list[float] | None = None) -> list[float]:
    """The rate of every step, and what is left after the last; of two groups, which must move together."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    optimizer = torch.optim.SGD(groups, lr=2.0, momentum=0.5)
    rate = Rate(schedule, optimizer, epochs=epochs, steps=steps)
    seen = []
    for epoch in range(epochs):
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            rate.after_step()
            assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[1]["lr"]
            assert optimizer.param_groups[0]["momentum"] == 0.5
        rate.after_epoch(losses[epoch] if losses else 1.0)
    return [*seen, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), [2, 2, 1.9, 1.9, 1.805]),
        (Schedule(gamma=0.5), [2, 2, 1, 1, 0.5]),
        (Schedule("step", step_size=2), [2, 2, 2, 2, 0.4]),
        (Schedule("step", step_size=1, gamma=0.1), [2, 2, 0.2, 0.2, 0.02]),
        (Schedule("linear"), [2, 1.5, 1, 0.5, 0]),
        (Schedule("linear", start=0.5, end=2.5), [1, 2, 3, 4, 5]),
        (Schedule("cosine"), [1 + math.cos(math.pi * t / 4) for t in range(5)]),
        (Schedule("constant"), [2] * 5),
    ],
    ids=str,
)
def test_the_rate_at_every_step(schedule: Schedule, expected: list[float]) -> None:
    assert rates(schedule, epochs=2, steps=2) == pytest.approx(expected)


def test_plateau_waits_for_the_training_loss() -> None:
    losses = [1.0, 0.5, 0.6, 0.7, 0.4, 0.4, 0.4]
    seen = rates(Schedule("plateau", patience=1), epochs=7, steps=1, losses=losses)
    assert seen == pytest.approx([2, 2, 2, 2, 0.4, 0.4, 0.4, 0.08])


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (2, 1), (5, 20)])
def test_one_cycle_rises_to_the_learning_rate_and_falls(epochs: int, steps: int) -> None:
    seen = rates(Schedule("onecycle"), epochs, steps)
    peak = seen.index(max(seen))
    assert seen[-1] < 1e-3
    if steps == 20:
        assert seen[peak] == pytest.approx(2, rel=0.01)
        assert 0.2 < peak / len(seen) < 0.4
        assert seen[: peak + 1] == sorted(seen[: peak + 1])
        assert seen[peak:] == sorted(seen[peak:], reverse=True)


def test_every_schedule_has_a_state_that_can_be_kept(tmp_path) -> None:
    for name in SCHEDULERS:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        state = Rate(Schedule(name), optimizer, epochs=2, steps=2).scheduler.state_dict()
        torch.save(state, tmp_path / "state.pt")
        assert torch.load(tmp_path / "state.pt", weights_only=True) == state


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule("step", step_size=0), "--schedule.step-size 0: use at least 1"),
        (Schedule(gamma=0.0), "--schedule.gamma 0.0: use a positive number"),
        (Schedule(gamma=float("nan")), "--schedule.gamma nan: use a finite number"),
    ],
)
def test_settings_out_of_range(schedule: Schedule, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(schedule=schedule)
