"""The step of PyTorch's optimizers as operations in a graph, on the state that the optimizers keep themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from onward.estimators.base import Estimator

Update = Callable[[Mapping[str, Any], Tensor, Tensor, dict[str, Tensor], Tensor], None]
"""Of a group's settings, a parameter, its gradient, its state and the learning rate: moves parameter and state in place."""
NOT_WATCHED = ("params", "lr", "initial_lr", "foreach", "fused", "capturable")
"""Settings of a group that may change, or make no difference to the numbers."""


class Updates:
    """The optimizers' step within a graph: learning rates and state are its inputs, and state moves in place.

    So ``state_dict`` holds what it would hold, and schedules take effect. ``refused`` says what hinders, if anything does.
    """

    def __init__(self, optimizers: Sequence[Optimizer], estimator: Estimator) -> None:
        self.optimizers = optimizers
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.moved = {p for group in self.groups for p in group["params"]}
        self.rates = [torch.zeros((), dtype=torch.float64) for _ in self.groups]
        self.refused = _hindrance(optimizers, estimator)
        self.held = self._held()
        self.settings = self._settings()
        self.states = [(state, list(state)) for optimizer in optimizers for state in optimizer.state.values()]

    def _held(self) -> list[Any]:
        """The objects that are watched: groups, their parameters, the state of each."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        parts = (groups, chain.from_iterable(group["params"] for group in groups), states)
        return [*chain.from_iterable(parts), *chain.from_iterable(state.values() for state in states)]

    def _settings(self) -> list[dict[str, Any]]:
        return [{name: value for name, value in group.items() if name not in NOT_WATCHED} for group in self.groups]

    def same(self) -> bool:
        """Whether groups, settings and the tensors of the state are what they were."""
        held = self._held()
        same = len(held) == len(self.held) and all(map(is_, held, self.held)) and self._settings() == self.settings
        return same and not any(map(_hooked, self.optimizers))

    def inputs(self) -> list[Tensor]:
        """The state of every parameter, and the learning rate of every group."""
        for rate, group in zip(self.rates, self.groups, strict=True):
            rate.fill_(group["lr"])
        return [*chain.from_iterable(_tensors(state) for state, _ in self.states), *self.rates]

    @torch.no_grad()
    def follow(self, mine: Mapping[Tensor, Tensor], inputs: Sequence[Tensor]) -> None:
        """Within the traced function: let the parameters that stand for the network's follow their gradients."""
        given = iter(inputs)
        states = {}
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                states[p] = {name: next(given) for name, value in state.items() if isinstance(value, Tensor)}
        rates = list(given)
        for optimizer in self.optimizers:
            update = UPDATES[type(optimizer)]
            for group in optimizer.param_groups:
                rate = rates[next(i for i, known in enumerate(self.groups) if known is group)]
                for p in group["params"]:
                    if p in mine and (gradient := mine[p].grad) is not None:
                        update(group, mine[p], -gradient if group["maximize"] else gradient, states.get(p, {}), rate)

    def applied(self) -> None:
        """After a step of the graph: schedules want to see that their optimizer has made one."""
        for optimizer in self.optimizers:
            if "_opt_called" in vars(optimizer) or hasattr(optimizer.step, "_wrapped_by_lr_sched"):
                optimizer._opt_called = True  # type: ignore[attr-defined]


def _tensors(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def _hooked(optimizer: Optimizer) -> bool:
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def _hindrance(optimizers: Sequence[Optimizer], estimator: Estimator) -> str | None:
    """Why the step of these optimizers cannot be part of a graph, if so."""
    known = set(estimator.parameters())
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if type(optimizer) not in UPDATES:
            return f"{name} is none of {', '.join(kind.__name__ for kind in UPDATES)}"
        if _hooked(optimizer):
            return f"{name} has hooks, which a graph would not run"
        for group in optimizer.param_groups:
            numbers = (*group.get("betas", ()), group["weight_decay"])
            if group.get("differentiable") or any(isinstance(number, Tensor) for number in numbers):
                return f"settings of {name} are tensors, or it is differentiable"
            for p in group["params"]:
                if p not in known and p.grad is not None:
                    return f"{name} has a parameter of shape {tuple(p.shape)} that is not the estimator's"
                if p.is_complex():
                    return f"{name} has a complex parameter of shape {tuple(p.shape)}"
    return None


def _sgd(group: Mapping[str, Any], p: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: Tensor) -> None:
    """``torch.optim.SGD``: with momentum m, ``v = m v + (1 - dampening) g`` and ``p -= lr v``."""
    if group["weight_decay"]:
        gradient = gradient.add(p, alpha=group["weight_decay"])
    if group["momentum"]:
        moving = state["momentum_buffer"]
        moving.mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
        gradient = gradient.add(moving, alpha=group["momentum"]) if group["nesterov"] else moving
    p.sub_(gradient * lr)


def _adam(group: Mapping[str, Any], p: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: Tensor) -> None:
    """``torch.optim.Adam`` and ``AdamW``: of averages m of g and v of g², ``p -= lr m' / (sqrt(v') + eps)``.

    m' and v' are m / (1 - b1^t) and v / (1 - b2^t).
    """
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    b1, b2 = group["betas"]
    decay = group["weight_decay"]
    if decay and group["decoupled_weight_decay"]:
        p.mul_(1 - lr * decay)
    elif decay:
        gradient = gradient.add(p, alpha=decay)
    state["step"].add_(1)
    t = state["step"].double()
    mean.lerp_(gradient, 1 - b1)
    square.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
    if group["amsgrad"]:
        square = state["max_exp_avg_sq"].copy_(torch.maximum(state["max_exp_avg_sq"], square))
    spread = (square.sqrt() / (1 - b2**t).sqrt()).add_(group["eps"])
    p.sub_(mean / spread * (lr / (1 - b1**t)))


UPDATES: dict[type[Optimizer], Update] = {SGD: _sgd, Adam: _adam, AdamW: _adam}
"""The optimizers whose step can be part of a graph; a child class may do anything else, so types have to be these."""
