from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import onward
from onward.errors import UsageError
from onward.lab.networks import models
from onward.lab.networks.models import FACTS, MODELS, build, check, parse_shape
from onward.lab.settings import Network


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


@pytest.mark.parametrize(("name", "least"), [("mlp", 1), ("cnn", 10), ("alexnet", 63), ("resnet18-16b", 1)])
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
        (
            "resnet18-16b",
            (1, 28, 28),
            Network(downsample="avg-pool"),
            "--network.downsample avg-pool: resnet18-16b has no such",
        ),
        ("small-net", (1, 28, 28), Network(downsample="max-pool"), "unknown downsampling 'max-pool': did you mean 'avg-pool'"),
        ("mlp", (1, 28, 28), Network(layers=0), "mlp with 0 hidden layers: use at least 1"),
        ("mlp", (1, 28, 28), Network(width=0), "--network.width 0: use a positive number"),
    ],
)
def test_refusals(name: str, shape: tuple[int, ...], options: Network, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(name, shape, 10, options)


def test_every_model_is_described() -> None:
    assert all(builder.__doc__ for builder in MODELS.values())


@pytest.mark.parametrize("shape", [(10,), (3,), (4, 5), (2, 3, 4, 5)])
def test_mlp_takes_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    model = build("mlp", shape, 1, Network(width=0.01))
    assert model.block1[1].weight.shape == (8, math.prod(shape))
    assert model(torch.rand(3, *shape)).shape == (3, 1)


def test_networks_for_images_take_nothing_else() -> None:
    for name, entry in FACTS.items():
        for shape in [(10,), {"image": (1, 8, 8)}] if entry.images else []:
            with pytest.raises(
                UsageError, match=f"{name} for inputs of shape .*: it is for images, three sizes such as 3,32,32"
            ):
                build(name, shape, 10, Network())
    for shape in ((), {"x": (10,)}):
        with pytest.raises(UsageError, match=r"mlp for inputs of shape .*: it is for tensors with a row of numbers"):
            build("mlp", shape, 10, Network())


def test_a_network_is_one_file(tmp_path: Path) -> None:
    package = Path(str(models.__file__)).parent
    shutil.copytree(package.parents[1], tmp_path / "onward", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "onward/lab/networks/perceptron.py").write_text(
        "from torch import nn\nfrom onward.lab.networks.blocks import chain, network\n"
        '@network("perceptron", images=False)\n'
        'def perceptron(shape, classes):\n    """No hidden layer but one."""\n'
        "    return chain([nn.Sequential(nn.Flatten(), nn.Linear(shape[0], 8), nn.Tanh())], nn.Linear(8, classes))\n"
    )
    told = subprocess.run([sys.executable, "-m", "onward", "list"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.search(r"^  perceptron +No hidden layer but one$", told.stdout, re.MULTILINE)


# ---- ResNet-18 and its relatives


def sizes(model: nn.Module, *shape: int) -> list[tuple[int, ...]]:
    """The shapes of one sample at the blocks' outputs."""
    found, x = [], torch.zeros(2, *shape, device=next(model.parameters()).device)
    for block in model:
        x = block(x)
        found.append(tuple(x.shape[1:]))
    return found


def convolutions(block: nn.Module) -> list[tuple[int, int]]:
    """Kernel sides and strides."""
    return [(m.kernel_size[0], m.stride[0]) for m in block.modules() if isinstance(m, nn.Conv2d)]


def test_resnet18_8b_is_resnet18_with_a_norm_before_its_pool() -> None:
    with torch.device("meta"):
        model = build("resnet18-8b", (3, 32, 32), 10, Network())
    assert onward.default_cuts(model) == tuple(f"block{k}" for k in range(1, 8))
    stages = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert sizes(model, 3, 32, 32) == [*[shape for shape in stages for _ in range(2)][:-1], (10,)]
    # torchvision's resnet18 with 10 outputs and a 3x3 stem has 11,173,962 parameters; 2 x 512 are the last head's batch norm
    assert sum(p.numel() for p in model.parameters()) == 11_173_962 + 1024
    assert convolutions(model.block1) == [(3, 1)] * 3
    assert convolutions(model.block2) == [(3, 1)] * 2
    assert convolutions(model.block3) == [(3, 2), (3, 1), (1, 2)]
    names = ["block8", "norm", "pool", "flatten", "linear"]
    assert [name for name, _ in model.output.named_children()] == names


def test_a_residual_block_adds_its_input() -> None:
    model = build("resnet18-8b", (3, 8, 8), 10, Network(width=0.1)).eval()
    (block,) = model.block2
    x = torch.randn(2, 6, 8, 8)
    for parameter in block.body.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(block(x), x.relu())
    assert len(block.shortcut) == 0


def test_shortcuts_may_pool() -> None:
    model = build("resnet18-8b", (3, 32, 32), 10, Network(width=0.1, downsample="avg-pool"))
    (block,) = model.block3
    assert [type(layer).__name__ for layer in block.shortcut] == ["AvgPool2d", "Conv2d", "BatchNorm2d"]
    assert convolutions(block) == [(3, 2), (3, 1), (1, 1)]
    assert sizes(model, 3, 32, 32)[2][1:] == (16, 16)


def test_resnet18_16b_has_no_skip_connections() -> None:
    with torch.device("meta"):
        model = build("resnet18-16b", (3, 32, 32), 10, Network())
    assert onward.default_cuts(model) == tuple(f"block{k}" for k in range(1, 16))
    stages = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert sizes(model, 3, 32, 32) == [*[shape for shape in stages for _ in range(4)][:-1], (10,)]
    assert [convolutions(block) for block in model] == [
        [(3, 2 if number in (5, 9, 13) else 1)] * (2 if number == 1 else 1) for number in range(1, 17)
    ]
    assert all(kinds(block) == ["Conv2d", "BatchNorm2d", "ReLU"] for block in list(model)[1:-1])


def test_resnet18_2b_is_the_first_half() -> None:
    with torch.device("meta"):
        half, whole = (build(name, (3, 32, 32), 10, Network()) for name in ("resnet18-2b", "resnet18-8b"))
    assert onward.default_cuts(half) == ("block1",)
    assert sizes(half, 3, 32, 32) == [(64, 32, 32), (10,)]
    assert convolutions(half.block1) + convolutions(half.output) == [
        pair for block in list(whole)[:4] for pair in convolutions(block)
    ]
    assert [type(block).__name__ for block in half.output.block2] == ["Residual"] * 2


def test_small_net_keeps_the_size_unless_it_pools() -> None:
    model = build("small-net", (1, 12, 12), 10, Network(width=0.1))
    assert onward.default_cuts(model) == tuple(f"block{k}" for k in range(1, 6))
    assert sizes(model, 1, 12, 12) == [(6, 12, 12)] * 2 + [(13, 12, 12)] * 2 + [(26, 12, 12), (10,)]
    pooling = build("small-net", (1, 12, 12), 10, Network(width=0.1, downsample="avg-pool"))
    assert sizes(pooling, 1, 12, 12) == [(6, 12, 12)] * 2 + [(13, 6, 6)] * 2 + [(26, 3, 3), (10,)]
    with torch.device("meta"):
        whole = build("small-net", (3, 32, 32), 10, Network())
    assert [block[0].out_channels for block in [*list(whole)[:-1], whole.output.block6]] == [64, 64, 128, 128, 256, 256]


@pytest.mark.parametrize("name", ["resnet18-8b", "resnet18-2b", "resnet18-16b"])
def test_images_above_32_pixels_are_reduced_in_the_stem(name: str) -> None:
    with torch.device("meta"):
        model = build(name, (3, 224, 224), 10, Network())
        assert sizes(model, 3, 224, 224)[0] == (64, 56, 56)
        assert kinds(model.block1)[:4] == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]
        second = [] if name == "resnet18-16b" else [(3, 1)]  # whose first block is the stem alone then
        assert convolutions(model.block1)[:2] == [(7, 2), *second]
        assert convolutions(build(name, (3, 33, 20), 10, Network()).block1)[0] == (7, 2)
        assert convolutions(build(name, (3, 32, 32), 10, Network()).block1)[0] == (3, 1)


@pytest.mark.parametrize("downsample", ["conv", "avg-pool"])
@pytest.mark.parametrize("name", ["resnet18-8b", "resnet18-2b", "small-net"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 9), (5, 33, 35)])
def test_any_shape_of_image(name: str, downsample: str, shape: tuple[int, ...]) -> None:
    model = build(name, shape, 3, Network(width=0.01, downsample=downsample))
    assert model(torch.rand(3, *shape)).shape == (3, 3)


@pytest.mark.parametrize("name", ["resnet18-8b", "resnet18-16b", "resnet18-2b", "small-net"])
def test_the_papers_initial_weights(name: str) -> None:
    model = build(name, (3, 32, 32), 10, Network(width=0.5))
    assert (model.output.linear.bias == 0.01).all()
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            bound = (6 / layer.weight[0].numel()) ** 0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is None
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()


def test_a_chain_is_of_equal_blocks() -> None:
    model = build("chain", (3, 8, 8), 10, Network(layers=4, width=0.5))
    assert onward.default_cuts(model) == ("block1", "block2", "block3", "block4")
    assert sizes(model, 3, 8, 8) == [(8, 8, 8)] * 4 + [(10,)]


OWN = """\
import torch
from torch import Tensor, nn
from sibling import SIZE

def make_model(shape, classes):
    assert shape == (1, SIZE, SIZE) and isinstance(classes, int)
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, classes))

def fixed():
    return make_model((1, SIZE, SIZE), 3)

def deep(classes, layers=5, **options):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), *[nn.Linear(5, 5) for _ in range(layers)], nn.Linear(5, classes))

def wide(shape, classes, width):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, int(8 * width)), nn.Linear(int(8 * width), classes))

def broken():
    return 1 / 0

def list_of_layers():
    return [make_model((1, 4, 4), 3)]

def for_other_images():
    return nn.Linear(7, 3)

class Fails(nn.Module):
    def forward(self, x):
        return x.no_such_thing

class Flat(nn.Linear):
    def __init__(self, outputs):
        super().__init__(16, outputs)
    def forward(self, x):
        return super().forward(x.flatten(1)).flatten()

class Words(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(9, 3), nn.Linear(3 * shape["words"][0] + shape["age"][0], classes)
    def forward(self, words, age):
        return self.linear(torch.cat([self.embedding(words).flatten(1), age], 1))
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "sibling.py").write_text("SIZE = 4\n")
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


@pytest.mark.parametrize("function", ["make_model", "fixed", "deep", "wide"])
def test_a_network_of_ones_own(own: str, function: str) -> None:
    torch.manual_seed(0)
    model = build(f"{own}:{function}", (1, 4, 4), 3, Network())
    after = torch.rand(1)
    assert model(torch.zeros(2, 1, 4, 4)).shape == (2, 3)
    assert all(norm.num_batches_tracked == 1 for norm in model if isinstance(norm, nn.BatchNorm1d))  # by the line above
    torch.manual_seed(0)
    build(f"{own}:{function}", (1, 4, 4), 3, Network())
    assert torch.equal(after, torch.rand(1))
    assert onward.default_cuts(nn.Sequential(model, nn.Linear(3, 3))) == ("0",)


def test_a_network_of_ones_own_may_return_its_only_output_flat(own: str) -> None:
    assert build(f"{own}:Flat", (1, 4, 4), 1, Network())(torch.zeros(2, 1, 4, 4)).shape == (2,)
    with pytest.raises(
        UsageError, match=r"own.py:Flat returned a tensor of shape \(6,\) for 2 inputs: return one of shape \(2, 3\)"
    ):
        build(f"{own}:Flat", (1, 4, 4), 3, Network())


def test_a_network_of_ones_own_is_tried_with_an_example(own: str) -> None:
    x = {"words": torch.ones(3, 5, dtype=torch.long), "age": torch.zeros(3, 2)}
    shape = {name: tuple(part.shape[1:]) for name, part in x.items()}
    assert build(f"{own}:Words", shape, 4, Network(), example=x)(**x).shape == (3, 4)
    said = r"own.py, line \d+ on a batch of shape {'words': \(3, 4\), 'age': \(3, 2\)}: RuntimeError: mat1 and mat2"
    with pytest.raises(UsageError, match=said):
        build(f"{own}:Words", shape, 4, Network(), example={**x, "words": x["words"][:, 1:]})


def test_a_network_of_ones_own_has_the_options_of_its_function(own: str) -> None:
    for layers in (2, 4):  # one of them is the command's default, none the function's
        assert len(build(f"{own}:deep", (1, 4, 4), 3, Network(layers=layers))) == 3 + layers
    assert build(f"{own}:wide", (1, 4, 4), 3, Network())[1].out_features == 8
    with pytest.raises(UsageError, match=r"--network.layers 4: .*own.py:fixed has no such option"):
        build(f"{own}:fixed", (1, 4, 4), 3, Network(layers=4))


@pytest.mark.parametrize(
    ("function", "classes", "message"),
    [
        ("mak_model", 3, r"unknown function of .*own.py 'mak_model': did you mean 'make_model'"),
        ("nn", 3, r"unknown function of .*own.py 'nn'"),
        ("broken", 3, r"own.py, line 19: ZeroDivisionError: division by zero$"),
        ("list_of_layers", 3, r"own.py:list_of_layers returned a list: return a torch.nn.Module"),
        ("for_other_images", 3, r"own.py on a batch of shape \(2, 1, 4, 4\): RuntimeError: mat1 and mat2 shapes"),
        ("Fails", 3, r"own.py, line 29 on a batch of shape \(2, 1, 4, 4\): AttributeError: 'Tensor' object has no attribute"),
        ("fixed", 5, r"own.py:fixed returned a tensor of shape \(2, 3\) for 2 inputs: return one of shape \(2, 5\)"),
    ],
)
def test_a_network_of_ones_own_that_fails(own: str, function: str, classes: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(f"{own}:{function}", (1, 4, 4), classes, Network())


def test_a_file_of_ones_own_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    with pytest.raises(UsageError, match=r"own.py:make_model: there is no file .*own.py: give path/to/file.py:function"):
        check(f"{path}:make_model")
    with pytest.raises(UsageError, match=r"say which function of the file makes the network, such as .*own.py:make_model"):
        check(str(path))
    path.write_text("x = 1\nraise KeyError('no weights')\n")
    with pytest.raises(UsageError, match=r"own.py, line 2: KeyError: 'no weights'$"):
        build(f"{path}:make_model", (1, 4, 4), 3, Network())
    path.write_text("x = 1\n\ndef make_model(:\n")
    with pytest.raises(UsageError, match=r"own.py, line 3: SyntaxError: invalid syntax$"):
        build(f"{path}:make_model", (1, 4, 4), 3, Network())


def test_a_path_from_here_has_its_lines_too(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(own).parent)
    with pytest.raises(UsageError, match=r"^own.py, line 19: ZeroDivisionError: division by zero$"):
        build("own.py:broken", (1, 4, 4), 3, Network())
    Path("unreadable.py").write_text("x = 1\n\ndef make_model(:\n")
    with pytest.raises(UsageError, match=r"^unreadable.py, line 3: SyntaxError: invalid syntax$"):
        build("unreadable.py:make_model", (1, 4, 4), 3, Network())


def test_shapes() -> None:
    assert parse_shape("3,32,32") == (3, 32, 32)
    for text in ("", "3x32", "3,0,32", "3,,2"):
        with pytest.raises(UsageError, match=f"--input {text}: give positive sizes"):
            parse_shape(text)


def test_local_mixer_by_its_formulas() -> None:
    """Patch by patch and group by group; the loss of pieces is one for each of them."""
    torch.manual_seed(0)
    model = build("local-mixer", (2, 8, 8), 3, Network(width=0.125, layers=2)).double()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)

    def norm(v: Tensor) -> Tensor:
        return (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()

    def grouped(layer: nn.Module, h: Tensor) -> Tensor:
        groups = [
            norm(layer.weight[2 * g : 2 * g + 2, :, 0] @ norm(h[2 * g : 2 * g + 2]) + layer.bias[2 * g : 2 * g + 2])
            for g in range(16)
        ]
        return torch.cat(groups)

    for n in range(2):
        cut = [x[n, :, 2 * a : 2 * a + 2, 2 * b : 2 * b + 2].permute(1, 2, 0).flatten() for a in range(4) for b in range(4)]
        first, second, out = model.block1, model.block2, model.output[2]
        h = []
        for patch in cut:
            inside = norm(first[1][1].weight @ norm(patch) + first[1][1].bias).relu()
            h.append(grouped(first[2].linear, inside).relu())
        torch.testing.assert_close(model.block1(x)[n], torch.stack(h))
        normed = torch.stack([norm(v) for v in h])
        over = torch.stack([norm(second.patches.weight @ column + second.patches.bias).relu() for column in normed.T], 1)
        dense = second.channels[1]
        after = [
            (v + grouped(second.groups.linear, norm(dense.weight @ norm(mixed) + dense.bias).relu())).relu()
            for v, mixed in zip(h, over, strict=True)
        ]
        torch.testing.assert_close(model(x)[n], out.weight @ norm(torch.stack(after).mean(0)) + out.bias)
    heads = onward.make_heads(model, x, "pieces", groups=16, patches=16)
    assert heads["block1"].parts(model.block1(x)).shape == (2, 256, 3)
    with pytest.raises(UsageError, match="sides have to be multiples of 4"):
        build("local-mixer", (1, 9, 8), 3, Network())
