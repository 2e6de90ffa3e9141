"""The optimizers of a run, and their learning rate over time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

import onward
from onward.lab.settings import Schedule, Train

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": partial(torch.optim.Adam, fused=True), "sgd": torch.optim.SGD}
SCHEDULERS: dict[str, Callable[[Schedule, Optimizer, int], LRScheduler]] = {  # of a schedule, an optimizer, and all steps
    "exponential": lambda its, optimizer, _: lr_scheduler.ExponentialLR(optimizer, its.gamma or 0.95),
    "step": lambda its, optimizer, _: lr_scheduler.StepLR(optimizer, its.step_size, its.gamma or 0.2),
    "milestones": lambda its, optimizer, _: lr_scheduler.MultiStepLR(optimizer, its.milestones, its.gamma or 0.2),
    "plateau": lambda its, optimizer, _: ReduceLROnPlateau(optimizer, factor=its.gamma or 0.2, patience=its.patience),
    "onecycle": lambda _, optimizer, steps: lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps + 1, cycle_momentum=False
    ),
    "linear": lambda its, optimizer, steps: lr_scheduler.LambdaLR(
        optimizer, lambda step: its.start + (its.end - its.start) * step / steps
    ),
    "cosine": lambda _, optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps),
    "constant": lambda _, optimizer, __: lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
}
EACH_STEP = ("onecycle", "linear", "cosine")


class Rate:
    """The learning rate of every group of an optimizer, over `epochs` of `steps` steps each.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    >>> rate = Rate(Schedule("linear"), optimizer, epochs=1, steps=4)
    >>> for _ in range(3):
    ...     optimizer.step()
    ...     rate.after_step()
    >>> optimizer.param_groups[0]["lr"]
    0.25
    """

    def __init__(self, schedule: Schedule, optimizer: Optimizer, *, epochs: int, steps: int) -> None:
        self.scheduler = SCHEDULERS[schedule.name](schedule, optimizer, epochs * steps)
        self.each_step = schedule.name in EACH_STEP

    def after_step(self) -> None:
        """A step of the optimizer is done."""
        if self.each_step:
            self.scheduler.step()

    def after_epoch(self, train_loss: float) -> None:
        """An epoch is done."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(train_loss)
        elif not self.each_step:
            with warnings.catch_warnings():
                # A run that goes on behind the last step of an epoch ends the epoch before it makes a step.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self.scheduler.step()


def make_optimizers(config: Train, estimator: onward.Estimator) -> dict[str, Optimizer]:
    """One optimizer for the network and its heads, and one for feedback if the estimator has any. Each role has its own
    learning rate and weight decay; those of heads are the network's unless they are given."""
    network: dict[str, Any] = {"lr": config.lr, "weight_decay": config.optimizer.weight_decay}
    if config.optimizer.name == "lean":
        return {"network": onward.Lean(estimator, **network)}
    if config.optimizer.name == "sgd":
        network |= {"momentum": config.optimizer.momentum, "nesterov": config.optimizer.nesterov}
    own = {"lr": config.heads.lr, "weight_decay": config.heads.decay}
    groups = estimator.parameter_groups(
        network=network,
        heads=network | {name: value for name, value in own.items() if value is not None},
        feedback={"lr": config.feedback.lr, "weight_decay": config.feedback.decay},
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
