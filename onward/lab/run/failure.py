"""Training that cannot go on, and what is to blame for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import onward
from onward.lab.data.inputs import Inputs, leaves
from onward.network.replay import frozen_statistics
from onward.network.run import call


class TrainingFailed(RuntimeError):
    """Training cannot go on: a loss or a gradient is no longer a finite number, or a step refuses its batch."""


def check_finite(estimator: onward.Estimator, loss: Tensor, x: Inputs, where: str) -> None:
    """Raise a TrainingFailed unless the loss and every gradient are finite."""
    if not math.isfinite(loss.item()):
        raise TrainingFailed(f"the training loss is {loss.item()} at {where} ({culprit(estimator, x)})")
    for estimate in estimator.kept or ():
        if not all(math.isfinite(weight) for weights in estimate.weights.values() for weight in weights):
            raise TrainingFailed(f"the derivative along a random direction is not finite at {where}")
    gradients = [p.grad for p in estimator.parameters() if p.grad is not None]
    if not nn.utils.get_total_norm(gradients).isfinite():
        for name, p in estimator.named_parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                raise TrainingFailed(f"the gradient of {name.removeprefix('model.')} is not finite at {where}")


def culprit(estimator: onward.Estimator, x: Inputs) -> str:
    """The first thing that is not finite: the input, a parameter, the output of a module, a statistic."""
    model = estimator.model
    inputs = [(f"the input {name}".rstrip(), tensor) for name, tensor in leaves(x).items()]
    outputs = () if torch.distributed.is_initialized() else _outputs(model, x)  # the others may not run it again
    for name, tensor in itertools.chain(inputs, model.named_parameters(), outputs, model.named_buffers()):
        if not tensor.isfinite().all():
            return f"{name} is not finite"
    return "the network's parameters are finite, its loss is not"


def _outputs(model: nn.Module, x: Inputs) -> Iterator[tuple[str, Tensor]]:
    """What each module of the network makes of a batch, from the first to the last that returns."""
    found: list[tuple[str, Tensor]] = []

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append((f"the output of {name}" if name else "the network's output", output))

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: note(name, output))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad(), frozen_statistics(model):
            call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    yield from found
