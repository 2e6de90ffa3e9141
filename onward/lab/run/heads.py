"""The heads that a run asks for: their kind and width, and what a network says about where its heads begin."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from functools import partial
from typing import Any

from torch import Tensor, nn

import onward
from onward.errors import UsageError
from onward.lab.networks import models
from onward.lab.networks.blocks import scaled
from onward.lab.settings import Train
from onward.network.cuts import check_names
from onward.network.heads import PredSim, default_width, local_loss
from onward.network.pieces import Pieces
from onward.network.run import Loss
from onward.network.shapes import outputs_at


def make_heads(model: nn.Module, config: Train, x: Any) -> dict[str, nn.Module]:
    """A head for each hidden block, as `config.heads` says.

    Raises:
        UsageError: a kind that does not fit a block's output.
    """
    shared = models.facts(config.model).heads_behind
    cuts = check_names(model, config.cuts or onward.default_cuts(model))
    ends = [shared.get(cut, cut) for cut in cuts]
    made = _drawn(model, config, x, config.heads.kind or _fitting(model, x, ends), ends)
    heads = {
        cut: made[end] if end == cut else _behind(copy.deepcopy(model.get_submodule(end)), made[end])
        for cut, end in zip(cuts, ends, strict=True)
    }
    if initialize := models.facts(config.model).initialize:
        for head in heads.values():
            vars(head)["reset_parameters"] = partial(initialize, head)  # so heads drawn afresh start in the same way
    return heads


def _fitting(model: nn.Module, x: Any, ends: list[str]) -> str:
    """The kind of head for these modules' outputs, if none is asked for."""
    outputs, _ = outputs_at(model, x, ends)
    return "cnn" if all(h.dim() == 4 for h in outputs) else "linear"


def _drawn(model: nn.Module, config: Train, x: Tensor, kind: str, ends: list[str]) -> dict[str, nn.Module]:
    """A head of that kind for the output of each of these modules, as wide as the configuration says, with the network's
    kind of initial weights."""
    width = default_width(kind, len(ends)) if config.heads.width is None else config.heads.width
    factor = 1.0 if models.facts(config.model).tokens else config.network.width
    try:
        sizes = {"depth": config.heads.depth, "groups": config.heads.groups, "patches": config.heads.patches}
        made = onward.make_heads(model, x, kind, cuts=ends, width=width and scaled(width, factor), **sizes)
    except UsageError as error:
        raise UsageError(re.sub(r"use kind=('mlp' or )?'linear'", "use --heads.kind linear", str(error))) from error
    if initialize := models.facts(config.model).initialize:
        for head in made.values():
            initialize(head)
    return made


def end_in_head(model: nn.Module, config: Train, x: Tensor) -> None:
    """Put a head of the chosen kind in the place of the network's classifier; of predsim, its own classifier."""
    last, kind = models.facts(config.model).ends_in_head, config.heads.kind
    assert last is not None
    assert kind is not None
    (head,) = _drawn(model, config, x, kind, [f"output.{last}"]).values()
    head = head.classify if isinstance(head, PredSim) else head
    model.output = nn.Sequential(OrderedDict({last: model.get_submodule(f"output.{last}"), "head": head}))


def _behind(block: nn.Module, head: nn.Module) -> nn.Module:
    """A head that starts with a block, and has a loss of its own only if the head behind the block does."""
    if isinstance(head, Pieces):
        raise UsageError("--heads.kind pieces: a head of this network starts with a copy of a block, take another kind")
    return (_OwnLoss if hasattr(head, "local_loss") else nn.Sequential)(block, head)


class _OwnLoss(nn.Sequential):
    def local_loss(self, h: Tensor, y: Any, loss: Loss) -> tuple[Tensor, Tensor]:
        block, head = self
        return local_loss(head, block(h), y, loss)
