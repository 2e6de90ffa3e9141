"""Networks by name: those in the files beside this one, and the user's own.

Every network here is an `nn.Sequential` of named blocks, `block1` ... and `output`, so that the library's default cuts (every
child but the last) are the block boundaries that the papers use. Initial weights are PyTorch's own, except in `resnets`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onward.errors import UsageError, unknown
from onward.lab.data.inputs import shape_of
from onward.lab.networks import hugging_face
from onward.lab.networks.blocks import FACTS, Facts, Shapes
from onward.lab.networks.blocks import MODELS as MODELS
from onward.lab.settings import Network
from onward.lab.system import own
from onward.network.replay import frozen_statistics
from onward.network.run import call, samples_of

HUGGING_FACE = "hf:"
"""Begins the name of a network of `transformers`: what follows is its name on the hub, or a folder."""
FACTS[HUGGING_FACE] = Facts(images=False, inputs=(64,), tokens=True, task="next-token")

for module in pkgutil.iter_modules([str(Path(__file__).parent)]):  # each names its networks
    importlib.import_module(f"{__package__}.{module.name}")


def check(name: str) -> None:
    """Raise a UsageError if there is no network of that name, or no file where it says."""
    if own.named("--model", name) is None and name not in MODELS and not name.startswith(HUGGING_FACE):
        raise unknown("model", name, [*MODELS, f"{HUGGING_FACE}NAME_OR_FOLDER", "path/to/file.py:function"])


def facts(name: str) -> Facts:
    """What the network of that name states about itself; of the user's own, what most have in common.

    >>> facts("alexnet").image_size
    224
    """
    return FACTS.get(HUGGING_FACE if name.startswith(HUGGING_FACE) else name, Facts())


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


def build(
    name: str,
    shape: Shapes,
    outputs: int,
    options: Network,
    example: Any = None,
    *,
    vocabulary: int | None = None,
    positions: Sequence[int] = (),
    padding: int | None = None,
) -> nn.Module:
    """The network of that name: one of `MODELS`, or `path/to/file.py:function`.

    The user's own network is called once, with the batch `example`, or with zeros of that shape if there is none. The
    `vocabulary` is how many tokens there are, where inputs are such; `positions` the sizes between samples and outputs, where
    there are outputs for each position; `padding` the token that fills up short rows.

    Raises:
        UsageError: an unknown name, an option that this network does not have, inputs that it does not take; or the user's
            file fails, or its network does not return `outputs` numbers for each input.

    >>> build("mlp", (1, 8, 8), 10, Network(layers=3)).output
    Linear(in_features=800, out_features=10, bias=True)
    """
    check(name)
    make = _maker(name)
    takes = inspect.signature(make).parameters
    for entry in dataclasses.fields(options):
        if entry.name not in takes and (value := getattr(options, entry.name)) != entry.default:
            raise UsageError(f"--network.{entry.name.replace('_', '-')} {value}: {name} has no such option, leave it out")
    if facts(name).tokens and isinstance(shape, Mapping) and "input_ids" in shape:
        shape = shape["input_ids"]
    sizes = shape if isinstance(shape, Mapping) else tuple(shape)
    known = {"shape": sizes, "classes": outputs, "outputs": outputs, **vars(options)}
    known |= {"vocabulary": vocabulary, "positions": tuple(positions), "padding": padding}
    made = partial(make, **{parameter: known[parameter] for parameter in takes if parameter in known})
    if theirs := own.named("--model", name):
        return _tried(theirs, made, torch.zeros(2, *shape) if example is None else example, (*positions, outputs))
    if name.startswith(HUGGING_FACE):
        return made()
    one, images = all(isinstance(size, int) for size in sizes), facts(name).images
    if not one or not sizes or (images and len(sizes) != 3):
        wanted = "images, three sizes such as 3,32,32" if images else "tensors with a row of numbers for each input"
        raise UsageError(f"{name} for inputs of shape {sizes}: it is for {wanted}")
    return made()


def options_of(name: str) -> set[str]:
    """The fields of `Network` that this network takes.

    >>> sorted(options_of("mlp"))
    ['dropout', 'layers', 'leaky', 'width']
    """
    return {entry.name for entry in dataclasses.fields(Network)} & inspect.signature(_maker(name)).parameters.keys()


def _maker(name: str) -> Callable[..., nn.Module]:
    """The function that makes the network; a file of the user's own is run for it."""
    if name.startswith(HUGGING_FACE):
        return partial(hugging_face.make, name.removeprefix(HUGGING_FACE))
    theirs = own.named("--model", name)
    return own.load(theirs) if theirs else MODELS[name]


def _tried(theirs: own.Own, make: Callable[[], nn.Module], x: Any, outputs: tuple[int, ...]) -> nn.Module:
    """The user's own network, once it has taken the batch `x`."""
    with own.errors(theirs, elsewhere=True):
        model = make()
    if not isinstance(model, nn.Module):
        raise UsageError(f"{theirs} returned a {type(model).__name__}: return a torch.nn.Module")
    when = f" on a batch of shape {shape_of(x)}"
    with own.errors(theirs, when, elsewhere=True), torch.no_grad(), torch.random.fork_rng([]), frozen_statistics(model):
        z = call(model, x)
    count = samples_of(x)
    shape = tuple(z.shape) if isinstance(z, Tensor) else None
    if shape != (count, *outputs) and (shape, outputs) != ((count,), (1,)):
        found = f"a {type(z).__name__}" if shape is None else f"a tensor of shape {shape}"
        wanted = f"return one of shape {(count, *outputs)}, a row for each"
        raise UsageError(f"{theirs} returned {found} for {count} inputs: {wanted}")
    return model
