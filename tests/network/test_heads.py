"""Auxiliary networks: what each kind is made of, what sizes it takes, and the similarity-matching loss by its definition."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case
from torch import Tensor, nn

from onward import LocalLoss, UsageError, make_heads
from onward.network.heads import HEADS, PredSim

KINDS = ("cnn", "mlp", "linear", "predsim")


def images(channels: int = 6, size: int = 8, cuts: int = 1) -> tuple[nn.Module, Tensor]:
    layers = [nn.Sequential(nn.Conv2d(channels if k else 2, channels, 3, padding=1), nn.ReLU()) for k in range(cuts)]
    return nn.Sequential(*layers, nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, 5))), torch.randn(4, 2, size, size)


def flat() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5)), torch.randn(4, 3)


def sequence() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Sequential(nn.Flatten(), nn.Linear(42, 5))), torch.randn(4, 6, 3)


def volume() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Sequential(nn.Flatten(), nn.Linear(16, 5))), torch.randn(
        4, 1, 3, 3, 3
    )


OUTPUTS = {"images": images, "flat": flat, "sequence": sequence, "volume": volume}


def only(heads: dict[str, nn.Module]) -> nn.Module:
    (head,) = heads.values()
    return head


def test_a_head_of_positions_reads_its_own_position() -> None:
    model = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5))  # the output has numbers for each position
    x = torch.randn(4, 6, 3)
    head = only(make_heads(model, x, "linear"))
    h = torch.randn(4, 6, 7, requires_grad=True)
    head(h)[1, 2].sum().backward()  # type: ignore[index]
    assert head(h).shape == (4, 6, 5)
    assert h.grad is not None
    assert h.grad.abs().sum(2).nonzero().tolist() == [[1, 2]]
    for kind in ("mlp", "predsim"):
        with pytest.raises(
            UsageError, match=rf"{kind} head at cut '1': .*\(4, 6, 5\), and this head reads all .*kind='linear'"
        ):
            make_heads(model, x, kind)


def test_the_kinds() -> None:
    assert set(HEADS) == {*KINDS, "auglocal", "pieces"}  # which test_more_heads.py is for


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_from_any_output_to_the_networks_outputs(kind: str, output: str) -> None:
    model, x = OUTPUTS[output]()
    if kind == "cnn" and output != "images":
        with pytest.raises(UsageError, match=r"cnn head at cut '1'.*\(N, C, H, W\).*mlp"):
            make_heads(model, x, kind, cuts=["1"])
        return
    heads = make_heads(model, x, kind, cuts=["0"])
    assert list(heads) == ["0"]
    h = model[0](x).detach()
    logits = only(heads)(h)
    assert logits.shape == (4, 5)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_images_of_any_size(kind: str, size: int) -> None:
    model, x = images(3, size)
    assert only(make_heads(model, x, kind, width=8))(model[0](x)).shape == (4, 5)


def modules(head: nn.Module) -> Counter[type]:
    return Counter(type(module) for module in head.modules() if not list(module.children()))


def numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_cnn() -> None:
    """1x1 convolution to h, three times a 3x3 convolution of stride 2, each with batch norm and ReLU, pool to 2x2, linear."""
    model, x = images(6, 16)
    head = only(make_heads(model, x, "cnn", width=10))
    order = [type(module) for module in head.modules() if not list(module.children())]
    assert order == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 4 + [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    convolutions = [module for module in head.modules() if isinstance(module, nn.Conv2d)]
    assert all(c.bias is None for c in convolutions)
    assert [c.kernel_size for c in convolutions] == [(1, 1), (3, 3), (3, 3), (3, 3)]
    assert [c.stride for c in convolutions] == [(1, 1), (2, 2), (2, 2), (2, 2)]
    assert [c.in_channels for c in convolutions] == [6, 10, 10, 10]
    (linear,) = (module for module in head.modules() if isinstance(module, nn.Linear))
    assert (linear.in_features, linear.out_features) == (40, 5)


def test_mlp() -> None:
    """Pool to 2x2, three times linear, batch norm and ReLU, linear."""
    model, x = images(6, 16)
    head = only(make_heads(model, x, "mlp", width=10))
    found = modules(head)
    assert (found[nn.BatchNorm1d], found[nn.ReLU], found[nn.Linear]) == (3, 3, 4)
    linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
    assert [(one.in_features, one.out_features) for one in linears] == [(24, 10), (10, 10), (10, 10), (10, 5)]


def test_linear() -> None:
    """Batch norm of the channels, pool to 2x2, linear."""
    model, x = images(6, 16)
    head = only(make_heads(model, x, "linear"))
    assert [type(m) for m in head.modules() if m is not head and numbers(m)] == [nn.BatchNorm2d, nn.Linear]
    assert numbers(head) == 12 + 24 * 5 + 5


@pytest.mark.parametrize(("cuts", "cnn", "mlp"), [(2, 32, 1024), (8, 32, 1024), (15, 16, 512)])
def test_default_widths(cuts: int, cnn: int, mlp: int) -> None:
    """Half as wide on networks of 16 blocks."""
    model, x = images(2, 4, cuts)
    for head in make_heads(model, x, "cnn").values():
        assert numbers(head) == (2 * cnn + 2 * cnn) + 3 * (9 * cnn**2 + 2 * cnn) + (4 * cnn * 5 + 5)
    for head in make_heads(model, x, "mlp").values():
        assert numbers(head) == (8 * mlp + mlp) + 2 * (mlp**2 + mlp) + 3 * 2 * mlp + (mlp * 5 + 5)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_every_network(case: Case, kind: str) -> None:
    """Nothing moves: statistics, mode, gradients; the heads have the network's precision and as many outputs."""
    model, x, _, cuts, _ = case.build()
    state, training = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    heads = make_heads(model, x, kind, cuts=cuts, width=4)
    assert tuple(heads) == cuts
    assert [module.training for module in model.modules()] == training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for (name, before), after in zip(state.items(), model.state_dict().values(), strict=True):
        assert torch.equal(before, after), name
    for head in heads.values():
        assert all(p.dtype == torch.float64 and p.requires_grad for p in head.parameters())
        assert head.training
    seen = {}
    handles = [
        model.get_submodule(cut).register_forward_hook(lambda m, i, o, cut=cut: seen.update({cut: o.detach().clone()}))
        for cut in cuts
    ]
    logits = model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, dict) else model(x)
    for handle in handles:
        handle.remove()
    assert all(heads[cut](h).shape == logits.shape for cut, h in seen.items())


def test_weights_come_from_the_global_generator_and_from_nothing_else() -> None:
    """The same seed gives the same heads, whether or not the network draws masks."""

    def made(seed: int, dropout: float) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 7), nn.Dropout(dropout), nn.Tanh(), nn.Linear(7, 5))
        torch.manual_seed(seed)
        return list(make_heads(model, torch.ones(4, 3), "mlp", cuts=["2"], width=4)["2"].parameters())

    first, same, masked, other = made(1, 0.0), made(1, 0.0), made(1, 0.5), made(2, 0.0)
    for p, q, r in zip(first, same, masked, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_heads_have_the_networks_precision(dtype: torch.dtype) -> None:
    """Of its parameters, whatever autocast makes of what they compute."""
    model = flat()[0].to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        head = only(make_heads(model, torch.randn(4, 3, dtype=dtype), "linear"))
    assert {p.dtype for p in head.parameters()} == {dtype}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_samples_are_the_first_dimension(kind: str) -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.hidden(x.transpose(0, 1)).mean(0))

    with pytest.raises(UsageError, match=r"cut 'hidden' has shape \(6, 5, 4\) for 5 samples.*the sample dimension first"):
        make_heads(TimeFirst(), torch.randn(5, 6, 3), kind, cuts=["hidden"])


def test_one_sample_has_no_batch_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 5))
    x = torch.randn(4, 3)
    with pytest.raises(UsageError, match="a batch of one sample has no batch statistics"):
        make_heads(model, x[:1], "linear")
    assert only(make_heads(model.eval(), x[:1], "linear")).training


def test_each_cut_has_weights_of_its_own() -> None:
    model, x = images(3, 4, 2)
    first, second = make_heads(model, x, "cnn").values()
    assert not any(p is q for p in first.parameters() for q in second.parameters())
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_networks_device(kind: str) -> None:
    model, x = images()
    model, x = model.cuda(), x.cuda()
    for head in make_heads(model, x, kind).values():
        assert head(model[0](x)).device.type == "cuda"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "ccn"}, "head 'ccn'.*did you mean 'cnn'"),
        ({"cuts": ["O"]}, "cut 'O'"),
        ({"width": 0}, "width 0.*at least 1"),
        ({"width": -3}, "width -3.*at least 1"),
    ],
)
def test_refused(options: dict, match: str) -> None:
    model, x = images()
    with pytest.raises(UsageError, match=match):
        make_heads(model, x, **options)


# The similarity-matching loss.


def cosines(rows: list[list[float]]) -> list[list[float]]:
    """Adjusted cosine similarities: each sample's features centred by their own mean."""
    centred = [[value - sum(row) / len(row) for value in row] for row in rows]
    lengths = [math.sqrt(sum(value * value for value in row)) for row in centred]
    return [
        [sum(p * q for p, q in zip(a, b, strict=True)) / (m * n) for b, n in zip(centred, lengths, strict=True)]
        for a, m in zip(centred, lengths, strict=True)
    ]


def similarity_loss(features: Tensor, labels: list[int], classes: int) -> float:
    """The mean squared difference of the similarities between samples and those between their one-hot labels."""
    found = cosines(features.tolist())
    wanted = cosines([[float(c == label) for c in range(classes)] for label in labels])
    count = len(labels)
    return sum((found[i][j] - wanted[i][j]) ** 2 for i in range(count) for j in range(count)) / count**2


def predsim_loss(model: nn.Module, x: Tensor, y: Tensor, features: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, x = model.double(), x.double()
    head = only(make_heads(model, x, "predsim", cuts=["0"]))
    given = copy.deepcopy(head)
    step = LocalLoss(model, ["0"], heads={"0": given}).estimate(x, y)
    value, logits = step.heads["0"]
    h = model[0](x).detach()
    torch.testing.assert_close(logits, head(h).detach())
    expected = 0.99 * similarity_loss(features(head, h), y.tolist(), 5) + 0.01 * F.cross_entropy(logits, y)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
    # Its gradient, along one weight of the block and in every weight of the head.
    for p in (*given.parameters(), *model[0].parameters()):
        assert p.grad is not None
        assert p.grad.any()
    weight, epsilon = next(model[0].parameters()), 1e-6
    values = []
    for shift in (epsilon, -epsilon):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            next(moved[0].parameters()).flatten()[1] += shift
        h = moved[0](x).detach()
        values.append(0.99 * similarity_loss(features(head, h), y.tolist(), 5) + 0.01 * F.cross_entropy(head(h), y).item())
    assert abs(weight.grad.flatten()[1] - (values[0] - values[1]) / (2 * epsilon)) < 1e-6


def test_predsim_on_flat_outputs() -> None:
    """The features are a linear map of the output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 5))

    def features(head: nn.Module, h: Tensor) -> Tensor:
        (layer,) = (m for m in head.modules() if isinstance(m, nn.Linear) and m.out_features == 7)
        return layer(h).detach()

    predsim_loss(model, torch.randn(6, 3), torch.tensor([0, 1, 1, 4, 0, 3]), features)


def test_predsim_on_images() -> None:
    """The features are the standard deviations, over the image, of the channels of a 3x3 convolution of the output."""
    torch.manual_seed(0)
    model, x = images(6, 5)

    def features(head: nn.Module, h: Tensor) -> Tensor:
        (layer,) = (m for m in head.modules() if isinstance(m, nn.Conv2d))
        assert layer.kernel_size == (3, 3)
        maps = layer(h).detach()
        assert maps.shape == h.shape
        return torch.tensor([[maps[n, c].std().item() for c in range(6)] for n in range(len(h))], dtype=h.dtype)

    predsim_loss(model, x, torch.tensor([0, 1, 1, 4]), features)


@pytest.mark.parametrize(
    ("shape", "kernel", "features"),
    [
        ((64, 32, 32), (8, 4), 2048),  # the blocks of ResNet-18 on 32x32 images
        ((128, 16, 16), (4, 4), 2048),
        ((256, 8, 8), (4, 2), 2048),
        ((512, 4, 4), (2, 2), 2048),
        ((6, 8, 8), (1, 1), 384),  # few enough
        ((2048, 2, 2), (2, 2), 2048),
        ((4096, 2, 2), (2, 2), 4096),  # nothing is left to be pooled
    ],
)
def test_predsims_classifier_sees_at_most_2048_features(
    shape: tuple[int, int, int], kernel: tuple[int, int], features: int
) -> None:
    """Height and width are halved in turn, height first, until channels times height times width fit."""
    h = torch.randn(2, *shape, dtype=torch.float64)
    head = PredSim(h, 5, 1).double()
    linear = head.classify[-1]
    assert linear.in_features == features
    torch.testing.assert_close(head(h), linear(F.avg_pool2d(h, kernel).flatten(1)))


def test_predsim_pools_what_cannot_be_halved() -> None:
    h = torch.randn(2, 512, 7, 5)
    assert PredSim(h, 5, 1).classify[-1].in_features == 512 * 2 * 2  # 7x5, 4x5, 4x3, 2x3, 2x2


def test_predsim_survives_constant_outputs() -> None:
    """Dead units have no direction; the loss and its gradient stay finite."""
    torch.manual_seed(0)
    for model, x in (images(6, 5), flat()):
        with torch.no_grad():
            for p in model[0].parameters():
                p.zero_()
        heads = make_heads(model, x, "predsim")
        step = LocalLoss(model, heads=heads).estimate(x, torch.tensor([0, 1, 1, 4]))
        assert all(torch.isfinite(value) for value, _ in step.heads.values())
        for p in (*model.parameters(), *(p for head in heads.values() for p in head.parameters())):
            assert p.grad is None or torch.isfinite(p.grad).all()
