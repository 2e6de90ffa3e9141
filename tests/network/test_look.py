"""What a look at a first batch has found out wrongly, or has changed, in networks as others write them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import headed
from torch import Tensor, nn

import onward
from onward import DFA, FDFA, Backprop, Estimator, ForwardGradient, LocalLoss, UsageError, suggest_cuts, validate

X, Y = torch.randn(8, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
MAKERS: dict[str, Callable[..., Estimator]] = {
    "local": headed(LocalLoss),
    "dfa": DFA,
    "fdfa": FDFA,
    "fdfa-low-memory": partial(FDFA, low_memory=True),
    "fg": ForwardGradient,
    "fg-reverse": partial(ForwardGradient, engine="reverse"),
    "fg-weight": partial(ForwardGradient, space="avg-weight"),
}
EACH = pytest.mark.parametrize("kind", MAKERS)


def around(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), middle, nn.Linear(6, 3)).double()


class Keeps(nn.Module):
    """State in places that a state dict does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.cache = nn.Linear(6, 6), torch.zeros(6, dtype=torch.float64)
        self.counts, self.held, self.space = [0], {"runs": [0]}, SimpleNamespace(runs=0)

    def forward(self, x: Tensor) -> Tensor:
        self.cache += 1
        self.counts[0] += 1
        self.held["runs"][0] += 1
        self.space.runs += 1
        return (self.linear(x) * self.cache * self.counts[0]).tanh()

    def runs(self) -> list[float]:
        return [self.cache[0].item(), self.counts[0], self.held["runs"][0], self.space.runs]


@pytest.mark.parametrize("kind", ["local", "dfa", "fdfa", "fg-reverse"])
def test_state_anywhere_in_a_module(kind: str) -> None:
    model = around(Keeps())
    twin = copy.deepcopy(model)
    found = []
    for each, check in ((model, True), (twin, False)):
        torch.manual_seed(1)
        found.append([MAKERS[kind](each, ["0", "1"], check=check).estimate(X, Y).loss, *(p.grad for p in each.parameters())])
    assert model[1].runs() == [1, 1, 1, 1]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_state_anywhere_is_left_by_those_who_ask() -> None:
    model = around(Keeps())
    validate(model, X)
    suggest_cuts(model, X)
    onward.make_heads(model, X, "linear", cuts=["0"])
    DFA(model, ["0"]).initialize(X)
    assert model[1].runs() == [0, 0, 0, 0]


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return (2 * h).round() / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Some(nn.Module):
    """Rounds some samples alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x).tanh()
        return torch.cat([z[:5], StraightThrough.apply(z[5:])])


class FromZero(nn.Module):
    """A branch that starts at zero."""

    def __init__(self, branch: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.gate, self.branch = nn.Linear(6, 6), nn.Parameter(torch.zeros(())), branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.branch(self.linear(x))


@pytest.mark.parametrize("kind", ["fdfa", "fdfa-low-memory", "fg", "fg-weight"])
@pytest.mark.parametrize("make", [Some, partial(FromZero, StraightThrough.apply)], ids=["some samples", "from zero"])
def test_another_derivative_in_a_part(make: Callable[[], nn.Module], kind: str) -> None:
    with pytest.raises(UsageError, match="forward mode and the backward pass disagree"):
        MAKERS[kind](around(make()), ["0", "1"]).estimate(X, Y)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("change", [lambda g: -g, lambda g: g * 0.5], ids=["reversed", "scaled"])
def test_hooks_that_change_gradients(change: Callable[[Tensor], Tensor]) -> None:
    model = around(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    model[1][0].register_full_backward_hook(lambda module, before, after: tuple(g if g is None else change(g) for g in before))
    for kind in ("fdfa", "fg", "fg-weight"):
        with pytest.raises(UsageError, match="forward mode and the backward pass disagree"):
            MAKERS[kind](model, ["0", "1"]).estimate(X, Y)
    DFA(model, ["0", "1"]).estimate(X, Y)


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda h: h + torch.cat([h.chunk(2)[1], h.chunk(2)[0]]),
    "neighbours": lambda h: h + h.roll(1, 0),
    "groups": lambda h: h + h.view(2, -1, 6).var(0).repeat(2, 1),
    "the last by the first": lambda h: torch.cat([h[:-1], h[-1:] + h[:1]]),
}


@pytest.mark.parametrize("name", MIXES)
def test_samples_influence_one_another_in_any_pairs(name: str) -> None:
    class Mixes(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return MIXES[name](h)

    assert [problem.module for problem in validate(around(Mixes()), X)] == ["1"]


@dataclasses.dataclass
class Graph:
    edges: Tensor
    features: Tensor


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, graph: Graph | Tensor, features: Tensor | None = None) -> Tensor:
        edges, x = (graph.edges, graph.features) if features is None else (graph, features)
        h = self.a(x).tanh()
        return self.b(h.index_add(0, edges[1], h[edges[0]]))


@pytest.mark.parametrize("form", ["dataclass", "edges first"])
def test_samples_that_are_not_in_the_first_tensor(form: str) -> None:
    torch.manual_seed(0)
    edges, model = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 0]]), Convolution().double()
    x = Graph(edges, X) if form == "dataclass" else (edges, X)
    assert any("influence one another" in problem.problem for problem in validate(model, x))
    with pytest.warns(UserWarning, match="samples influence one another"):
        ForwardGradient(model, ["a"]).estimate(x, Y)


class TiedByFunction(nn.Module):
    def __init__(self, padded: bool) -> None:
        super().__init__()
        self.embed, self.mix, self.padded = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 4), padded

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids) if self.padded else F.embedding(ids, self.embed.weight)
        return F.linear(self.mix(h.mean(1)).tanh(), self.embed.weight)


class FunctionalPadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(F.embedding(ids, self.table, padding_idx=0).mean(1).tanh())


PADDED = [partial(TiedByFunction, True), partial(TiedByFunction, False), FunctionalPadding]


@pytest.mark.parametrize("engine", ["forward", "reverse"])
@pytest.mark.parametrize("make", PADDED, ids=["tied", "not padded", "by the function"])
def test_padding_is_left_out_by_use(make: Callable[[], nn.Module], engine: str) -> None:
    """A forward gradient of weights is the true slope along the direction that leaves out what has no gradient."""
    torch.manual_seed(0)
    model, ids, y = make().double(), torch.tensor([[1, 2, 0], [0, 4, 0]]), torch.tensor([0, 3])
    F.cross_entropy(model(ids), y).backward()
    true = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    estimator = ForwardGradient(model, space="avg-weight", engine=engine)
    drawn = {name: estimator.drawn_weights(name, p, 0) for name, p in model.named_parameters()}
    for name, g in true.items():
        if not g[0].any() and g.dim() == 2:  # the row of padding
            drawn[name][0] = 0
    slopes = {name: (true[name] * drawn[name]).sum() for name in true}
    estimator.estimate(ids, y)
    for name, p in model.named_parameters():
        slope = slopes[name] if engine == "reverse" else sum(slopes.values())
        torch.testing.assert_close(p.grad, slope * drawn[name], msg=name)


class Hiding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, inner: nn.Module) -> Tensor:
        ctx.inner = inner
        ctx.save_for_backward(h)
        return inner(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        h = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.inner(h)
        torch.autograd.backward(y, gradient)
        return h.grad, None


class OpenAndHidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return h + Hiding.apply(h, self.inner)


@EACH
def test_a_parameter_that_is_hidden_in_one_place_and_open_in_another(kind: str) -> None:
    model = around(OpenAndHidden())
    with pytest.raises(UsageError):
        MAKERS[kind](model, ["0", "1"]).estimate(X, Y)
    assert model[1].inner.weight.grad is None or not model[1].inner.weight.grad.any()


@pytest.mark.parametrize("held", [lambda g: [g], lambda g: {"masks": g}], ids=["list", "dictionary"])
def test_generators_in_lists_and_dictionaries(held: Callable[[torch.Generator], Any]) -> None:
    class Faint(nn.Module):
        """A branch so faint that another mask hardly shows."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.generators = nn.Linear(6, 6), held(torch.Generator().manual_seed(0))
            self.gate = nn.Parameter(torch.full((6,), 1e-5))

        def forward(self, x: Tensor) -> Tensor:
            generator = next(iter(self.generators.values())) if isinstance(self.generators, dict) else self.generators[0]
            return x + self.gate * self.linear(x) * (torch.rand(x.shape, generator=generator) > 0.5)

    grads = []
    for make in (Backprop, partial(Backprop, checkpoint=True)):
        model = around(Faint())
        make(model, ["0", "1"]).estimate(X, Y)
        grads.append(model[1].gate.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_half_precision_inside_is_told_from_a_wrong_derivative() -> None:
    torch.manual_seed(0)

    class Wide(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h.float()

    body = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 16), nn.LayerNorm(16), Wide())
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), body, nn.Linear(16, 3))
    x = X.float()
    for kind in ("fdfa", "fg", "fg-weight"):
        with torch.autocast("cpu", torch.bfloat16):
            MAKERS[kind](model, ["0", "1"]).estimate(x, Y)
    half = nn.Sequential(model[0], body[:4], Wide(), nn.Linear(16, 3).float())
    half[:2].bfloat16()
    for kind in ("fdfa", "fg"):
        MAKERS[kind](half, ["0", "2"]).estimate(x.bfloat16(), Y)


class Hooked(nn.Module):
    """Hooks its own output, unasked."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        h.register_hook(lambda gradient: None)
        return h.tanh()


def test_a_tensor_that_is_hooked_in_the_forward() -> None:
    for kind in ("dfa", "local", "fg-reverse"):
        MAKERS[kind](around(Hooked()), ["0", "1"]).estimate(X, Y)
    for kind in ("fdfa-low-memory", "fg", "fg-weight"):
        with pytest.raises(UsageError, match="needs a graph in its forward"):
            MAKERS[kind](around(Hooked()), ["0", "1"]).estimate(X, Y)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_sentences() -> None:
    model = around(nn.Tanh())
    with pytest.raises(UsageError, match="the loss returned a float: it must return a tensor"):
        DFA(model, ["0"], loss=lambda z, y: z.sum().item()).estimate(X, Y)
    with pytest.raises(UsageError, match="nothing that the loss depends on requires a gradient"):
        Backprop(copy.deepcopy(model).requires_grad_(False)).estimate(X, Y)
    with pytest.raises(UsageError, match=r"space='avg-weight' compares gradients of parameters, and 0.weight is complex"):
        ForwardGradient(nn.Sequential(nn.Linear(2, 2).to(torch.cdouble)), space="avg-weight")


class Unlisted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(6, 6).double()]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x).tanh()


@pytest.mark.parametrize("engine", ["forward", "reverse"])
@pytest.mark.parametrize("space", ["avg-weight", "weight"])
def test_a_parameter_that_the_network_does_not_list(space: str, engine: str) -> None:
    if (space, engine) == ("weight", "forward"):
        pytest.skip("there is no such combination")
    with pytest.raises(UsageError, match=r"a parameter of shape \(6,( 6)?\) that it does not list, .*ModuleList"):
        ForwardGradient(around(Unlisted()), ["0", "1"], space=space, engine=engine).estimate(X, Y)


class Lazily(nn.Module):
    """Makes its layer, and a buffer, when it first runs."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "layer"):
            self.layer = nn.Linear(6, 6).double()
            self.register_buffer("positions", torch.arange(6.0).double())
        return (self.layer(x) + self.positions).tanh()


@EACH
def test_a_layer_that_is_made_in_the_first_run(kind: str) -> None:
    torch.manual_seed(2)
    model = around(Lazily())
    estimator = MAKERS[kind](model, ["0", "1"])
    for _ in range(2):
        estimator.estimate(X, Y)
    assert model[1].layer.weight.grad is not None


def test_a_hook_on_a_parameter_that_changes_its_gradient() -> None:
    model = around(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    model[1][0].weight.register_hook(lambda gradient: gradient * (torch.arange(6) > 2))
    for options in ({}, {"cuts": ["0", "1"]}):
        with pytest.raises(UsageError, match="forward mode and the backward pass disagree"):
            ForwardGradient(model, space="avg-weight", **options).estimate(X, Y)
    for kind in ("dfa", "fdfa", "fg", "fg-reverse"):
        model.zero_grad()
        MAKERS[kind](model, ["0", "1"]).estimate(X, Y)
        assert not model[1][0].weight.grad[:, :3].any()
