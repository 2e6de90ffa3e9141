"""The algorithms by name: each makes an estimator of a network from a configuration."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import onward
from onward.errors import UsageError, unknown
from onward.estimators.base import Loss
from onward.lab import models
from onward.lab.blocks import scaled
from onward.lab.config import Train

HEAD_WIDTH = {"cnn": 32, "mlp": 1024}
"""Of a network of 8 blocks; half of it beyond. Other heads have no width."""
WITH_HEADS = {"local", "above", "sum", "ntk", "fixed-ntk"}
"""Targets and guesses that are gradients of heads' losses."""


def bp(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """Backpropagation, the baseline."""
    if config.low_memory:
        raise UsageError("--low-memory: bp has no such form, use --backprop.checkpoint, which keeps no activations")
    return onward.Backprop(model, checkpoint=config.backprop.checkpoint, seed=config.seed)


def local(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """Local losses: every hidden block learns from the exact gradient of its own head (Belilovsky et al. 2019)."""
    if config.low_memory:
        raise UsageError("--low-memory: local has no such form, it never runs the network twice: leave it out")
    return onward.LocalLoss(model, heads=make_heads(model, config, x), seed=config.seed)


def dfa(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """Direct feedback alignment: random fixed feedback (Nokland 2016)."""
    return onward.DFA(model, low_memory=config.low_memory, seed=config.seed)


def dkp(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """Direct Kolen-Pollack: feedback that follows the output layer's updates (Webster, Choi, Ahn)."""
    return onward.DKP(model, low_memory=config.low_memory, seed=config.seed)


def fdfa(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """Forward direct feedback alignment: feedback learned in forward mode (Bacho & Chu 2024)."""
    return onward.FDFA(model, directions=config.feedback.directions, low_memory=config.low_memory, seed=config.seed)


def fg(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """Forward gradients: guesses scaled by a measured derivative (Baydin et al. 2022, Ren et al., Fournier et al. 2023)."""
    if config.low_memory:
        raise UsageError("--low-memory: fg has no such form, its forward engine always keeps one block at a time: leave it out")
    asked = config.forward_gradient
    heads = make_heads(model, config, x) if {asked.target, asked.guess} & WITH_HEADS else None
    return onward.ForwardGradient(model, heads=heads, seed=config.seed, **dataclasses.asdict(asked))


ALGORITHMS: dict[str, Callable[[nn.Module, Train, Tensor], onward.Estimator]] = {
    "bp": bp,
    "local": local,
    "dfa": dfa,
    "dkp": dkp,
    "fdfa": fdfa,
    "fg": fg,
}


def check(name: str) -> None:
    """Raise a UsageError if there is no algorithm of that name."""
    if name not in ALGORITHMS:
        raise unknown("algorithm", name, ALGORITHMS)


def build(model: nn.Module, config: Train, x: Tensor) -> onward.Estimator:
    """The estimator that `config.algorithm` names, of `model`, whose inputs look like the batch `x`.

    Heads are drawn from the global generator.

    Raises:
        UsageError: an unknown algorithm, or an option that it does not have.
    """
    check(config.algorithm)
    return ALGORITHMS[config.algorithm](model, config, x)


def make_heads(model: nn.Module, config: Train, x: Tensor) -> dict[str, nn.Module]:
    """A head for each hidden block, as `config.heads` says.

    Raises:
        UsageError: a kind that does not fit a block's output.
    """
    shared = models.HEADS_BEHIND.get(config.model, {})
    cuts = onward.default_cuts(model)
    ends = [shared.get(cut, cut) for cut in cuts]
    flat = any(isinstance(layer, nn.Flatten) for end in ends for layer in model.get_submodule(end).modules())
    kind = config.heads.kind or ("mlp" if flat else "cnn")
    width = config.heads.width
    if width is None and kind in HEAD_WIDTH:
        width = HEAD_WIDTH[kind] if len(cuts) <= 8 else HEAD_WIDTH[kind] // 2
    made = onward.make_heads(model, x, kind, cuts=ends, width=width and scaled(width, config.network.width))
    if config.model in models.INITIALIZE:
        for head in made.values():
            models.INITIALIZE[config.model](head)
    return {
        cut: made[end] if end == cut else _behind(copy.deepcopy(model.get_submodule(end)), made[end])
        for cut, end in zip(cuts, ends, strict=True)
    }


def _behind(block: nn.Module, head: nn.Module) -> nn.Module:
    """A head that starts with a block, and has a loss of its own only if the head behind the block does."""
    return (_OwnLoss if hasattr(head, "local_loss") else nn.Sequential)(block, head)


class _OwnLoss(nn.Sequential):
    def local_loss(self, h: Tensor, y: Any, loss: Loss) -> tuple[Tensor, Tensor]:
        block, head = self
        return head.local_loss(block(h), y, loss)
