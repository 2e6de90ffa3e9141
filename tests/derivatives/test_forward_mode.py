"""`Tangents` against central differences and PyTorch's own forward mode, layer by layer and operation by operation."""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import reference
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from onward.derivatives import shortcuts
from onward.derivatives.tangents import Tangents
from onward.errors import UsageError

STEP = 1e-6


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def seeded(function: Callable[..., Any], *inputs: Any) -> list[Tensor]:
    torch.manual_seed(5)
    return reference.floating(function(*inputs))


def shifted(module: nn.Module, inputs: Sequence[Any], tangents: dict[Any, Tensor], step: float) -> list[Tensor]:
    """The outputs at the point moved by `step` along `tangents` (keys: input positions and parameter names)."""
    moved = copy.deepcopy(module)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            if name in tangents:
                p += step * tangents[name]
        return seeded(moved, *(a + step * tangents[i] if i in tangents else a for i, a in enumerate(inputs)))


@contextmanager
def without_mkldnn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own switch warns about TF32
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def forward_ad(module: nn.Module, inputs: Sequence[Any], tangents: dict[Any, Tensor]) -> list[Tensor | None]:
    """PyTorch's dual numbers; its kernels without a rule are switched off."""
    module = copy.deepcopy(module)
    with without_mkldnn(), sdpa_kernel(SDPBackend.MATH), fwd.dual_level():
        state = {
            name: fwd.make_dual(p.detach(), tangents[name]) if name in tangents else p.detach()
            for name, p in module.named_parameters()
        }
        duals = [fwd.make_dual(a, tangents[i]) if i in tangents else a for i, a in enumerate(inputs)]
        results = seeded(lambda *args: torch.func.functional_call(module, state, args), *duals)
        return [fwd.unpack_dual(result).tangent for result in results]


def ours(module: nn.Module, inputs: Sequence[Any], tangents: dict[Any, Tensor]) -> tuple[list[Tensor], list[Any]]:
    with Tangents() as mode:
        parameters = dict(module.named_parameters())
        for key, tangent in tangents.items():
            mode.set(inputs[key] if isinstance(key, int) else parameters[key], tangent)
        results = seeded(module, *inputs)
        return results, [mode.get(result) for result in results]


def zero_if_none(tangent: Tensor | None, primal: Tensor) -> Tensor:
    return torch.zeros_like(primal) if tangent is None else tangent


def check(module: nn.Module, inputs: Sequence[Any], where: str = "both", rtol: float = 1e-9, exact: bool = True) -> None:
    """The tangent is right, and nothing else about the run has changed (attention's summation order excepted)."""
    attends = any(isinstance(part, (nn.MultiheadAttention, Attention)) for part in module.modules())
    same = partial(torch.testing.assert_close, rtol=rtol, atol=rtol) if attends else assert_identical
    tangents: dict[Any, Tensor] = {}
    if where != "parameters":
        tangents |= {i: torch.randn_like(a) for i, a in enumerate(inputs) if isinstance(a, Tensor) and a.is_floating_point()}
    if where != "inputs":
        tangents |= {name: torch.randn_like(p) for name, p in module.named_parameters()}
    before, plain = copy.deepcopy(module), copy.deepcopy(module)

    leaves = [a.clone().requires_grad_() if i in tangents else a for i, a in enumerate(inputs)]
    results, found = ours(module, leaves, tangents)
    plain_leaves = [a.clone().requires_grad_() if i in tangents else a for i, a in enumerate(inputs)]
    plain_results = seeded(plain, *plain_leaves)

    ahead, behind = shifted(before, inputs, tangents, STEP), shifted(before, inputs, tangents, -STEP)
    for primal, tangent, a, b in zip(results, found, ahead, behind, strict=True):
        assert tangent is None or (not tangent.requires_grad and tangent.grad_fn is None)
        assert tangent is None or (tangent.shape == primal.shape and tangent.dtype == primal.dtype)
        if primal.dtype == torch.float64:
            numeric = (a - b) / (2 * STEP)
            torch.testing.assert_close(
                zero_if_none(tangent, primal), numeric, rtol=1e-5, atol=1e-6 * (1 + numeric.abs().max().item())
            )
    if exact:
        for primal, tangent, expected in zip(results, found, forward_ad(before, inputs, tangents), strict=True):
            expected = zero_if_none(expected, primal.detach())
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(zero_if_none(tangent, primal), expected, rtol=rtol, atol=rtol * scale)

    for primal, plain_primal in zip(results, plain_results, strict=True):
        same(primal, plain_primal)
        assert primal.requires_grad == plain_primal.requires_grad
    for (name, buffer), other in zip(module.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    differentiable = [(r, p) for r, p in zip(results, plain_results, strict=True) if r.requires_grad]
    if differentiable:
        seeds = [torch.randn_like(r) for r, _ in differentiable]
        torch.autograd.backward([r for r, _ in differentiable], seeds)
        torch.autograd.backward([p for _, p in differentiable], seeds)
        pairs = zip([*leaves, *module.parameters()], [*plain_leaves, *plain.parameters()], strict=True)
        for leaf, other in pairs:
            if isinstance(leaf, Tensor) and other.grad is not None:
                same(leaf.grad, other.grad)


def assert_identical(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b)


class Function(nn.Module):
    """A function as a module, so that one check serves both."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


class Attention(Function):
    """A function that attends."""


def warm(norm: nn.Module) -> nn.Module:
    """Running statistics and scales away from their initial values."""
    for tensor in [*norm.parameters(), *norm.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.5
    return norm


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (5, 3)),
    "BatchNorm1d sequence": (lambda: nn.BatchNorm1d(3), (4, 3, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 5)),
    "BatchNorm2d no affine": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 2, 2)),
    "BatchNorm2d no statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 2)),
    "BatchNorm2d cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2, eps=0.1), (3, 2, 2, 1, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(5), (2, 3, 5)),
    "LayerNorm two dims": (lambda: nn.LayerNorm((3, 5), eps=0.01), (2, 3, 5)),
    "LayerNorm no bias": (lambda: nn.LayerNorm(5, bias=False), (4, 5)),
    "LayerNorm no affine": (lambda: nn.LayerNorm(5, elementwise_affine=False), (4, 5)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (3, 6, 2, 3)),
    "GroupNorm flat": (lambda: nn.GroupNorm(2, 6), (3, 6)),
    "GroupNorm no affine": (lambda: nn.GroupNorm(3, 6, affine=False), (3, 6, 4)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3), (2, 3, 5)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True), (2, 3, 3, 2)),
    "InstanceNorm2d statistics": (lambda: nn.InstanceNorm2d(3, track_running_stats=True), (2, 3, 3, 2)),
    "RMSNorm": (lambda: nn.RMSNorm(5), (2, 3, 5)),
    "RMSNorm no affine": (lambda: nn.RMSNorm(5, elementwise_affine=False, eps=0.1), (2, 3, 5)),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), (2, 4, 3, 3)),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Identity": (nn.Identity, (2, 3)),
    "Linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "Linear no bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "Linear sequence": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "Linear vector": (lambda: nn.Linear(4, 3), (4,)),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2), (2, 2, 8)),
    "Conv1d same": (lambda: nn.Conv1d(2, 3, 3, padding="same"), (2, 2, 6)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 2, 5, 4)),
    "Conv2d unbatched": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 5, 4)),
    "Conv2d no bias": (lambda: nn.Conv2d(2, 3, (2, 3), bias=False), (2, 2, 5, 4)),
    "Conv2d pointwise": (lambda: nn.Conv2d(2, 3, 1), (2, 2, 3, 3)),
    "Conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2), (2, 4, 5, 5)),
    "Conv2d depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, stride=(2, 1)), (2, 3, 5, 5)),
    "Conv2d circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 2, 4, 4)),
    "Conv2d reflect": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 2, 4, 4)),
    "Conv3d": (lambda: nn.Conv3d(2, 2, 2, padding=1), (2, 2, 3, 2, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (2, 2, 4)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, groups=2, padding=1), (2, 4, 3, 3)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 2, 2), (1, 2, 2, 2, 2)),
    "PReLU": (nn.PReLU, (3, 4)),
    "PReLU channels": (lambda: nn.PReLU(3), (2, 3, 4)),
    **{
        layer.__name__: (layer, (4, 6))
        for layer in [
            nn.ReLU,
            nn.ReLU6,
            nn.LeakyReLU,
            nn.ELU,
            nn.SELU,
            nn.CELU,
            nn.GELU,
            nn.SiLU,
            nn.Mish,
            nn.Softplus,
            nn.Softsign,
            nn.Tanh,
            nn.Sigmoid,
            nn.LogSigmoid,
            nn.Hardswish,
            nn.Hardsigmoid,
            nn.Hardtanh,
            nn.Hardshrink,
            nn.Softshrink,
            nn.Tanhshrink,
            nn.GLU,
            nn.Flatten,
        ]
    },
    "GELU tanh": (lambda: nn.GELU("tanh"), (4, 6)),
    "Softmin": (lambda: nn.Softmin(1), (4, 6)),
    "Softmax": (lambda: nn.Softmax(1), (4, 6)),
    "LogSoftmax": (lambda: nn.LogSoftmax(1), (4, 6)),
    "Softmax2d": (nn.Softmax2d, (2, 3, 2, 2)),
    "ReLU in place": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True)), (4, 6)),
    "SiLU in place": (lambda: nn.Sequential(nn.Linear(6, 4), nn.SiLU(inplace=True)), (4, 6)),
    "ELU in place": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ELU(inplace=True)), (4, 6)),
    "Hardswish in place": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Hardswish(inplace=True)), (4, 6)),
    "LeakyReLU in place": (lambda: nn.Sequential(nn.Linear(6, 4), nn.LeakyReLU(inplace=True)), (4, 6)),
    "Hardtanh in place": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Hardtanh(inplace=True)), (4, 6)),
    "Dropout in place": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5, inplace=True)), (4, 6)),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), (2, 3, 6)),
    "MaxPool2d": (lambda: nn.MaxPool2d(3, stride=2, padding=1), (2, 3, 6, 5)),
    "MaxPool2d dilated": (lambda: nn.MaxPool2d(2, dilation=2, ceil_mode=True), (2, 3, 6, 5)),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), (2, 2, 4, 2, 4)),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), (2, 3, 6)),
    "AvgPool2d": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), (2, 3, 6, 5)),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), (2, 2, 4, 2, 4)),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), (2, 2, 4, 4)),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(2), (2, 3, 5)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((2, 3)), (2, 3, 5, 5)),
    "AdaptiveAvgPool2d global": (lambda: nn.AdaptiveAvgPool2d(1), (2, 3, 5, 5)),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d((2, 3)), (2, 3, 5, 5)),
    "Upsample nearest": (lambda: nn.Upsample(scale_factor=2), (2, 2, 2, 3)),
    "Upsample bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), (2, 2, 2, 3)),
    "Upsample bicubic": (lambda: nn.Upsample(size=(5, 4), mode="bicubic"), (2, 2, 3, 3)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), (2, 4, 2, 3)),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), (2, 1, 4, 2)),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), (2, 1, 3, 2)),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d(1), (2, 1, 3, 2)),
    "ReplicationPad1d": (lambda: nn.ReplicationPad1d(1), (2, 1, 3)),
    "Unfold": (lambda: nn.Unfold(2), (2, 2, 3, 3)),
    "Fold": (lambda: nn.Fold((3, 3), 2), (2, 8, 4)),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 3)), (2, 6)),
    "Dropout": (lambda: nn.Dropout(0.5), (4, 6)),
    "Dropout2d": (lambda: nn.Dropout2d(0.5), (4, 3, 2, 2)),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.3), (4, 6)),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), (1, 4, 2, 2)),
    "LSTM": (lambda: nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True), (2, 3, 3)),
    "LSTM projected": (lambda: nn.LSTM(3, 4, proj_size=2), (3, 2, 3)),
    "GRU": (lambda: nn.GRU(3, 4, bias=False), (3, 2, 3)),
    "GRU bidirectional": (lambda: nn.GRU(3, 2, batch_first=True, bidirectional=True), (2, 3, 3)),
    "RNN": (lambda: nn.RNN(3, 4, nonlinearity="relu"), (3, 2, 3)),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), (2, 3)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), (2, 3, 4)),
    "TransformerEncoderLayer gelu": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.1, activation="gelu", norm_first=True),
        (3, 2, 4),
    ),
}
WHERE = ["inputs", "parameters", "both"]


def places(kinds: dict[str, tuple[Callable[[], nn.Module], Any]]) -> list[tuple[str, str]]:
    """Each layer with where its tangents may be."""
    return [(name, where) for name, (make, _) in kinds.items() for where in WHERE[: 3 if list(make().parameters()) else 1]]


@pytest.mark.parametrize(("name", "where"), places(LAYERS))
def test_layer(name: str, where: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    check(make().double(), [normal(*shape)], where)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "where"), places(NORMS))
def test_norm(name: str, train: bool, where: str) -> None:
    torch.manual_seed(0)
    make, shape = NORMS[name]
    check(warm(make().double()).train(train), [normal(*shape) + 0.3], where)


EVAL = ["Dropout", "AlphaDropout", "LSTM", "TransformerEncoderLayer", "TransformerEncoderLayer gelu"]


@pytest.mark.parametrize(("name", "where"), places({name: LAYERS[name] for name in EVAL}))
def test_layer_in_eval_mode(name: str, where: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    check(make().double().eval(), [normal(*shape)], where, exact="Transformer" not in name)


@pytest.mark.parametrize("name", EVAL)
def test_layer_in_eval_mode_without_graph(name: str) -> None:
    """Without gradients PyTorch takes fused shortcuts; the tangent must survive them."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    module = make().double().eval()
    x, t = normal(*shape), normal(*shape)
    with torch.no_grad():
        results, found = ours(module, [x], {0: t})
    ahead, behind = shifted(module, [x], {0: t}, STEP), shifted(module, [x], {0: t}, -STEP)
    for result, tangent, a, b in zip(results, found, ahead, behind, strict=True):
        torch.testing.assert_close(zero_if_none(tangent, result), (a - b) / (2 * STEP), rtol=1e-5, atol=1e-6)


SEVERAL_INPUTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]]]] = {
    "Embedding": (lambda: nn.Embedding(5, 3), lambda: [torch.tensor([[0, 2, 2], [4, 1, 0]])]),
    "Bilinear": (lambda: nn.Bilinear(3, 4, 2), lambda: [normal(5, 3), normal(5, 4)]),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), lambda: [normal(3, 2, 4), normal(5, 2, 4), normal(5, 2, 4)]),
    "MultiheadAttention of other sizes": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        lambda: [normal(3, 2, 4), normal(6, 2, 3), normal(6, 2, 5)],
    ),
    "MultiheadAttention dropout": (
        lambda: nn.MultiheadAttention(4, 2, dropout=0.2),
        lambda: [normal(3, 2, 4), normal(5, 2, 4), normal(5, 2, 4)],
    ),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(4, 2, 6, 0.0), lambda: [normal(3, 2, 4), normal(5, 2, 4)]),
    "GRU with state": (lambda: nn.GRU(3, 4), lambda: [normal(3, 2, 3), normal(1, 2, 4)]),
    "CosineSimilarity": (lambda: nn.CosineSimilarity(), lambda: [normal(3, 4), normal(3, 4)]),
    "PairwiseDistance": (lambda: nn.PairwiseDistance(), lambda: [normal(3, 4), normal(3, 4)]),
    "CrossEntropyLoss": (lambda: nn.CrossEntropyLoss(), lambda: [normal(4, 3), torch.tensor([0, 2, 1, 1])]),
    "CrossEntropyLoss smoothed": (
        lambda: nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.rand(3), reduction="sum"),
        lambda: [normal(4, 3), torch.tensor([0, 2, 1, 1])],
    ),
    "CrossEntropyLoss of probabilities": (
        lambda: nn.CrossEntropyLoss(),
        lambda: [normal(4, 3), torch.rand(4, 3, dtype=torch.float64)],
    ),
    "CrossEntropyLoss of maps": (
        lambda: nn.CrossEntropyLoss(ignore_index=1),
        lambda: [normal(2, 3, 5), torch.randint(3, (2, 5))],
    ),
    "NLLLoss": (lambda: nn.NLLLoss(), lambda: [normal(4, 3), torch.tensor([0, 2, 1, 1])]),
    "MSELoss": (lambda: nn.MSELoss(), lambda: [normal(4, 3), normal(4, 3)]),
    "L1Loss": (lambda: nn.L1Loss(), lambda: [normal(4, 3), normal(4, 3)]),
    "SmoothL1Loss": (lambda: nn.SmoothL1Loss(), lambda: [normal(4, 3), normal(4, 3)]),
    "HuberLoss": (lambda: nn.HuberLoss(), lambda: [normal(4, 3), normal(4, 3)]),
    "BCEWithLogitsLoss": (lambda: nn.BCEWithLogitsLoss(), lambda: [normal(4, 3), torch.rand(4, 3, dtype=torch.float64)]),
    "KLDivLoss": (lambda: nn.KLDivLoss(reduction="batchmean"), lambda: [normal(4, 3), torch.rand(4, 3, dtype=torch.float64)]),
}


@pytest.mark.parametrize(
    ("name", "where"), [(name, where) for name, where in places(SEVERAL_INPUTS) if where != "inputs" or "Embedding" not in name]
)
def test_layer_of_several_or_integer_inputs(name: str, where: str) -> None:
    torch.manual_seed(0)
    make, inputs = SEVERAL_INPUTS[name]
    check(make().double(), inputs(), where)


def test_the_padding_row_of_an_embedding_is_a_constant() -> None:
    """As in the backward pass, which leaves it out on purpose."""
    torch.manual_seed(0)
    layer, ids = nn.Embedding(5, 3, padding_idx=2).double(), torch.tensor([[0, 2, 2], [4, 2, 1]])
    with Tangents() as mode:
        mode.set(layer.weight, t := normal(5, 3))
        moved = mode.get(layer(ids))
    assert torch.equal(moved, t[ids] * (ids != 2).unsqueeze(2))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_self_attention(need_weights: bool, masked: bool, train: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double().train(train)
    mask = torch.tensor([[False, False, True], [False, False, False]]) if masked else None

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Any:
            return self.attention(x, x, x, need_weights=need_weights, key_padding_mask=mask)

    check(Self(), [normal(2, 3, 4)], exact=train)


def half(x: Tensor) -> Tensor:
    return x.chunk(2, dim=1)[0]


def overwrite_flat_view(x: Tensor) -> Tensor:
    y = x * 2
    F.relu_(y.flatten(1))
    return y


def write_slices(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] += y[:, 1]
    y[0] = 0.0
    y[1, 1:3] = x[2, :2] * x[0, :2]
    y[2] *= x[1]
    return y * y


def fill_buffer(x: Tensor) -> Tensor:
    """A tensor without a tangent receives one, through a view made beforehand."""
    buffer = torch.zeros(6, 4, dtype=x.dtype)
    view = buffer.t()[1:3]
    buffer[:, :] = x.t()
    return view * view


def erase(x: Tensor) -> list[Tensor]:
    y, z = x * 3, x * 4
    view = z[:, 2]
    y.zero_()
    z[1:].fill_(7.0)
    return [y, z, view]


def view_of_view(x: Tensor) -> Tensor:
    y = x * 1
    y.view(2, 2, 6)[1].transpose(0, 1)[::2].square_()
    y.unsqueeze(0).squeeze(0).select(1, 3).exp_()
    return y


def overwrite_transposed(x: Tensor) -> Tensor:
    y = x * 1
    y.t().mul_(x.t()).add_(x.t(), alpha=2)
    return y


def in_place_arithmetic(x: Tensor) -> Tensor:
    y = x.clone()
    y += x
    y -= 2 * x.sin()
    y *= x
    y /= 2 + x.cos()
    y.addcmul_(x, x, value=0.5).clamp_(-2, 2).neg_().lerp_(x, 0.3)
    return y.addmm_(x, x.t() @ x) if y.shape[1] == x.shape[1] else y


def unbind_and_stack(x: Tensor) -> Tensor:
    rows = [row.clone() for row in (x * 1).unbind(0)]
    rows[0].mul_(rows[1])
    return torch.stack(rows[::-1], dim=1)


def masks_and_indices(x: Tensor) -> Tensor:
    y = x.clone()
    y.masked_fill_(x > 0.5, 0.0)
    y[torch.tensor([0, 2])] = x[torch.tensor([1, 3])] * 2
    y[x < -0.5] = x[x < -0.5] ** 2
    y.index_add_(0, torch.tensor([0, 1]), x[:2])
    y.scatter_add_(1, torch.zeros(4, 1, dtype=torch.long), x[:, :1])
    y.index_copy_(1, torch.tensor([5]), x[:, 1:2])
    return y


def fill_with_tensors(x: Tensor) -> Tensor:
    y, z = x * 2, torch.zeros(4, 6, dtype=x.dtype)
    y[:2].fill_(x.sum())
    y[2] = x[0, 1]
    y.index_fill_(1, torch.tensor([0, 3]), x[0, 0])
    y.masked_fill_(x > 1, x.prod())
    z[:, 1:3] = x.mean()
    z.scatter_(1, torch.tensor([[0], [3], [3], [1]]), x[:, :1].exp())
    z.masked_scatter_(x < -1, x.sin())
    z.put_(torch.tensor([0, 23]), x[2, :2])
    return y * z + y


def python_numbers(x: Tensor) -> Tensor:
    """Operations that return no tensor have no tangent."""
    with torch.no_grad():
        norm = float(x.norm()) + x.sum().item()
        if torch.equal(x, x * 2) or torch.allclose(x, x + 1) or bool(x[0, 0] * 0):
            return x
    return x * int(norm)


def changing_a_view_then_reading_the_base(x: Tensor) -> list[Tensor]:
    y = x * 1
    left, right = y[:, :3], y[:, 3:]
    left.mul_(3).add_(1)
    right += x[:, 1:4]
    right.copy_(left)
    return [y, left, right]


def swap(x: Tensor) -> list[Tensor]:
    """Each of two tensors overwritten with the other: a tangent follows its tensor, not its storage."""
    a, b = x * 2, x.sin()
    c = a.clone()
    a.copy_(b)
    b.copy_(c)
    return [a, b]


def in_place_views(x: Tensor) -> list[Tensor]:
    """Operations that change a tensor's shape in place."""
    y, z = x * 2, (x * 3).unsqueeze_(0)
    y.t_().unsqueeze_(1).squeeze_(1).transpose_(0, 1)
    y[0].mul_(2)
    z.squeeze_().swapaxes_(0, 1)
    return [y, z.sin()]


def where_of_constants(x: Tensor) -> Tensor:
    return torch.where(x > 0, x * x, torch.ones((), dtype=x.dtype))


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "einsum": lambda x: torch.einsum("ij,kj,k->ik", x, x.sin(), x[:, 0]),
    "cat": lambda x: torch.cat([x, x * x, torch.ones(1, 6, dtype=x.dtype)]),
    "cat of constants": lambda x: torch.cat([torch.ones(1, 6, dtype=x.dtype), x[:0], x.exp()]),
    "stack": lambda x: torch.stack([x, x.cos()], dim=-1),
    "chunk": lambda x: [part * part for part in x.chunk(3, dim=1)],
    "split and unbind": lambda x: [*x.split([1, 5], dim=1), *x.unbind()],
    "where": where_of_constants,
    "where of both": lambda x: torch.where(x > 0, x.exp(), x.sin()),
    "slices": lambda x: x[1:, ::2] * x[:-1, 1::2],
    "negative and new axes": lambda x: x[None, -1, ..., None] * x[0],
    "index": lambda x: x[torch.tensor([0, 0, 3])] * x[:, torch.tensor([1, 2, 3])][:1].sum(),
    "index pairs": lambda x: x[torch.tensor([0, 2]), torch.tensor([1, 1])],
    "mask": lambda x: x[x > 0] ** 2,
    "gather": lambda x: x.gather(1, torch.tensor([[0, 5], [1, 1], [2, 0], [3, 3]])),
    "take_along_dim": lambda x: torch.take_along_dim(x, x.argsort(1), dim=1),
    "index_select": lambda x: x.index_select(1, torch.tensor([5, 0])),
    "scatter": lambda x: torch.zeros(4, 6, dtype=x.dtype).scatter(1, torch.tensor([[0], [2], [2], [1]]), x[:, 3:4]),
    "sort": lambda x: x.sort(dim=1, descending=True).values,
    "topk": lambda x: x.topk(2, dim=1)[0],
    "kthvalue and median": lambda x: [x.kthvalue(2, dim=1)[0], x.median(dim=1).values],
    "max and min": lambda x: [x.max(), x.min(dim=1).values, x.amax(0), x.amin((0, 1)), torch.maximum(x, x.sin() * 2)],
    "matmul": lambda x: x @ x.t(),
    "matmul broadcast": lambda x: x.view(2, 1, 2, 6) @ x.t().unsqueeze(0),
    "matrix vector": lambda x: x @ x[0] + torch.dot(x[1], x[2]),
    "bmm": lambda x: torch.bmm(x.view(2, 2, 6), x.view(2, 6, 2)),
    "baddbmm": lambda x: torch.baddbmm(x[:2, :4].view(2, 2, 2), x.view(2, 2, 6), x.view(2, 6, 2), beta=0.5, alpha=2),
    "addmm": lambda x: torch.addmm(x[0, :4], x, x.t(), beta=2, alpha=0.3),
    "softmax": lambda x: [x.softmax(0), x.log_softmax(1), F.softmin(x, 1)],
    "cumulative": lambda x: [x.cumsum(1), x.cumprod(0), x.logcumsumexp(1), x.cummax(1).values],
    "reductions": lambda x: [x.sum(), x.mean(0), x.var(1), x.std(), x.prod(1), x.logsumexp(1), x.norm(), x.sum((0, 1))],
    "norms": lambda x: [F.normalize(x), torch.linalg.vector_norm(x, 3, dim=1), x.norm(1), torch.linalg.norm(x, dim=1)],
    "var_mean": lambda x: torch.var_mean(x, dim=1, keepdim=True),
    "pointwise": lambda x: [
        x.exp(),
        x.sin(),
        x.abs(),
        x.square(),
        (x.abs() + 1).log(),
        x.erf(),
        (x * x + 1).rsqrt(),
        x.tanh(),
        x.atan(),
        x.sigmoid(),
        x.neg(),
        x.abs().sqrt(),
        (x * x + 1).reciprocal(),
        x.expm1(),
        x.sinh(),
        x.abs().log1p(),
        x.clamp(-1, 0.5),
    ],
    "functions of complex numbers": lambda x: [
        torch.view_as_real(function(torch.complex(x, x.cos())))
        for function in (torch.exp, torch.log, torch.sqrt, torch.rsqrt, torch.tanh, torch.sigmoid)
    ],
    "powers": lambda x: [
        x**3,
        2**x,
        x.abs() ** 1.5,
        (x.abs() + 1) ** x,
        x.pow(0),
        x / (x * x + 1),
        1 / (x + 9),
        x.atan2(x * x + 1),
    ],
    "scalars": lambda x: [x + 1, 1 - x, x * 2.5, x / 3, -x, x.add(x, alpha=3), torch.rsub(x, 2, alpha=3)],
    "rounding": lambda x: [
        x.round() + x,
        x.floor() * x,
        x.sign() * x,
        x.fmod(0.7),
        x % 0.7,
        x.trunc() - x,
        torch.div(x, 0.3, rounding_mode="floor") + x,
    ],
    "other constants": lambda x: [x.new_ones(2), torch.zeros_like(x) + x, torch.full_like(x, 2) * x, x.argmax(1)],
    "views": lambda x: [
        x.view(-1),
        x.t(),
        x.reshape(2, 12),
        x.unsqueeze(1).expand(4, 3, 6),
        x.permute(1, 0).contiguous(),
        x.flip(1),
        x.diagonal(),
        x.unfold(1, 2, 2),
        x.movedim(0, 1),
        x.view(2, 2, 6).transpose(0, 2),
        x.narrow(1, 2, 3),
        x.squeeze(),
        x.as_strided((3, 3), (2, 1), 1),
        x.tril(),
        x.view_as(x),
        x.real,
    ],
    "copies": lambda x: [x.repeat(2, 1), x.roll(1, 0), x.repeat_interleave(2, 1), x.tile(2), x.clone(), x.contiguous()],
    "meshes": lambda x: [torch.outer(x[0], x[1]), torch.diag(x[0]), torch.kron(x[:2], x[:, :2]), torch.diag_embed(x)],
    "linalg": lambda x: [
        torch.linalg.solve(x[:, :4] + 5 * torch.eye(4, dtype=x.dtype), x),
        torch.linalg.inv(x[:, :4] + 5 * torch.eye(4)),
        torch.linalg.det(x[:, :4]),
        torch.linalg.cholesky(x @ x.t() + torch.eye(4)),
        torch.linalg.svdvals(x),
    ],
    "attention": lambda x: F.scaled_dot_product_attention(
        x.view(1, 2, 2, 6), x.view(1, 2, 2, 6) * 2, x.view(1, 2, 2, 6), is_causal=True
    ),
    "attention of grouped heads": lambda x: F.scaled_dot_product_attention(
        x.view(1, 4, 2, 3), x[:2].sin().view(1, 2, 2, 3), x[2:].view(1, 2, 2, 3), enable_gqa=True
    ),
    "attention with a row masked out": lambda x: F.scaled_dot_product_attention(
        x.view(1, 2, 2, 6), x.view(1, 2, 2, 6), x.view(1, 2, 2, 6), torch.tensor([[True, False], [False, False]])
    ),
    "attention to all alike": lambda x: F.scaled_dot_product_attention(
        x.view(1, 2, 2, 6), x.view(1, 2, 2, 6), x.view(1, 2, 2, 6), scale=0.0
    ),
    "attention mask": lambda x: F.scaled_dot_product_attention(
        x.view(2, 2, 6), x.view(2, 2, 6), x.view(2, 2, 6), torch.eye(2) > 0
    ),
    "interpolate": lambda x: F.interpolate(x.view(1, 2, 2, 6), size=(3, 4), mode="bilinear", antialias=True),
    "pad": lambda x: [F.pad(x, (1, -2), value=3.0), F.pad(x[None], (1, 1), mode="reflect")],
    "dropout": lambda x: [
        F.dropout(x, 0.5),
        torch.native_dropout(x, 0.5, True)[0],
        torch.native_dropout(x, 1.0, True)[0],
        F.feature_dropout(x.view(2, 2, 6), 0.5) if hasattr(F, "feature_dropout") else x,
    ],
    "gumbel": lambda x: F.gumbel_softmax(x, tau=0.7),
    "noise of its own": lambda x: x * torch.rand_like(x) + torch.randn(6, dtype=x.dtype),
    "one hot and cross entropy": lambda x: F.cross_entropy(x, torch.tensor([1, 0, 5, 2]), reduction="none"),
    "searchsorted and bucketize": lambda x: x * torch.bucketize(x, torch.tensor([0.0, 1.0])),
    "slice writes": write_slices,
    "relu of a flat view": overwrite_flat_view,
    "writing into a buffer": fill_buffer,
    "erasing": erase,
    "view of view": view_of_view,
    "transposed view": overwrite_transposed,
    "in-place arithmetic": in_place_arithmetic,
    "unbind and stack": unbind_and_stack,
    "masked and indexed writes": masks_and_indices,
    "filling with tensors": fill_with_tensors,
    "Python numbers": python_numbers,
    "both halves": changing_a_view_then_reading_the_base,
    "swap": swap,
    "in-place views": in_place_views,
    "broadcasting": lambda x: [
        x * x[0],
        x / (x[:, :1].abs() + 1),
        x[:1] + x,
        torch.sub(x[0], x, alpha=2),
        torch.ones(2, 4, 6) + x,
        x[:, :1] - 1,
        torch.ones(2, 4, 6, dtype=x.dtype) * x,
        torch.where(x > 0, x[:1], x[:, :1]),
        torch.where(x > 0, 0.0, x[0]),
        torch.where(torch.arange(4)[None, :, None] > 1, x[:1, None, :3], torch.ones(2, 4, 3, dtype=x.dtype)),
        torch.where(torch.arange(4)[None, :, None] > 1, x[:1, :1, None], torch.ones(2, 4, 1, dtype=x.dtype)),
    ],
    "masked fill": lambda x: [
        x.masked_fill(x > 0, x[0, 0]),
        x.masked_fill(x > 0, 2.0),
        torch.ones(4, 6, dtype=x.dtype).masked_fill(x > 0, x[1, 1]),
    ],
    "in-place powers and roots": lambda x: (x * x + 1).pow_(2).log_().neg_().sub_(1),
    "in-place constants": lambda x: (x * 1).add_(1).sub_(x, alpha=2).clamp_min_(-1).mul_(3).cumsum_(0).exp_(),
    "tensor methods": lambda x: [x.masked_select(x > 0), x.nan_to_num(), x.put(torch.tensor([0]), x[:1, 1]), x.trace()],
    "threshold": lambda x: [F.threshold(x, 0.1, 20.0), F.relu(x).clamp_max(1), F.logsigmoid(x), F.celu(x, 0.5)],
    "normalised without statistics": lambda x: [
        F.batch_norm(x, None, None, training=True),
        F.layer_norm(x, (6,)),
        F.group_norm(x, 3),
        F.instance_norm(x[None]),
    ],
    "no tangent": lambda x: torch.ones(3, dtype=x.dtype) * 2,
    "half": half,
}


MIXED_PRECISION: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: [
        x.float() * x,
        x + x.float(),
        torch.cat([x.float(), x]),
        x.to(torch.float32),
        x.mean(dtype=torch.float32),
    ],
    "copies of another type": lambda x: torch.zeros(2, 4, 6, dtype=torch.float32).copy_(x).double() + x,
}


@pytest.mark.parametrize("name", MIXED_PRECISION)
def test_operation_in_mixed_precision(name: str) -> None:
    """Too coarse for differences; PyTorch's forward mode alone is the judge."""
    torch.manual_seed(0)
    x, t = normal(4, 6), normal(4, 6)
    module = Function(MIXED_PRECISION[name])
    results, found = ours(module, [x], {0: t})
    for result, tangent, expected in zip(results, found, forward_ad(module, [x], {0: t}), strict=True):
        assert tangent.dtype == result.dtype
        torch.testing.assert_close(tangent, expected.to(tangent.dtype))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str) -> None:
    torch.manual_seed(0)
    kind = Attention if "attention" in name else Function
    check(kind(OPERATIONS[name]), [normal(4, 6)])


@pytest.mark.parametrize(
    "draw",
    [
        lambda x, g: torch.normal(x, 1.0, generator=g),
        lambda x, g: torch.normal(x, x.abs(), generator=g),
        lambda x, g: torch.poisson(x.abs(), generator=g),
        lambda x, g: (x * 1).cauchy_(generator=g),
        lambda x, g: (x * 1).geometric_(0.5, generator=g),
    ],
)
def test_draws_leave_a_generator_as_without_tangents(draw: Callable[..., Tensor]) -> None:
    x = normal(5)
    one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    with Tangents() as mode:
        mode.set(x, normal(5))
        drawn = draw(x, one)
        assert not zero_if_none(mode.get(drawn), drawn).any()
    assert torch.equal(drawn, draw(x, other))
    assert torch.equal(one.get_state(), other.get_state())


def test_writing_into_integers() -> None:
    """Rounding has the tangent 0, in a buffer too (where PyTorch's forward mode fails)."""

    def write(x: Tensor) -> Tensor:
        index, flag = torch.zeros(4, 6, dtype=torch.long), torch.zeros(4, dtype=torch.bool)
        with torch.no_grad():
            index.copy_(x * 3)
            flag.fill_(x[0, 0])
        return index * x + index.to(x.dtype) * flag[:, None]

    torch.manual_seed(0)
    check(Function(write), [normal(4, 6)], exact=False)


@pytest.mark.parametrize(
    "write",
    [torch.sin, torch.exp, torch.square, torch.neg, lambda x, out: torch.mul(x, x, out=out), partial(torch.cumsum, dim=0)],
)
def test_out_argument(write: Callable[..., Tensor]) -> None:
    x, t, result = normal(3), normal(3), torch.zeros(3, dtype=torch.float64)
    expected, tangent = torch.func.jvp(lambda a: write(a, out=None), (x,), (t,))
    with Tangents() as mode:
        mode.set(x, t)
        write(x, out=result)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(mode.get(result), tangent)
        write(torch.ones(3, dtype=torch.float64), out=result)
        assert not mode.get(result).any()
        with pytest.raises(UsageError, match="writes to an argument"):
            write(x, out=torch.empty(0, dtype=torch.float64))


@pytest.mark.parametrize(
    "name", ["Conv2d", "Linear", "LSTM", "TransformerEncoderLayer", "MaxPool2d", "GELU", "ConvTranspose2d"]
)
def test_layer_in_single_precision(name: str) -> None:
    """Single precision runs other kernels than double."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    check(make(), [normal(*shape, dtype=torch.float32)], rtol=2e-5)


@pytest.mark.parametrize("name", NORMS)
def test_norm_in_single_precision(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NORMS[name]
    check(warm(make()), [normal(*shape, dtype=torch.float32)], rtol=1e-4)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "expanded": lambda x: x,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(3, 4, 3), lambda: nn.Conv2d(3, 3, 3, groups=3), lambda: nn.BatchNorm2d(3),
        lambda: nn.BatchNorm2d(3).eval(), lambda: nn.GroupNorm(1, 3), lambda: nn.GroupNorm(3, 3, affine=False),
        lambda: nn.InstanceNorm2d(3, affine=True), lambda: nn.LayerNorm((5, 4)), lambda: nn.LayerNorm(4), lambda: nn.RMSNorm(4),
        lambda: nn.MaxPool2d(2), lambda: nn.AdaptiveMaxPool2d(2), lambda: nn.AvgPool2d(2), lambda: nn.ReLU(), lambda: nn.GELU(),
        lambda: nn.Softmax(1), lambda: nn.LogSoftmax(1), lambda: nn.Flatten(), lambda: nn.Linear(4, 2), lambda: nn.PReLU(3),
        lambda: nn.Upsample(scale_factor=2), lambda: Function(lambda x: x.sum(1).cumsum(0)),
    ],
    ids=lambda make: re.search(r"Conv2d.*|[A-Z][A-Za-z0-9]+", str(make())).group(),
)  # fmt: skip
def test_memory_layouts(make: Callable[[], nn.Module], layout: str) -> None:
    """Tensors and tangents may lie in memory in any order."""
    torch.manual_seed(0)
    module = warm(make().double())
    x, t = normal(2, 3, 5, 4), normal(2, 3, 5, 4)
    if layout == "expanded":
        x, t = x[:1].expand(2, 3, 5, 4), t[:, :1].expand(2, 3, 5, 4)
    (expected,) = forward_ad(module, [x.contiguous()], {0: t.contiguous()})
    for x_layout, t_layout in [(layout, layout), (layout, "contiguous"), ("contiguous", layout)]:
        _, (found,) = ours(copy.deepcopy(module), [LAYOUTS[x_layout](x)], {0: LAYOUTS[t_layout](t)})
        torch.testing.assert_close(found, expected)


def test_tangents_without_a_graph() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    x, t = normal(3, 2, 4, 4), normal(3, 2, 4, 4)
    expected = forward_ad(net, [x], {0: t})[0]
    with torch.no_grad():
        (result,), (found,) = ours(net, [x], {0: t})
    assert not result.requires_grad
    torch.testing.assert_close(found, expected)


def test_tangent_set_in_the_middle() -> None:
    """A tangent may be put on any intermediate result, replacing or adding to what it has."""
    x = normal(3).requires_grad_()
    with Tangents() as mode:
        h = x.sin()
        assert mode.get(h) is None
        u = normal(3)
        mode.set(h, u)
        y = h.exp()
        mode.set(y, mode.get(y) + 1)
        found = mode.get(y * 2)
    torch.testing.assert_close(found, 2 * (x.sin().exp() * u + 1).detach())


def test_no_tangent_outside_and_after() -> None:
    x = normal(3)
    with Tangents() as mode:
        mode.set(x, normal(3))
    with Tangents() as mode:
        assert mode.get(x) is None
        assert mode.get(x * 2) is None


def test_tangent_of_a_frozen_and_of_a_learning_parameter() -> None:
    layer = nn.Linear(3, 2).double()
    layer.bias.requires_grad_(False)
    x, tangents = normal(4, 3), {"weight": normal(2, 3), "bias": normal(2)}
    (_,), (found,) = ours(layer, [x], tangents)
    torch.testing.assert_close(found, x @ tangents["weight"].t() + tangents["bias"])


def test_detach_stops_a_tangent() -> None:
    x = normal(3)
    with Tangents() as mode:
        mode.set(x, normal(3))
        assert mode.get(x.detach()) is None
        assert torch.equal(mode.get(x - x.detach()), mode.get(x))


@pytest.mark.parametrize(
    "name", ["Conv2d", "Dropout", "LSTM", "MaxPool2d", "Softmax", "PReLU channels", "ELU in place", "AlphaDropout"]
)
def test_several_directions_in_one_pass(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    module, x = make().double(), normal(*shape)
    tangents = [{0: normal(*shape)} | {key: torch.randn_like(p) for key, p in module.named_parameters()} for _ in range(3)]
    expected = [ours(copy.deepcopy(module), [x], each)[1] for each in tangents]
    with Tangents(3) as mode:
        mode.set(x, *(each[0].clone() for each in tangents))
        for key, p in module.named_parameters():
            mode.set(p, *(each[key] for each in tangents))
        results = seeded(module, x)
        for i, result in enumerate(results):
            for direction in range(3):
                torch.testing.assert_close(mode.get(result, direction), expected[direction][i])


def test_detach_keeps_values_and_gradients() -> None:
    """Backward inside the mode gives the same gradients as outside."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.Linear(3, 2)).double()
    twin, x = copy.deepcopy(net), normal(5, 4)
    twin(x).square().sum().backward()
    with Tangents() as mode:
        mode.set(x, normal(5, 4))
        net(x).square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_no_grad_inside_stops_a_tangent() -> None:
    """As it stops a gradient: what is computed there is a constant, views and in-place operations included."""
    torch.manual_seed(0)
    x, t = normal(3, 4), normal(3, 4)

    def function(x: Tensor, target: nn.Parameter) -> Tensor:
        with torch.no_grad():
            scale = x.abs().max()
            rows = x[1:]
            target.mul_(0.5).add_(x.sum(), alpha=0.5)
        with torch.inference_mode():
            shift = x.exp()
        return x / scale + rows.sum() * target + shift.clone()

    with Tangents() as mode:
        mode.set(x, t.clone())
        moved = mode.get(function(x, torch.ones(())))
    leaf = x.clone().requires_grad_()
    w = normal(3, 4)
    (true,) = torch.autograd.grad((function(leaf, torch.ones(())) * w).sum(), leaf)
    torch.testing.assert_close((moved * w).sum(), (true * t).sum())
    with torch.no_grad(), Tangents() as mode:
        mode.set(x, t.clone())
        with torch.no_grad():
            y = x * 2
        assert torch.equal(mode.get(y), 2 * t)  # around the mode it says nothing


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of a power": lambda h, w: (h**3 * w).sum(),
    "of a linear layer": lambda h, w: (F.linear(h, w).tanh() * w.sum()).sum(),
    "of a softmax": lambda h, w: ((h @ w).softmax(1) * h).sum(),
    "of an exponential": lambda h, w: (h * w.sum()).exp().sum(),
    "of a view in place": lambda h, w: (h.clone().mul_(w).sin().flatten()[1:] ** 2).sum(),
    "of a gradient": lambda h, w: torch.autograd.grad((h**4 * w).sum(), h, create_graph=True)[0].square().sum(),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_taken_inside(name: str) -> None:
    """Followed where asked for, refused where not: the same function, and its derivative by differences."""
    torch.manual_seed(0)
    x, w, tx, tw = normal(3, 3), normal(3, 3), normal(3, 3), normal(3, 3)

    def function(x: Tensor, w: Tensor, create_graph: bool = True) -> Tensor:
        h = x * 1 if x.requires_grad else (x * 1).requires_grad_()
        return h + torch.autograd.grad(GRADIENTS[name](h, w), h, create_graph=create_graph)[0]

    def ours(create_graph: bool = True, **options: bool) -> Tensor | None:
        with Tangents(**options) as mode:
            a, b = x.clone(), w.clone()
            mode.set(a, tx.clone())
            mode.set(b, tw.clone())
            return mode.get(function(a, b, create_graph))

    true = (function(x + STEP * tx, w + STEP * tw) - function(x - STEP * tx, w - STEP * tw)) / (2 * STEP)
    torch.testing.assert_close(ours(through_gradients=True), true.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match=r"a gradient is taken inside the network's forward .*low_memory=True"):
        ours()
    if name != "of a gradient":
        torch.testing.assert_close(ours(False), tx)  # without a graph of its own it is a constant


def test_torch_func_inside_is_refused() -> None:
    def inside() -> None:
        with Tangents() as mode:
            mode.set(x := normal(3), normal(3))
            torch.func.grad(lambda r: (r**3).sum())(x)

    with pytest.raises(UsageError, match=r"cannot follow torch\.func transforms"):
        inside()


class Inside(torch.autograd.Function):
    """Runs an operation in a Function's forward, where PyTorch's own forward mode is off."""

    @staticmethod
    def forward(ctx: Any, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return f(x)


@pytest.mark.parametrize("name", ["sin", "abs", "clamp", "pow", "sort", "cumsum", "logsumexp"])
def test_operations_inside_a_function(name: str) -> None:
    torch.manual_seed(0)
    functions = {"clamp": lambda x: x.clamp(-0.5, 0.5), "pow": lambda x: x**3, "sort": lambda x: x.sort(0)[0]}
    functions |= {"cumsum": lambda x: x.cumsum(0), "logsumexp": lambda x: x.logsumexp(0)}
    f = functions.get(name) or getattr(torch, name)
    x, t = normal(5), normal(5)
    with Tangents() as mode:
        mode.set(x, t.clone())
        moved = mode.get(x + Inside.apply(f, x))
    torch.testing.assert_close(moved, t + torch.func.jvp(f, (x,), (t,))[1])


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "EmbeddingBag": (lambda: nn.EmbeddingBag(5, 3), lambda: [torch.tensor([[0, 1], [2, 2]])]),
    "EmbeddingBag max": (lambda: nn.EmbeddingBag(5, 3, mode="max"), lambda: [torch.tensor([[0, 1], [2, 2]])]),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), lambda: [normal(4, 3)]),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)).eval(), lambda: [normal(4, 3)]),
    "grid_sample": (
        lambda: Function(lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False)),
        lambda: [normal(1, 2, 3, 3), normal(1, 2, 2, 2)],
    ),
    "cdist": (lambda: Function(lambda x, y: torch.cdist(x, y)), lambda: [normal(3, 4), normal(2, 4)]),
    "cdist p": (lambda: Function(lambda x, y: torch.cdist(x, y, p=1.5)), lambda: [normal(3, 4), normal(2, 4)]),
    "ctc_loss": (
        lambda: Function(lambda x: F.ctc_loss(x.log_softmax(2), torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2]))),
        lambda: [normal(5, 1, 4)],
    ),
    "fractional pool": (lambda: nn.FractionalMaxPool2d(2, output_size=2), lambda: [normal(1, 2, 5, 5)]),
    "max unpool": (
        lambda: Function(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
        lambda: [normal(1, 2, 4, 4)],
    ),
    "multilabel margin": (lambda: nn.MultiLabelMarginLoss(), lambda: [normal(2, 3), torch.tensor([[1, -1, 0], [0, 2, -1]])]),
    "multi margin": (lambda: nn.MultiMarginLoss(), lambda: [normal(4, 3), torch.tensor([0, 2, 1, 1])]),
    "rrelu in place": (lambda: Function(lambda x: F.rrelu_(x * 1, training=True)), lambda: [normal(4, 3)]),
    "product by index": (
        lambda: Function(lambda x: x.scatter_reduce(0, torch.zeros(1, 3, dtype=torch.long), x[1:2], "prod")),
        lambda: [normal(4, 3)],
    ),
    "many in place": (lambda: Function(lambda x: [y := x * 1, torch._foreach_mul_([y], 2.0)][0]), lambda: [normal(4, 3)]),
    "rrelu": (nn.RReLU, lambda: [normal(4, 3)]),
    "rrelu in eval mode": (lambda: nn.RReLU().eval(), lambda: [normal(4, 3)]),
    "complex": (lambda: Function(lambda x: torch.view_as_real(torch.complex(x, x.sin()) * 1j)), lambda: [normal(4, 3)]),
    "fft": (lambda: Function(lambda x: torch.fft.fft2(x).real), lambda: [normal(4, 3)]),
    "compiled": (lambda: torch.compile(nn.Linear(3, 2), backend="eager"), lambda: [normal(4, 3)]),
    "lu_solve": (lambda: Function(lambda x: torch.linalg.lu_factor(x)[0]), lambda: [normal(3, 3)]),
    "segment reduce": (
        lambda: Function(lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([1, 3]))),
        lambda: [normal(4)],
    ),
    "stft": (
        lambda: Function(lambda x: torch.stft(x, 4, window=torch.ones(4, dtype=x.dtype), return_complex=True).abs()),
        lambda: [normal(12)],
    ),
    "checkpoint": (
        lambda: Function(lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)),
        lambda: [normal(3)],
    ),
    "vmap": (lambda: Function(lambda x: torch.vmap(lambda r: r.sin() * r.sum())(x)), lambda: [normal(3, 2)]),
    "sparse": (lambda: Function(lambda x: torch.eye(3, dtype=x.dtype).to_sparse() @ x), lambda: [normal(3, 2)]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_right_or_refused(name: str) -> None:
    """Where PyTorch has no rule the tangent is right or the user is told; it is never dropped in silence."""
    torch.manual_seed(0)
    make, inputs = UNSUPPORTED[name][0]().double(), UNSUPPORTED[name][1]()
    try:
        check(make, inputs, exact=False)
    except (UsageError, NotImplementedError) as error:
        assert len(str(error)) > 20  # noqa: PT017 - either outcome is right


def test_tangents_die_with_their_tensors() -> None:
    x = normal(50)
    with torch.no_grad(), Tangents() as mode:
        mode.set(x, normal(50))
        h = x.sin()
        tangent = mode.get(h)
        alive = weakref.ref(tangent.untyped_storage()), weakref.ref(tangent)
        del tangent
        y = h * 2
        del h
        assert alive[1]() is None
        assert mode.get(y) is not None


@pytest.mark.parametrize("layer", [nn.Tanh, lambda: nn.Linear(40, 40), lambda: nn.LayerNorm(40)])
def test_memory_does_not_grow_with_depth(layer: Callable[[], nn.Module]) -> None:
    def peak(depth: int) -> int:
        net, x = nn.Sequential(*(layer() for _ in range(depth))), torch.randn(100, 40)
        with torch.no_grad(), reference.PeakBytes() as bytes_, Tangents() as mode:
            mode.set(x, torch.randn(100, 40))
            net(x)
        return bytes_.peak

    assert peak(12) == peak(4)


CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
few = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@few
@given(
    dims=st.integers(1, 3), transposed=st.booleans(), groups=st.integers(1, 3), inputs=st.integers(1, 2),
    results=st.integers(1, 2), kernel=st.integers(1, 3), stride=st.integers(1, 2), padding=st.integers(0, 2),
    dilation=st.integers(1, 2), bias=st.booleans(), samples=st.integers(1, 3), size=st.integers(5, 6),
    where=st.sampled_from(WHERE),
)  # fmt: skip
def test_any_convolution(
    dims: int, transposed: bool, groups: int, inputs: int, results: int, kernel: int, stride: int, padding: int,
    dilation: int, bias: bool, samples: int, size: int, where: str,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    size = size if dims < 3 else 5
    layer = (TRANSPOSED if transposed else CONVOLUTION)[dims](
        groups * inputs, groups * results, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias
    )
    check(layer.double(), [normal(samples, groups * inputs, *[size] * dims)], where)


@few
@given(
    kind=st.sampled_from(["batch", "layer", "group", "instance", "rms"]), samples=st.integers(2, 4), groups=st.integers(1, 3),
    per_group=st.integers(1, 2), extent=st.lists(st.integers(2, 3), min_size=0, max_size=3), affine=st.booleans(),
    train=st.booleans(), eps=st.sampled_from([1e-5, 1e-2]), where=st.sampled_from(WHERE),
)  # fmt: skip
def test_any_norm(
    kind: str, samples: int, groups: int, per_group: int, extent: list[int], affine: bool, train: bool, eps: float, where: str
) -> None:
    torch.manual_seed(0)
    channels = groups * per_group
    if (kind == "instance" and not extent) or (kind == "group" and per_group == 1 and not extent):
        extent = [3]
    shape = (samples, channels, *extent)
    norm = {
        "batch": lambda: {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(extent)](
            channels, eps, affine=affine
        ),
        "layer": lambda: nn.LayerNorm(shape[1:] if train else shape[-1:], eps, affine),
        "group": lambda: nn.GroupNorm(groups, channels, eps, affine),
        "instance": lambda: {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[len(extent)](
            channels, eps, affine=affine
        ),
        "rms": lambda: nn.RMSNorm(shape[-1:], eps, affine),
    }[kind]()
    if not affine and where == "parameters":
        where = "inputs"
    check(warm(norm.double()).train(train), [normal(*shape)], where)


def test_learned_attention_mask() -> None:
    """Fused attention takes its mask by keyword: refused with the remedy, right with the remedy."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)
    mask, t = torch.randn(2, 5, 5, dtype=torch.float64)
    with torch.no_grad(), Tangents() as tangents:
        tangents.set(mask, t)
        with pytest.raises(UsageError, match=r"SDPBackend\.MATH"):
            F.scaled_dot_product_attention(q, k, v, mask)
        with sdpa_kernel(SDPBackend.MATH):
            out = tangents.get(F.scaled_dot_product_attention(q, k, v, mask))
    expected = torch.func.jvp(lambda m: (q @ k.transpose(-2, -1) / 6**0.5 + m).softmax(-1) @ v, (mask,), (t,))[1]
    torch.testing.assert_close(out, expected)


class Kernels(TorchDispatchMode):
    """Kernels of other devices, by what they compute: what is dispatched to them, and how, is the same on any device."""

    def __init__(self, kernels: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = self.kernels.get(func.overloadpacket, func)
        return kernel(*args, **(kwargs or {}))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """Attention, one head of one sample at a time."""
    samples = []
    for n in range(len(q)):
        heads = []
        for head in range(q.shape[1]):
            key, value = (a[n, head * a.shape[1] // q.shape[1]] for a in (k, v))
            scores = q[n, head] @ key.T * (scale or q.shape[-1] ** -0.5) + (0.0 if mask is None else mask[n, head])
            if causal:
                scores = torch.where(torch.arange(len(q[n, head]))[:, None] >= torch.arange(len(key)), scores, -torch.inf)
            heads.append(scores.softmax(-1) @ value)
        samples.append(torch.stack(heads))
    return torch.stack(samples)


ATTENTION: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "_scaled_dot_product_flash_attention_for_cpu": lambda op, q, k, v, mask, causal, **scale: op(
        q, k, v, 0.0, causal, attn_mask=mask, **scale
    ),
    "_scaled_dot_product_flash_attention": lambda op, q, k, v, mask, causal, **scale: op(q, k, v, 0.0, causal, False, **scale),
    "_scaled_dot_product_flash_attention debug": lambda op, q, k, v, mask, causal, **scale: op(
        q, k, v, 0.0, causal, True, **scale
    ),
    "_scaled_dot_product_efficient_attention": lambda op, q, k, v, mask, causal, **scale: op(
        q, k, v, mask, False, 0.0, causal, **scale
    ),
    "_scaled_dot_product_efficient_attention training": lambda op, q, k, v, mask, causal, **scale: op(
        q, k, v, mask, True, 0.0, causal, **scale
    ),
    "_scaled_dot_product_cudnn_attention": lambda op, q, k, v, mask, causal, **scale: op(
        q, k, v, mask, False, 0.0, causal, False, **scale
    ),
    "_scaled_dot_product_cudnn_attention training": lambda op, q, k, v, mask, causal, **scale: op(
        q, k, v, mask, True, 0.0, causal, True, **scale
    ),
}


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_every_backend(name: str, masked: bool, causal: bool, scale: float | None, heads: int) -> None:
    """Each in its own order of arguments, of which dispatch leaves out those that equal their defaults."""
    if masked and "flash_attention" in name and "cpu" not in name:
        return
    torch.manual_seed(0)
    inputs = [normal(2, 4, 3, 6), normal(2, heads, 5, 6), normal(2, heads, 5, 6)]
    tangents = [torch.randn_like(a) for a in inputs]
    mask = normal(2, 4, 3, 5) if masked else None
    expected = torch.func.jvp(lambda *qkv: attend(*qkv, mask, causal, scale), tuple(inputs), tuple(tangents))[1]

    operation = getattr(torch.ops.aten, name.split()[0])
    returns = operation.default._schema.returns

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return (torch.zeros_like(args[0]), *(torch.zeros(0) if str(r.type) == "Tensor" else 0 for r in returns[1:]))

    with torch.no_grad(), Kernels({operation: kernel}), Tangents() as mode:
        for a, t in zip(inputs, tangents, strict=True):
            mode.set(a, t)
        out = ATTENTION[name](operation, *inputs, mask, causal, scale=scale)[0]
    torch.testing.assert_close(mode.get(out), expected)


def test_cuda_batch_norm() -> None:
    """cuDNN's returns a fourth tensor."""
    torch.manual_seed(0)
    norm, x, t = warm(nn.BatchNorm2d(3).double()), normal(4, 3, 2, 5), normal(4, 3, 2, 5)

    def kernel(*args: Any) -> Any:
        return (*torch.native_batch_norm(*args), torch.zeros(0, dtype=torch.uint8))

    (expected,) = forward_ad(norm, [x], {0: t})
    arguments = (x, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, 0.1, norm.eps)
    with torch.no_grad(), Kernels({torch.ops.aten.cudnn_batch_norm: kernel}), Tangents() as mode:
        mode.set(x, t)
        out = torch.ops.aten.cudnn_batch_norm(*arguments)[0]
    torch.testing.assert_close(mode.get(out), expected)


@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_cuda_softmax_to_single_precision(function: Callable[..., Tensor]) -> None:
    """Of a tensor in half precision, as autocast calls it: its own operation on CUDA, a cast and a softmax elsewhere."""
    torch.manual_seed(0)
    x, t = torch.randn(2, 4, 6).half()
    operation = getattr(torch.ops.aten, f"_{function.__name__}")
    expected = torch.func.jvp(partial(function, dim=1), (x.float(),), (t.float(),))[1]
    with Kernels({operation: lambda a, dim, _: function(a.float(), dim)}), Tangents() as mode:
        mode.set(x, t)
        out = operation(x, 1, True)
    torch.testing.assert_close(mode.get(out), expected)


def test_shortcuts_do_what_the_operations_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with tangents on inputs, weights and biases; and PyTorch's own functions come back, also after a failure."""
    own = F.linear, F.relu
    layers = [nn.Linear(5, 4), nn.Linear(4, 1, bias=False), nn.Linear(1, 3)]
    x = torch.randn(6, 5)
    u = [torch.randn_like(t) for t in (x, layers[0].weight, layers[2].bias)]

    def run() -> list[Tensor | None]:
        with Tangents(2) as tangents:
            tangents.set(x, u[0], -u[0])
            tangents.set(layers[0].weight, u[1], u[1] * 2)
            tangents.set(layers[2].bias, u[2], u[2])
            h = x
            for layer in layers:
                h = F.relu(F.linear(h, layer.weight, layer.bias))
        return [h.detach(), tangents.get(h), tangents.get(h, 1)]

    short = run()
    assert (F.linear, F.relu) == own
    monkeypatch.setattr(shortcuts, "install", lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(short, run(), strict=True))
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError), Tangents():
        _ = 1 / int(F.linear is own[0])
    assert (F.linear, F.relu) == own


def test_no_shortcut_where_somebody_else_listens_or_gradients_are_off() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    with Tangents() as tangents:
        tangents.set(x, torch.randn_like(x))
        with torch.no_grad():
            stopped = F.relu(layer(x))
        with FlopCounterMode(display=False) as counted:
            layer(x)
    assert tangents.get(stopped) is None
    assert counted.get_total_flops() >= 2 * 4 * 3 * 2
