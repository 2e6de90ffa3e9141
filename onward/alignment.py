"""How well an estimator's error signals point along the true gradient."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from onward.cuts import cut_graph, same_randomness
from onward.errors import UsageError
from onward.estimators.base import Estimator, call, compute_loss, device_of


def cosines(estimator: Estimator, x: Any, y: Any) -> dict[str, Tensor]:
    """At each cut, each sample's cosine between its error signal and the true gradient dL/dh_k, of shape (N,).

    The error signal is what block k differentiates itself with: delta_k, or, in spaces of parameters, the guess u_k. One step
    is taken on a copy: the estimator, its gradients, its running statistics and the generators stay as they are.

    Raises :class:`onward.UsageError` for an estimator that delivers no error signals.

    >>> import onward
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = cosines(onward.DFA(model), torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> found["1"].shape
    torch.Size([3])
    """
    if not estimator.cuts:
        raise UsageError(f"{type(estimator).__name__} has no cuts here, so it delivers no error signals to compare")
    learner = copy.deepcopy(estimator)
    signals: dict[int, Tensor] = {}
    learner.observe = lambda k, delta: signals.__setitem__(k, delta.detach())
    again = same_randomness(device_of(estimator.model))
    try:
        with again:
            learner.estimate(x, y)
        with again:
            true = true_signals(estimator, x, y)
    finally:
        with again:
            pass  # nothing has been drawn
    if len(signals) < len(estimator.cuts):
        raise UsageError(
            f"{type(estimator).__name__} delivers no error signal to {len(estimator.cuts) - len(signals)} of its "
            f"{len(estimator.cuts)} cuts: there is nothing to compare with the true gradient"
        )
    return {
        name: torch.nn.functional.cosine_similarity(signals[k].flatten(1), true[k].flatten(1))
        for k, name in enumerate(estimator.cuts)
    }


def true_signals(estimator: Estimator, x: Any, y: Any) -> list[Tensor]:
    """dL/dh_k at each cut, by backpropagation through a copy of the network."""
    model = copy.deepcopy(estimator.model)
    outputs: list[Tensor] = []

    def keep(k: int, h: Tensor) -> Tensor:
        outputs.append(h)
        return h.clone()  # what follows may overwrite it

    with torch.enable_grad(), cut_graph(model, estimator.cuts, keep):
        loss = compute_loss(estimator.loss, call(model, x), y)
    return list(torch.autograd.grad(loss, outputs))
