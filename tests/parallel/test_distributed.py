"""Several processes, each with a shard of the batch, estimate what one process estimates from all of it."""

from __future__ import annotations

import copy
import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from cases import DIRECT
from together import in_group, start, together
from torch import Tensor, nn

import onward
from onward.estimators.forward_gradient.estimator import GUESSES, OF_HEADS, TARGETS
from onward.estimators.forward_gradient.spaces import SPACES

FORWARD = {"local", "random", "ntk", "fixed-ntk", "feedback"}, ("activation", "activation-2", "avg-weight", "f-activation")
SHARDS = {2: (5, 4), 4: (3, 1, 3, 2)}
CLASSES = 3
STEPS = 1000
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
        "spsa": onward.SPSA,
        "node": onward.NodePerturbation,
        "brsf": onward.BRSF,
        "kp": onward.KolenPollack,
        "ff": onward.ForwardForward,
        **DIRECT,
        "fg": onward.ForwardGradient,
    }[kind]
    if kind == "fg" and not OF_HEADS.isdisjoint({options.get("target"), options.get("guess")}):
        options["heads"] = heads()
    return made(network(), seed=5, **options)


def plain() -> Iterator[tuple[str, Options]]:
    for kind in ("bp", "bp-checkpoint", "local", "brsf", "kp", "ff", *DIRECT):
        yield kind, {}
    for kind in DIRECT:
        yield kind, {"low_memory": True}
    yield "fdfa", {"directions": 2, "noise": "rademacher"}
    yield "spsa", {"directions": 2}
    yield "node", {"directions": 2}
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


def scalar_only_run(rank: int, processes: int, width: int, steps: int, kind: str = "fg") -> tuple[int, dict[str, Tensor]]:
    """Bytes that a process sent in each step, and the weights at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, CLASSES)).double()
    estimator = onward.SPSA(model, seed=5) if kind == "spsa" else onward.ForwardGradient(model, space="avg-weight", seed=5)
    if processes > 1:
        onward.distribute(estimator)
    lean = kind == "spsa"
    optimizer = onward.Lean(estimator, lr=1e-3) if lean else torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(2)
    sent = {0}
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, (8,), generator=generator)
        before = getattr(estimator.shard, "sent", 0)
        optimizer.zero_grad()
        estimator.estimate(x[rank::processes], y[rank::processes])
        optimizer.step()
        sent.add(getattr(estimator.shard, "sent", 0) - before)
    return max(sent), model.state_dict()


@pytest.mark.parametrize(("kind", "steps"), [pytest.param("fg", STEPS, marks=pytest.mark.slow), ("fg", 100), ("spsa", 30)])
def test_only_scalars_travel_and_weights_stay_bitwise_equal(kind: str, steps: int) -> None:
    everyone = together(2, scalar_only_run, 2, 12, steps, kind)
    _, alone = scalar_only_run(0, 1, 12, steps, kind)
    for sent, weights in everyone:
        assert sent == 24  # the number of samples, the derivative and the loss, 8 bytes each
        for name, value in weights.items():
            assert torch.equal(value, everyone[0][1][name])
            torch.testing.assert_close(value, alone[name], rtol=1e-9, atol=1e-12)
    assert {sent for sent, _ in together(2, scalar_only_run, 2, 1200, 2, kind)} == {everyone[0][0]}


def accumulated(rank: int) -> list[Tensor]:
    """Gradients of two batches on top of one another, and of the first alone."""
    x, y = data(8)
    x, y = x.chunk(2)[rank], y.chunk(2)[rank]
    estimator = onward.distribute(build("dkp"))
    weight = estimator.get_parameter("model.0.0.weight")
    estimator.estimate(x[:2], y[:2])
    first = weight.grad.clone()
    estimator.estimate(x[2:], y[2:])
    return [first, weight.grad]


def test_gradients_add_up_over_batches() -> None:
    x, y = data(8)
    estimator = build("dkp")
    estimator.estimate(x[[0, 1, 4, 5]], y[[0, 1, 4, 5]])
    first = estimator.get_parameter("model.0.0.weight").grad.clone()
    estimator.estimate(x[[2, 3, 6, 7]], y[[2, 3, 6, 7]])
    for found in together(2, accumulated):
        torch.testing.assert_close(found, [first, estimator.get_parameter("model.0.0.weight").grad])


def fails_after(rank: int) -> bool:
    """Whether a step that cannot be made leaves the gradient of the step before."""
    x, y = data(8)
    estimator = onward.distribute(build("dfa"))
    estimator.estimate(x, y)
    weight = estimator.get_parameter("model.0.0.weight")
    before = weight.grad.clone()
    with pytest.raises(onward.UsageError, match="labels run from 0 to 2"):
        estimator.estimate(x, y + CLASSES)
    return torch.equal(weight.grad, before)


def test_a_step_that_fails_loses_no_gradient() -> None:
    assert together(2, fails_after) == [True, True]


class Gate(nn.Module):
    """Uses its layer for some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.never = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.shape[0] > 2 else x


def gated(rank: int) -> tuple[bool, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(Gate(), nn.Linear(6, CLASSES)).double()
    samples = (3, 2)[rank]
    onward.distribute(onward.Backprop(model)).estimate(torch.ones(samples, 6).double(), torch.zeros(samples).long())
    return model[0].never.weight.grad is None, model[0].layer.weight.grad


def test_a_parameter_that_one_process_uses_is_averaged_and_one_that_none_uses_keeps_no_gradient() -> None:
    (unused, gradient), (also_unused, other) = together(2, gated)
    assert unused
    assert also_unused
    assert gradient.abs().sum() > 0
    assert torch.equal(gradient, other)


def with_batch_norm(rank: int, statistics: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, CLASSES))
    estimator = onward.distribute(onward.DFA(model), statistics=statistics)
    estimator.estimate(torch.randn(5, 6), torch.zeros(5).long())
    return model[1].running_mean, model[0].weight.detach()


def test_running_statistics_are_averaged_or_left_alone() -> None:
    (local, weight), (other, same) = together(2, with_batch_norm, "local")
    assert not torch.equal(local, other)
    assert torch.equal(weight, same)  # those of the first process
    for mean, _ in together(2, with_batch_norm, "averaged"):
        torch.testing.assert_close(mean, (local + other) / 2)


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    second = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5, momentum=None, affine=False), nn.Tanh())
    return nn.Sequential(first, second, nn.Linear(5, CLASSES)).double()


NORMED: list[tuple[Callable[..., onward.Estimator], Options]] = [
    (onward.Backprop, {}),
    (onward.Backprop, {"checkpoint": True}),
    (onward.DFA, {}),
    (onward.DKP, {"low_memory": True}),
    (onward.FDFA, {"directions": 2}),
    (onward.ForwardGradient, {}),
    (onward.ForwardGradient, {"engine": "reverse", "guess": "feedback"}),
    (onward.ForwardGradient, {"space": "avg-weight"}),
]


def synchronised(rank: int) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    x, y = (t.split(SHARDS[2])[rank] for t in data(sum(SHARDS[2])))
    found = []
    for kind, options in NORMED:
        estimator = onward.distribute(kind(normed(), seed=5, **options), statistics="synchronised")
        gradients = two_steps(estimator, x, y)
        alone = copy.deepcopy(estimator)
        with torch.no_grad():
            alone(x)  # a copy speaks with nobody
        found.append((gradients, dict(estimator.named_buffers())))
    return found


def test_synchronised_batch_norm_gives_the_gradients_and_statistics_of_one_process() -> None:
    for everyone in together(2, synchronised):
        for (kind, options), (gradients, buffers) in zip(NORMED, everyone, strict=True):
            estimator = kind(normed(), seed=5, **options)
            wanted = two_steps(estimator, *data(sum(SHARDS[2])))
            torch.testing.assert_close(
                gradients, wanted, rtol=1e-9, atol=1e-11, msg=lambda m, k=kind, o=options: f"{k} {o}: {m}"
            )
            torch.testing.assert_close(buffers, dict(estimator.named_buffers()))


def refused(rank: int, what: str) -> str:
    torch.manual_seed(0)
    width = 4 + rank if what == "other network" else 4
    model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))

    def attempt() -> None:
        made = onward.ForwardGradient(model, space="weight", engine="reverse") if what == "spaces" else onward.DFA(model)
        statistics = {"statistics": "sum", "spaces": "synchronised"}.get(what, "local")
        estimator = onward.distribute(made, statistics=statistics)
        estimator.estimate(torch.randn(1 - rank, 6), torch.zeros(1 - rank).long())

    with pytest.raises(onward.UsageError) as error:
        attempt()
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("other network", "process 1 has other parameters or buffers .* than process 0: build the same network"),
        ("statistics", "unknown handling of batch norm's statistics 'sum'"),
        ("spaces", "statistics='synchronised' with space='weight', which takes each sample's gradient by itself"),
        ("empty", "process 1 of 2 has no sample of this batch: give every process at least one"),
    ],
)
def test_what_cannot_work_is_refused_in_every_process(what: str, message: str) -> None:
    for said in together(2, refused, what):
        assert re.search(message, said)


def test_without_a_group_the_remedy_is_named() -> None:
    with pytest.raises(onward.UsageError, match="no process group: start the script with torchrun"):
        onward.distribute(build("dfa"))


def loses_one(rank: int, lost: int, how: signal.Signals) -> tuple[str, float]:
    x, y = data(8)
    estimator = onward.distribute(build("fdfa"))

    def go_on() -> None:
        while True:
            estimator.estimate(x, y)

    estimator.estimate(x, y)
    if rank == lost:
        os.kill(os.getpid(), how)
    start = time.monotonic()
    with pytest.raises(onward.ProcessLost) as error:
        go_on()
    return str(error.value), time.monotonic() - start


LATER = pytest.mark.slow


@pytest.mark.parametrize(
    ("lost", "how"),
    [(2, signal.SIGKILL), pytest.param(0, signal.SIGKILL, marks=LATER), pytest.param(1, signal.SIGSTOP, marks=LATER)],
)
def test_a_process_that_is_gone_is_named_within_a_minute(lost: int, how: signal.Signals) -> None:
    ended = start(4, partial(in_group, 20, loses_one), lost, how)
    for rank in set(range(4)) - {lost}:
        said, seconds = ended[rank].result
        assert seconds < 60
        assert said == f"process {lost} of 4 failed or no longer answers"


def wrapped(kind: str, place: str) -> nn.Module:
    """A network in a wrapper of PyTorch's, as a whole or in part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 3))

    def wrap(module: nn.Module) -> nn.Module:
        match kind:
            case "DataParallel":
                return nn.DataParallel(module)
            case "DistributedDataParallel":
                return nn.parallel.DistributedDataParallel(module)
            case "FullyShardedDataParallel":
                from torch.distributed.fsdp import FullyShardedDataParallel

                return FullyShardedDataParallel(module, device_id=torch.device("cpu"))
        from torch.distributed.fsdp import fully_shard

        return fully_shard(module)

    if place == "whole":
        return wrap(model)
    model[0] = wrap(model[0])
    return model


def refuse_wrapped(rank: int, kind: str, place: str, cut: str) -> None:
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    said = rf"is wrapped in {kind}, .* without the wrapper \(model.module\), and call onward.distribute\(estimator\)"
    makes: list[Callable[[nn.Module], onward.Estimator]] = [
        lambda m: onward.DFA(m, [cut]),
        lambda m: onward.FDFA(m, [cut]),
        lambda m: onward.LocalLoss(m, [cut], heads={cut: nn.Linear(8, 3)}),
        lambda m: onward.ForwardGradient(m, [cut]),
        onward.ForwardGradient,
    ]
    for make in makes:
        with pytest.raises(onward.UsageError, match=said):
            make(wrapped(kind, place))
    plain = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 3))
    estimator = onward.DFA(plain)
    estimator.model = wrapped(kind, place)  # after it was made
    with pytest.raises(onward.UsageError, match=said):
        estimator.estimate(x, y)
    onward.distribute(onward.DFA(plain)).estimate(x, y)


@pytest.mark.parametrize("place", ["whole", "part"])
@pytest.mark.parametrize("kind", ["DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"])
def test_a_wrapper_that_exchanges_gradients_is_refused(kind: str, place: str) -> None:
    together(1, refuse_wrapped, kind, place, "module.0" if place == "whole" and kind != "FSDPModule" else "0")


def backprop_in_a_wrapper(rank: int) -> list[Tensor]:
    model = wrapped("DistributedDataParallel", "whole")
    x, y = torch.arange(32.0).view(8, 4).sin(), torch.tensor([0, 1, 2, 1, 0, 2, 2, 1])
    half = slice(4 * rank, 4 * rank + 4)
    onward.Backprop(model).estimate(x[half], y[half])
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_backpropagation_works_in_a_wrapper() -> None:
    """Which is made for it."""
    first, second = together(2, backprop_in_a_wrapper)
    (whole,) = together(1, backprop_whole)
    torch.testing.assert_close(first, whole)
    torch.testing.assert_close(second, whole)


def backprop_whole(rank: int) -> list[Tensor]:
    model = wrapped("DistributedDataParallel", "whole").module
    x, y = torch.arange(32.0).view(8, 4).sin(), torch.tensor([0, 1, 2, 1, 0, 2, 2, 1])
    onward.Backprop(model).estimate(x, y)
    return [p.grad for p in model.parameters() if p.grad is not None]


def seed_and_step(rank: int) -> list[int]:
    estimator = onward.DFA(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), seed=5 + rank)
    estimator.step = 3 * (1 - rank)
    return onward.distribute(estimator).state_dict()["_extra_state"].tolist()


def test_seed_and_step_are_those_of_the_first_process() -> None:
    assert together(2, seed_and_step) == [[3, 5], [3, 5]]


SPARSE: list[Callable[..., onward.Estimator]] = [
    onward.Backprop,
    onward.DFA,
    onward.ForwardGradient,
    partial(onward.ForwardGradient, engine="reverse", space="weight"),
]


def sparse_steps(rank: int, processes: int) -> list[tuple[bool, Tensor]]:
    found = []
    ids, y = torch.arange(30).view(6, 5) * 7 % 11, torch.tensor([0, 1, 2, 1, 0, 2])
    mine = slice(0, 6) if processes == 1 else slice(0, 4) if rank == 0 else slice(4, 6)
    for make in SPARSE:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(40, 3, sparse=True), nn.Sequential(nn.Flatten(), nn.Linear(15, 8), nn.Tanh()))
        model.append(nn.Linear(8, 3)).double()
        estimator = onward.distribute(make(model, ["0", "1"]))
        for _ in range(2):  # they add up
            estimator.estimate(ids[mine], y[mine])
        found.append((model[0].weight.grad.is_sparse, model[0].weight.grad.to_dense()))
    return found


def test_sparse_gradients_are_averaged_and_stay_sparse() -> None:
    (whole,) = together(1, sparse_steps, 1)
    for one in together(2, sparse_steps, 2):
        for (sparse, gradient), (_, wanted) in zip(one, whole, strict=True):
            assert sparse
            torch.testing.assert_close(gradient, wanted)
