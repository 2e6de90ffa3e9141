"""Several passes of a network in one step are of one network: the same random numbers, the same buffers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import headed
from torch import Tensor, nn

from onward import DFA, DKP, FDFA, Backprop, Estimator, ForwardGradient, UsageError, validate
from onward.network.replay import Replay

_stray = torch.Generator().manual_seed(3)

DRAWS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "torch": lambda module, h: torch.rand(h.shape),
    "numpy": lambda module, h: torch.from_numpy(np.random.rand(*h.shape)),  # noqa: NPY002
    "python": lambda module, h: torch.tensor([random.random() for _ in range(h.numel())]).view(h.shape),
    "own torch": lambda module, h: torch.rand(h.shape, generator=module.torch),
    "own numpy": lambda module, h: torch.from_numpy(module.numpy.random(tuple(h.shape))),
    "own old numpy": lambda module, h: torch.from_numpy(module.old.rand(*h.shape)),
    "own python": lambda module, h: torch.tensor([module.python.random() for _ in range(h.numel())]).view(h.shape),
}


class Mask(nn.Module):
    def __init__(self, draw: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw
        self.torch, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.old, self.python = np.random.RandomState(1), random.Random(1)

    def forward(self, h: Tensor) -> Tensor:
        return h * (self.draw(self, h) > 0.5).to(h) * 2


def network(draw: Callable[[nn.Module, Tensor], Tensor]) -> nn.Sequential:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    first = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), Mask(draw))
    return nn.Sequential(first, nn.Sequential(nn.Linear(16, 8), nn.Tanh(), Mask(draw)), nn.Linear(8, 4)).double()


X, Y = torch.randn(8, 6, dtype=torch.float64), torch.randint(4, (8,))

# Two forms of one estimate, the second of which runs the network twice.
PAIRS: dict[str, tuple[Callable[..., Estimator], Callable[..., Estimator]]] = {
    "bp": (Backprop, partial(Backprop, checkpoint=True)),
    "dfa": (DFA, partial(DFA, low_memory=True)),
    "dkp": (DKP, partial(DKP, low_memory=True)),
    "fdfa": (FDFA, partial(FDFA, low_memory=True)),
    "fg": (partial(ForwardGradient, engine="reverse"), partial(ForwardGradient, passes="block")),
    "fg-local": (headed(ForwardGradient, guess="local", engine="reverse"), headed(ForwardGradient, guess="local")),
    "fg-weight": (
        partial(ForwardGradient, space="avg-weight", engine="reverse"),
        partial(ForwardGradient, space="avg-weight", passes="block"),
    ),
}


def steps(make: Callable[..., Estimator], model: nn.Module, count: int = 2) -> list[Tensor | None]:
    estimator = make(model, ["0", "1"])
    found = []
    for _ in range(count):
        estimator.zero_grad()
        estimator.estimate(X, Y)
        found += [p.grad for p in model.parameters()]
    return found


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("draw", DRAWS)
def test_masks_are_drawn_once(draw: str, pair: str) -> None:
    """Whatever generator they come from, both steps long."""
    once, twice = (steps(make, network(DRAWS[draw])) for make in PAIRS[pair])
    for one, other in zip(once, twice, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair != "bp"])
@pytest.mark.parametrize("kind", ["stray generator", "counter"])
def test_a_second_run_of_another_network_is_refused(kind: str, pair: str) -> None:
    def draw(module: nn.Module, h: Tensor) -> Tensor:
        if kind == "counter":
            module.count = getattr(module, "count", 0) + 1
            return torch.full(h.shape, float(module.count % 2))
        return torch.rand(h.shape, generator=_stray)

    once, twice = PAIRS[pair]
    steps(once, network(draw))
    with pytest.raises(UsageError, match=r"second run in this step gave another output .* attribute of the module .* buffer"):
        steps(partial(twice, check=False), network(draw))


class Observed(nn.Module):
    """An observer's scale: a moving average that moves before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(0.5).add_(h.abs().max(), alpha=0.5)
        return h / self.scale


DECIDE: dict[str, Callable[[int, int], nn.Module]] = {
    "spectral norm": lambda a, b: nn.utils.spectral_norm(nn.Linear(a, b)),
    "spectral norm as a parametrization": lambda a, b: nn.utils.parametrizations.spectral_norm(nn.Linear(a, b)),
    "observer": lambda a, b: nn.Sequential(nn.Linear(a, b), Observed()),
    "replaced buffer": lambda a, b: nn.Sequential(nn.Linear(a, b), Replacing()),
}


class Replacing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        self.scale = self.scale * 1.5
        return h * self.scale


@pytest.mark.filterwarnings("ignore:samples influence one another")  # through the observer's maximum
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", DECIDE)
def test_buffers_that_decide_what_is_computed(kind: str, pair: str) -> None:
    if (kind, pair) in {("observer", "fg"), ("observer", "fg-local")}:
        pytest.skip("samples influence one another through the maximum, which the forward engine leaves out, and says so")
    torch.manual_seed(0)
    blocks = [nn.Sequential(DECIDE[kind](a, b), nn.Tanh()) for a, b in ((6, 16), (16, 8))]
    model = nn.Sequential(*blocks, nn.Linear(8, 4)).double()
    once, twice = (steps(make, each := copy.deepcopy(model)) + list(each.buffers()) for make in PAIRS[pair])
    for one, other in zip(once, twice, strict=True):
        torch.testing.assert_close(one, other)


def test_looking_at_a_network_draws_nothing() -> None:
    model = network(DRAWS["own numpy"])

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), model[0][2].numpy.bit_generator.state, *model.buffers()]

    before = states()
    DFA(model).initialize(X)
    with Replay(model).unseen():
        model(X)
    assert not validate(model, X)
    assert states() == before


def test_under_autocast_a_step_computes_with_its_own_weights_after_a_look() -> None:
    """A network with hooks is looked at itself, with weights that are a little off: none of their casts may stay."""
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 1])
    found = []
    for check in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        model.register_forward_hook(lambda module, args, output: None)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(DKP(model, check=check).estimate(x, y).output)
    assert torch.equal(*found)
