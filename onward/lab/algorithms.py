"""The algorithms by name: each makes an estimator of a network from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import onward
from onward.errors import UsageError, unknown
from onward.lab.config import Train


def bp(model: nn.Module, config: Train) -> onward.Estimator:
    """Backpropagation, the baseline."""
    if config.low_memory:
        raise UsageError("--low-memory: bp has no such form, use --backprop.checkpoint, which keeps no activations")
    return onward.Backprop(model, checkpoint=config.backprop.checkpoint, seed=config.seed)


def dfa(model: nn.Module, config: Train) -> onward.Estimator:
    """Direct feedback alignment: random fixed feedback (Nokland 2016)."""
    return onward.DFA(model, low_memory=config.low_memory, seed=config.seed)


def dkp(model: nn.Module, config: Train) -> onward.Estimator:
    """Direct Kolen-Pollack: feedback that follows the output layer's updates (Webster, Choi, Ahn)."""
    return onward.DKP(model, low_memory=config.low_memory, seed=config.seed)


def fdfa(model: nn.Module, config: Train) -> onward.Estimator:
    """Forward direct feedback alignment: feedback learned in forward mode (Bacho & Chu 2024)."""
    return onward.FDFA(model, directions=config.feedback.directions, low_memory=config.low_memory, seed=config.seed)


def fg(model: nn.Module, config: Train) -> onward.Estimator:
    """Forward gradient along random directions, of activations (Ren et al. 2023) or weights (Baydin et al. 2022)."""
    options: dict[str, Any] = vars(config.forward_gradient)
    return onward.ForwardGradient(model, **options, low_memory=config.low_memory, seed=config.seed)


ALGORITHMS: dict[str, Callable[[nn.Module, Train], onward.Estimator]] = {
    "bp": bp,
    "dfa": dfa,
    "dkp": dkp,
    "fdfa": fdfa,
    "fg": fg,
}


def check(name: str) -> None:
    """Raise a UsageError if there is no algorithm of that name."""
    if name not in ALGORITHMS:
        raise unknown("algorithm", name, ALGORITHMS)


def build(model: nn.Module, config: Train) -> onward.Estimator:
    """The estimator that `config.algorithm` names, of `model`.

    Raises:
        UsageError: an unknown algorithm, or an option that it does not have.
    """
    check(config.algorithm)
    return ALGORITHMS[config.algorithm](model, config)
