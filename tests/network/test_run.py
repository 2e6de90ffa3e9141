"""Networks that return several tensors, in any form, or a single number."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward import DFA, DKP, FDFA, Backprop, Estimator, ForwardGradient, LocalLoss, UsageError, alignment, make_heads
from onward.network.run import as_rows, from_rows, leaves, output_error, replaced


@dataclasses.dataclass
class Pair:
    first: Tensor
    second: Tensor
    note: str = "of two"


Named = namedtuple("Named", ["a", "b"])

FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "one tensor": (lambda a, b: torch.cat([a, b], 1), lambda out: (out[:, :3], out[:, 3:])),
    "tuple": (lambda a, b: (a, b), lambda out: out),
    "named tuple": (Named, lambda out: (out.a, out.b)),
    "dict with more": (lambda a, b: {"a": a, "b": [b, torch.arange(3)], "cache": None}, lambda out: (out["a"], out["b"][0])),
    "dataclass": (Pair, lambda out: (out.first, out.second)),
    "dataclass in a tuple": (lambda a, b: (Pair(a, b), b * 0 + 7), lambda out: (out[0].first, out[0].second)),
}


class Two(nn.Module):
    """Two heads on a body, or on nothing, in the form of their outputs; the same weights for the same seed."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any], body: bool = True, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh()) if body else nn.Identity()
            self.a, self.b, self.form = nn.Linear(6, 3), nn.Linear(6, 2), form
        self.double()

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        return self.form(self.a(h), self.b(h))


MAKERS: dict[str, Callable[..., Estimator]] = {
    "bp": Backprop,
    "bp-checkpoint": partial(Backprop, checkpoint=True),
    "dfa": DFA,
    "dkp": partial(DKP, low_memory=True),
    "fdfa": FDFA,
    "fdfa-low-memory": partial(FDFA, low_memory=True),
    "fg": ForwardGradient,
    "fg-weight": partial(ForwardGradient, space="avg-weight"),
    "fg-reverse": partial(ForwardGradient, engine="reverse", space="weight"),
    "fg-feedback": partial(ForwardGradient, guess="feedback"),
    "local": LocalLoss,
    "fg-local": partial(ForwardGradient, guess="local", target="sum"),
    "fg-sum-reverse": partial(ForwardGradient, guess="local", target="sum", engine="reverse"),
}


def loss_of(parts: Callable[[Any], tuple[Tensor, Tensor]]) -> Callable[[Any, Tensor], Tensor]:
    def loss(out: Any, y: Tensor) -> Tensor:
        a, b = parts(out)
        return F.cross_entropy(a, y) + (b - 1).square().sum(1).mean()

    return loss


@pytest.mark.parametrize("form", list(FORMS)[1:])
@pytest.mark.parametrize("kind", MAKERS)
def test_several_outputs_learn_as_one_tensor_of_all(kind: str, form: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(2, (5,))
    found = []
    for make, parts in (FORMS[form], FORMS["one tensor"]):
        model = Two(make)
        heads = {"heads": {"body": Two(make, body=False, seed=1)}} if "local" in kind or "sum" in kind else {}
        estimator = MAKERS[kind](model, ["body"], loss=loss_of(parts), **heads)
        for _ in range(2):  # learned feedback is zero at first
            estimator.zero_grad()
            step = estimator.estimate(x, y)
            for p in estimator.parameter_groups()[-1]["params"]:
                p.data.sub_(p.grad, alpha=0.1)
        found.append([step.loss, *(p.grad for p in model.parameters())])
        assert type(step.output) is type(model(x))
        assert not any(z.requires_grad for z in reference.floating(leaves(step.output)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_only_outputs_that_the_loss_reads_count() -> None:
    model = Two(lambda a, b: {"logits": a, "unread": b.sum()})
    estimator = DFA(model, ["body"], loss=lambda out, y: F.cross_entropy(out["logits"], y))
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    estimator.estimate(x, y)
    assert estimator.feedback[0].shape == (3, 6)
    assert model.a.weight.grad.any()
    assert model.b.weight.grad is None
    nameless = Two(lambda a, b: {"read": a, "unread": b.sum()})
    with pytest.raises(UsageError, match=r"returns a dict, and only its loss tells .* call estimate"):
        DFA(nameless, ["body"]).initialize(x)
    with pytest.raises(UsageError, match=r"returns a dict, and heads are made for one tensor"):
        make_heads(nameless, x, "linear", cuts=["body"])


def test_alignment_of_a_network_with_two_outputs() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 4, dtype=torch.float64), torch.randint(2, (64,))
    make, parts = FORMS["tuple"]
    estimator = FDFA(Two(make), ["body"], loss=loss_of(parts))
    estimator.estimate(x, y)
    with torch.no_grad():  # the network is linear from here on, so its Jacobian is its weight
        estimator.feedback[0].copy_(torch.cat([estimator.model.a.weight, estimator.model.b.weight]))
    found = alignment.measure(estimator, x, y)["body"]
    assert found.signal.cosine == pytest.approx(1)
    assert found.feedback.cosine == pytest.approx(1)


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.out(self.body(x)), labels)


def first(output: Tensor, y: Any) -> Tensor:
    return output


def test_a_network_that_returns_its_loss() -> None:
    torch.manual_seed(0)
    x = {"x": torch.randn(5, 4).double(), "labels": torch.randint(3, (5,))}
    model = WithLoss().double()
    model(**x).backward()
    true = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ForwardGradient(model, ["body"], loss=first, guess="global", engine="reverse").estimate(x, None)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, true[name])
    model.zero_grad()
    estimator = ForwardGradient(model, loss=first, space="avg-weight")
    slope = sum((estimator.drawn_weights(name, p, 0) * true[name]).sum() for name, p in model.named_parameters())
    estimator.estimate(x, None)
    estimator.step = 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, slope * estimator.drawn_weights(name, p, 0))
    for make in (DFA, partial(FDFA, low_memory=True), ForwardGradient):
        with pytest.raises(UsageError, match=r"output is a single number, .* loss="):
            make(model, ["body"], loss=first).estimate(x, None)


def test_outputs_side_by_side_and_back() -> None:
    parts = [torch.randn(3, 2, 2), torch.randn(3), torch.randn(3, 4)]
    rows = as_rows(parts)
    assert rows.shape == (3, 9)
    for part, again in zip(parts, from_rows(rows, parts), strict=True):
        assert torch.equal(part, again)
    with pytest.raises(UsageError, match=r"shapes \(3, 2, 2\), \(2, 4\), whose first dimensions differ"):
        as_rows([parts[0], torch.randn(2, 4)])


def test_a_loss_that_depends_on_nothing() -> None:
    with pytest.raises(UsageError, match="does not depend on the network's output"):
        output_error(lambda out, y: y.sum(), torch.randn(2, 3), torch.randn(2))


def test_what_is_no_number_stays() -> None:
    output = {"a": torch.ones(2), "b": (torch.arange(2), "text", None)}
    doubled = replaced(output, lambda z: z * 2)
    assert doubled["a"].tolist() == [2, 2]
    assert doubled["b"][0] is output["b"][0]
    assert doubled["b"][1:] == ("text", None)
