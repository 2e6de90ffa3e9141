"""Networks of other papers: their size is the published one, and every kind of head and of algorithm fits them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import onward
from onward.errors import UsageError
from onward.lab.networks.models import build
from onward.lab.run import algorithms
from onward.lab.settings import Heads, Network, Train, Transform
from onward.network.heads import HEADS

NAMES = ("vgg8b", "vgg11b", "lenet", "resnet20", "resnet56")
COUNTS = [  # Nokland and Eidnes' tables; LeNet-5 and He et al.'s by hand
    ("vgg8b", (1, 28, 28), 10, 1, 7.3),
    ("vgg8b", (1, 28, 28), 10, 2, 28.2),
    ("vgg8b", (3, 32, 32), 10, 1, 8.9),
    ("vgg8b", (3, 32, 32), 100, 1, 9.0),
    ("vgg8b", (3, 96, 96), 10, 1, 11.5),
    ("vgg11b", (3, 32, 32), 10, 1, 11.6),
    ("vgg11b", (3, 32, 32), 10, 2, 42.0),
    ("vgg11b", (3, 32, 32), 100, 3, 91.4),
    ("lenet", (1, 32, 32), 10, 1, 0.061706),
    ("resnet20", (3, 32, 32), 10, 1, 0.269722),
    ("resnet56", (3, 32, 32), 10, 1, 0.853018),
]


@pytest.mark.parametrize(("name", "shape", "classes", "width", "millions"), COUNTS)
def test_the_published_number_of_parameters(
    name: str, shape: tuple[int, ...], classes: int, width: float, millions: float
) -> None:
    with torch.device("meta" if name.startswith("vgg") else "cpu"):
        model = build(name, shape, classes, Network(width=width))
    digits = 6 if millions < 1 else 1
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, digits) == millions


def test_a_block_ends_behind_its_relu_and_the_next_begins_with_what_follows() -> None:
    model = build("vgg8b", (3, 32, 32), 10, Network(width=0.02, dropout=0.1, leaky=True))
    assert onward.default_cuts(model) == tuple(f"block{k}" for k in range(1, 8))
    kinds = [[type(layer).__name__ for layer in block] for block in model]
    assert kinds[2] == ["Dropout", "MaxPool2d", "Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert kinds[6] == ["Dropout", "MaxPool2d", "Flatten", "Linear", "BatchNorm1d", "LeakyReLU"]
    assert kinds[7] == ["Dropout", "Linear"]
    kinds = [[type(layer).__name__ for layer in block] for block in build("lenet", (1, 32, 32), 10, Network())[:-1]]
    assert kinds[1:] == [["MaxPool2d", "Conv2d", "ReLU"], ["MaxPool2d", "Flatten", "Linear", "ReLU"], ["Linear", "ReLU"]]
    shapes, x = [], torch.zeros(1, 3, 32, 32)
    for block in build("resnet20", (3, 32, 32), 10, Network())[:-1].eval():
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 2
    assert len(onward.default_cuts(build("resnet56", (3, 8, 8), 10, Network(width=0.1)))) == 26


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_head_and_of_derivative_fits(name: str) -> None:
    shape = (3, 32, 32) if name == "lenet" else (3, 16, 16)
    x, y = torch.rand(4, *shape), torch.tensor([0, 1, 2, 1])
    network = Network(width=0.05)
    for kind in (None, *(kind for kind in HEADS if name != "lenet" or kind != "cnn")):
        if name == "vgg8b" and kind == "cnn":
            continue  # a block is flat
        if name in ("vgg11b", "resnet56") and kind:
            continue  # as vgg8b and resnet20
        config = Train(algorithm="local", network=network, heads=Heads(kind=kind))
        estimator = algorithms.build(build(name, shape, 3, network), config, x)
        estimator.check = False
        estimator.estimate(x, y)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in estimator.parameters())
    if name not in ("vgg11b", "resnet56"):
        onward.FDFA(build(name, shape, 3, network)).estimate(x, y)  # compares forward mode with the backward pass first


@pytest.mark.parametrize(("name", "least"), [("vgg8b", 16), ("vgg11b", 16), ("lenet", 16), ("resnet20", 1)])
def test_the_smallest_images(name: str, least: int) -> None:
    assert build(name, (2, least, least), 5, Network(width=0.02))(torch.rand(3, 2, least, least)).shape == (3, 5)
    if least > 1:
        with pytest.raises(UsageError, match=f"{name} on 15x20 images: it needs 16x16, enlarge them with --transform.size 32"):
            build(name, (2, 15, 20), 5, Network())


def test_dropout_is_a_share() -> None:
    with pytest.raises(UsageError, match=r"--network.dropout 1.0: use a number from 0 to below 1"):
        build("mlp", (1, 4, 4), 10, Network(dropout=1.0))
    model = build("mlp", (1, 4, 4), 10, Network(layers=2, dropout=0.5, leaky=True))
    assert [type(layer).__name__ for layer in model.modules() if not isinstance(layer, nn.Sequential)] == [
        "Flatten", "Linear", "BatchNorm1d", "LeakyReLU", "Dropout", "Linear", "BatchNorm1d", "LeakyReLU", "Dropout", "Linear",
    ]  # fmt: skip


def test_transforms_refuse_what_is_no_length() -> None:
    for name in ("padding", "cutout"):
        with pytest.raises(UsageError, match=f"--transform.{name} -1: use at least 0"):
            Transform(**{name: -1})
