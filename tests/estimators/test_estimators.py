"""What every estimator promises: accumulation, state, copies, groups, and clear refusals."""

from __future__ import annotations

import copy
import gc
import io
from collections import UserDict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from cases import DIRECT, by_name, headed
from reference import close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import onward
from onward import DFA, Backprop, Estimator, ForwardGradient, LocalLoss, UsageError

KINDS: dict[str, Callable[..., Estimator]] = {
    "bp": Backprop,
    "bp-checkpoint": partial(Backprop, checkpoint=True),
    "brsf": onward.BRSF,
    "kp": onward.KolenPollack,
    **DIRECT,
    **{f"{name}-low-memory": partial(kind, low_memory=True) for name, kind in DIRECT.items()},
    "fg-activation": ForwardGradient,
    "fg-weight": partial(ForwardGradient, space="avg-weight"),
    "fg-random-reverse": partial(ForwardGradient, space="weight", engine="reverse"),
    "fg-global": partial(ForwardGradient, guess="global", space="span-weight", engine="reverse"),
    "fg-feedback": partial(ForwardGradient, guess="feedback"),
    "fg-feedback-dfa": partial(ForwardGradient, guess="feedback", feedback="dfa"),
    "fg-feedback-reverse": partial(ForwardGradient, guess="feedback", feedback="dkp", engine="reverse"),
    "fg-local": headed(ForwardGradient, guess="local"),
    "fg-local-one": headed(ForwardGradient, guess="local", space="activation-2", passes="one"),
    "fg-local-reverse": headed(ForwardGradient, guess="local", space="weight", engine="reverse"),
    "fg-above-ntk": headed(ForwardGradient, target="above", guess="ntk", space="avg-weight"),
    "local": headed(LocalLoss),
}
RANDOM = ("brsf", "fg-activation", "fg-weight", "fg-random-reverse", "fg-local-one", "fg-above-ntk")  # never twice the same
SEEDLESS = (
    "bp",
    "bp-checkpoint",
    "dkp",
    "dkp-low-memory",
    "fg-global",
    "fg-feedback-reverse",
    "fg-local",
    "fg-local-reverse",
    "local",
)
LEARNED = [f"{name}{form}" for name in ("dkp", "fdfa", "grape") for form in ("", "-low-memory")]
LEARNED_FEEDBACK = (*LEARNED, "fg-feedback", "fg-feedback-reverse")
HEADED = ("fg-local", "fg-local-one", "fg-local-reverse", "fg-above-ntk", "local")
NEEDS_OUTPUTS = ("dkp", "fg-feedback-reverse")
ALL = pytest.mark.parametrize("kind", KINDS)
FEEDBACK = pytest.mark.parametrize("kind", [*DIRECT, "fdfa-low-memory", "fg-feedback", "fg-feedback-dfa"])
SWEPT = ("bp", "bp-checkpoint", "brsf", "kp")  # the error comes from the next block
SIGNALS = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SWEPT])


def built(kind: str, name: str = "mlp-batch-norm", seed: int = 7, network_seed: int = 1) -> tuple[Estimator, Any, Tensor]:
    model, x, y, cuts, loss = by_name(name).build(seed=network_seed)
    return KINDS[kind](model, cuts, loss=loss, seed=seed), x, y


def all_gradients(estimator: Estimator) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in estimator.parameters()]


def train(estimator: Estimator, optimizer: torch.optim.Optimizer, x: Any, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        estimator.estimate(x, y)
        optimizer.step()


@ALL
def test_is_the_network(kind: str) -> None:
    estimator, x, _ = built(kind, "dict-of-inputs")
    assert torch.equal(estimator(**x), estimator.model(**x))
    assert isinstance(estimator.cuts, tuple)
    assert isinstance(estimator.engine, str)
    assert estimator.engine
    assert all(module.training for module in estimator.modules())
    estimator.eval()
    assert not any(module.training for module in estimator.modules())
    assert {id(p) for p in estimator.model.parameters()} <= {id(p) for p in estimator.parameters()}


@ALL
def test_two_estimates_add_up(kind: str) -> None:
    estimator, x, y = built(kind, "mlp")
    estimator.estimate(x, y)
    first = all_gradients(estimator)
    estimator.zero_grad()
    estimator.estimate(x, y)
    second = all_gradients(estimator)
    again, _, _ = built(kind, "mlp")
    again.estimate(x, y)
    again.estimate(x, y)
    for total, a, b in zip(all_gradients(again), first, second, strict=True):
        close(total, None if a is None or b is None else a + b)
    assert again.step == 2
    if kind in RANDOM:
        assert not torch.equal(first[0], second[0])
    else:
        assert torch.equal(first[0], second[0])


@ALL
def test_same_seed_same_numbers_whatever_the_global_generator(kind: str) -> None:
    results = []
    for global_seed, seed in [(0, 7), (1, 7), (0, 8)]:
        estimator, x, y = built(kind, "mlp", seed=seed)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        estimator.estimate(x, y)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(torch.cat([p.grad.flatten() for p in estimator.parameters() if p.grad is not None]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2]) == (kind in SEEDLESS)


@ALL
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_run_goes_on_from_its_state(kind: str, through_a_file: bool) -> None:
    """Into a fresh estimator, whose feedback has no size and whose seed is another."""
    estimator, x, y = built(kind)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=0.01)
    train(estimator, optimizer, x, y, 3)
    state, optimizer_state = estimator.state_dict(), optimizer.state_dict()
    if through_a_file:
        file = io.BytesIO()
        torch.save((state, optimizer_state), file)
        file.seek(0)
        state, optimizer_state = torch.load(file, weights_only=True)
    state, optimizer_state = copy.deepcopy((state, optimizer_state))
    train(estimator, optimizer, x, y, 3)

    fresh, _, _ = built(kind, seed=99, network_seed=5)
    fresh.load_state_dict(state)
    assert fresh.step == 3
    optimizer = torch.optim.Adam(fresh.parameters(), lr=0.01)
    optimizer.load_state_dict(optimizer_state)
    train(fresh, optimizer, x, y, 3)
    assert fresh.step == estimator.step == 6
    for a, b in zip(estimator.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(estimator.buffers(), fresh.buffers(), strict=True):
        assert torch.equal(a, b)


@FEEDBACK
def test_state_before_the_first_step(kind: str) -> None:
    estimator, x, y = built(kind)
    fresh, _, _ = built(kind, seed=99, network_seed=5)
    fresh.load_state_dict(estimator.state_dict())
    for each in (estimator, fresh):
        each.estimate(x, y)
    for a, b in zip(all_gradients(estimator), all_gradients(fresh), strict=True):
        close(a, b)


@ALL
@pytest.mark.parametrize("steps", [0, 2])
def test_deepcopy(kind: str, steps: int) -> None:
    estimator, x, y = built(kind)
    for _ in range(steps):
        estimator.estimate(x, y)
    estimator.zero_grad()
    twin = copy.deepcopy(estimator)
    for each in (estimator, twin):
        each.estimate(x, y)
    assert twin.step == estimator.step == steps + 1
    for p, q in zip(estimator.parameters(), twin.parameters(), strict=True):
        assert p is not q
        close(p.grad, q.grad)


@ALL
@pytest.mark.parametrize("steps", [0, 1])
def test_to_another_precision(kind: str, steps: int) -> None:
    model, x, y, cuts, loss = by_name("mlp").build()
    estimator = KINDS[kind](model.float(), cuts, loss=loss)
    for _ in range(steps):
        estimator.estimate(x.float(), y)
    estimator.to(torch.float64)
    estimator.zero_grad()
    estimator.estimate(x, y)
    for p in estimator.parameters():
        assert p.dtype == torch.float64
        assert p.grad is None or p.grad.dtype == torch.float64


@ALL
def test_parameter_groups(kind: str) -> None:
    estimator, _, _ = built(kind)
    options = {"network": {"lr": 0.5}, "heads": {"lr": 0.125}, "feedback": {"lr": 0.25, "weight_decay": 1e-6}}
    groups = estimator.parameter_groups(**options)
    by_role = {group["role"]: group for group in groups}
    assert len(by_role) == len(groups)
    beside = estimator.feedback if kind == "kp" else []  # which learns as the network does
    assert [id(p) for p in by_role["network"]["params"]] == [id(p) for p in [*estimator.model.parameters(), *beside]]
    assert set(by_role) == {"network", *["feedback"] * (kind in LEARNED_FEEDBACK), *["heads"] * (kind in HEADED)}
    for role, group in by_role.items():
        assert group["params"]
        assert {key: group[key] for key in options[role]} == options[role]
    if "heads" in by_role:
        assert {id(p) for p in by_role["heads"]["params"]} == {id(p) for p in estimator.heads.parameters()}
    if "feedback" in by_role:
        assert [id(p) for p in by_role["feedback"]["params"]] == [id(p) for p in estimator.feedback]
    optimizer = torch.optim.SGD(estimator.parameter_groups(), lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * len(groups)


@pytest.mark.parametrize("kind", ["dkp", "fdfa", "fdfa-low-memory"])
def test_the_step_uses_the_feedback_from_before_it(kind: str) -> None:
    """The first step has B = 0: hidden blocks get nothing, and the feedback's own gradient is not yet in use."""
    estimator, x, y = built(kind, "mlp")
    estimator.estimate(x, y)
    assert not estimator.model[0][0].weight.grad.any()
    assert estimator.model[2].weight.grad.any()
    assert all(matrix.grad.any() and not matrix.any() for matrix in estimator.feedback)
    assert [tuple(matrix.shape) for matrix in estimator.feedback] == [(3, 5), (3, 4)]


@ALL
def test_the_last_block_gets_the_exact_gradient(kind: str) -> None:
    estimator, x, y = built(kind, "mlp-batch-norm")
    expected = reference.backprop(estimator.model, x, y, F.cross_entropy)
    estimator.estimate(x, y)
    close(estimator.model[6].weight.grad, expected["6.weight"])
    close(estimator.model[6].bias.grad, expected["6.bias"])


@ALL
@pytest.mark.parametrize("frozen", [["0.0"], ["0"], ["1"], ["0", "1"], ["2"]], ids=str)
def test_frozen_parameters(kind: str, frozen: list[str]) -> None:
    model, x, y, cuts, loss = by_name("mlp").build()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    estimator = KINDS[kind](model, cuts, loss=loss)
    if frozen == ["2"] and kind not in SWEPT:
        with pytest.raises(UsageError, match="last block"):
            estimator.estimate(x, y)
        return
    estimator.estimate(x, y)
    for p in model.parameters():
        assert (p.grad is not None) == p.requires_grad


@ALL
def test_parameters_that_the_network_does_not_use(kind: str) -> None:
    """They keep no gradient, as after `loss.backward()`, so that an optimizer's weight decay leaves them alone."""
    model, x, y, cuts, loss = by_name("mlp").build()
    model[0].unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model[2].unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    KINDS[kind](model, cuts, loss=loss).estimate(x, y)
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["0.unused", "2.unused"]


@ALL
def test_batches_of_different_sizes(kind: str) -> None:
    estimator, x, y = built(kind)
    estimator.estimate(x, y)
    estimator.estimate(x[:2], y[:2])
    estimator.estimate(x.repeat(3, 1), y.repeat(3))


@ALL
@pytest.mark.parametrize("label", [3, 17, -1])
def test_labels_out_of_range(kind: str, label: int) -> None:
    estimator, x, y = built(kind, "cnn-batch-norm")
    y[2] = label
    with pytest.raises(UsageError, match=rf"{label}.*0 to 2"):
        estimator.estimate(x, y)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in estimator.modules())
    assert not any(p.grad is not None and p.grad.any() for p in estimator.parameters())
    assert estimator.step == 0


@ALL
def test_batch_of_one_with_batch_norm(kind: str) -> None:
    estimator, x, y = built(kind)
    with pytest.raises(UsageError, match=r"batch norm.*at least 2"):
        estimator.estimate(x[:1], y[:1])
    estimator.eval().estimate(x[:1], y[:1])


@ALL
def test_loss_that_is_not_a_scalar(kind: str) -> None:
    model, x, y, cuts, _ = by_name("mlp").build()
    estimator = KINDS[kind](model, cuts, loss=partial(F.cross_entropy, reduction="none"))
    with pytest.raises(UsageError, match=r"loss.*\(4,\).*scalar"):
        estimator.estimate(x, y)


@ALL
def test_a_loss_that_cannot_take_the_output(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self, form: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.a, self.b, self.form = nn.Linear(3, 3), nn.Linear(3, 3), form

        def forward(self, x: Tensor) -> Any:
            return self.form(self.b(self.a(x)))

    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    with pytest.raises(UsageError, match=r"the loss cannot take the dict .* loss=lambda output, y"):
        KINDS[kind](Net(lambda z: {"scores": z, "more": z}), ["a"]).estimate(x, y)
    with pytest.raises(UsageError, match=r"returned a str without a tensor"):
        KINDS[kind](Net(lambda z: "nothing"), ["a"]).estimate(x, y)


@SIGNALS
def test_a_failure_in_the_network_leaves_nothing_behind(kind: str) -> None:
    """Hooks, modes, statistics in use and switches are as they were."""
    estimator, x, y = built(kind)
    estimator.estimate(x, y)
    switches = (
        torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled(), torch.backends.mkldnn.enabled,
        torch.is_grad_enabled(), torch.is_autocast_cache_enabled(),
    )  # fmt: skip
    buffers = list(estimator.buffers())
    for wrong in (x[:, :2], x.long()):
        with pytest.raises(Exception):  # noqa: B017, PT011 - PyTorch's own complaint about shapes or types
            estimator.estimate(wrong, y)
    assert switches == (
        torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled(), torch.backends.mkldnn.enabled,
        torch.is_grad_enabled(), torch.is_autocast_cache_enabled(),
    )  # fmt: skip
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in estimator.modules())
    assert all(a is b for a, b in zip(buffers, estimator.buffers(), strict=True))
    assert estimator.step == 1
    loss = F.cross_entropy(estimator(x), y)
    estimator.zero_grad()
    loss.backward()
    assert all(p.grad is not None for p in estimator.model.parameters())


@ALL
def test_under_autocast(kind: str) -> None:
    """The loss and its derivative are in single precision; the estimate is near the one without."""
    model, x, y, cuts, loss = by_name("mlp").build(seed=2)
    x = x.float()
    plain = KINDS[kind](copy.deepcopy(model).float(), cuts, loss=loss)
    half = KINDS[kind](model.float(), cuts, loss=loss)
    for estimator in (plain, half):
        if getattr(estimator, "feedback", None) is not None:
            estimator.estimate(x, y)  # makes the matrices
            estimator.zero_grad()
            with torch.no_grad():
                for matrix in estimator.feedback:
                    matrix.copy_(torch.linspace(-1, 1, matrix.numel()).view_as(matrix))
    expected = plain.estimate(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = half.estimate(x, y)
    assert step.loss.dtype == torch.float32
    torch.testing.assert_close(step.loss, expected.loss, rtol=0.02, atol=0.02)
    for p, q in zip(half.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            assert p.grad.dtype == p.dtype
            assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.97


@ALL
@pytest.mark.parametrize("name", ["cnn-batch-norm", "residual", "group-norm", "convolutions"])
def test_channels_last(kind: str, name: str) -> None:
    """The layout of images in memory changes nothing."""
    model, x, y, cuts, loss = by_name(name).build(seed=2)
    plain = KINDS[kind](copy.deepcopy(model), cuts, loss=loss)
    other = KINDS[kind](model.to(memory_format=torch.channels_last), cuts, loss=loss)
    plain.estimate(x, y)
    plain.estimate(x, y)
    for _ in range(2):
        other.estimate(x.contiguous(memory_format=torch.channels_last), y)
    for p, q in zip(other.parameters(), plain.parameters(), strict=True):
        close(p.grad, q.grad)


@SIGNALS
def test_ends_of_blocks_that_are_overwritten(kind: str) -> None:
    """In-place modules behind a cut: the numbers are those of the same network without them."""

    def network(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 5), nn.ELU(inplace=inplace), nn.Linear(5, 4), nn.LeakyReLU(inplace=inplace), nn.Linear(4, 3)]
        return nn.Sequential(*layers).double()

    _, x, y, _, loss = by_name("mlp").build(seed=2)
    pair = [KINDS[kind](network(inplace), ["0", "2"], loss=loss) for inplace in (False, True)]
    if kind in NEEDS_OUTPUTS:
        with pytest.raises(UsageError, match="overwrites that block's output in place"):
            pair[1].estimate(x, y)
        return
    for estimator in pair:
        estimator.estimate(x, y)
        estimator.estimate(x, y)
    for p, q in zip(*(estimator.parameters() for estimator in pair), strict=True):
        close(p.grad, q.grad)


@SIGNALS
def test_network_inside_no_grad_blocks_of_its_own(kind: str) -> None:
    """A frozen feature extractor under `torch.no_grad()` in front of what is trained."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.body, self.head = nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.features(x)
            return self.head(self.body(h))

    model = Net().double()
    model.features.requires_grad_(False)
    _, x, y, _, loss = by_name("mlp").build(seed=2)
    estimator = KINDS[kind](model, ["body"], loss=loss)
    estimator.estimate(x, y)
    estimator.estimate(x, y)
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("features"))


@ALL
def test_a_step_leaves_no_garbage(kind: str) -> None:
    """No tensor waits for Python's garbage collector: what a step held is free when it returns."""
    estimator, x, y = built(kind, "cnn-batch-norm")
    estimator.estimate(x, y)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        estimator.estimate(x, y)
        gc.collect()
        assert not [one for one in gc.garbage if isinstance(one, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


class Counting(nn.Module):
    """Keeps statistics of its own, in the ways that people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            self.calls += 1
        return (h - self.mean).tanh()


@ALL
@pytest.mark.filterwarnings("ignore:samples influence one another")  # through statistics that are not batch norm's
def test_statistics_of_any_kind_move_once(kind: str) -> None:
    _, x, y, _, _ = by_name("mlp").build(seed=2)
    torch.manual_seed(0)
    model = nn.Sequential(Counting(), Counting(), nn.Linear(6, 3)).double()
    plain = copy.deepcopy(model)
    plain(x)
    KINDS[kind](model, ["0", "1"]).estimate(x, y)
    for (name, buffer), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)


class Reshaped(nn.Module):
    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.shape = model, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).view(self.shape)


@ALL
@pytest.mark.parametrize("initialized", [False, True])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1, 1)], ids=["vector", "three dimensions"])
def test_outputs_of_another_number_of_dimensions(kind: str, shape: tuple[int, ...], initialized: bool) -> None:
    """One output per sample as a vector, or a map of outputs: the same numbers as a matrix of outputs."""
    _, x, _, _, _ = by_name("mlp").build(seed=2)
    y = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    pair = []
    for each in ((-1, 1), shape):
        model = Reshaped(copy.deepcopy(network), each)
        estimator = KINDS[kind](model, ["model.1"], loss=lambda z, y: F.binary_cross_entropy_with_logits(z.flatten(), y))
        if initialized and hasattr(estimator, "initialize"):
            estimator.initialize(x)
        estimator.estimate(x, y)
        estimator.estimate(x, y)
        pair.append(estimator)
    for p, q in zip(*(estimator.parameters() for estimator in pair), strict=True):
        close(p.grad, q.grad)


class Learned(nn.Module):
    """A loss with something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z * self.temperature, y)


def test_a_loss_that_would_not_be_trained_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    loss = Learned()
    with pytest.raises(UsageError, match=r"the loss Learned has parameters to train \(temperature\)"):
        DFA(model, loss=loss)
    DFA(model, loss=loss.requires_grad_(False)).estimate(torch.randn(2, 3), torch.tensor([0, 1]))


class Shared(nn.Module):
    """The gradients of p and q are equal, and so are all elements of that of r."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.p, self.q, self.r = (nn.Parameter(torch.ones(2)) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h) * self.r.sum() + (self.p + self.q)


def test_every_gradient_has_memory_of_its_own() -> None:
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), Shared())
    estimator = ForwardGradient(model, ["1"], engine="reverse", seed=1)
    once = Backprop(model)
    once.estimate(x, y)
    wanted = {name: 2 * p.grad for name, p in model[2].named_parameters() if p.grad is not None}
    model.zero_grad()
    estimator.estimate(x, y)
    estimator.estimate(x, y)
    for name, p in model[2].named_parameters():
        torch.testing.assert_close(p.grad, wanted[name])
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


EACH = {
    "Backprop": onward.Backprop,
    "DFA": DFA,
    "FDFA": onward.FDFA,
    "low memory": lambda model: onward.FDFA(model, low_memory=True),
    "forward": onward.ForwardGradient,
    "reverse": lambda model: onward.ForwardGradient(model, engine="reverse"),
    "weight": lambda model: onward.ForwardGradient(model, engine="reverse", space="weight"),
}


@pytest.mark.parametrize("make", EACH.values(), ids=EACH)
def test_where_gradients_are_off_or_there_is_no_sample(make: Any) -> None:
    estimator = make(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)))
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    for off in (torch.no_grad, torch.inference_mode):
        with off(), pytest.raises(UsageError, match=r"gradients are off here: call estimate outside of torch.no_grad\(\)"):
            estimator.estimate(x, y)
    with pytest.raises(UsageError, match="a batch without a sample"):
        estimator.estimate(x[:0], y[:0])
    assert estimator.step == 0


def test_without_a_graph_gradients_may_be_off() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        onward.ForwardGradient(model, space="avg-weight").estimate(torch.randn(2, 3), torch.tensor([0, 1]))
    assert model[0].weight.grad is not None


def test_inputs_in_any_mapping() -> None:
    """Such as what tokenizers return."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, *, words: Tensor, mask: Tensor) -> Tensor:
            return self.last(self.first(words * mask).relu())

    x = UserDict(words=torch.randn(2, 3), mask=torch.ones(2, 3))
    assert DFA(Named(), ["first"]).estimate(x, torch.tensor([0, 1])).output.shape == (2, 2)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("guess", [None, "local"])
@pytest.mark.parametrize("dense", [True, False])
def test_heads_of_networks_whose_outputs_are_no_rows(kind: str, guess: str | None, dense: bool) -> None:
    """Of every pixel, and one number of every sample, which must not be spread over the batch."""
    x = torch.randn(6, 2, 4, 4)
    hidden = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
    last: nn.Module = nn.Conv2d(4, 3, 1)
    y, loss = torch.randint(3, (6, 4, 4)), nn.functional.cross_entropy
    if not dense:
        last = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
        y, loss = torch.randn(6), nn.functional.mse_loss
    model = nn.Sequential(hidden, last)
    heads = onward.make_heads(model, x, kind, cuts=["0"])
    make = onward.LocalLoss if guess is None else partial(onward.ForwardGradient, guess=guess)
    step = make(model, ["0"], heads=heads, loss=loss).estimate(x, y)
    assert step.heads["0"][1].shape == step.output.shape == ((6, 3, 4, 4) if dense else (6,))
    if dense:
        with pytest.raises(UsageError, match="this head is for classes of whole samples: use another kind of head"):
            onward.make_heads(model, x, "predsim", cuts=["0"])


def test_a_predsim_head_needs_labels_of_samples() -> None:
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    estimator = onward.LocalLoss(model, heads=onward.make_heads(model, x, "predsim"))
    with pytest.raises(UsageError, match="a predsim head compares the labels of samples: give class numbers from 0 on"):
        estimator.estimate(x, torch.tensor([0, -100, 2]))


def test_a_feedback_matrix_that_there_is_no_memory_for() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()), nn.Conv2d(1, 1, 1))
    estimator = DFA(model, ["0"], loss=lambda z, y: z.mean(), positions="own")
    with pytest.raises(UsageError, match=r"cut '0' would have 16777216 x 16777216 numbers.* no memory"):
        estimator.estimate(torch.zeros(1, 1, 4096, 4096), None)


@pytest.mark.parametrize("space", ["activation", "activation-2"])
def test_checkpointing_inside_a_block(space: str) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda t: self.linear(t).relu(), x, use_reentrant=False)

    x, y = torch.randn(4, 3).requires_grad_(), torch.tensor([0, 1, 1, 0])
    torch.manual_seed(0)
    model = nn.Sequential(Again(), Again(), nn.Linear(3, 2))
    plain = nn.Sequential(*(nn.Sequential(layer.linear, nn.ReLU()) for layer in model[:2]), model[2])
    for network in (model, plain):
        network.zero_grad()
        onward.ForwardGradient(network, ["0", "1"], space=space).estimate(x, y)
        network.found = [p.grad.clone() for p in network.parameters()]
    torch.testing.assert_close(model.found, plain.found)


def test_every_direction_is_drawn_once_in_a_measuring_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = onward.directions.draw

    def noted(*args: Any, **given: Any) -> Tensor:
        drawn.append(given["direction"])
        return draw(*args, **given)

    monkeypatch.setattr("onward.estimators.base.draw", noted)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    onward.ForwardGradient(model, passes="block", directions=32).estimate(torch.randn(2, 3), torch.tensor([0, 1]))
    assert len(drawn) == 32  # so small that they are kept, to be delivered


@pytest.mark.parametrize("name", KINDS)
def test_every_loss_is_computed_in_float32_under_autocast(name: str) -> None:
    seen = set()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        seen.add((z.dtype, torch.is_autocast_enabled("cpu")))
        return F.cross_entropy(z, y)

    estimator = KINDS[name](nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), loss=loss)
    with torch.autocast("cpu", torch.bfloat16):
        estimator.estimate(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    assert seen == {(torch.float32, False)}


def test_a_predsim_head_of_features_that_are_all_the_same() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    x = torch.randn(4, 1, 6, 6)
    estimator = LocalLoss(model, ["0"], heads=onward.make_heads(model, x, "predsim", cuts=["0"]))
    estimator.estimate(x, torch.tensor([0, 1, 2, 1]))  # one channel, so nothing is left once it is centred
    assert all(p.grad.isfinite().all() for p in estimator.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", KINDS)
def test_what_a_step_returns_can_be_saved(name: str) -> None:
    estimator, held = KINDS[name](nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), seed=np.int64(3)), io.BytesIO()
    step = estimator.estimate(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    torch.save((step.output, estimator.state_dict()), held)
    held.seek(0)
    assert torch.equal(torch.load(held, weights_only=True)[0], step.output)


class Halts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return x + w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


@pytest.mark.parametrize("engine", ["forward", "reverse"])
@pytest.mark.parametrize("space", ["avg-weight", "weight"])
def test_a_custom_function_without_a_gradient(engine: str, space: str) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.linear = nn.Parameter(torch.zeros(3)), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(Halts.apply(x, self.shift)).tanh()

    if (engine, space) == ("forward", "weight"):
        pytest.skip("there is no such combination")
    model, x = nn.Sequential(Shifted(), nn.Linear(4, 2)), torch.randn(4, 3)
    heads = {"0": nn.Linear(4, 2)}
    estimator = ForwardGradient(model, ["0"], guess="local", space=space, engine=engine, heads=heads)
    estimator.estimate(x, torch.tensor([0, 1, 1, 0]))
    assert model[0].linear.weight.grad.any()
    assert model[0].shift.grad is None or not model[0].shift.grad.any()
