"""Networks, as chains of blocks; and networks of one's own, from a file.

Every network here is an `nn.Sequential` of named blocks, `block1` ... and `output`, so that the library's default cuts (every
child but the last) are the block boundaries that the papers use. Initial weights are PyTorch's own, but those of `resnets`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils import _device

from onward.errors import UsageError, unknown
from onward.lab.networks.blocks import Shape, chain, scaled
from onward.lab.networks.resnets import initialize, resnet18_2b, resnet18_8b, resnet18_16b, small_net
from onward.lab.settings import Network
from onward.lab.system import memory, surroundings
from onward.network.replay import frozen_statistics
from onward.parallel.shards import ProcessLost


class NetworkError(UsageError):
    """A network of one's own fails, in a line of its file or of one beside it."""


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
    if (own := _own(name)) is None:
        if name not in MODELS:
            raise unknown("model", name, MODELS)
    elif not own[0].is_file():
        raise UsageError(f"--model {name}: there is no file {own[0]}: give path/to/file.py:function")


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
    if own := _own(name):
        return _tried(name, own[0], partial(make, **arguments), shape, classes)
    if len(shape) != 3:
        raise UsageError(f"{name} for inputs of shape {tuple(shape)}: it is for images, three sizes such as 3,32,32")
    return make(**arguments)


def digest(name: str) -> str | None:
    """A hexadecimal number of what is in the file of a network of one's own; None of another network, or without the file."""
    own = _own(name)
    try:
        return hashlib.sha256(own[0].read_bytes()).hexdigest() if own else None
    except OSError:  # whoever builds it is told
        return None


def options_of(name: str) -> set[str]:
    """The fields of `Network` that this network takes.

    >>> sorted(options_of("mlp"))
    ['layers', 'width']
    """
    return {entry.name for entry in dataclasses.fields(Network)} & inspect.signature(_maker(name)).parameters.keys()


def _maker(name: str) -> Callable[..., nn.Module]:
    """The function that makes the network; a file of one's own is run for it."""
    own = _own(name)
    if own is None:
        return MODELS[name]
    path, function = own
    with _its_own_errors(path):
        module = _imported(path)
    make = getattr(module, function, None)
    if not callable(make):
        there = [
            n for n, found in vars(module).items() if callable(found) and getattr(found, "__module__", "") == module.__name__
        ]
        raise unknown(f"function of {path}", function, there)
    return make


def _own(name: str) -> tuple[Path, str] | None:
    """The file and the function in it of a network of one's own; None of another name."""
    path, _, function = name.rpartition(":")
    if name.endswith(".py"):
        raise UsageError(f"--model {name}: say which function of the file makes the network, such as {name}:make_model")
    return (Path(path), function) if path.endswith(".py") else None


def _tried(name: str, path: Path, make: Callable[[], nn.Module], shape: Shape, classes: int) -> nn.Module:
    """The network of one's own, once it has taken two inputs."""
    with _its_own_errors(path):
        model = make()
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model {name} returned a {type(model).__name__}: return a torch.nn.Module")
    x = torch.zeros(2, *shape)
    when = f" on a batch of shape {tuple(x.shape)}"
    with _its_own_errors(path, when), torch.no_grad(), torch.random.fork_rng([]), frozen_statistics(model):
        z = model(x)
    if not isinstance(z, Tensor) or z.shape != (2, classes):
        found = f"a tensor of shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
        raise UsageError(
            f"--model {name} returned {found} for 2 inputs: return one of shape (2, {classes}), a number per class"
        )
    return model


def _imported(path: Path) -> ModuleType:
    """The file as a module, run with its own folder on the import path, as `python file.py` does.

    It is run anew each time, so that generators of its own start as ever. What it registers with PyTorch may be there only
    once, however: where it fails the second time and has not changed, the first one is taken.
    """
    spec = importlib.util.spec_from_file_location(f"{path.stem} (--model)", path)
    module = importlib.util.module_from_spec(spec)
    source = path.read_bytes()
    before = sys.modules.get(spec.name)
    sys.modules[spec.name] = module
    _move_to(str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception:
        if getattr(before, "_source", None) != (path.resolve(), source):
            raise
        sys.modules[spec.name] = before
        return before
    module._source = path.resolve(), source
    return module


class _Place:
    """The folder of the file that was run last, and the modules beside it, which those beside another may be namesakes of."""

    folder: str | None = None
    added = False
    """Whether it was not on the import path before."""
    others: frozenset[str] = frozenset()
    """What had been imported before."""
    left: dict[str, dict[str, ModuleType]] = {}  # noqa: RUF012 (there is one place)
    """By folder, to be there again when a file of it is."""


def _move_to(folder: str) -> None:
    """Put a folder on the import path in place of the one before, and let what is imported from that one be imported anew."""
    if folder != _Place.folder:
        if _Place.folder is not None:
            beside = [name for name, module in sys.modules.items() if _is_beside(name, module)]
            _Place.left[_Place.folder] = {name: sys.modules.pop(name) for name in beside}
            if _Place.added and _Place.folder in sys.path:
                sys.path.remove(_Place.folder)
        _Place.others = frozenset(name.partition(".")[0] for name in sys.modules)
        sys.modules.update(_Place.left.pop(folder, {}))
        _Place.folder, _Place.added = folder, folder not in sys.path
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()


def _is_beside(name: str, module: ModuleType) -> bool:
    """Whether a module came from the folder that was run last."""
    top = name.partition(".")[0]
    if top in _Place.others or name.endswith("(--model)"):
        return False
    found = sys.modules.get(top, module)
    paths = [*getattr(found, "__path__", ())] or [getattr(found, "__file__", None)]
    return any(path and os.path.realpath(os.path.dirname(path)) == _Place.folder for path in paths)  # noqa: PTH120


def own_errors(name: str, when: str) -> AbstractContextManager[None]:
    """Tell an error in a network of one's own with its file and line; those of others pass, and those of other networks."""
    own = _own(name)
    return _its_own_errors(own[0], when, elsewhere=False) if own else nullcontext()


@contextmanager
def _its_own_errors(path: Path, when: str = "", *, elsewhere: bool = True) -> Iterator[None]:
    """Tell an error of the file, or of one beside it, with its line; one that has come about `elsewhere` too, unless that is
    off. What the file changes for the whole program is changed back."""
    try:
        with _undisturbed():
            yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [(frame.filename, frame.lineno) for frame in frames]
        if isinstance(error, SyntaxError) and error.filename:
            places.append((error.filename, error.lineno))
        home = path.resolve()
        lines = [(path, line) for file, line in places if Path(file).resolve() == home]
        beside = [(file, line) for file, line in places if Path(file).resolve().parent == home.parent]
        if not elsewhere and (not beside or isinstance(error, UsageError | ProcessLost) or memory.exhausted(error)):
            raise
        where = "{}, line {}".format(*(lines or beside)[-1]) if beside else str(path)
        said = error.msg if isinstance(error, SyntaxError) else str(error).partition("\n")[0]
        raise NetworkError(f"{where}{when}: {type(error).__name__}: {said}") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What the body does to the working folder, the standard streams, and PyTorch's default type and device, is undone."""
    try:
        folder = os.getcwd()  # noqa: PTH109 (at every step)
    except OSError:  # it is gone
        folder = None
    streams = sys.stdin, sys.stdout, sys.stderr
    dtype, device = torch.get_default_dtype(), _default_device()
    try:
        yield
    finally:
        if folder is not None:
            with suppress(OSError):
                os.chdir(folder)
        surroundings.mend(streams)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if _default_device() != device:
            torch.set_default_device(device)


def _default_device() -> torch.device | None:
    """The one that was set; None if none was."""
    return _device.CURRENT_DEVICE
