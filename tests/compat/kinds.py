"""One small network for each kind of thing that has gone wrong: blocks hide their graph, drop a path, or differ when run again.

Most are three blocks, of which the middle one has the peculiarity. Where the answers cannot be worked out on the network as it
is, `plain` is the same function without it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from answers import Case
from networks import labels, normal
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from trials import AGAIN, CUT, MEASURING, NAMES, OWN_SLOPES, Outcome, attempt
from trials import SAMPLES as PER_WEIGHT

Parts = tuple[nn.Module, Any, Any]
SAMPLES, WIDTH, CLASSES = 5, 6, 3
CUTS = ("first", "middle")
BY_SAMPLE = tuple(name for name in CUT if "weights" not in name)
"""Those that take rows for samples."""


class Net(nn.Module):
    """Three blocks, one after the other."""

    def __init__(self, middle: nn.Module, first: nn.Module | None = None, last: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first or nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh())
        self.middle, self.last = middle, last or nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def flat(middle: Callable[[], nn.Module]) -> Parts:
    return Net(middle()).double(), normal(SAMPLES, 4), labels(SAMPLES)


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


class Skip(nn.Module):
    """x + f(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Apply(nn.Module):
    """A linear layer, then a function of tensors."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(WIDTH, WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


# Checkpointing.


class Checkpointed(nn.Module):
    """A block that checkpoints what is in it, or does not."""

    def __init__(self, how: bool | None) -> None:
        super().__init__()
        self.inner, self.how = dense(), how

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.how is None else checkpoint(self.inner, x, use_reentrant=self.how)


class CheckpointedNet(Net):
    """A network that checkpoints its blocks, or does not."""

    def __init__(self, how: bool | None) -> None:
        super().__init__(dense(), dense())
        self.stem, self.how = nn.Linear(4, WIDTH), how

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in (self.first, self.middle):
            h = block(h) if self.how is None else checkpoint(block, h, use_reentrant=self.how)
        return self.last(h)


def checkpointed(how: bool | None) -> Parts:
    return CheckpointedNet(how).double(), normal(SAMPLES, 4), labels(SAMPLES)


# Gradients, and transforms, inside forward.


class Energy(nn.Module):
    """h less the gradient of a learned energy at h; or at a copy of h, always or where h asks for no gradient."""

    def __init__(self, how: str, inputs: int = WIDTH) -> None:
        super().__init__()
        self.energy, self.how = nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, 1)), how

    def forward(self, h: Tensor) -> Tensor:
        if self.how == "torch.func":
            return h - torch.func.vmap(torch.func.grad(lambda row: self.energy(row).sum()))(h)
        with torch.enable_grad():
            here = h
            if self.how == "copy" or not h.requires_grad:
                here = (h if self.how == "in place" else h.detach()).requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(here).sum(), here, create_graph=True)
        return h - slope


def gradient_first() -> Parts:
    first = nn.Sequential(Energy("copy", 4), nn.Linear(4, WIDTH), nn.Tanh())
    return Net(dense(), first).double(), normal(SAMPLES, 4), labels(SAMPLES)


class Sensitivity(nn.Module):
    """f(h) and how it moves along h itself, by torch.func.jvp."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = dense()

    def forward(self, h: Tensor) -> Tensor:
        value, moved = torch.func.jvp(self.layer, (h,), (h,))
        return value + moved


class OneByOne(nn.Module):
    """A layer mapped over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = dense()

    def forward(self, h: Tensor) -> Tensor:
        return torch.func.vmap(self.layer)(h)


# Functions with a backward of their own.


class Sine(torch.autograd.Function):
    """The true derivative."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.sin()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0] * ctx.saved_tensors[0].cos()


class Rounded(torch.autograd.Function):
    """Straight through: forward rounds, backward does as if it did not."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return (4 * h).round() / 4

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0]


class Reversed(torch.autograd.Function):
    """Forward passes on, backward turns the sign, as in domain adaptation."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return -g[0]


class Hiding(torch.autograd.Function):
    """Runs a module without a graph, and again with one when a gradient arrives."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, module: nn.Module, _switch: Tensor | None = None) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(h)
        return module(h)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        here = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(here), g[0])
        return here.grad, None, None


class Hidden(nn.Module):
    def __init__(self, hidden: bool, switched: bool) -> None:
        super().__init__()
        self.inner, self.hidden = dense(), hidden
        self.switch = torch.zeros((), requires_grad=True) if switched else None

    def forward(self, x: Tensor) -> Tensor:
        return Hiding.apply(x, self.inner, self.switch) if self.hidden else self.inner(x)


class HidingNet(Net):
    """The function hides a whole block, and the cut in it."""

    def __init__(self, hidden: bool) -> None:
        super().__init__(dense(), dense())
        self.stem, self.hidden = nn.Linear(4, WIDTH), hidden

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in (self.first, self.middle):
            h = Hiding.apply(h, block) if self.hidden else block(h)
        return self.last(h)


def hiding(hidden: bool) -> Parts:
    return HidingNet(hidden).double(), normal(SAMPLES, 4), labels(SAMPLES)


# What does not train.


def frozen(*names: str) -> Parts:
    net, x, y = flat(dense)
    for name in names:
        net.get_submodule(name).requires_grad_(False)
    return net, x, y


class WithoutGradient(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)


def no_grad_first(beside: bool) -> Parts:
    inner: nn.Module = WithoutGradient(nn.Linear(4, WIDTH))
    first = nn.Sequential(inner, nn.Linear(WIDTH, WIDTH), nn.Tanh()) if beside else inner
    return Net(dense(), first).double(), normal(SAMPLES, 4), labels(SAMPLES)


# Skips.


class Skipping(Net):
    """A skip from a cut's own output, or from before that cut, which passes something first."""

    def __init__(self, through: nn.Module, bypass: bool) -> None:
        super().__init__(dense())
        self.through, self.stem, self.bypass = through, nn.Linear(4, 4), bypass

    def forward(self, x: Tensor) -> Tensor:
        early = self.stem(x)
        h = self.first(early)
        if self.bypass:
            return self.last(self.middle(h) + self.through(F.pad(early, (0, WIDTH - 4))))
        h = self.through(h)
        return self.last(self.middle(h) + h)


class Pool(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.interpolate(F.avg_pool1d(h.unsqueeze(1), 2), WIDTH).squeeze(1)


class Scale(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * 0.5


def skipping(through: Callable[[], nn.Module], bypass: bool = False) -> Parts:
    return Skipping(through(), bypass).double(), normal(SAMPLES, 4), labels(SAMPLES)


# Tables.


def table(**options: Any) -> Parts:
    first = nn.Sequential(nn.Embedding(7, 4, **options), nn.Flatten(), nn.Linear(12, WIDTH), nn.Tanh())
    return Net(dense(), first).double(), torch.tensor([[1, 2, 0], [3, 0, 0], [4, 1, 1], [2, 2, 6], [0, 5, 1]]), labels(SAMPLES)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.layer = nn.EmbeddingBag(7, 4), nn.Linear(4, WIDTH)

    def forward(self, words: Tensor) -> Tensor:
        return self.layer(self.bag(words)).tanh()


def bags() -> Parts:
    return Net(dense(), Bags()).double(), torch.randint(7, (SAMPLES, 3)), labels(SAMPLES)


# Buffers, and other state, that decide what is computed.


class Centred(nn.Module):
    """Subtracts a moving average, which every run moves; kept in a buffer, in a new one each time, or in a number."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.linear, self.kept, self.number = nn.Linear(WIDTH, WIDTH), kept, 0.0
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        now = h.detach().square().mean() + 1
        if self.kept == "in place":
            self.average.mul_(0.5).add_(now, alpha=0.5)
        elif self.kept == "replaced":
            self.average = 0.5 * self.average + 0.5 * now
        else:
            self.number = 0.5 * self.number + 0.5 * now.item()
        return (h - (self.number if self.kept == "number" else self.average)).tanh()


class FirstBatch(nn.Module):
    """Scales by what the first batch that it sees asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale, self.ready = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH)), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if not self.ready:
            with torch.no_grad():
                self.scale.copy_(1 / (h.std(0) + 0.1))
            self.ready = True
        return (h * self.scale).tanh()


class Following(nn.Module):
    """A second layer that follows the first, a little at every run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.slow = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.slow.requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.slow.weight.lerp_(self.layer.weight, 0.1)
        return (self.layer(h) + self.slow(h)).tanh()


class StopGradient(nn.Module):
    """Normalises by what it takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h / h.detach().norm(dim=1, keepdim=True)


def spectral(old: bool) -> nn.Module:
    normed = nn.utils.spectral_norm if old else parametrizations.spectral_norm
    return nn.Sequential(normed(nn.Linear(WIDTH, WIDTH)), nn.Tanh())


# Rows that influence one another.


class AcrossRows(nn.Module):
    """Attention of every sample to all others."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.project(h).chunk(3, -1)
        return h + (q @ k.T).softmax(-1) @ v


class StepsFirst(nn.Module):
    """A recurrent layer that takes rows for steps of one sequence; batch_first was forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return self.lstm(h)[0]


# Randomness.


class Mask(nn.Module):
    """Dropout whose masks come from somewhere else."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.linear, self.source = nn.Linear(WIDTH, WIDTH), source
        self.generator, self.of_numpy, self.of_random = (
            torch.Generator().manual_seed(1),
            np.random.default_rng(1),
            random.Random(1),
        )
        hidden = np.random.default_rng(1)
        self.out_of_sight = lambda shape: hidden.random(shape)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        drawn = {
            "torch": lambda: torch.rand(h.shape),
            "numpy": lambda: torch.from_numpy(np.random.rand(*h.shape)),  # noqa: NPY002
            "random": lambda: torch.tensor([random.random() for _ in range(h.numel())]).view(h.shape),
            "own": lambda: torch.rand(h.shape, generator=self.generator),
            "own of numpy": lambda: torch.from_numpy(self.of_numpy.random(h.shape)),
            "own of random": lambda: torch.tensor([self.of_random.random() for _ in range(h.numel())]).view(h.shape),
            "out of sight": lambda: torch.from_numpy(self.out_of_sight(h.shape)),
        }[self.source]()
        return h * (drawn > 0.5).to(h) * 2


class LayerDrop(nn.Module):
    """Leaves out layers, by Python's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(dense() for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            if random.random() < 0.5:
                h = layer(h)
        return h


class Redrawn(nn.Module):
    """Checkpoints a dropout, or does not."""

    def __init__(self, how: bool | None) -> None:
        super().__init__()
        self.inner, self.how = nn.Sequential(dense(), nn.Dropout(0.5)), how

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.how is None else checkpoint(self.inner, x, use_reentrant=self.how)


# Layers whose output is not what their weights and input say.


def hooked() -> nn.Module:
    block = dense()
    block[0].register_forward_hook(lambda _module, inputs, output: output * inputs[0].square().sum(1, keepdim=True))
    return block


def pre_hooked() -> nn.Module:
    block = dense()
    block[0].register_forward_pre_hook(lambda _module, inputs: (inputs[0] * inputs[0].roll(1, 1),))
    return block


def replaced() -> nn.Module:
    block = dense()
    layer = block[0]
    layer.forward = lambda h: F.linear(h.square(), layer.weight, layer.bias) + F.linear(h, layer.weight).sin()
    return block


class LowRank(nn.Linear):
    """A linear layer with an adapter of low rank."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.down, self.up = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(WIDTH, 2))
        self.weight.requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight + self.up @ self.down, self.bias)


class Quantised(nn.Module):
    """A weight that is rounded whenever it is read; its gradient goes straight through."""

    def forward(self, weight: Tensor) -> Tensor:
        return Rounded.apply(weight)


class Doubled(nn.Module):
    """A weight that is read as twice itself."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(by: nn.Module) -> nn.Module:
    block = dense()
    parametrize.register_parametrization(block[0], "weight", by)
    return block


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh())


def used_twice() -> nn.Module:
    shared = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(shared, nn.Tanh(), shared)


def written_out() -> nn.Module:
    """A layer's weight read by somebody else, beside its own run."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, h: Tensor) -> Tensor:
            return self.layer(h).tanh() + F.linear(h, self.layer.weight.square())

    return Reader()


class Hyper(nn.Module):
    """A layer whose weight another layer makes out of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.make = nn.Parameter(torch.randn(3)), nn.Linear(3, WIDTH * WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        made = {"weight": self.make(self.code).view(WIDTH, WIDTH), "bias": self.layer.bias}
        return torch.func.functional_call(self.layer, made, (h,)).tanh()


class Clamped(nn.Module):
    """A layer that bounds its weight before every use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.clamp_(-0.2, 0.2)
        return self.layer(h).tanh()


class Fourier(nn.Module):
    """Multiplies frequencies by complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH // 2 + 1, 2))

    def forward(self, h: Tensor) -> Tensor:
        return h.tanh() + torch.fft.irfft(torch.fft.rfft(h) * torch.view_as_complex(self.weight), n=WIDTH)


class Single(nn.Module):
    """Computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h.float(), self.layer.weight.float(), self.layer.bias.float()).tanh().double()


def hooked_tensor(h: Tensor) -> Tensor:
    h = h.sin()
    if h.requires_grad:
        h.register_hook(lambda g: 0.1 * g)
    return h


def straight_through_by_detach(h: Tensor) -> Tensor:
    return (h + ((4 * h).round() / 4 - h).detach()).sin()


def sampled(h: Tensor) -> Tensor:
    return torch.distributions.Normal(h, F.softplus(h) + 0.1).rsample()


def leaky_at_random(h: Tensor) -> Tensor:
    """Which PyTorch's own checkpointing differentiates wrongly."""
    return F.rrelu(h, training=True)


def by_gumbel(h: Tensor) -> Tensor:
    return F.gumbel_softmax(h, hard=True)


def first_half(h: Tensor) -> Tensor:
    return torch.cat([h, h.sin()], 1).chunk(2, 1)[1]


def expanded(h: Tensor) -> Tensor:
    return h.mean(1, keepdim=True).sin().expand(-1, WIDTH)


class CalledByForward(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle.forward(self.first(x)))


class CutApart(Net):
    """Lets no gradient through between its blocks."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).detach()))


class StepsAndSamples(nn.Module):
    """Returns as many steps as there are samples, and steps first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, SAMPLES * 2)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h).view(len(h), SAMPLES, 2).transpose(0, 1).tanh()


class OverSteps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, CLASSES)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h).mean(0)


def steps_first() -> Parts:
    return Net(StepsAndSamples(), last=OverSteps()).double(), normal(SAMPLES, 4), labels(SAMPLES)


def net(kind: type[Net], middle: Callable[[], nn.Module] = dense) -> Parts:
    return kind(middle()).double(), normal(SAMPLES, 4), labels(SAMPLES)


# Losses that read more than the output.

latest: list[nn.Module] = []
"""The network that has run last."""


class Sized(nn.Module):
    """Keeps how large its activations are, for the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        h = self.layer(h)
        self.size = h.square().mean()
        return h.tanh()


class Remembered(Net):
    def forward(self, x: Tensor) -> Tensor:
        latest[:] = [self]
        return super().forward(x)


def of_weights(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + 0.1 * sum(p.square().sum() for p in latest[0].parameters())


def of_block(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + latest[0].middle.size


# Layouts.


def channels_last(norm: Callable[[], nn.Module], memory: torch.memory_format = torch.channels_last) -> Parts:
    first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
    middle = nn.Sequential(norm(), nn.Conv2d(4, 3, 3), nn.ReLU())
    net = Net(middle, first, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, CLASSES)))
    return net.double().to(memory_format=memory), normal(SAMPLES, 2, 6, 6).to(memory_format=memory), labels(SAMPLES)


# Towers and outputs.


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Sequential(nn.Linear(4, 3), nn.GELU()), nn.Sequential(nn.Linear(2, 3), nn.Tanh())
        self.last = nn.Linear(6, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.last(torch.cat([self.first(left), self.middle(right)], 1))


def towers() -> Parts:
    return Towers().double(), (normal(SAMPLES, 4), normal(SAMPLES, 2)), labels(SAMPLES)


class TwoOutputs(Net):
    def __init__(self, as_dict: bool) -> None:
        super().__init__(dense())
        self.value, self.as_dict = nn.Linear(WIDTH, 1), as_dict

    def forward(self, x: Tensor) -> Any:
        h = self.middle(self.first(x))
        found = self.last(h), self.value(h)
        return {"logits": found[0], "value": found[1]} if self.as_dict else found


def of_two(output: Any, y: Any) -> Tensor:
    logits, value = output.values() if isinstance(output, dict) else output
    return F.cross_entropy(logits, y[0]) + F.mse_loss(value.squeeze(1), y[1])


def two_outputs(as_dict: bool) -> Parts:
    return TwoOutputs(as_dict).double(), normal(SAMPLES, 4), (labels(SAMPLES), normal(SAMPLES))


class OwnLoss(Net):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(x), labels)


def own_loss() -> Parts:
    return OwnLoss(dense()).double(), {"x": normal(SAMPLES, 4), "labels": labels(SAMPLES)}, None


def middle(name: str, make: Callable[[], nn.Module], **wanted: Any) -> Case:
    return Case(name, partial(flat, make), CUTS, **wanted)


def run_once(name: str, make: Callable[[], nn.Module]) -> list[Case]:
    """What no second run can repeat: to be noticed; and where nothing runs it twice, nothing is changed."""
    plain = {estimator for estimator in NAMES if estimator not in AGAIN} | {"fg forward weights"}
    return [
        middle(name, make, refused=set(AGAIN) - plain, unasked=plain - {"bp"}),
        middle(f"{name}, unchecked", make, unchecked=True, unasked=set(AGAIN) - plain),
    ]


KINDS: list[Case] = [
    middle("nothing peculiar", dense),
    middle("skip", lambda: Skip(dense())),
    # Blocks that run without a graph, as reentrant checkpoints have it, have none to cut.
    Case("reentrant checkpoint around cuts", partial(checkpointed, True), CUTS, plain=partial(checkpointed, None)),
    middle(
        "reentrant checkpoint in a block",
        lambda: Checkpointed(True),
        plain=partial(flat, lambda: Checkpointed(None)),
    ),
    Case("checkpoint around cuts", partial(checkpointed, False), CUTS, plain=partial(checkpointed, None)),
    middle("checkpoint in a block", lambda: Checkpointed(False), plain=partial(flat, lambda: Checkpointed(None))),
    middle("gradient inside forward", lambda: Energy("in place"), either=("fdfa",)),
    middle("gradient inside forward at a copy", lambda: Energy("copy")),
    # Where no gradient is asked for it is another function.
    middle("gradient inside forward at a copy, at times", lambda: Energy("at times"), either=MEASURING),
    Case("gradient inside the first block", gradient_first, CUTS),
    middle("torch.func.grad inside forward", lambda: Energy("torch.func"), either=("bp checkpoint", *MEASURING)),
    middle("torch.func.jvp inside forward", Sensitivity, either=MEASURING),
    middle("torch.func.vmap inside forward", OneByOne),
    middle("own function", lambda: Apply(Sine.apply)),
    middle("own function beside a skip", lambda: Skip(Apply(Sine.apply))),
    # Forward mode measures what forward does, which is not what backward says.
    middle("straight-through", lambda: Apply(Rounded.apply), either=MEASURING),
    middle(
        "straight-through beside a skip",
        lambda: Skip(Apply(Rounded.apply)),
        either=MEASURING,
        divided=False,
    ),
    middle("reversed gradient", lambda: Apply(Reversed.apply), either=MEASURING, divided=False),
    middle(
        "function that hides a module",
        lambda: Hidden(True, False),
        plain=partial(flat, lambda: Hidden(False, False)),
        either=(*CUT, "fg forward weights"),
    ),
    middle(
        "function that hides a module, switched on",
        lambda: Hidden(True, True),
        plain=partial(flat, lambda: Hidden(False, True)),
        either=(*CUT, "fg forward weights"),
        divided=False,
    ),
    Case(
        "function that hides the cuts",
        partial(hiding, True),
        CUTS,
        plain=partial(hiding, False),
        refused=CUT,
        either=("fg forward weights",),
    ),
    Case("first block frozen", partial(frozen, "first"), CUTS),
    Case("middle block frozen", partial(frozen, "middle"), CUTS),
    Case("half a block frozen", partial(frozen, "first.0", "last"), ("first",)),
    Case("last block frozen", partial(frozen, "last"), CUTS, either=CUT),
    Case("first block without gradient", partial(no_grad_first, False), CUTS),
    Case("part of a block without gradient", partial(no_grad_first, True), CUTS),
    middle(
        "middle block without gradient",
        lambda: WithoutGradient(dense()),
        either=("fg forward weights cut",),
    ),
    # Paths around a block.
    Case("skip through dropout", partial(skipping, lambda: nn.Dropout(0.4)), CUTS),
    Case("skip through a scale", partial(skipping, Scale), CUTS),
    Case("skip through a pool", partial(skipping, Pool), CUTS, divided=False),
    Case("skip through nothing", partial(skipping, nn.Identity), CUTS),
    Case("skip through a layer", partial(skipping, lambda: nn.Linear(WIDTH, WIDTH)), CUTS, refused=CUT, divided=False),
    Case("skip around a cut", partial(skipping, Scale, bypass=True), CUTS, refused=CUT),
    # What a backward leaves out on purpose.
    Case("padding", partial(table, padding_idx=0), CUTS, untaught={"first.0.weight": 0}),
    Case(
        "gradient by frequency",
        partial(table, scale_grad_by_freq=True),
        CUTS,
        either=("fg forward weights", "fg forward weights cut"),
    ),
    Case("rows of bounded norm", partial(table, max_norm=1.0), CUTS),
    Case(
        "sparse table",
        partial(table, sparse=True),
        CUTS,
    ),
    middle("what is taken for a constant", StopGradient, divided=False),
    # What a run leaves for the next.
    # Its power iteration, which runs without gradients, moves with the weight in forward mode, and not in backpropagation.
    middle("spectral norm", partial(spectral, False), precision=1e-6),
    middle("spectral norm, old style", partial(spectral, True)),
    middle("moving average in place", lambda: Centred("in place")),
    middle("moving average replaced", lambda: Centred("replaced"), divided=False),
    middle("scale from the first batch", FirstBatch, either=AGAIN),
    middle("weights that follow others", Following, either=AGAIN),
    *run_once("moving average in a number", lambda: Centred("number")),
    middle("batch norm", lambda: nn.Sequential(dense(), nn.BatchNorm1d(WIDTH)), told=OWN_SLOPES, unasked=PER_WEIGHT),
    middle("attention over the batch", AcrossRows, told=OWN_SLOPES),
    middle("steps taken for samples", StepsFirst, told=OWN_SLOPES, unasked=PER_WEIGHT),
    middle("masks of torch", lambda: Mask("torch")),
    middle("masks of numpy", lambda: Mask("numpy")),
    middle("masks of random", lambda: Mask("random")),
    middle("masks of an own generator", lambda: Mask("own")),
    middle("masks of an own generator of numpy", lambda: Mask("own of numpy"), divided=False),
    middle("masks of an own generator of random", lambda: Mask("own of random"), divided=False),
    *run_once("masks of a generator out of sight", lambda: Mask("out of sight")),
    middle("layer dropped at random", LayerDrop),
    middle("sample of a distribution", lambda: Apply(sampled), divided=False),
    middle("leaky at random", lambda: Apply(leaky_at_random), unasked=("bp checkpoint",), divided=False),
    middle("choice straight-through", lambda: Apply(by_gumbel), divided=False),
    middle("checkpoint of a dropout", lambda: Redrawn(False), plain=partial(flat, lambda: Redrawn(None)), divided=False),
    # Layers whose weights' gradients are not those of their class.
    middle("weight made by another", Hyper, divided=False),
    middle("weight bounded before use", Clamped, divided=False),
    middle("complex numbers", Fourier, divided=False),
    middle("less precision inside", Single, precision=1e-5, divided=False),
    middle(
        "hook on a tensor's gradient",
        lambda: Apply(hooked_tensor),
        either=MEASURING,
        divided=False,
    ),
    middle("straight-through by detach", lambda: Apply(straight_through_by_detach), divided=False),
    middle("a view for an output", lambda: Apply(first_half), divided=False),
    middle("an expanded output", lambda: Apply(expanded), divided=False),
    Case("cut that returns its input", partial(flat, lambda: nn.Sequential(dense(), nn.Identity())), ("first", "middle.1")),
    Case("forward called by name", partial(net, CalledByForward), CUTS, refused=CUT),
    Case("no gradient between blocks", partial(net, CutApart), CUTS),
    Case(
        "as many steps as samples",
        steps_first,
        CUTS,
        either=BY_SAMPLE,
        told=BY_SAMPLE,
    ),
    Case("loss that reads the weights", partial(net, Remembered), CUTS, loss=of_weights, either=NAMES[2:], unasked=("local",)),
    Case(
        "loss that reads what a block keeps",
        partial(net, Remembered, Sized),
        CUTS,
        loss=of_block,
        either=NAMES[2:],
        unasked=("local",),
    ),
    Case("bags of rows", bags, CUTS, either=("fg forward weights", "fg forward weights cut")),
    middle("hook on a layer's output", hooked),
    middle("hook on a layer's input", pre_hooked, divided=False),
    middle("replaced forward", replaced, divided=False),
    middle("adapter", LowRank),
    middle("parametrized weight", lambda: parametrized(Doubled())),
    middle(
        "quantised weight",
        lambda: parametrized(Quantised()),
        either=("fg forward weights", "fg forward weights cut"),
    ),
    middle("weight norm", weight_norm),
    middle("layer used twice", used_twice),
    middle("weight read by another", written_out),
    *(
        Case(
            f"channels last, {name}",
            partial(channels_last, norm),
            CUTS,
            plain=partial(channels_last, norm, torch.contiguous_format),
            told=told,
            unasked=PER_WEIGHT if told else (),
            divided=False,
            alone=True,
        )
        for name, norm, told in (
            ("group norm", lambda: nn.GroupNorm(2, 4), ()),
            ("instance norm", lambda: nn.InstanceNorm2d(4, affine=True), ()),
            ("batch norm", lambda: nn.BatchNorm2d(4), OWN_SLOPES),
            ("max pool", lambda: nn.MaxPool2d(2, 1), ()),
            ("average pool", lambda: nn.AvgPool2d(2, 1), ()),
            ("resizing", lambda: nn.Upsample(scale_factor=2.0, mode="bilinear"), ()),
        )
    ),
    Case("two towers", towers, CUTS),
    Case("tuple of outputs", partial(two_outputs, False), CUTS, loss=of_two),
    Case("dict of outputs", partial(two_outputs, True), CUTS, loss=of_two),
    Case(
        "its own loss",
        own_loss,
        CUTS,
        loss=lambda output, _: output,
        either=tuple(name for name in CUT if name not in ("fg forward weights cut", "fg reverse random", "fg reverse weights")),
    ),
]

NAMES_OF_KINDS = tuple(case.name for case in KINDS)


def kind(name: str) -> Case:
    return KINDS[NAMES_OF_KINDS.index(name)]


def alone(_rank: int, name: str, estimators: tuple[str, ...], folder: str) -> None:
    """One estimator after the other on a kind; each outcome is written before the next, which could take the process down."""
    for estimator in estimators:
        torch.save(attempt(kind(name), estimator), Path(folder) / f"{estimator}.pt")


def divided(rank: int, estimators: tuple[str, ...], shards: tuple[slice, ...]) -> list[list[Outcome]]:
    """A step of each estimator on this process's shard of every kind's batch, as long as all processes keep in step."""
    here, lost = [case for case in KINDS if case.divided], False

    def step(case: Case, name: str) -> Outcome:
        nonlocal lost
        if lost:
            return Outcome("crashed", "not tried, after processes have lost one another")
        outcome = attempt(case, name, shards[rank], distributed=True)
        lost = outcome.said.startswith("ProcessLost")
        return outcome

    return [[step(case, name) for case in here] for name in estimators]
