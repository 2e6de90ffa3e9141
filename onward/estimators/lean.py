"""Lean estimates: numbers times directions that are drawn again, followed in place. No gradient is ever stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from onward.derivatives.directions import shift
from onward.errors import UsageError
from onward.estimators.base import Estimator
from onward.network.gradients import accumulate, as_asked


class Along(NamedTuple):
    """An estimate of parameters' gradients, ``sum_i c_i v_i``, as its numbers: the directions v_i of a step are drawn again."""

    seed: int
    step: int
    noise: str
    weights: Mapping[str, Sequence[float]]
    """By a parameter's name, the c_i of its directions."""
    padding: Mapping[str, int]
    """By a parameter's name, the row that its directions leave out."""

    def add(self, tensor: Tensor, name: str, scale: float = 1.0) -> None:
        """Add the estimate of a parameter's gradient to a tensor of its shape, in place."""
        for i, weight in enumerate(self.weights[name]):
            shift(
                tensor,
                scale * weight,
                seed=self.seed,
                step=self.step,
                block=name,
                direction=i,
                noise=self.noise,
                without=self.padding.get(name),
            )


@torch.no_grad()
def deliver(estimator: Estimator, estimate: Along) -> None:
    """Add an estimate to ``.grad``, or leave it to :class:`Lean` as the numbers that it is."""
    if estimator.kept is not None:
        estimator.kept.append(estimate)
        return
    for name, p in estimator.model.named_parameters():
        if name in estimate.weights:
            gradient = torch.zeros_like(p)
            estimate.add(gradient, name)
            accumulate([p], [gradient])
    as_asked(estimator.model)


class Lean(Optimizer):
    """Gradient descent that stores no gradient: ``theta <- theta - lr (g + weight_decay theta)``, g drawn again piece by piece.

    It is for estimators whose estimate is a few numbers times random directions: ``SPSA``, and ``ForwardGradient`` with random
    guesses in ``space="avg-weight"`` without cuts. From then on their ``estimate`` keeps those numbers in the place of
    ``.grad``, so that a step needs the memory of inference (SPSA), or of inference with tangents. Several estimates before a
    step add up; ``zero_grad`` forgets them, and so does ``step``, once they are followed. Schedules, parameter groups and
    ``state_dict`` are those of any optimizer; it is plain SGD to them. What reads ``.grad`` (clipping, scaling) sees nothing.

    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, algorithm 1.

    Raises :class:`onward.UsageError` for an estimator of another kind.

    >>> import onward
    >>> from torch import nn
    >>> estimator = onward.SPSA(nn.Linear(4, 2))
    >>> optimizer = Lean(estimator, lr=0.01)
    >>> step = estimator.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> optimizer.step()
    >>> estimator.model.weight.grad is None
    True
    """

    def __init__(self, estimator: Estimator, lr: float, weight_decay: float = 0.0) -> None:
        if not estimator.can_be_lean:
            raise UsageError(
                f"{type(estimator).__name__} ({estimator.engine}) has gradients to store: the lean optimizer is for estimates "
                "that are numbers times random directions of parameters, which are those of SPSA, and of ForwardGradient with "
                "guess='random' and space='avg-weight', the engine forward, without cuts. Use another optimizer"
            )
        super().__init__(estimator.parameter_groups(), {"lr": lr, "weight_decay": weight_decay})
        estimator.kept = []
        self._estimator = estimator

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the estimates that no step has followed."""
        self._estimator.kept = []
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Follow the estimates since the last step, and forget them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        estimates, self._estimator.kept = self._estimator.kept or [], []
        names = {p: name for name, p in self._estimator.model.named_parameters()}
        for group in self.param_groups:
            rate = float(group["lr"])
            for p in group["params"]:
                mine = [estimate for estimate in estimates if names[p] in estimate.weights]
                if mine and group["weight_decay"]:
                    p.mul_(1 - rate * group["weight_decay"])
                for estimate in mine:
                    estimate.add(p, names[p], -rate)
        return loss
