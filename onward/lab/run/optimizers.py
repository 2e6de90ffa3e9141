"""The optimizers of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

import onward
from onward.lab.settings import Train

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": partial(torch.optim.Adam, fused=True), "sgd": torch.optim.SGD}


def make_optimizers(config: Train, estimator: onward.Estimator) -> dict[str, Optimizer]:
    """One optimizer for the network and its heads, and one for feedback if the estimator has any."""
    options = {"lr": config.lr, "weight_decay": config.optimizer.weight_decay}
    if config.optimizer.name == "sgd":
        options["momentum"] = config.optimizer.momentum
    groups = estimator.parameter_groups(
        network=options, heads=options, feedback={"lr": config.feedback.lr, "weight_decay": config.feedback.decay}
    )
    feedback = [group for group in groups if group["role"] == "feedback"]
    optimizers = {"network": OPTIMIZERS[config.optimizer.name]([group for group in groups if group["role"] != "feedback"])}
    if feedback:
        optimizers["feedback"] = OPTIMIZERS[config.feedback.optimizer](feedback)
    return optimizers


def check_shapes(optimizer: Optimizer) -> None:
    """Raise a ValueError if the averages that it keeps are of other parameters."""
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}")
