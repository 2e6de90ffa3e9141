"""Where networks are cut: every way in which a cut can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import DIRECT, headed
from torch import Tensor, nn

from onward import DFA, DKP, FDFA, Backprop, Estimator, ForwardGradient, LocalLoss, UsageError

Linear, Sequential = nn.Linear, nn.Sequential
X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])


def block(*extra: nn.Module) -> nn.Module:
    return Sequential(Linear(3, 3), nn.Tanh(), *extra)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage = block(), nn.ModuleList([block(), block()])
        self.head = Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stage:
            x = stage(x)
        return self.head(x)


class Functional(nn.Module):
    """The network of PyTorch's tutorials: non-linearities are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.output = Linear(3, 3), Linear(3, 3), Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.second(self.first(x).relu()).relu())


def test_a_network_that_is_compiled_as_a_whole_is_refused() -> None:
    compiled = torch.compile(Sequential(block(), block(), Linear(3, 3)), backend="eager")
    with pytest.raises(UsageError, match=r"compiled as a whole.*compile its blocks instead"):
        DFA(compiled, ["_orig_mod.0"])


@pytest.mark.parametrize("estimator", [DFA, FDFA, partial(LocalLoss, heads={}), ForwardGradient])
def test_without_a_cut_it_would_be_backpropagation(estimator: Callable[..., Estimator]) -> None:
    with pytest.raises(UsageError, match=r"cuts=\[\]: without a cut, \w+ would be backpropagation"):
        estimator(Functional(), [])
    with pytest.raises(UsageError, match="Sequential has no module that ends with something to train both before"):
        estimator(Sequential(Linear(3, 3)))


@pytest.mark.parametrize("estimator", [Backprop, DFA, DKP, FDFA, ForwardGradient])
def test_unknown_name(estimator: type) -> None:
    with pytest.raises(UsageError, match=r"stagge\.0.*did you mean 'stage\.0'"):
        estimator(Custom(), ["stagge.0"])


def test_a_cut_named_twice() -> None:
    with pytest.raises(UsageError, match="stem"):
        DFA(Custom(), ["stem", "stem"])


class Makes(nn.Module):
    def __init__(self, of: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inside, self.of = block(), of

    def forward(self, x: Tensor) -> Any:
        return self.of(self.inside(x))


class Returns(nn.Module):
    """A network whose first block returns several values: `of` makes them of its hidden state; `read` takes what goes on."""

    def __init__(self, of: Callable[[Tensor], Any], read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.read = Makes(of), Linear(3, 3), read

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.first(x)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.unused = Linear(3, 3), block(), block()
        self.head = Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(self.first(x))))


FEEDBACK = {
    f"{kind.__name__}{'-low-memory' * low_memory}": partial(kind, low_memory=low_memory)
    for kind in DIRECT.values()
    for low_memory in (False, True)
}
SIGNALS = {
    **FEEDBACK,
    "ForwardGradient": ForwardGradient,
    "ForwardGradient-reverse": partial(ForwardGradient, engine="reverse", guess="global", space="weight"),
    "ForwardGradient-local": headed(ForwardGradient, guess="local"),
    "ForwardGradient-local-reverse": headed(ForwardGradient, guess="local", target="sum", engine="reverse"),
    "LocalLoss": headed(LocalLoss),
}
EACH_FEEDBACK = pytest.mark.parametrize("estimator", FEEDBACK.values(), ids=FEEDBACK)
EACH_SIGNAL = pytest.mark.parametrize("estimator", SIGNALS.values(), ids=SIGNALS)


def refused(estimator: Callable[..., Estimator], model: nn.Module, cuts: list[str], match: str) -> str:
    """The estimate is refused, the network keeps no hooks, no gradients and still runs."""
    with pytest.raises(UsageError, match=match) as raised:
        estimator(model, cuts).estimate(X, Y)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(X)
    message = str(raised.value)
    assert "\n" not in message
    return message


class Record(NamedTuple):
    h: Tensor
    more: Any


@dataclass
class Held:
    last_hidden_state: Tensor
    more: Any = None


SEVERAL: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda h: (h, None), lambda out: out[0]),
    "tuple, with more that is not used": (lambda h: (h, 2 * h), lambda out: out[0]),
    "named tuple": (lambda h: Record(h, "more"), lambda out: out.h),
    "dict": (lambda h: {"h": h, "n": 1}, lambda out: out["h"]),
    "dict, by name": (lambda h: {"n": 1, "hidden_states": h}, lambda out: out["hidden_states"]),
    "dataclass": (lambda h: Held(h), lambda out: out.last_hidden_state),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_of_several_values_the_hidden_state_is_cut(kind: str) -> None:
    """As if the block returned it alone; and what is beside it gets no gradient."""
    of, read = SEVERAL[kind]
    for estimator in (DFA, partial(FDFA, low_memory=True), partial(ForwardGradient, engine="reverse", guess="global")):
        found = []
        for model in (Returns(of, read), Returns(lambda h: h, lambda h: h)):
            estimator(model, ["first"]).estimate(X, Y)
            found.append({name: p.grad for name, p in model.named_parameters()})
        torch.testing.assert_close(*found, rtol=0, atol=0)


@EACH_SIGNAL
def test_what_goes_on_beside_the_hidden_state_must_not_carry_a_gradient(estimator: Callable[..., Estimator]) -> None:
    refused(
        estimator,
        Returns(lambda h: (h, 2 * h), lambda out: out[0] + out[1]),
        ["first"],
        r"'first' \(Makes\) returns more than its hidden state, .*first.inside.0.weight.* would cross the cut. Freeze",
    )


@EACH_SIGNAL
def test_output_without_a_hidden_state(estimator: Callable[..., Estimator]) -> None:
    model = Returns(lambda h: {"n": 1, "h": h}, lambda out: out["h"])
    refused(estimator, model, ["first"], "'first'.* is a dict that does not begin with a tensor")


@EACH_SIGNAL
def test_reused_module(estimator: Callable[..., Estimator]) -> None:
    refused(estimator, Twice(), ["shared"], "'shared'.*more than once")


@EACH_SIGNAL
def test_reused_module_that_is_not_a_cut(estimator: Callable[..., Estimator]) -> None:
    estimator(Twice(), ["first"]).estimate(X, Y)


@EACH_SIGNAL
def test_cut_that_is_never_reached(estimator: Callable[..., Estimator]) -> None:
    refused(estimator, Twice(), ["first", "unused"], "'unused'.*did not run")


@EACH_SIGNAL
def test_last_block_without_parameters(estimator: Callable[..., Estimator]) -> None:
    refused(estimator, Sequential(block(), Linear(3, 3)), ["0", "1"], "last block has no parameters.*'1'")
    refused(estimator, Sequential(block(), Linear(3, 3), nn.Tanh()), ["1"], "last block has no parameters.*'1'")


class Skip(nn.Module):
    """h1 = stem(x); z = head(body(h1) + skip(h1))."""

    def __init__(self, skip: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.stem, self.body, self.head = block(), block(), Linear(3, 3)
        self.skip = skip or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(self.body(h) + self.skip(h))


def test_the_advice_on_a_bypass_can_be_followed() -> None:
    assert "allow_bypass=True" in refused(DFA, Skip(), ["body"], "bypass")
    for estimator in (partial(DFA, low_memory=True), headed(LocalLoss), ForwardGradient):
        assert "allow_bypass" not in refused(estimator, Skip(), ["body"], "bypass")


@EACH_SIGNAL
def test_bypassed_cut(estimator: Callable[..., Estimator]) -> None:
    message = refused(estimator, Skip(), ["body"], "'body'.*bypass")
    assert "stem" in message
    assert "head" not in message.split("bypass")[1].split("Cut where")[0]
    refused(estimator, Skip(block()), ["body"], "'body'.*bypass")


@EACH_SIGNAL
def test_a_cut_that_no_longer_separates(estimator: Callable[..., Estimator]) -> None:
    model = Skip()
    model.stem.requires_grad_(False)
    made = estimator(model, ["body"])
    made.estimate(X, Y)
    model.stem.requires_grad_()
    model.zero_grad()
    with pytest.raises(UsageError, match=r"'body'.*bypass"):
        made.estimate(X, Y)


@EACH_SIGNAL
def test_bypass_from_the_first_block_to_a_later_one(estimator: Callable[..., Estimator]) -> None:
    class Long(Skip):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem[0](x)
            return self.head(self.body(self.stem[1](h)) + h)

    with pytest.raises(UsageError, match=r"bypass") as raised:
        estimator(Long(), ["stem.1", "body"]).estimate(X, Y)
    assert "stem.0" in str(raised.value)


@EACH_SIGNAL
def test_what_is_no_bypass(estimator: Callable[..., Estimator]) -> None:
    """A skip between two cuts' own values, the input handed on, and the end of a residual block."""
    estimator(Skip(), ["stem", "body"]).estimate(X, Y)
    estimator(Skip(), ["stem"]).estimate(X, Y)

    class Input(Skip):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.stem(x)) + x.exp())

    estimator(Input(), ["stem", "body"]).estimate(X, Y)
    estimator(Input(), ["stem", "body"]).estimate(X.clone().requires_grad_(), Y)


def test_bypass_allowed() -> None:
    """The detour's gradient is the exact one, the cut path's comes from feedback."""
    model = Skip().double()
    estimator = DFA(model, ["body"], allow_bypass=True)
    estimator.initialize(X.double())
    expected, _, _ = reference.direct_feedback(model, X.double(), Y, ["body"], F.cross_entropy, estimator.feedback)
    estimator.estimate(X.double(), Y)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


@EACH_SIGNAL
def test_bypass_is_looked_for_again_after_a_failure(estimator: Callable[..., Estimator]) -> None:
    attempt = estimator(Skip(), ["body"])
    for _ in range(2):
        with pytest.raises(UsageError, match="bypass"):
            attempt.estimate(X, Y)


@EACH_SIGNAL
def test_cuts_in_another_order(estimator: Callable[..., Estimator]) -> None:
    """Refused, or else right; never delivered to the wrong block."""
    refused(estimator, Custom(), ["stage.0", "stem"], "'stem'.*'stage.0'|'stage.0'.*'stem'")


@EACH_FEEDBACK
def test_sample_dimension_not_first(estimator: Callable[..., Estimator]) -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = block(), Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(torch.stack([x] * 5)).mean(0))

    refused(estimator, TimeFirst(), ["first"], "'first'.*sample")


@EACH_FEEDBACK
def test_inputs_of_another_size(estimator: Callable[..., Estimator]) -> None:
    first = Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    model = Sequential(first, Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(2, 3)))
    attempt = estimator(model)
    attempt.estimate(torch.randn(4, 1, 5, 5), Y)
    with pytest.raises(UsageError, match=r"'0'.*3 x 18.*3 x 32"):
        attempt.estimate(torch.randn(4, 1, 6, 6), Y)


@EACH_SIGNAL
def test_several_cuts_on_one_tensor(estimator: Callable[..., Estimator]) -> None:
    """A module that returns its input, and blocks without parameters, are blocks like any other."""
    model = Sequential(block(), nn.Identity(), nn.Flatten(), block(), Linear(3, 3))
    estimator(model, ["0", "1", "2", "3"]).estimate(X, Y)
