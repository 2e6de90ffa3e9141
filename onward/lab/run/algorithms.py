"""The algorithms by name: each makes an estimator of a network from a configuration."""

from __future__ import annotations

import copy
import dataclasses
import re
import types
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor, nn

import onward
from onward.errors import UsageError, unknown
from onward.estimators.base import Loss
from onward.estimators.forward_gradient.estimator import OF_HEADS
from onward.lab.networks import models
from onward.lab.networks.blocks import scaled
from onward.lab.settings import Train
from onward.network.cuts import check_names
from onward.network.heads import PredSim, default_width


def bp(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """Backpropagation, the baseline."""
    if config.low_memory:
        raise UsageError("--low-memory: bp has no such form, use --backprop.checkpoint, which keeps no activations")
    checkpoint = config.backprop.checkpoint
    return onward.Backprop(model, config.cuts if checkpoint else None, checkpoint=checkpoint, seed=config.seed)


def local(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """Local losses: every hidden block learns from the exact gradient of its own head (Belilovsky et al. 2019)."""
    if config.low_memory:
        raise UsageError("--low-memory: local has no such form, it never runs the network twice: leave it out")
    return onward.LocalLoss(model, config.cuts, heads=make_heads(model, config, x), seed=config.seed)


def dfa(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """Direct feedback alignment: random fixed feedback (Nokland 2016)."""
    return onward.DFA(model, config.cuts, low_memory=config.low_memory, seed=config.seed)


def dkp(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """Direct Kolen-Pollack: feedback that follows the output layer's updates (Webster, Choi, Ahn)."""
    return onward.DKP(model, config.cuts, low_memory=config.low_memory, seed=config.seed)


def fdfa(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """Forward direct feedback alignment: feedback learned in forward mode (Bacho & Chu 2024)."""
    directions = config.feedback.directions
    return onward.FDFA(model, config.cuts, directions=directions, low_memory=config.low_memory, seed=config.seed)


def fg(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """Forward gradients: guesses scaled by a measured derivative (Baydin et al. 2022, Ren et al., Fournier et al. 2023)."""
    if config.low_memory:
        raise UsageError("--low-memory: fg has no such form, its forward engine always keeps one block at a time: leave it out")
    asked = config.forward_gradient
    heads = make_heads(model, config, x) if {asked.target, asked.guess} & OF_HEADS else None
    return onward.ForwardGradient(model, config.cuts, heads=heads, seed=config.seed, **dataclasses.asdict(asked))


ALGORITHMS: dict[str, Callable[[nn.Module, Train, Tensor], onward.Estimator]] = {
    "bp": bp,
    "local": local,
    "dfa": dfa,
    "dkp": dkp,
    "fdfa": fdfa,
    "fg": fg,
}
SETTINGS: dict[str, tuple[str, ...]] = {
    "bp": ("backprop",),
    "local": ("heads",),
    "dfa": ("low_memory",),
    "dkp": ("feedback", "low_memory"),
    "fdfa": ("feedback", "low_memory"),
    "fg": ("forward_gradient", "heads", "feedback"),
}
"""The fields of a configuration that an algorithm reads; the first is its own."""


def check(name: str) -> None:
    """Raise a UsageError if there is no algorithm of that name."""
    if name not in ALGORITHMS:
        raise unknown("algorithm", name, ALGORITHMS)


def build(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """The estimator that `config.algorithm` names, of `model`, whose inputs look like the batch `x`.

    Heads are drawn from the global generator. A network that ends in the chosen kind of head is given it.

    Raises:
        UsageError: an unknown algorithm, or an option that it does not have; inputs that are not those of `config.input`.
    """
    check(config.algorithm)
    if config.input and models.parse_shape(config.input) != (shape := tuple(x.shape[1:])):
        raise UsageError(f"--input {config.input}: the inputs are {','.join(map(str, shape))}, leave it out")
    if config.heads.kind and models.facts(config.model).ends_in_head:
        _end_in_head(model, config, x)
    return ALGORITHMS[config.algorithm](model, config, x)


def variant(text: str, config: Train) -> Train:
    """The configuration of an algorithm as lists name it: `name`, or `name:setting=value,...`.

    A setting is named as on the command line, without the dashes (lr, low-memory, heads.kind); the owner of the algorithm's own
    settings may be left out (space instead of forward-gradient.space).

    Raises:
        UsageError: an unknown algorithm, or a setting or value that it does not have.

    >>> config = variant("fg:guess=local,space=weight,heads.kind=linear,lr=0.01", Train())
    >>> config.algorithm, config.forward_gradient.guess, config.heads.kind, config.lr
    ('fg', 'local', 'linear', 0.01)
    """
    name, colon, settings = text.partition(":")
    check(name)
    places = _places(name)
    changes: dict[str, dict[str, Any]] = {"": {"algorithm": name}}
    for entry in settings.split(",") if colon else ():
        key, equals, value = entry.partition("=")
        if not equals:
            raise UsageError(f"algorithm {text!r}: {entry!r} is no setting=value, write it as in fg:guess=local,space=weight")
        if (key := key.replace("-", "_")) not in places:
            raise unknown(f"setting of {name}", key, places)
        owner, setting, hint = places[key]
        if setting in changes.setdefault(owner, {}):
            raise UsageError(f"algorithm {text!r} sets {key} twice: leave one out")
        changes[owner][setting] = _parsed(f"{name}:{key}", value, hint)
    nested = {owner: dataclasses.replace(getattr(config, owner), **values) for owner, values in changes.items() if owner}
    return dataclasses.replace(config, **changes[""], **nested)


def folder_name(text: str) -> str:
    """What a variant, or a model, is called in the name of a folder.

    >>> folder_name("fg:guess=local,heads.kind=cnn"), folder_name("../nets/small.py:make_model")
    ('fg-guess=local-heads.kind=cnn', 'small.py-make_model')
    """
    return re.sub(r"[^\w.=+-]+", "-", text.replace("\\", "/").rpartition("/")[2])


def _places(name: str) -> dict[str, tuple[str, str, Any]]:
    """Where the settings of an algorithm are in a configuration: by name (owner, field, type)."""
    own, *_ = SETTINGS[name]
    hints = get_type_hints(Train)
    places = {"lr": ("", "lr", float)}
    for owner in SETTINGS[name]:
        if dataclasses.is_dataclass(hints[owner]):
            inner = get_type_hints(hints[owner])
            places |= {f"{owner}.{field}": (owner, field, hint) for field, hint in inner.items()}
        else:
            places[owner] = ("", owner, hints[owner])
    short = {key.removeprefix(f"{own}."): place for key, place in places.items()}
    return {**short, **places}


def _parsed(name: str, value: str, hint: Any) -> Any:
    """The value of a setting, of the type that it has."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise unknown(name, value, get_args(hint))
        return value
    if hint is bool:
        if value not in ("true", "false"):
            raise UsageError(f"{name}={value}: use true or false")
        return value == "true"
    try:
        return hint(value)
    except ValueError:
        raise UsageError(f"{name}={value}: this is no {'whole number' if hint is int else 'number'}") from None


def make_heads(model: nn.Module, config: Train, x: Tensor) -> dict[str, nn.Module]:
    """A head for each hidden block, as `config.heads` says.

    Raises:
        UsageError: a kind that does not fit a block's output.
    """
    shared = models.facts(config.model).heads_behind
    cuts = check_names(model, config.cuts or onward.default_cuts(model))
    ends = [shared.get(cut, cut) for cut in cuts]
    flat = any(isinstance(layer, nn.Flatten) for end in ends for layer in model.get_submodule(end).modules())
    made = _drawn(model, config, x, config.heads.kind or ("linear" if flat else "cnn"), ends)
    heads = {
        cut: made[end] if end == cut else _behind(copy.deepcopy(model.get_submodule(end)), made[end])
        for cut, end in zip(cuts, ends, strict=True)
    }
    if initialize := models.facts(config.model).initialize:
        for head in heads.values():
            head.reset_parameters = partial(initialize, head)  # so heads that are drawn afresh start in the same way
    return heads


def _drawn(model: nn.Module, config: Train, x: Tensor, kind: str, ends: list[str]) -> dict[str, nn.Module]:
    """A head of that kind for the output of each of these modules, as wide as the configuration says, with the network's
    kind of initial weights."""
    width = default_width(kind, len(ends)) if config.heads.width is None else config.heads.width
    made = onward.make_heads(model, x, kind, cuts=ends, width=width and scaled(width, config.network.width))
    if initialize := models.facts(config.model).initialize:
        for head in made.values():
            initialize(head)
    return made


def _end_in_head(model: nn.Module, config: Train, x: Tensor) -> None:
    """Put a head of the chosen kind in the place of the network's classifier; of predsim, its own classifier."""
    last = models.facts(config.model).ends_in_head
    (head,) = _drawn(model, config, x, config.heads.kind, [f"output.{last}"]).values()
    head = head.classify if isinstance(head, PredSim) else head
    model.output = nn.Sequential(OrderedDict({last: model.output.get_submodule(last), "head": head}))


def _behind(block: nn.Module, head: nn.Module) -> nn.Module:
    """A head that starts with a block, and has a loss of its own only if the head behind the block does."""
    return (_OwnLoss if hasattr(head, "local_loss") else nn.Sequential)(block, head)


class _OwnLoss(nn.Sequential):
    def local_loss(self, h: Tensor, y: Any, loss: Loss) -> tuple[Tensor, Tensor]:
        block, head = self
        return head.local_loss(block(h), y, loss)
