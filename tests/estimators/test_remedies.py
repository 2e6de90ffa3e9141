"""What is refused is told by what is the matter, and with a remedy that works: each is followed here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward import DFA, ForwardGradient, UsageError

OUT_OF_RANGE: dict[str, tuple[tuple[int, ...], Any, tuple[int, ...]]] = {
    "rows": ((4, 3), F.cross_entropy, (4,)),
    "positions": ((4, 3, 5), F.cross_entropy, (4, 5)),
    "pixels": ((4, 3, 5, 6), F.cross_entropy, (4, 5, 6)),
    "words": ((4, 5, 3), lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()), (4, 5)),
    "indices": ((4, 3), lambda z, y: -z.log_softmax(1)[torch.arange(4), y].mean(), (4,)),
}


class Shaped(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        size = torch.Size(shape[1:])
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, size.numel())
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()).unflatten(1, self.size)


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_the_classes_are_counted_where_they_are(name: str) -> None:
    shape, loss, labels = OUT_OF_RANGE[name]
    estimator, x = DFA(Shaped(shape), ["first"], loss=loss), torch.randn(4, 3)
    with pytest.raises(UsageError, match=r"7 is out of bounds.* The network has 3 outputs, so labels run from 0 to 2: check"):
        estimator.estimate(x, torch.full(labels, 7))
    estimator.estimate(x, torch.full(labels, 2))


def test_where_nobody_knows_how_many_classes_there_are() -> None:
    estimator = DFA(Shaped((4, 5, 3)), ["first"], loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y["labels"].flatten()))
    with pytest.raises(UsageError, match=r"Target 7 is out of bounds. Check the labels, or give the network as many outputs"):
        estimator.estimate(torch.randn(4, 3), {"labels": torch.full((4, 5), 7)})


def test_other_errors_of_a_loss_are_its_own() -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(2, 3), torch.tensor([0, 1])
    weights = [1.0]
    for wrong, said in (
        (lambda z, y: F.cross_entropy(z, y) * weights[1], "list index out of range"),
        (lambda z, y: F.cross_entropy(z, y) * torch.ones(5)[7], "index 7 is out of bounds for dimension 0 with size 5"),
    ):
        with pytest.raises(IndexError, match=f"^{said}$"):
            DFA(model, loss=wrong).estimate(x, y)


HEADS_OF_ONE_SAMPLE = {
    "local": onward.LocalLoss,
    "forward": partial(ForwardGradient, guess="local", target="local"),
    "reverse": partial(ForwardGradient, guess="local", engine="reverse"),
    "fixed": partial(ForwardGradient, guess="fixed-ntk"),
}


@pytest.mark.parametrize("make", HEADS_OF_ONE_SAMPLE.values(), ids=HEADS_OF_ONE_SAMPLE)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_one_sample_for_heads_with_batch_norm(make: Any, head: str) -> None:
    """The network has none. And what the sentence advises works."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(4, 3)
    estimator = make(model, heads=onward.make_heads(model, x, head))
    one, label = x[:1], torch.tensor([1])
    with pytest.raises(UsageError, match=r"no batch statistics: the heads have batch norm, .* at least 2 .* kind='predsim'"):
        estimator.estimate(one, label)
    estimator.estimate(x[:2], torch.tensor([1, 0]))
    if make is onward.LocalLoss:
        make(model, heads=onward.make_heads(model, x, "predsim")).estimate(one, label)
    make(model, heads={"1": nn.Linear(4, 3)}).estimate(one, label)


def test_the_advice_on_a_last_block_without_parameters_can_be_followed() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2).requires_grad_(False))

    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    with pytest.raises(UsageError, match=r"nothing after the cut '3' requires .* Leave out that cut, or unfreeze the output"):
        DFA(network(), ["1", "3"]).estimate(x, y)
    DFA(network(), ["1"]).estimate(x, y)
    DFA(network().requires_grad_(), ["1", "3"]).estimate(x, y)


def test_without_a_cut_the_advice_can_be_followed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(UsageError, match=r"cuts=\[\]: without a cut, DFA .* \(onward.suggest_cuts proposes some\)"):
        DFA(model, [])
    DFA(model, onward.suggest_cuts(model)).estimate(torch.randn(2, 3), torch.tensor([0, 1]))


X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh())


class Net(nn.Module):
    """Three blocks and a head, run as a function of theirs says."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third, self.head = block(), block(), block(), nn.Linear(3, 3)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def in_turn(net: Any, x: Tensor) -> Tensor:
    return net.head(net.third(net.second(net.first(x))))


def twice(net: Any, x: Tensor) -> Tensor:
    return net.head(net.third(net.second(net.second(net.first(x)))))


def without_call(net: Any, x: Tensor) -> Tensor:
    return net.head(net.third(net.second.forward(net.first(x))))


def around(net: Any, x: Tensor) -> Tensor:
    h = net.first(x)
    return net.head(net.third(net.second(h) + h))


def within_transform(net: Any, x: Tensor) -> Tensor:
    return net.head(net.third(torch.func.vmap(net.first)(x)))


def without_gradients(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = net.first(x)
    return net.head(net.third(net.second(h)))


def frozen_first(run: Callable[[Any, Tensor], Tensor]) -> Net:
    net = Net(run)
    net.first.requires_grad_(False)
    return net


class WithUnit(nn.Module):
    """A residual connection inside a module, at whose end everything passes."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.head = Net(lambda net, x: around(net, x)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.unit(x))


class Tempered(nn.Module):
    """A loss with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z * self.scale, y)


class Scaled(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(block(), Tempering())


class Tempering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(()))

    def forward(self, h: Tensor) -> Tensor:
        return self.last(h) * self.scale


def aliased() -> Net:
    net = Net(in_turn)
    net.other = net.second
    return net


def compiled_blocks() -> Net:
    net = Net(in_turn)
    net.first = torch.compile(net.first, backend="eager")
    return net


Make = Callable[[], onward.Estimator]
FOLLOWED: dict[str, tuple[Make, str, list[Make]]] = {
    "unknown": (
        lambda: DFA(Net(in_turn), ["frist"]),
        r"unknown cut 'frist': did you mean 'first'\?",
        [lambda: DFA(Net(in_turn), ["first"])],
    ),
    "one module": (
        lambda: DFA(aliased(), ["second", "other"]),
        "cuts 'second' and 'other' are the same module: name each module once",
        [lambda: DFA(aliased(), ["second"])],
    ),
    "twice": (
        lambda: DFA(Net(twice), ["second"]),
        r"cut 'second' \(Sequential\) runs more than once .*: cut at a module that runs once, or give each use a module",
        [lambda: DFA(Net(twice), ["first"]), lambda: DFA(Net(in_turn), ["first", "second"])],
    ),
    "order": (
        lambda: DFA(Net(in_turn), ["second", "first"]),
        "cut 'first' ran before cut 'second': name the cuts in the order in which they run",
        [lambda: DFA(Net(in_turn), ["first", "second"])],
    ),
    "not called": (
        lambda: DFA(Net(without_call), ["second"]),
        r"cut 'second' did not run .*: cut at a module that the network calls",
        [lambda: DFA(Net(without_call), ["third"]), lambda: DFA(Net(in_turn), ["second"])],
    ),
    "bypassed": (
        lambda: DFA(WithUnit(), ["unit.second"]),
        r"cut 'unit.second' is bypassed: .* at the end of the residual block, or .*allow_bypass=True",
        [lambda: DFA(WithUnit(), ["unit"]), lambda: DFA(WithUnit(), ["unit.second"], allow_bypass=True)],
    ),
    "inside a transform": (
        lambda: DFA(Net(within_transform), ["first"]),
        r"cut 'first' .* torch.func transform .*: cut outside of it, or use Backprop",
        [lambda: DFA(Net(within_transform), ["third"]), lambda: onward.Backprop(Net(within_transform))],
    ),
    "without gradients": (
        lambda: DFA(Net(without_gradients), ["first", "second"]),
        r"cut 'first' .* with gradients off .*: take it out of that, or freeze it by requires_grad_\(False\) and leave out",
        [lambda: DFA(Net(in_turn), ["first", "second"]), lambda: DFA(frozen_first(without_gradients), ["second"])],
    ),
    "compiled": (
        lambda: DFA(torch.compile(Net(in_turn), backend="eager"), ["_orig_mod.first"]),
        r"compile its blocks instead, such as model.block1 = torch.compile\(model.block1\)",
        [lambda: DFA(compiled_blocks(), ["first", "second"])],
    ),
    "trained loss": (
        lambda: DFA(Net(in_turn), ["first"], loss=Tempered()),
        r"parameters to train \(scale\), .*: make them part of the network's last block, or freeze them",
        [lambda: DFA(Scaled(), ["0"]), lambda: DFA(Net(in_turn), ["first"], loss=Tempered().requires_grad_(False))],
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_advice_is_followed(name: str) -> None:
    wrong, said, right = FOLLOWED[name]
    with pytest.raises(UsageError, match=said):
        wrong().estimate(X, Y)
    for make in right:
        make().estimate(X, Y)
