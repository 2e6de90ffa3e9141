"""Small float64 networks, one for each thing that can go wrong; every estimator is tested on every one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward import DirectFeedback
from onward.estimators.base import ALGORITHMS
from onward.network.cuts import check_names
from onward.network.suggest import default_cuts

Loss = Callable[[Tensor, Tensor], Tensor]
SAMPLES, CLASSES = 4, 3


class Built(NamedTuple):
    """A network, one batch for it, where to cut it and what to minimise."""

    model: nn.Module
    x: Any
    y: Tensor
    cuts: tuple[str, ...]
    loss: Loss


@dataclass(frozen=True)
class Case:
    """A network by name; `mixes_samples` says that in training mode one sample's output depends on the others."""

    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    cuts: tuple[str, ...]
    mixes_samples: bool = False
    draws_masks: bool = False
    loss: Loss = F.cross_entropy

    def build(self, seed: int = 0) -> Built:
        """The same network and batch for the same seed; the global generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, x = self.make()
            if self.loss is F.cross_entropy:
                y = torch.randint(CLASSES, (SAMPLES,))
            else:
                y = torch.randn(SAMPLES, CLASSES, dtype=torch.float64)
        return Built(model.double(), x, y, self.cuts, self.loss)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def images(channels: int = 2, size: int = 6) -> Tensor:
    return normal(SAMPLES, channels, size, size)


def mlp() -> tuple[nn.Module, Any]:
    blocks = nn.Sequential(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Sequential(nn.Linear(5, 4), nn.ReLU()), nn.Linear(4, CLASSES)
    )
    return blocks, normal(SAMPLES, 6)


def mlp_batch_norm() -> tuple[nn.Module, Any]:
    layers = [nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(5, CLASSES)), normal(SAMPLES, 6)


def cnn_batch_norm() -> tuple[nn.Module, Any]:
    first = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    second = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False), nn.ReLU())
    third = nn.Sequential(nn.AvgPool2d(3), nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())
    return nn.Sequential(first, second, third, nn.Linear(5, CLASSES)), images()


class ResidualBlock(nn.Module):
    """Uses one activation module twice and adds in place, as published residual networks do."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.blocks = nn.ModuleList([ResidualBlock(3, 3), ResidualBlock(3, 4, 2), ResidualBlock(4, 4)])
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def group_norm() -> tuple[nn.Module, Any]:
    first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
    second = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.GroupNorm(3, 6), nn.GELU())
    third = nn.Sequential(nn.Conv2d(6, 3, 2), nn.InstanceNorm2d(3, affine=True), nn.Flatten(), nn.LeakyReLU())
    return nn.Sequential(first, second, third, nn.Linear(12, CLASSES)), images(size=7)


def convolutions() -> tuple[nn.Module, Any]:
    grouped = nn.Sequential(nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), nn.ELU())
    depthwise = nn.Sequential(nn.Conv2d(6, 6, 3, stride=(2, 1), padding=1, groups=6, bias=False), nn.Softplus())
    circular = nn.Sequential(nn.Conv2d(6, 3, (1, 3), padding=(0, 1), padding_mode="circular"), nn.PReLU(3))
    up = nn.Sequential(nn.ConvTranspose2d(3, 2, 2, stride=2), nn.Hardswish(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(grouped, depthwise, circular, up, nn.Linear(8, CLASSES)), images(4, 5)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.randn(1, 3, 4))
        pre = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True)
        post = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, activation="gelu")
        self.layers = nn.ModuleList([pre, post])
        self.head = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.position
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


class CausalAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(self.norm(x)).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.attend(x, x, x, need_weights=False)[0]


def attention() -> tuple[nn.Module, Any]:
    last = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    return nn.Sequential(CausalAttention(4), CausalAttention(4), last), normal(SAMPLES, 3, 4)


class Tied(nn.Module):
    """One weight used in three blocks: as a module twice, and transposed in the third."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(4, 4)
        self.block1 = nn.Sequential(shared, nn.Tanh())
        self.block2 = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), shared, nn.Tanh())
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.block2(self.block1(x)), self.block1[0].weight.t()))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4, bias=False)
        self.join = nn.Sequential(nn.Tanh(), nn.Linear(4, 5), nn.Tanh())
        self.head = nn.Linear(5, CLASSES)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.join(self.left(left) + scale * self.right(right)))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Recurrent(nn.LSTM(3, 4, batch_first=True))
        self.second = Recurrent(nn.GRU(4, 2, batch_first=True, bidirectional=True))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x))[:, -1])


class InPlace(nn.Module):
    """Every module after a cut overwrites its own input; the cuts lie at different depths of the module tree."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 3), "norm": nn.GroupNorm(1, 3)})
        self.middle = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2), nn.Flatten())
        self.tail = nn.Sequential(nn.ELU(inplace=True), nn.Linear(8, 5))
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.body["norm"](self.body["conv"](x)))
        h = self.tail(h)
        h *= 0.5
        h[:, 1:3].relu_()
        return self.head(h)


def dropout() -> tuple[nn.Module, Any]:
    first = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5))
    second = nn.Sequential(nn.Linear(8, 8), nn.AlphaDropout(0.3), nn.Tanh())
    return nn.Sequential(first, second, nn.Sequential(nn.Dropout(0.2), nn.Linear(8, CLASSES))), normal(SAMPLES, 6)


def half_sum_of_squares(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - y).square().sum()


class AnyHead(nn.Module):
    """A head that fits the output of any block: it sees the mean and the mean square of a sample's features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(2, classes)

    def forward(self, h: Tensor) -> Tensor:
        h = h.flatten(1)
        return self.classify(torch.stack([h.mean(1), h.square().mean(1)], 1))


def any_heads(model: nn.Module, cuts: Iterable[str], seed: int = 3) -> dict[str, nn.Module]:
    """The same for the same seed, with as many outputs as the network's last layer has."""
    like = [p for p in model.parameters() if p.dim() == 2][-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {cut: AnyHead(like.shape[0]).to(like.dtype) for cut in cuts}


def headed(make: Callable[..., nn.Module], **options: Any) -> Callable[..., nn.Module]:
    """Make an estimator with heads, from the arguments of one without."""

    def build(model: nn.Module, cuts: Iterable[str] | None = None, **more: Any) -> nn.Module:
        cuts = default_cuts(model) if cuts is None else check_names(model, list(cuts))
        return make(model, cuts, heads=any_heads(model, cuts), **options, **more)

    return build


CASES = [
    Case("mlp", mlp, ("0", "1")),
    Case("mlp-batch-norm", mlp_batch_norm, ("2", "5"), mixes_samples=True),
    Case("cnn-batch-norm", cnn_batch_norm, ("0", "1", "2"), mixes_samples=True),
    Case("residual", lambda: (Residual(), images()), ("blocks.0", "blocks.1", "blocks.2"), mixes_samples=True),
    Case("group-norm", group_norm, ("0", "1", "2")),
    Case("convolutions", convolutions, ("0", "1", "2", "3")),
    Case("transformer", lambda: (Transformer(), torch.randint(7, (SAMPLES, 3))), ("layers.0", "layers.1")),
    Case("attention", attention, ("0", "1")),
    Case("tied", lambda: (Tied(), normal(SAMPLES, 4)), ("block1", "block2")),
    Case("tuple-of-inputs", lambda: (TwoInputs(), (normal(SAMPLES, 3), normal(SAMPLES, 5))), ("join",)),
    Case(
        "dict-of-inputs",
        lambda: (TwoInputs(), {"right": normal(SAMPLES, 5), "left": normal(SAMPLES, 3), "scale": 0.5}),
        ("join.0", "join.2"),
    ),
    Case("recurrent", lambda: (Sequence(), normal(SAMPLES, 3, 3)), ("first", "second")),
    Case("in-place", lambda: (InPlace(), images(size=5)), ("body.conv", "middle.1", "tail")),
    Case("dropout", dropout, ("0", "1"), draws_masks=True),
    Case("regression", mlp, ("0", "1"), loss=half_sum_of_squares),
]
NAMES = [case.name for case in CASES]


def by_name(name: str) -> Case:
    return CASES[NAMES.index(name)]


DIRECT = {name: kind for name, kind in ALGORITHMS.items() if issubclass(kind, DirectFeedback)}
"""Every rule of direct feedback by its name: defining its class is enough to have it tried in every form."""
