"""Networks, as chains of blocks; and networks of one's own, from a file.

Every network here is an `nn.Sequential` of named blocks, `block1` ... and `output`, so that the library's default cuts (every
child but the last) are the block boundaries that the papers use. Initial weights are PyTorch's own, but those of `resnets`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from onward.errors import UsageError, unknown
from onward.lab.networks.blocks import Shape, chain, scaled
from onward.lab.networks.resnets import initialize, resnet18_2b, resnet18_8b, resnet18_16b, small_net
from onward.lab.settings import Network
from onward.lab.system import own
from onward.lab.system.own import Own
from onward.network.replay import frozen_statistics


def mlp(shape: Shape, classes: int, *, width: float = 1.0, layers: int = 2) -> nn.Sequential:
    """Linear layers with batch norm and ReLU: 800 wide for grey images, 1000 for colour; cut after each ReLU.

    Source: Bacho & Chu 2024, the fully connected networks.

    >>> list(dict(mlp((1, 28, 28), 10).named_children()))
    ['block1', 'block2', 'output']
    """
    if layers < 1:
        raise UsageError(f"mlp with {layers} hidden layers: use at least 1")
    channels, height, wide = shape
    hidden = scaled(1000 if channels == 3 else 800, width)
    sizes = [channels * height * wide] + [hidden] * layers
    blocks = [nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()) for before, after in pairwise(sizes)]
    blocks[0].insert(0, nn.Flatten())
    return chain(blocks, nn.Linear(hidden, classes))


def cnn(shape: Shape, classes: int, *, width: float = 1.0, pool_first: bool = False) -> nn.Sequential:
    """Two 5x5 convolutions, a max-pool, one linear layer, each with batch norm and ReLU; cut after each ReLU.

    `pool_first` also pools after the first convolution: 15C5-P2-40C5-P2-128, as the FDFA paper's README writes it (its code
    does not).

    Source: Bacho & Chu 2024, the shallow convolutional network.

    >>> cnn((3, 32, 32), 10).block3[2].in_features
    5760
    """
    channels, *size = shape
    least = 16 if pool_first else 10
    if min(size) < least:
        raise UsageError(f"cnn on {size[0]}x{size[1]} images: it needs {least}x{least}, enlarge them with --transform.size 28")
    first, second, hidden = scaled(15, width), scaled(40, width), scaled(128, width)
    size = [edge - 4 for edge in size]
    if pool_first:
        size = [edge // 2 for edge in size]
    size = [(edge - 4) // 2 for edge in size]
    return chain(
        [
            nn.Sequential(nn.Conv2d(channels, first, 5), nn.BatchNorm2d(first), nn.ReLU()),
            nn.Sequential(*([nn.MaxPool2d(2)] * pool_first), nn.Conv2d(first, second, 5), nn.BatchNorm2d(second), nn.ReLU()),
            nn.Sequential(
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(second * size[0] * size[1], hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
            ),
        ],
        nn.Linear(hidden, classes),
    )


def alexnet(shape: Shape, classes: int, *, width: float = 1.0) -> nn.Sequential:
    """AlexNet with batch norm and without dropout, for 224x224 images.

    Convolutions 1 and 2 are cut after their pool, 3 and 4 after ReLU, 5 once flattened, the linear layers after ReLU.

    Source: Bacho & Chu 2024, the network for CIFAR-100.

    >>> len(alexnet((3, 224, 224), 100, width=0.1))
    8
    """
    channels, *size = shape
    if min(size) < 63:
        raise UsageError(f"alexnet on {size[0]}x{size[1]} images: it needs 63x63, enlarge them with --transform.size 224")
    a, b, c, d, e = (scaled(n, width) for n in (64, 192, 384, 256, 256))
    hidden = scaled(4096, width)

    def convolution(before: int, after: int, kernel: int, stride: int = 1, padding: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(before, after, kernel, stride, padding), nn.BatchNorm2d(after), nn.ReLU()]

    return chain(
        [
            nn.Sequential(*convolution(channels, a, 11, 4, 2), nn.MaxPool2d(3, 2)),
            nn.Sequential(*convolution(a, b, 5, padding=2), nn.MaxPool2d(3, 2)),
            nn.Sequential(*convolution(b, c, 3)),
            nn.Sequential(*convolution(c, d, 3)),
            nn.Sequential(*convolution(d, e, 3), nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(6), nn.Flatten()),
            nn.Sequential(nn.Linear(e * 36, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
            nn.Sequential(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
        ],
        nn.Linear(hidden, classes),
    )


def conv_chain(shape: Shape, classes: int, *, width: float = 1.0, layers: int = 2) -> nn.Sequential:
    """Equal blocks of a 3x3 convolution, batch norm and ReLU, 16 wide, then an average pool: for what depth costs.

    >>> list(dict(conv_chain((3, 8, 8), 10, layers=3).named_children()))
    ['block1', 'block2', 'block3', 'output']
    """
    if layers < 1:
        raise UsageError(f"chain of {layers} blocks: use at least 1")
    hidden = scaled(16, width)
    sizes = [shape[0]] + [hidden] * layers
    blocks = [
        nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())
        for before, after in pairwise(sizes)
    ]
    return chain(blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, classes)))


MODELS: dict[str, Callable[..., nn.Sequential]] = {
    "mlp": mlp,
    "cnn": cnn,
    "alexnet": alexnet,
    "resnet18-8b": resnet18_8b,
    "resnet18-16b": resnet18_16b,
    "resnet18-2b": resnet18_2b,
    "small-net": small_net,
    "chain": conv_chain,
}
IMAGE_SIZE = {"alexnet": 224}
"""Side that images are resized to for a network when nothing else is asked for."""
INITIALIZE = dict.fromkeys(("resnet18-8b", "resnet18-16b", "resnet18-2b", "small-net"), initialize)
"""How the heads of a network start, where not as PyTorch's modules do."""
HEADS_BEHIND = {"resnet18-2b": {"block1": "output.block2"}}
"""Of a network, cuts whose head starts with a copy of another block."""
ENDS_IN_HEAD = {"resnet18-2b": "block2"}
"""Of a network, the part of its output block behind which a kind of head, if one is chosen, takes the classifier's place."""


def check(name: str) -> None:
    """Raise a UsageError if there is no network of that name, or no file where it says."""
    if own.named("--model", name) is None and name not in MODELS:
        raise unknown("model", name, MODELS)


def parse_shape(text: str) -> tuple[int, ...]:
    """The shape of one input.

    >>> parse_shape("3,32,32")
    (3, 32, 32)
    """
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input {text}: give positive sizes with commas between them, such as 3,32,32")
    return shape


def build(name: str, shape: Shape, classes: int, options: Network) -> nn.Module:
    """The network of that name for inputs of `shape`, (C, H, W) of images; one of `MODELS`, or `path/to/file.py:function`.

    Raises:
        UsageError: an unknown name, an option that this network does not have, images too small for it; a file of one's own
            that fails, with its error and line, or whose network does not return one output for each class.

    >>> build("mlp", (1, 8, 8), 10, Network(layers=3)).output
    Linear(in_features=800, out_features=10, bias=True)
    """
    check(name)
    make = _maker(name)
    takes = inspect.signature(make).parameters
    for entry in dataclasses.fields(options):
        if entry.name not in takes and (value := getattr(options, entry.name)) != entry.default:
            raise UsageError(f"--network.{entry.name.replace('_', '-')} {value}: {name} has no such option, leave it out")
    known = {"shape": tuple(shape), "classes": classes, **vars(options)}
    arguments = {parameter: known[parameter] for parameter in takes if parameter in known}
    if theirs := own.named("--model", name):
        return _tried(theirs, partial(make, **arguments), shape, classes)
    if len(shape) != 3:
        raise UsageError(f"{name} for inputs of shape {tuple(shape)}: it is for images, three sizes such as 3,32,32")
    return make(**arguments)


def options_of(name: str) -> set[str]:
    """The fields of `Network` that this network takes.

    >>> sorted(options_of("mlp"))
    ['layers', 'width']
    """
    return {entry.name for entry in dataclasses.fields(Network)} & inspect.signature(_maker(name)).parameters.keys()


def _maker(name: str) -> Callable[..., nn.Module]:
    """The function that makes the network; a file of the user's own is run for it."""
    theirs = own.named("--model", name)
    return own.load(theirs) if theirs else MODELS[name]


def _tried(theirs: Own, make: Callable[[], nn.Module], shape: Shape, classes: int) -> nn.Module:
    """The user's own network, once it has taken two inputs."""
    with own.errors(theirs, elsewhere=True):
        model = make()
    if not isinstance(model, nn.Module):
        raise UsageError(f"{theirs} returned a {type(model).__name__}: return a torch.nn.Module")
    x = torch.zeros(2, *shape)
    when = f" on a batch of shape {tuple(x.shape)}"
    with own.errors(theirs, when, elsewhere=True), torch.no_grad(), torch.random.fork_rng([]), frozen_statistics(model):
        z = model(x)
    if not isinstance(z, Tensor) or z.shape != (2, classes):
        found = f"a tensor of shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
        raise UsageError(f"{theirs} returned {found} for 2 inputs: return one of shape (2, {classes}), a number per class")
    return model
