from __future__ import annotations

import pytest
import torch
from torch import nn

import onward
from onward.errors import UsageError
from onward.lab.config import Network
from onward.lab.models import MODELS, build


def kinds(block: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in block.children()]


def test_the_default_cuts_of_mlp_follow_each_relu() -> None:
    model = build("mlp", (1, 28, 28), 10, Network(layers=3))
    assert onward.default_cuts(model) == ("block1", "block2", "block3")
    assert kinds(model.block1) == ["Flatten", "Linear", "BatchNorm1d", "ReLU"]
    assert kinds(model.block2) == kinds(model.block3) == ["Linear", "BatchNorm1d", "ReLU"]
    assert [module.out_features for module in model.modules() if isinstance(module, nn.Linear)] == [800, 800, 800, 10]


def test_mlp_is_wider_on_colour_images() -> None:
    assert build("mlp", (3, 32, 32), 10, Network()).block1[1].weight.shape == (1000, 3072)


@pytest.mark.parametrize(("shape", "features"), [((3, 32, 32), 5760), ((1, 28, 28), 4000)])
def test_cnn_pools_after_the_second_cut(shape: tuple[int, ...], features: int) -> None:
    model = build("cnn", shape, 10, Network())
    assert onward.default_cuts(model) == ("block1", "block2", "block3")
    assert kinds(model.block2) == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds(model.block3) == ["MaxPool2d", "Flatten", "Linear", "BatchNorm1d", "ReLU"]
    assert model.block3[2].weight.shape == (128, features)


def test_cnn_may_pool_after_the_first_convolution_too() -> None:
    model = build("cnn", (1, 28, 28), 10, Network(pool_first=True))
    assert kinds(model.block1) == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds(model.block2)[:2] == ["MaxPool2d", "Conv2d"]
    assert model.block3[2].in_features == 40 * 4 * 4


def test_alexnet_has_the_papers_layers_and_boundaries() -> None:
    with torch.device("meta"):
        model = build("alexnet", (3, 224, 224), 100, Network())
        shapes = {}
        x = torch.empty(2, 3, 224, 224)
        for name, block in model.named_children():
            x = block(x)
            shapes[name] = tuple(x.shape[1:])
    assert shapes == {
        "block1": (64, 27, 27),
        "block2": (192, 13, 13),
        "block3": (384, 13, 13),
        "block4": (256, 13, 13),
        "block5": (9216,),
        "block6": (4096,),
        "block7": (4096,),
        "output": (100,),
    }
    assert [kinds(block)[-1] for block in list(model)[:-1]] == ["MaxPool2d"] * 2 + ["ReLU"] * 2 + ["Flatten"] + ["ReLU"] * 2
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())


@pytest.mark.parametrize(("name", "least"), [("mlp", 1), ("cnn", 10), ("alexnet", 63)])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_channels_classes_width_and_the_smallest_images(name: str, least: int, channels: int) -> None:
    model = build(name, (channels, least, least), 7, Network(width=0.02))
    assert model(torch.rand(3, channels, least, least)).shape == (3, 7)


def test_width_multiplies_every_hidden_layer() -> None:
    model = build("cnn", (1, 12, 12), 10, Network(width=2))
    assert [p.shape[0] for name, p in model.named_parameters() if name.endswith("0.weight")] == [30, 80]
    assert model.block3[2].out_features == 256


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("mpl", (1, 8, 8), Network(), "unknown model 'mpl': did you mean 'mlp'"),
        ("cnn", (1, 8, 8), Network(), "cnn on 8x8 images: it needs 10x10, enlarge them with --transform.size 28"),
        ("cnn", (1, 12, 12), Network(pool_first=True), "cnn on 12x12 images: it needs 16x16"),
        ("alexnet", (3, 32, 32), Network(), "alexnet on 32x32 images: it needs 63x63.*--transform.size 224"),
        ("cnn", (1, 28, 28), Network(layers=3), "--network.layers 3: cnn has no such option"),
        ("mlp", (1, 28, 28), Network(pool_first=True), "--network.pool-first True: mlp has no such option"),
        ("mlp", (1, 28, 28), Network(layers=0), "mlp with 0 hidden layers: use at least 1"),
        ("mlp", (1, 28, 28), Network(width=0), "--network.width 0: use a positive number"),
    ],
)
def test_refusals(name: str, shape: tuple[int, ...], options: Network, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(name, shape, 10, options)


def test_every_model_is_described() -> None:
    assert all(builder.__doc__ for builder in MODELS.values())
