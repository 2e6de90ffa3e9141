"""Several processes, each with a shard of the batch, estimate what one process estimates from all of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from together import together
from torch import Tensor, nn

import onward
from onward.estimators.forward_gradient import GUESSES, OF_HEADS, TARGETS
from onward.spaces import SPACES

FORWARD = {"local", "random", "ntk", "fixed-ntk", "feedback"}, ("activation", "activation-2", "avg-weight", "f-activation")
SHARDS = {2: (5, 4), 4: (3, 1, 3, 2)}
CLASSES = 3
Options = dict[str, Any]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU())
    second = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.Tanh())
    return nn.Sequential(first, second, nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))).double()


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {
        "0": nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)).double(),
        "1": nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)).double(),
    }


def data(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (samples,), generator=generator)


def build(kind: str, **options: Any) -> onward.Estimator:
    made = {
        "bp": partial(onward.Backprop),
        "bp-checkpoint": partial(onward.Backprop, checkpoint=True),
        "local": partial(onward.LocalLoss, heads=heads()),
        "dfa": onward.DFA,
        "dkp": onward.DKP,
        "fdfa": onward.FDFA,
        "fg": onward.ForwardGradient,
    }[kind]
    if kind == "fg" and not OF_HEADS.isdisjoint({options.get("target"), options.get("guess")}):
        options["heads"] = heads()
    return made(network(), seed=5, **options)


def plain() -> Iterator[tuple[str, Options]]:
    for kind in ("bp", "bp-checkpoint", "local", "dfa", "dkp", "fdfa"):
        yield kind, {}
    for kind in ("dfa", "dkp", "fdfa"):
        yield kind, {"low_memory": True}
    yield "fdfa", {"directions": 2, "noise": "rademacher"}
    yield "fg", {"directions": 3, "orthogonal": True}
    yield "fg", {"directions": 2, "scaling": "projection", "engine": "reverse", "space": "weight"}
    yield "fg", {"guess": "local", "eps": 0.01}
    yield "fg", {"guess": "local", "eps": 0.01, "space": "avg-weight"}
    yield "fg", {"guess": "feedback", "eps": 0.01, "space": "weight", "engine": "reverse"}
    yield "fg", {"guess": "local", "passes": "one"}
    yield "fg", {"guess": "local", "passes": "one", "space": "avg-weight"}
    for engine in ("forward", "reverse"):
        yield "fg", {"space": "avg-weight", "engine": engine, "directions": 2}
        yield "fg", {"space": "avg-weight", "engine": engine, "cuts": ["0", "1"]}
        yield "fg", {"space": "random-sign-weight", "engine": engine, "guess": "random"}


def family(targets: Sequence[str], guesses: Sequence[str]) -> Iterator[tuple[str, Options]]:
    for target, guess, space in itertools.product(targets, guesses, SPACES):
        options: Options = {"target": target, "guess": guess, "space": space, "cuts": ["0", "1"]}
        yield "fg", {**options, "engine": "reverse"}
        if guess in FORWARD[0] and space in FORWARD[1]:
            yield "fg", options


def two_steps(estimator: onward.Estimator, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The loss and every gradient of two steps, with a change of all that learns in between."""
    found = {}
    for n in range(2):
        estimator.zero_grad()
        found[f"loss {n}"] = estimator.estimate(x, y).loss
        with torch.no_grad():
            for name, p in estimator.named_parameters():
                if p.grad is not None:
                    found[f"{name} {n}"] = p.grad.clone()
                    p.sub_(p.grad, alpha=0.1)
    return found


def shard_of_two_steps(rank: int, kinds: list[tuple[str, Options]], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    x, y = data(sum(sizes))
    x, y = x.split(tuple(sizes))[rank], y.split(tuple(sizes))[rank]
    return [two_steps(onward.distribute(build(kind, **options)), x, y) for kind, options in kinds]


def assert_the_same(kinds: list[tuple[str, Options]], sizes: Sequence[int]) -> None:
    everyone = together(len(sizes), shard_of_two_steps, kinds, sizes)
    for index, (kind, options) in enumerate(kinds):
        alone = two_steps(build(kind, **options), *data(sum(sizes)))
        for rank, results in enumerate(everyone):
            found = results[index]
            assert found.keys() == alone.keys()
            for name, value in alone.items():
                where = f"{kind} {options}, process {rank}: {name}"
                assert torch.equal(found[name], everyone[0][index][name]), where
                torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, w=where: f"{w}: {m}")


@pytest.mark.parametrize("processes", SHARDS)
def test_every_estimator_gives_the_gradients_of_one_process(processes: int) -> None:
    assert_the_same(list(plain()), SHARDS[processes])


def test_the_family_gives_the_gradients_of_one_process() -> None:
    assert_the_same(list(family(["global", "local"], ["local", "random", "feedback"])), SHARDS[2])


@pytest.mark.slow
@pytest.mark.parametrize("processes", SHARDS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_whole_family_gives_the_gradients_of_one_process(target: str, processes: int) -> None:
    assert_the_same(list(family([target], list(GUESSES))), SHARDS[processes])
