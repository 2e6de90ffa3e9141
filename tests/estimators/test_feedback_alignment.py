"""Feedback alignment layer by layer: against explicit loops, for every rule, and on every network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import carried_reference
import pytest
import reference
import torch
import torch.nn.functional as F
from cases import CASES, Case, by_name
from reference import close
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import onward
from onward import BRSF, FRSF, USF, FeedbackAlignment, KolenPollack, UsageError

RULES: dict[str, type[FeedbackAlignment]] = {
    "fa": FeedbackAlignment,
    "usf": USF,
    "brsf": BRSF,
    "frsf": FRSF,
    "kp": KolenPollack,
}
CHAINS = [(name, rule) for name in ("mlp-batch-norm", "cnn-batch-norm") for rule in RULES]
CHAINS += [(name, "fa") for name in ("group-norm", "convolutions", "regression")]


def drawn(name: str, like: Tensor, step: int) -> Tensor:
    return onward.directions.draw(like.shape, seed=5, step=step, block=f"feedback {name}", dtype=like.dtype)


def rms(w: Tensor) -> float:
    return w.detach().norm().item() / w.numel() ** 0.5


def carriers(rule: str, start: nn.Module, now: nn.Module, step: int) -> dict[str, Tensor]:
    """What carries the error back, by the rules' formulas, of weights that started as `start`'s and are now as `now`'s."""
    found, before = {}, dict(start.named_parameters())
    for name, w in now.named_parameters():
        if w.dim() < 2 or "embedding" in name:
            continue
        w, size = w.detach(), rms(before[name])
        if rule == "usf":
            found[name] = size * w.sign()
        elif rule in ("brsf", "frsf"):
            found[name] = size * drawn(name, w, step if rule == "brsf" else 0).abs() * w.sign()
        else:
            found[name] = size * drawn(name, w, 0)
            if rule == "kp":  # which has taken every step of the weight's
                found[name] += w - before[name]
    return found


def check(rule: str, case: Case, gradients: Callable[..., dict[str, Tensor]], steps: int) -> None:
    model, x, y, _, loss = case.build(seed=1)
    start = copy.deepcopy(model)
    estimator = RULES[rule](model, loss=loss, seed=5)
    optimizer = torch.optim.SGD(estimator.parameters(), lr=0.3)
    for step in range(steps):
        wanted = gradients(model, x, y, loss, carriers(rule, start, model, step))
        torch.manual_seed(reference.MASKS)
        optimizer.zero_grad()
        estimator.estimate(x, y)
        for name, p in model.named_parameters():
            close(p.grad, wanted.get(name))
        optimizer.step()


@pytest.mark.parametrize(("name", "rule"), CHAINS)
def test_a_chain_by_explicit_loops(name: str, rule: str) -> None:
    check(rule, by_name(name), carried_reference.chain, steps=2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_network(case: Case) -> None:
    """Residual, tied, with attention, recurrent, in place, with dropout: by another way of writing its layers."""
    check("brsf", case, carried_reference.anywhere, steps=2)


def test_a_frozen_layer_carries_the_error_as_the_others() -> None:
    model, x, y, _, loss = by_name("convolutions").build(seed=1)
    model[1].requires_grad_(False)
    estimator = FeedbackAlignment(model, loss=loss, seed=5)
    estimator.estimate(x, y)
    wanted = carried_reference.chain(model, x, y, loss, carriers("fa", model, model, 0))
    for name, p in model.named_parameters():
        close(p.grad, wanted[name] if p.requires_grad else None)


def test_kolen_pollack_becomes_backpropagation() -> None:
    """The difference of W and B shrinks by the decay alone, whatever the gradients; with momentum too, in the end."""
    model, x, y, _, loss = by_name("cnn-batch-norm").build(seed=1)
    estimator = KolenPollack(model, loss=loss, seed=5)
    weights = [dict(model.named_parameters())[name] for name in estimator.carriers.names]
    before = [(w - b).detach() for w, b in zip(weights, estimator.feedback, strict=True)]
    optimizer = torch.optim.SGD(estimator.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        estimator.estimate(x, y)
        optimizer.step()
    for w, b, start in zip(weights, estimator.feedback, before, strict=True):
        close(w.detach() - b.detach(), start * (1 - 0.1 * 0.5) ** 20)
    assert [group["role"] for group in estimator.parameter_groups()] == ["network"]


def test_scale_of_a_weight_that_starts_at_zero() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))
    nn.init.zeros_(model[0].weight)
    estimator = FeedbackAlignment(model)
    assert 0.15 < rms(estimator.feedback[0].detach()) < 0.35  # 1 / sqrt(16)
    assert USF(model).feedback[0].item() == pytest.approx(0.25)


class Reads(nn.Module):
    """A layer that reads its weight in a way of its own."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.table, self.read = nn.Linear(4, 4), nn.Embedding(4, 4), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return gradients[0] @ w.T, x.T @ gradients[0]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "standardised": (
        lambda: Reads(lambda m, x: F.linear(x, m.layer.weight / m.layer.weight.std())),
        r"1\.layer\.weight is computed with \((Std|Div)Backward0\)",
    ),
    "absolute": (lambda: Reads(lambda m, x: F.linear(x, m.layer.weight.abs())), r"1\.layer\.weight is co"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), r"weight of 1 \(ParametrizedLinear\)"),
    "checkpointed": (lambda: Reads(lambda m, x: checkpoint(m.layer, x, use_reentrant=False)), r"1\.layer\.weight runs where"),
    "reentrant": (lambda: Reads(lambda m, x: checkpoint(m.layer, x, use_reentrant=True)), r"1\.layer\.weight runs where"),
    "a function's": (lambda: Reads(lambda m, x: Product.apply(x, m.layer.weight)), r"1\.layer\.weight is used by ProductB"),
    "bilinear": (lambda: Bilinear(), r"1\.twice\.weight is used by TrilinearBackward0"),
    "a table": (lambda: Reads(lambda m, x: F.linear(m.layer(x), m.table.weight)), r"1\.table\.weight is a table's"),
    "without a size": (lambda: nn.LazyLinear(4), r"1\.weight has no size yet"),
}


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Bilinear(4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(x, x)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replaced_is_named(name: str) -> None:
    make, message = REFUSED[name]
    model = nn.Sequential(nn.Linear(3, 4), make(), nn.Linear(4, 2))
    with pytest.raises(UsageError, match=message):
        FeedbackAlignment(model).estimate(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))


def test_frozen_layers_under_autocast_are_refused_and_others_work() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x, y, exact = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]), copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        FeedbackAlignment(model).estimate(x, y)
    FeedbackAlignment(exact).estimate(x, y)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 0.05 * q.grad.norm()
    model[2].requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UsageError, match=r"2\.weight is frozen"):
        FeedbackAlignment(model).estimate(x, y)


def test_hooks_that_use_up_a_gradient_are_refused_by_kolen_pollack() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(UsageError, match=r"0\.weight has hooks"):
        KolenPollack(model).estimate(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))


def test_alignment_sees_the_errors_that_the_sweep_brings() -> None:
    model, x, y, cuts, loss = by_name("cnn-batch-norm").build(seed=1)
    found = onward.alignment.measure(USF(model, loss=loss, seed=5), x, y, cuts=cuts)
    assert [0 < found[cut].signal.cosine < 1 for cut in cuts] == [True] * len(cuts)
    assert found["output"].parameters.cosine == pytest.approx(1)
