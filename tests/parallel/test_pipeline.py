"""Stages of a pipeline: the numbers of one process, and errors in place of wrong numbers or silence."""

from __future__ import annotations

import copy
import math
import os
import runpy
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CLASSES, any_heads, normal
from cases import DIRECT as RULES
from reference import close
from together import in_group, start, together
from torch import Tensor, nn

import onward
from onward import DFA, FDFA, Backprop, Estimator, ForwardGradient, LocalLoss, ProcessLost, Stage, UsageError

STEPS = 4
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def network(batch_norm: bool = True) -> nn.Sequential:
    """Four blocks, of which the second ends in a module without parameters and the last starts with one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d if batch_norm else lambda width: nn.GroupNorm(1, width)
        first = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), norm(3), nn.ReLU())
        second = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 3, padding=1))
        third = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.Tanh())
        return nn.Sequential(first, second, nn.ReLU(), third, nn.Dropout(0.0), nn.Linear(6, CLASSES)).double()


CUTS = ("0", "2", "3")


def batches(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """The last is smaller."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = [5] * (steps - 1) + [3]
        return [(normal(size, 2, 6, 6), torch.randint(CLASSES, (size,))) for size in sizes]


def forward_gradient(**options: Any) -> Callable[[nn.Module], Estimator]:
    return lambda model: ForwardGradient(model, CUTS, target="local", heads=any_heads(model, CUTS), seed=2, **options)


LOCAL: dict[str, Callable[[nn.Module], Estimator]] = {
    "local": lambda model: LocalLoss(model, CUTS, heads=any_heads(model, CUTS)),
    "random": forward_gradient(),
    "random, reverse": forward_gradient(engine="reverse"),
    "two directions": forward_gradient(directions=2, passes="block"),
    "ntk": forward_gradient(guess="ntk"),
    "fixed ntk, one pass": forward_gradient(guess="fixed-ntk", passes="one"),
    "local, of samples": forward_gradient(guess="local", engine="reverse", space="weight"),
    "random, of samples": forward_gradient(engine="reverse", space="sign-weight"),
    "parameters": forward_gradient(space="avg-weight"),
    "parameters, ntk": forward_gradient(guess="ntk", space="avg-weight"),
    "coins": forward_gradient(space="random-sign-weight"),
}
DIRECT: dict[str, Callable[[nn.Module], Estimator]] = {
    **{name: partial(kind, cuts=CUTS, seed=2) for name, kind in RULES.items()},
    "fdfa": partial(FDFA, cuts=CUTS, seed=2, directions=2),
}


def optimizer_of(estimator: Estimator) -> torch.optim.Optimizer:
    return torch.optim.SGD(estimator.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def train_stage(
    rank: int, make: Callable[[nn.Module], Estimator], parts: Sequence[int] | None, batch_norm: bool = True, **options: Any
) -> tuple[list[float], dict[str, Any] | None, Tensor | None]:
    """The losses, the whole state in the first process, the output for the first batch in the last."""
    estimator = make(network(batch_norm))
    stage = Stage(estimator, parts, **options)
    optimizer = optimizer_of(estimator)
    losses = []
    for x, y in batches():
        optimizer.zero_grad()
        step = stage.estimate(x if rank == 0 else None, y)
        losses.append(float("nan") if step is None else float(step.loss))
        optimizer.step()
    optimizer.zero_grad()
    while step := stage.flush():
        losses.append(float(step.loss))
        optimizer.step()
        optimizer.zero_grad()
    estimator.eval()
    output = stage(batches()[0][0])
    stage.flush()
    return losses, stage.full_state_dict(), output


def train_all(rank: int, names: Sequence[str], *args: Any, **options: Any) -> dict[str, Any]:
    return {name: train_stage(rank, {**LOCAL, **DIRECT}[name], *args, **options) for name in names}


def train_direct(rank: int, staleness: int, microbatches: int, batch_norm: bool) -> dict[str, Any]:
    return train_all(rank, list(DIRECT), None, batch_norm, staleness=staleness, microbatches=microbatches)


def expected(
    make: Callable[[nn.Module], Estimator], batch_norm: bool = True, late: int = 0, staleness: int = 0
) -> tuple[list[float], Estimator, Tensor]:
    """One process; what the first ``late`` children estimate is applied some steps later."""
    estimator = make(network(batch_norm))
    optimizer = optimizer_of(estimator)
    losses = []
    of_late = [p for child in list(estimator.model)[:late] for p in child.parameters()]
    kept: list[list[Tensor | None]] = []
    for x, y in batches():
        optimizer.zero_grad()
        losses.append(float(estimator.estimate(x, y).loss))
        kept.append([p.grad for p in of_late])
        apply(of_late, kept.pop(0) if len(kept) > staleness else [None] * len(of_late))
        optimizer.step()
    for gradients in kept:
        optimizer.zero_grad()
        apply(of_late, gradients)
        optimizer.step()
    estimator.eval()
    with torch.no_grad():
        return losses, estimator, estimator(batches()[0][0])


def apply(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient


def compare(results: list[tuple[list[float], Any, Any]], reference: tuple[list[float], Estimator, Tensor], name: str) -> None:
    losses, estimator, output = reference
    torch.testing.assert_close(results[-1][0], losses, rtol=1e-10, atol=1e-12, msg=lambda m: f"{name}: {m}")
    whole = estimator.state_dict()
    assert results[0][1].keys() == whole.keys()
    for key, value in whole.items():
        if isinstance(value, Tensor):
            close(results[0][1][key], value, f"{name}: {key}")
        else:
            assert results[0][1][key] == value
    torch.testing.assert_close(results[-1][2], output)
    assert all(result[1] is None for result in results[1:])
    assert all(result[2] is None for result in results[:-1])
    fresh = copy.deepcopy(estimator)
    fresh.load_state_dict(results[0][1])


SPLITS = [pytest.param([4], marks=pytest.mark.slow), pytest.param([1, 3], marks=pytest.mark.slow), [2, 1, 1]]


@pytest.mark.parametrize("parts", SPLITS, ids=str)
def test_local_losses_equal_one_process(parts: list[int]) -> None:
    results = together(len(parts), train_all, list(LOCAL), parts)
    for name, make in LOCAL.items():
        compare([result[name] for result in results], expected(make), name)


@pytest.mark.parametrize("parts", SPLITS, ids=str)
def test_direct_feedback_equals_one_process(parts: list[int]) -> None:
    results = together(len(parts), train_all, list(DIRECT), parts)
    for name, make in DIRECT.items():
        compare([result[name] for result in results], expected(make), name)
        for result in results:  # every process knows the loss of the batch that it learned from
            assert result[name][0] == results[-1][name][0]


@pytest.mark.parametrize(("processes", "microbatches"), [(1, 2), (2, 3), (3, 2), (2, 9)])
def test_microbatches_change_nothing(processes: int, microbatches: int) -> None:
    """Where samples do not mix; of five samples and of three."""
    results = together(processes, train_direct, 0, microbatches, False)
    for name, make in DIRECT.items():
        compare([result[name] for result in results], expected(make, batch_norm=False), name)


@pytest.mark.parametrize(("processes", "staleness", "microbatches"), [(2, 1, 1), (2, 3, 1), (3, 2, 1), (2, 9, 1), (3, 1, 2)])
def test_stale_signals(processes: int, staleness: int, microbatches: int) -> None:
    """The estimates of one process, those of the blocks before the last process applied later; the rest by ``flush``."""
    batch_norm = microbatches == 1
    results = together(processes, train_direct, staleness, microbatches, batch_norm)
    for name, make in DIRECT.items():  # two of the four blocks, three children, come before the last process
        compare([result[name] for result in results], expected(make, batch_norm, 3, staleness), name)


def train_with_dropout(rank: int, kind: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(50, 50), nn.Dropout(0.5)) for _ in range(2)]
    model = nn.Sequential(*blocks, nn.Linear(50, CLASSES))
    heads = any_heads(model, ["0", "1"])
    stage = Stage(LocalLoss(model, heads=heads) if kind == "local" else FDFA(model), [1, 2], microbatches=1)
    masks: list[Tensor] = []
    model[rank][1].register_forward_hook(lambda module, args, output: masks.append(output == 0))
    for _ in range(2):
        x, y = torch.randn(6, 50), torch.randint(CLASSES, (6,))  # as a data loader would
        stage.estimate(x, y)
    stage.flush()
    return torch.stack(masks), torch.get_rng_state()


@pytest.mark.parametrize("kind", ["local", "fdfa"])
def test_masks_differ_and_data_stay_the_same(kind: str) -> None:
    (first, first_state), (second, second_state) = together(2, train_with_dropout, kind)
    assert torch.equal(first_state, second_state)
    for a, b in ((first[0], first[1]), (second[0], second[1]), (first[0], second[0])):
        assert 0.4 < (a == b).float().mean() < 0.6


def describe(rank: int, kind: str) -> dict[str, int]:
    estimator = {**LOCAL, **DIRECT}[kind](network())
    estimator.estimate(*batches()[0])  # sizes the feedback
    Stage(estimator, [2, 2])
    return {name: p.numel() for name, p in estimator.named_parameters() if not isinstance(p, nn.UninitializedParameter)}


@pytest.mark.parametrize("kind", ["local", "ntk", "dkp"])
def test_a_process_holds_its_part_alone(kind: str) -> None:
    whole = {**LOCAL, **DIRECT}[kind](network())
    whole.estimate(*batches()[0])
    first, second = together(2, describe, kind)
    assert not first.keys() & second.keys()
    assert {**first, **second} == {name: p.numel() for name, p in whole.named_parameters()}
    assert not any(name.startswith(("model.3.", "model.5.", "heads.by_cut.2.", "feedback.2")) for name in first)


def other_labels(rank: int) -> str:
    stage = Stage(DIRECT["dfa"](network()), staleness=1)
    (x, y), *_ = batches()
    stage.estimate(x, y)
    try:
        stage.estimate(x, y if rank == 0 else y.flip(0))
        stage.flush()
    except (UsageError, ProcessLost) as error:
        return str(error)
    return ""


def other_steps(rank: int) -> str:
    stage = Stage(DIRECT["dfa"](network()), staleness=1)
    (x, y), *_ = batches()
    try:
        stage.estimate(x, y)
        if rank == 0:
            stage(x)
        stage.estimate(x, y)
        stage.estimate(x, y)
        stage.flush()
    except (UsageError, ProcessLost) as error:
        return str(error)
    return ""


def test_processes_that_see_different_batches_are_told() -> None:
    lost, told = together(2, other_labels)
    assert lost == LOST
    assert told.startswith("process 1 has other labels in step 1 than the processes before it: every process has to go")


def test_processes_that_take_different_steps_are_told() -> None:
    """Here an evaluation that only one of them makes."""
    lost, told = together(2, other_steps)
    assert lost == LOST
    assert told.startswith("process 1 is at step 2 and was handed step 1 by process 0: every process has to call estimate")


LOST = "process 1 of 2 failed or no longer answers, process 0 noticed"


def leave(rank: int, how: str) -> tuple[str, float]:
    stage = Stage({**LOCAL, **DIRECT}["local" if how == "locally" else "dfa"](network()))
    (x, y), *_ = batches()
    began = time.perf_counter()
    try:
        for _ in range(1 if rank == 1 else 1000):
            stage.estimate(x, y)
    except ProcessLost as error:
        return str(error), time.perf_counter() - began
    if how == "silent":
        time.sleep(8)
    os._exit(3)


@pytest.mark.parametrize("how", ["gone", "silent", "locally"])
def test_a_lost_process_is_named(how: str) -> None:
    left, gone = start(2, partial(in_group, 2, leave), how)
    assert gone.exit_code == 3
    told, seconds = left.result
    assert told == LOST
    assert seconds < 7


def refused(rank: int) -> dict[str, str]:
    """The messages of everything that cannot be divided, by one of three processes."""
    stages: dict[str, Callable[[], object]] = {
        "backprop": lambda: Stage(Backprop(network())),
        "global": lambda: Stage(ForwardGradient(network(), CUTS)),
        "feedback": lambda: Stage(forward_gradient(guess="feedback")(network())),
        "low memory": lambda: Stage(DFA(network(), CUTS, low_memory=True)),
        "stale": lambda: Stage(LOCAL["local"](network()), staleness=1),
        "negative": lambda: Stage(DFA(network(), CUTS), staleness=-1),
        "distributed": lambda: Stage(onward.distribute(DFA(network(), CUTS))),
        "no sequential": lambda: Stage(DFA(Wrapped(), ["whole.0"])),
        "inside": lambda: Stage(DFA(network(), ["0", "3.1"])),
        "tied": lambda: Stage(DFA(tied(), ["0", "1"])),
        "too few": lambda: Stage(DFA(network(), ["0"])),
        "parts": lambda: Stage(DFA(network(), CUTS), [1, 1, 1]),
        "parts of two": lambda: Stage(DFA(network(), CUTS), [2, 2]),
    }
    told = {}
    for name, make in stages.items():
        with pytest.raises(UsageError) as error:
            make()
        told[name] = str(error.value)
    return told


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x)


def tied() -> nn.Sequential:
    shared = nn.Linear(4, 4)
    return nn.Sequential(shared, nn.Sequential(nn.Tanh(), shared), nn.Linear(4, 2))


REFUSED = {
    "backprop": "Backprop has a backward lock",
    "global": "target='global' needs the blocks of other processes: in a pipeline use target='local', or DFA",
    "feedback": "guess='feedback' needs the blocks of other processes: in a pipeline use guess='local' or 'random'",
    "low memory": "low_memory=True runs the network twice",
    "stale": "staleness=1, microbatches=1: LocalLoss waits for no other process",
    "negative": "staleness=-1, microbatches=1: use at least 0 and 1",
    "distributed": "this estimator is distributed over shards",
    "no sequential": "Wrapped is not a Sequential",
    "inside": "cut '3.1' lies inside a child of the Sequential",
    "tied": "'1' shares a parameter with the block of '0'",
    "too few": "3 processes for 2 blocks: use at most 2",
    "parts": "parts=[1, 1, 1] for 3 processes and 4 blocks",
    "parts of two": "parts=[2, 2] for 3 processes and 4 blocks",
}


def test_what_cannot_be_divided_is_refused() -> None:
    for told in together(3, refused):
        assert told.keys() == REFUSED.keys()
        for name, begins in REFUSED.items():
            assert told[name].startswith(begins), told[name]


def test_the_bubble_is_what_the_documentation_derives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    simulate = runpy.run_path(str(BENCHMARKS / "pipeline.py"))["simulate"]
    for p, m, b in [(2, 1, 2.0), (3, 2, 1.0), (4, 4, 2.0), (4, 9, 1.5), (8, 3, 2.0)]:
        for method in ("gpipe", "1f1b"):
            assert simulate(method, p, m, backward=b) == pytest.approx((p - 1) / (m + p - 1))
        direct = max(0, p - m) / (max(m, p) + m * b)
        assert simulate("direct", p, m, backward=b) == pytest.approx(direct)
        assert simulate("local", p, backward=b) == 0
        enough = math.ceil((p - 1) / (1 + b))
        assert simulate("direct", p, s=enough, backward=b) == 0
        assert simulate("direct", p, s=enough - 1, backward=b) > 0


def run_example(rank: int) -> float | None:
    return runpy.run_path(str(BENCHMARKS.parent / "examples" / "pipeline.py"))["main"]()


def test_the_example_learns() -> None:
    first, last = together(2, run_example)
    assert first is None
    assert last > 0.8


def test_without_a_process_group() -> None:
    with pytest.raises(UsageError, match="there is no process group: start the script with torchrun"):
        Stage(DFA(network(), CUTS))
