"""The look at the first batch: rows that are no samples, and a forward mode that is not the backward pass's derivative."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, headed
from torch import Tensor, nn

from onward import DFA, DKP, FDFA, Estimator, ForwardGradient, UsageError, validate
from onward.network.probe import disagreement, mixing, once_in_order, trained

FORWARD: dict[str, Callable[..., Estimator]] = {
    "fdfa": FDFA,
    "fdfa-low-memory": partial(FDFA, low_memory=True),
    "fg": ForwardGradient,
    "fg-local": headed(ForwardGradient, guess="local"),
    "fg-weight": partial(ForwardGradient, space="avg-weight"),
    "fg-local-weight": headed(ForwardGradient, guess="local", space="avg-weight"),
    "fg-feedback": partial(ForwardGradient, guess="feedback"),
    "fg-feedback-reverse": partial(ForwardGradient, guess="feedback", engine="reverse"),
}
WITHOUT: dict[str, Callable[..., Estimator]] = {
    "dfa": DFA,
    "dkp": partial(DKP, low_memory=True),
    "fg-reverse": partial(ForwardGradient, engine="reverse", space="weight"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_is_found_where_nothing_is_wrong(case: Case) -> None:
    model, x, _, cuts, _ = case.build(seed=1)
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    names = once_in_order(model, x)
    assert set(cuts) <= set(names)
    assert disagreement(model, names, x, trained(model)) is None
    assert disagreement(model, cuts, x) is None
    assert mixing(model, [*names, ""], x) == []
    assert [problem for problem in validate(model, x) if "statistics of the batch" not in problem.problem] == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][name])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(p.grad is None for p in model.parameters())


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Reverses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class ByNumPy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return torch.from_numpy(np.sin(h.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


class Applies(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(6, 6), function

    def forward(self, h: Tensor) -> Tensor:
        return h + self.function(self.linear(h))  # beside a path that forward mode does follow


def clipped(h: Tensor) -> Tensor:
    """A hook that scales what comes back."""
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 0.1)
    return h


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "a straight-through estimator": lambda h: StraightThrough.apply(2 * h),
    "a reversed gradient": Reverses.apply,
    "a function by NumPy": ByNumPy.apply,
    "a scaled gradient": clipped,
}


def network(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Sequential(Applies(function), nn.Tanh())
    return nn.Sequential(*blocks, nn.Linear(6, 3)).double()


X, Y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))


@pytest.mark.parametrize("kind", FORWARD)
@pytest.mark.parametrize("name", ODD)
def test_another_derivative_than_the_backward_passes_is_refused(name: str, kind: str) -> None:
    model = network(ODD[name])
    with pytest.raises(UsageError, match=r"forward mode and the backward pass disagree in module '1.0' \(Applies\)"):
        FORWARD[kind](model, ["0", "1"]).estimate(X, Y)
    assert all(p.grad is None for p in model.parameters())
    (problem,) = validate(model, X)
    assert problem.module == "1.0"
    assert "leaves something out on purpose" in problem.remedy
    FORWARD[kind](model, ["0", "1"], check=False).estimate(X, Y)  # at one's own risk


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("name", ODD)
def test_estimators_without_forward_mode_take_any_derivative(name: str, kind: str) -> None:
    WITHOUT[kind](network(ODD[name]), ["0", "1"]).estimate(X, Y)


@pytest.mark.parametrize("name", ODD)
def test_a_network_without_cuts_is_looked_at_module_by_module(name: str) -> None:
    model = network(ODD[name])
    with pytest.raises(UsageError, match=r"disagree in module '1.0' \(Applies\)"):
        ForwardGradient(model, space="avg-weight").estimate(X, Y)
    ForwardGradient(model, space="avg-weight", check=False).estimate(X, Y)


class AsksItsInput(nn.Module):
    """Moves along a gradient, through what came before only if that asks for one: as behind a cut nothing does."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, h: Tensor) -> Tensor:
        with torch.enable_grad():
            here = h if h.requires_grad else h.detach().requires_grad_()
            return h - torch.autograd.grad(self.energy(here).sum(), here, create_graph=True)[0]


def test_a_module_that_asks_whether_its_input_requires_a_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), AsksItsInput(), nn.Linear(6, 3)).double()
    for make in (FDFA, ForwardGradient):
        with pytest.raises(UsageError, match=r"computes otherwise where its input needs no gradient"):
            make(model, ["0", "1"]).estimate(X, Y)
    DFA(model, ["0", "1"]).estimate(X, Y)


class Graph(nn.Module):
    def __init__(self, samples: int = 10) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        adjacency = (torch.rand(samples, samples) < 0.4) + torch.eye(samples)
        self.register_buffer("adjacency", adjacency / adjacency.sum(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.adjacency @ self.b((self.adjacency @ self.a(x)).tanh())


class OverTheBatch(nn.Module):
    """Attention among samples, as in retrieval within a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.attend, self.b = nn.Linear(4, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).unsqueeze(1)
        return self.b(self.attend(h, h, h)[0].squeeze(1))


class OwnBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(((h - h.mean(0)) / h.std(0)).tanh())


@pytest.mark.parametrize("make", [Graph, OverTheBatch, OwnBatchNorm])
def test_samples_that_influence_one_another(make: Callable[[], nn.Module]) -> None:
    """The forward engine says so, once; the reverse engine measures it; validate knows it before and after."""
    torch.manual_seed(0)
    model, x, y = make().double(), torch.randn(10, 4, dtype=torch.float64), torch.randint(3, (10,))
    assert not validate(model)
    assert any("samples influence one another" in problem.problem for problem in validate(model, x))
    estimator = ForwardGradient(model, ["a"])
    with pytest.warns(UserWarning, match="samples influence one another before the output of the network: .* engine='reverse'"):
        estimator.estimate(x, y)
    estimator.estimate(x, y)
    assert [problem.module for problem in validate(model)] == [""]
    ForwardGradient(model, ["a"], check=False).estimate(x, y)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    true = model.a.weight.grad.clone()
    model.zero_grad()
    ForwardGradient(model, ["a"], guess="global", engine="reverse", space="activation").estimate(x, y)
    torch.testing.assert_close(model.a.weight.grad, true)


def test_samples_that_influence_one_number_each() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0), nn.Softmax(0))
    (problem,) = validate(model, torch.randn(6, 4))
    assert problem.module == "4"


class TimeFirst(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed, self.rnn, self.out = nn.Linear(3, 8), nn.LSTM(8, 8, batch_first=batch_first), nn.Linear(8, 2)
        self.mix = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x if self.batch_first else x.transpose(0, 1))
        h = self.mix(self.rnn(h)[0])
        return self.out(h.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("kind", [*FORWARD, *WITHOUT])
def test_as_many_steps_as_samples(kind: str) -> None:
    """A batch of N sequences of N steps, steps first: shapes do not tell, and every row is of all samples."""
    if kind in ("fg-weight", "fg-local-weight"):
        pytest.skip("it reads no rows")
    make = {**FORWARD, **WITHOUT}[kind]
    x, y = torch.randn(5, 5, 3), torch.randint(2, (5,))
    with pytest.raises(
        UsageError, match=r"the output of cut 'embed' has the samples in its second dimension .*batch_first=True"
    ):
        make(TimeFirst(False), ["embed", "mix"]).estimate(x, y)
    make(TimeFirst(True), ["embed", "mix"]).estimate(x, y)
    (problem,) = validate(TimeFirst(False), x)
    assert problem.problem == "has the samples in the second dimension of its output"


def test_what_the_look_costs() -> None:
    """Passes with a graph and without, next to those of one step."""
    runs: list[bool] = []

    class Counts(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            runs.append(h.requires_grad)
            return h

    model = nn.Sequential(nn.Linear(4, 8), Counts(), nn.Tanh(), nn.Linear(8, 3))
    for make, most in ((FDFA, 5), (DFA, 3), (ForwardGradient, 5), (partial(ForwardGradient, space="avg-weight"), 3)):
        counts = []
        for check in (False, True):
            runs.clear()
            make(model, None, check=check).estimate(torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0]))
            counts.append(len(runs))
        assert counts[1] - counts[0] == most


@pytest.mark.parametrize("kind", FORWARD)
def test_padding_learns_nothing(kind: str) -> None:
    """`padding_idx` leaves its row out of the gradient, whatever the estimate is made of."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(10, 4, padding_idx=3), nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh()), nn.Linear(6, 3)
    )
    ids, y = torch.tensor([[1, 2, 3], [3, 4, 3], [5, 6, 7]]), torch.tensor([0, 1, 2])
    FORWARD[kind](model, ["0", "1"]).estimate(ids, y)
    assert not model[0].weight.grad[3].any()
    assert "f" in kind[1:] or model[0].weight.grad[1].any()  # feedback that is learned starts at zero


def test_padding_of_a_weight_that_others_use_too() -> None:
    """Tied to the output layer, the row of the padding token has a gradient, through that layer alone."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 4)
            self.out = nn.Linear(4, 6, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.mix(self.embed(ids).mean(1)).tanh())

    torch.manual_seed(0)
    model, ids, y = Tied().double(), torch.tensor([[1, 2, 0], [0, 4, 0]]), torch.tensor([0, 5])
    F.cross_entropy(model(ids), y).backward()
    true = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    estimator = ForwardGradient(model, space="avg-weight")
    drawn = {name: estimator.drawn_weights(name, p, 0) for name, p in model.named_parameters()}
    estimator.estimate(ids, y)
    slope = sum((true[name] * drawn[name]).sum() for name in true)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, slope * drawn[name])
    assert true["embed.weight"][0].any()


class Stateful(nn.Module):
    """Scales itself by its first batch, counts, caches, and lets weights follow others, all in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.teacher = nn.Linear(4, 6), nn.Linear(4, 6).requires_grad_(False)
        self.scale, self.ready, self.runs = nn.Parameter(torch.ones(6)), False, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        h = self.linear(x)
        if not self.ready:
            self.scale.data.copy_(1 / h.detach().std(0))
            self.register_buffer("first", h.detach().mean(0))
            self.ready = True
        with torch.no_grad():
            self.teacher.weight.lerp_(self.linear.weight, 0.1)
        return (h - self.first) * self.scale + self.teacher(x)


@pytest.mark.filterwarnings("ignore:samples influence one another")  # in the first batch
@pytest.mark.parametrize("kind", ["dfa", "fdfa", "fg-weight", "fg-reverse", "fg-feedback-reverse"])
def test_the_look_leaves_no_trace_in_a_network(kind: str) -> None:
    """Parameters, buffers, attributes: after a step they are as after one step without the look."""
    torch.manual_seed(0)
    model = nn.Sequential(Stateful(), nn.Tanh(), nn.Linear(6, 3)).double()
    handle = model[0].register_forward_hook(lambda *seen: None)
    twin, found = copy.deepcopy(model), []
    for each, check in ((model, True), (twin, False)):
        step = {**FORWARD, **WITHOUT}[kind](each, ["1"] if "weight" not in kind else None, check=check).estimate(X, Y)
        found.append([step.loss, *each.state_dict().values(), *(p.grad for p in each.parameters() if p.grad is not None)])
    assert (model[0].runs, model[0].ready) == (twin[0].runs, twin[0].ready)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    handle.remove()
    assert not model[0]._forward_hooks


def test_validate_leaves_no_trace_in_a_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Stateful(), nn.Tanh(), nn.Linear(6, 3)).double()
    before = copy.deepcopy(model.state_dict())
    validate(model, X)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert (model[0].runs, model[0].ready) == (0, False)
