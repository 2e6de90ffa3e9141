"""What hides a graph: checkpointing, functions, transforms, modules without gradients. Right or refused, never backprop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import headed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onward import DFA, DKP, FDFA, Backprop, Estimator, ForwardGradient, UsageError
from onward.estimators.local import LocalLoss

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "dfa": DFA,
    "dkp": DKP,
    "fdfa": FDFA,
    "dfa-low-memory": partial(DFA, low_memory=True),
    "fdfa-low-memory": partial(FDFA, low_memory=True),
    "local": headed(LocalLoss),
    "fg": ForwardGradient,
    "fg-local": headed(ForwardGradient, guess="local"),
    "fg-reverse": partial(ForwardGradient, engine="reverse"),
    "fg-local-reverse": headed(ForwardGradient, guess="local", engine="reverse", space="weight"),
    "fg-sum": headed(ForwardGradient, target="sum", guess="local", engine="reverse", space="avg-weight"),
    "fg-avg-weight": headed(ForwardGradient, guess="local", space="avg-weight"),
    "fg-feedback": partial(ForwardGradient, guess="feedback", feedback="dfa"),
}
EACH = pytest.mark.parametrize("kind", ESTIMATORS)
X, Y = torch.randn(8, 6, dtype=torch.float64), torch.randint(4, (8,))
CUTS = ["blocks.0", "blocks.1"]


class Chain(nn.Module):
    """A stem, two blocks that ``run`` runs, and a linear layer."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor] = lambda block, h: block(h)) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Linear(6, 16)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.3)) for _ in range(2))
            self.out = nn.Linear(16, 4)
        self.run = run
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = self.run(block, h)
        return self.out(h)


def gradients(kind: str, model: nn.Module, cuts: list[str] = CUTS, steps: int = 2) -> list[Tensor | None]:
    torch.manual_seed(1)
    estimator = ESTIMATORS[kind](model, cuts) if kind != "bp" else Backprop(model)
    for _ in range(steps):
        estimator.zero_grad()
        estimator.estimate(X, Y)
    return [p.grad for p in model.parameters()]


def around_a_part(block: nn.Module, h: Tensor, reentrant: bool) -> Tensor:
    """Checkpointing inside a block, whose end is outside of it."""
    return block[2](checkpoint(block[:2], h, use_reentrant=reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@EACH
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_blocks_under_checkpointing_learn_as_without(whole: bool, reentrant: bool, kind: str) -> None:
    if whole:
        model, plain = Chain(partial(checkpoint, use_reentrant=reentrant)), Chain()
        cuts = CUTS
    else:
        model, plain = Chain(partial(around_a_part, reentrant=reentrant)), Chain(lambda block, h: block[2](block[:2](h)))
        cuts = ["blocks.0.2", "blocks.1.2"]
    found, wanted, exact = gradients(kind, model, cuts), gradients(kind, plain, cuts), gradients("bp", Chain())
    for p, q in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, q)
    assert not all(torch.allclose(p, q) for p, q in zip(found, exact, strict=True))  # it is not still backprop


class Hides(torch.autograd.Function):
    """Reentrant checkpointing of one's own, as reversible layers and other libraries have it."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, h: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(h)
        return block(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        h = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(h)
        torch.autograd.backward(y, gradient)
        return None, h.grad


class Closure(torch.autograd.Function):
    """Uses a parameter that is none of its arguments, and no module at all."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Linear, h: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(h)
        return F.linear(h, layer.weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (h,) = ctx.saved_tensors
        found = gradient.T @ h
        ctx.layer.weight.grad = found if ctx.layer.weight.grad is None else ctx.layer.weight.grad + found
        return None, gradient @ ctx.layer.weight


HIDDEN: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], list[str], str]] = {
    "a cut inside a function": (
        lambda block, h: Hides.apply(block, h),
        CUTS,
        r"cut 'blocks.0' .* inside a torch.autograd.Function",
    ),
    "a module inside a function": (
        lambda block, h: block[2](Hides.apply(block[:2], h)),
        ["blocks.0.2", "blocks.1.2"],
        r"blocks.0.0.bias, blocks.0.0.weight are used inside a torch.autograd.Function, .* cut 'blocks.0.2'",
    ),
    "a parameter inside a function": (
        lambda block, h: block[2](block[1](Closure.apply(block[0], h))),
        ["blocks.0.2", "blocks.1.2"],
        r"blocks.0.0.weight is used inside a torch.autograd.Function",
    ),
    "a transform": (
        lambda block, h: torch.vmap(lambda row: block(row.unsqueeze(0)).squeeze(0), randomness="different")(h),
        CUTS,
        r"cut 'blocks.0' \(Sequential\) runs inside a torch.func transform",
    ),
    "gradients off at a cut": (
        torch.no_grad()(lambda block, h: block(h)),
        CUTS,
        r"cut 'blocks.0' .* has parameters to train and runs with gradients off",
    ),
}


@EACH
@pytest.mark.parametrize("how", HIDDEN)
def test_what_hides_a_graph_is_refused(how: str, kind: str) -> None:
    run, cuts, message = HIDDEN[how]
    model = Chain(run)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=message):
        ESTIMATORS[kind](model, cuts).estimate(X, Y)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@EACH
def test_a_part_without_gradients_is_left_out_as_in_backpropagation(kind: str) -> None:
    """Behind it nothing learns either, and what is frozen may run in any way."""
    frozen = Chain(lambda block, h: block(h))
    frozen.stem.requires_grad_(False)
    frozen.blocks[0].requires_grad_(False)

    def run(block: nn.Module, h: Tensor) -> Tensor:
        if block is model.blocks[0]:
            with torch.no_grad():
                return block(h)
        return block(h)

    model = copy.deepcopy(frozen)
    model.run = run
    found, wanted, exact = (gradients(k, m, CUTS) for k, m in ((kind, model), (kind, frozen), ("bp", copy.deepcopy(frozen))))
    for p, q, true in zip(found, wanted, exact, strict=True):
        assert (p is None) == (true is None)
        if p is not None:
            torch.testing.assert_close(p, q)


class Scale(nn.Module):
    """A parameter-free path around a block, from a cut on: a dropout, a pool, a scale."""

    def __init__(self, path: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.enc, self.dec, self.last, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.path = path
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        memory = self.path(self.enc(x))
        h = self.dec(memory).tanh() + memory
        return self.out(self.last(h).tanh() + self.path(memory))


@pytest.mark.parametrize("cuts", [["enc", "dec"], ["enc", "last"], ["enc", "dec", "last"]])
@pytest.mark.parametrize("path", ["handed on", "scale", "dropout", "pool", "relu"])
@pytest.mark.parametrize("guess", ["global", "sum"])
def test_a_sweep_follows_skips_that_start_at_a_cut(guess: str, path: str, cuts: list[str]) -> None:
    """A true guess is its own projection, so the estimate is the true gradient: of the loss, or of the sum of losses."""
    paths: dict[str, Callable[[Tensor], Tensor]] = {
        "handed on": lambda h: h,
        "scale": lambda h: h * 0.5,
        "dropout": lambda h: F.dropout(h, 0.3),
        "pool": lambda h: F.avg_pool1d(h, 3, 1, 1),
        "relu": F.relu,
    }
    model, twin = Scale(paths[path]), Scale(paths[path])
    estimator = headed(ForwardGradient, target=guess, guess=guess, engine="reverse")(model, cuts)
    torch.manual_seed(1)
    estimator.estimate(X, Y)
    torch.manual_seed(1)
    heads = estimator.heads.by_cut if guess == "sum" else []
    losses: list[Tensor] = []
    handles = [
        twin.get_submodule(cut).register_forward_hook(
            lambda module, args, h, head=head: losses.append(F.cross_entropy(copy.deepcopy(head)(h), Y))
        )
        for cut, head in zip(cuts, heads, strict=False)
    ]
    (F.cross_entropy(twin(X), Y) + sum(losses)).backward()
    for handle in handles:
        handle.remove()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.user, self.item = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Sequential(nn.Linear(5, 8), nn.Tanh())
            self.out = nn.Linear(16, 2)
        self.double()

    def forward(self, u: Tensor, i: Tensor) -> Tensor:
        return self.out(torch.cat([self.user(u), self.item(i)], 1))


def test_two_towers() -> None:
    """Neither leads to the other; what comes after both is linear, so feedback converges to its weight."""
    torch.manual_seed(0)
    x = (torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64))
    y = torch.randint(2, (6,))
    model = Towers()
    F.cross_entropy(model(*x), y).backward()
    true = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ForwardGradient(model, ["user", "item"], guess="global", engine="reverse").estimate(x, y)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, true[name], msg=name)
    for low_memory in (False, True):
        estimator = FDFA(model, ["user", "item"], directions=50, low_memory=low_memory)
        for _ in range(40):
            estimator.zero_grad()
            estimator.estimate(x, y)
            for matrix in estimator.feedback:
                matrix.data.sub_(matrix.grad, alpha=0.05)
        for matrix, wanted in zip(estimator.feedback, model.out.weight.split(8, 1), strict=True):
            assert (matrix - wanted).norm() < 0.3 * wanted.norm()


@EACH
@pytest.mark.parametrize("first", ["channels last", "tokens"])
def test_group_norm_behind_a_cut(first: str, kind: str) -> None:
    """PyTorch's kernel for its backward pass would end the process (torch 2.13, on a CPU, channels last)."""

    class Reshape(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h.transpose(1, 2).reshape(len(h), 8, 6, 6)

    torch.manual_seed(0)
    if first == "tokens":
        x: Tensor = torch.randn(4, 36, 3)
        start = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        middle = nn.Sequential(Reshape(), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3), nn.ReLU())
    else:
        x = torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last)
        start = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        middle = nn.Sequential(nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3), nn.ReLU())
    model = nn.Sequential(start, middle, nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 3)))
    last = model.to(memory_format=torch.channels_last) if first != "tokens" else model
    twin = copy.deepcopy(last).to(memory_format=torch.contiguous_format)
    y, found = torch.tensor([0, 1, 2, 0]), []
    for each, batch in ((last, x), (twin, x.contiguous())):
        torch.manual_seed(1)
        ESTIMATORS[kind](each, ["0", "1"]).estimate(batch, y)
        found.append([p.grad for p in each.parameters()])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@EACH
def test_the_function_of_group_norm_behind_a_cut(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 3)
            self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.group_norm(self.first(x), 4, self.weight, self.bias).flatten(1))

    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 6, 6), torch.tensor([0, 1])
    model, found = Net(), []
    for layout in (torch.contiguous_format, torch.channels_last):
        each = copy.deepcopy(model).to(memory_format=layout)
        torch.manual_seed(1)
        estimator = ESTIMATORS[kind](each, ["first"])
        for batch in (x, x.to(memory_format=layout)):  # as a first batch, and as a later one
            each.zero_grad()
            estimator.estimate(batch, y)
        found.append([p.grad for p in each.parameters()])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@EACH
def test_hooks_that_a_backward_pass_would_run(kind: str) -> None:
    """A full backward hook of a cut module sees the signal that is delivered there; an accumulated gradient is told of."""
    model = Chain()
    seen: list[Tensor] = []
    told: list[nn.Parameter] = []
    model.blocks[0].register_full_backward_hook(lambda module, grads_in, grads_out: seen.append(grads_out[0]))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(told.append)
    delivered: list[Tensor] = []
    estimator = ESTIMATORS[kind](model, CUTS)
    estimator.observe = lambda k, delta: delivered.append(delta) if k == 0 else None
    estimator.estimate(X, Y)
    assert {id(p) for p in told} == {id(p) for p in model.parameters()}
    assert seen
    if kind in ("dfa", "dkp", "fdfa", "dfa-low-memory", "fdfa-low-memory", "local", "fg", "fg-local"):
        (signal,) = delivered
        assert any(torch.equal(s, signal) for s in seen)


@EACH
def test_sparse_gradients_stay_sparse(kind: str) -> None:
    ids, y = torch.randint(0, 30, (8, 5)), torch.randint(0, 4, (8,))
    body = nn.Sequential(nn.Flatten(), nn.Linear(40, 16), nn.Tanh())
    model = nn.Sequential(nn.Embedding(30, 8, sparse=True), body, nn.Linear(16, 4))
    ESTIMATORS[kind](model, ["0", "1"]).estimate(ids, y)

    assert model[0].weight.grad.is_sparse


class TwoWaysAround(nn.Module):
    """Around the cut lead a path without a parameter, which carries nothing, and one with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.body, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        free, side = x * 2, self.side(x)
        h = self.body(free.tanh() + side.tanh())
        return self.out(h + free.tanh() + side.tanh())


def test_a_bypass_beside_a_harmless_path() -> None:
    x = torch.randn(4, 6).requires_grad_()
    with pytest.raises(UsageError, match="cut 'body' is bypassed: side is also reached"):
        DFA(TwoWaysAround(), ["body"]).estimate(x, torch.tensor([0, 1, 2, 1]))


class Forces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.energy = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 1)
        self.out = nn.Linear(6, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return self.out(torch.autograd.grad(self.energy(self.embed(x)).sum(), x, create_graph=True)[0])


@EACH
def test_a_gradient_inside_that_would_cross_a_cut(kind: str) -> None:
    with pytest.raises(
        UsageError, match=r"takes a gradient inside its forward that finds no way .* it would have to cross a cut"
    ):
        ESTIMATORS[kind](Forces(), ["embed"]).estimate(X, Y)
    ForwardGradient(Forces(), space="avg-weight").estimate(X, Y)
