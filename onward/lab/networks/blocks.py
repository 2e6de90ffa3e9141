"""What all networks are made with, and how a network gets its name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from onward.errors import UsageError

Shape = Sequence[int]
"""Of one input: (C, H, W) of an image."""
Shapes = Shape | Sequence[Shape] | Mapping[str, Shape]
"""Of one input that is a tensor, or of the tensors in it if it is a tuple or a dict."""
Make = Callable[..., nn.Sequential]
"""`make(shape, classes, **options)`: a network; the options are those fields of `settings.Network` that it names."""


@dataclass(frozen=True)
class Facts:
    """What the lab has to know about a network, beside the function that makes it."""

    images: bool = True
    """It takes nothing but images."""
    tokens: bool = False
    """It takes whole numbers, such as characters of a text, in place of real ones; its width is a number of features."""
    task: str = "classification"
    """What it is for if nothing else says it."""
    inputs: Shape = (3, 32, 32)
    """The shape of one input if neither data nor --input say it."""
    image_size: int | None = None
    """The side that images are resized to if --transform.size does not say it."""
    initialize: Callable[[nn.Module], None] | None = None
    """How the weights of heads are drawn; None leaves them as PyTorch's modules draw them."""
    heads_behind: Mapping[str, str] = field(default_factory=dict)
    """For some cuts another block, of which their head starts with a copy."""
    ends_in_head: str | None = None
    """A part of the output block: if a kind of head is chosen, such a head takes the place of what follows that part."""


MODELS: dict[str, Make] = {}
"""The function that makes each network, by name."""
FACTS: dict[str, Facts] = {}


def network(name: str, **facts: Any) -> Callable[[Make], Make]:
    """Name the network that the decorated function makes, and state those :class:`Facts` that are not the default.

    >>> @network("tiny", images=False)
    ... def tiny(shape: Shape, classes: int) -> nn.Sequential:
    ...     return chain([nn.Flatten()], nn.LazyLinear(classes))
    >>> MODELS.pop("tiny") is tiny, FACTS.pop("tiny").images
    (True, False)
    """

    def register(make: Make) -> Make:
        MODELS[name], FACTS[name] = make, Facts(**facts)
        return make

    return register


def scaled(channels: int, width: float) -> int:
    """That many channels times the width, at least one.

    >>> scaled(64, 0.25), scaled(3, 0.1)
    (16, 1)
    """
    if not 0 < width <= 1e4:
        raise UsageError(f"--network.width {width}: use a positive number, at most 10000")
    return max(1, round(channels * width))


def rectifier(leaky: bool) -> nn.Module:
    """ReLU, or one with a slope of 0.01 below zero."""
    return nn.LeakyReLU() if leaky else nn.ReLU()


def dropped(share: float) -> list[nn.Module]:
    """Dropout of that share, if there is any.

    >>> dropped(0.0), dropped(0.2)
    ([], [Dropout(p=0.2, inplace=False)])
    """
    if not 0 <= share < 1:
        raise UsageError(f"--network.dropout {share}: use a number from 0 to below 1")
    return [nn.Dropout(share)] if share else []


def chain(blocks: Sequence[nn.Module], output: nn.Module) -> nn.Sequential:
    """The network `block1`, `block2`, ..., `output`."""
    named = {f"block{number}": block for number, block in enumerate(blocks, start=1)}
    return nn.Sequential(OrderedDict(**named, output=output))
