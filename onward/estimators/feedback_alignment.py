"""Feedback alignment, layer by layer: the reverse sweep, with other weights to carry the error back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onward.derivatives.directions import draw
from onward.errors import UsageError
from onward.estimators.base import Estimator, Step
from onward.network.carriers import Carriers
from onward.network.cuts import check_names, cut_graph
from onward.network.replay import uncompiled
from onward.network.run import call, detached, leaves


class FeedbackAlignment(Estimator, name="fa"):
    """Feedback alignment: the reverse sweep, where each layer's error goes back through B instead of W; B random and fixed.

    A linear layer or convolution ``y = W x`` hands ``B^T dL/dy`` to what is before it, and its own gradient is formed as usual
    from the error that has arrived. B has the shape of W, and starts as N(0, s^2) with s the root mean square of W at the
    start (``1 / sqrt(fan_in)`` where W starts at zero). It is a global sweep: it keeps every graph, as ``Backprop`` does, and
    needs no cuts.

    A layer is a matrix product or a convolution with a parameter, wherever it is: in ``nn.Linear``, ``nn.Conv2d``,
    ``nn.MultiheadAttention``, recurrent layers, ``x @ self.weight``. Tied weights share one B, frozen ones have one too, and
    everything else (normalisation, elementwise scales, attention between activations) is differentiated as it is. Raises
    :class:`onward.UsageError` where a weight is computed before it is used (``weight_norm``, standardised weights), inside
    activation checkpointing, and in a function that hides the product.

    A child class says what is kept for each weight (:meth:`held`), and what B is (:meth:`carrier`). Lillicrap, Cownden, Tweed
    and Akerman, "Random synaptic feedback weights support error backpropagation for deep learning", 2016.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = FeedbackAlignment(model)
    >>> step = estimator.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> [b.shape for b in estimator.feedback], model[0].weight.grad.shape
    ([torch.Size([8, 4]), torch.Size([2, 8])], torch.Size([8, 4]))
    """

    engine = "reverse, through feedback weights"
    learns = False
    """Whether what is kept is trained with the network."""

    def __init__(self, model: nn.Module, cuts: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(model, check_names(model, cuts or ())[:0], uncut=True, **options)
        self.carriers = Carriers(model)
        parameters = dict(model.named_parameters())
        for name in self.carriers.names:
            if is_lazy(parameters[name]):
                raise UsageError(
                    f"{name} has no size yet, and what carries the error back through it is as large: run the network once on "
                    "a batch before"
                )
        with torch.no_grad():
            made = [self.held(name, parameters[name]) for name in self.carriers.names]
        self.feedback = nn.ParameterList(nn.Parameter(one, requires_grad=self.learns) for one in made)

    def held(self, name: str, weight: Tensor) -> Tensor:
        """What is kept for a weight, in the state too, from what the weight is at the start."""
        return self.initial(name, weight)

    def carrier(self, name: str, weight: Tensor, kept: Tensor) -> Tensor:
        """B, of the shape of the weight, in this step."""
        return kept

    def initial(self, name: str, weight: Tensor) -> Tensor:
        """N(0, s^2), s the scale of the weight: a function of the seed and the name."""
        drawn = draw(weight.shape, seed=self.seed, step=0, block=f"feedback {name}", dtype=weight.dtype, device=weight.device)
        return torch.empty_like(weight).copy_(drawn).mul_(scale(weight))

    def _estimate(self, x: Any, y: Any) -> Step:
        with uncompiled(), _unfused(self.model), self.separation() as check, cut_graph(self.model, (), _pass_on):
            output = call(self.model, x)
            check(0, *leaves(output))
        self.carriers.replace(self.model, leaves(output), self._drawn_carrier)
        loss = self.learn_last(output, y)
        self._learn()
        return Step(loss, detached(output))

    def _drawn_carrier(self, index: int, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return self.carrier(self.carriers.names[index], weight.detach(), self.feedback[index].detach())

    def _learn(self) -> None:
        """After the sweep: what is kept learns, where it does."""


def scale(weight: Tensor) -> Tensor:
    """The root mean square of a weight, or ``1 / sqrt(fan_in)`` where that is zero; a scalar.

    >>> scale(torch.tensor([[3.0, 4.0, 0.0, 0.0]])), scale(torch.zeros(2, 4))
    (tensor(2.5000), tensor(0.5000))
    """
    size = weight.square().mean().sqrt()
    return size.where(size > 0, size.new_tensor(max(1, weight[0].numel()) ** -0.5))


def _pass_on(k: int, h: Tensor) -> Tensor:
    return h


@contextmanager
def _unfused(model: nn.Module) -> Iterator[None]:
    """Within the block recurrent layers run as the products that they are made of, and not as one kernel that hides these."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    backends: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    before = [backend.enabled for backend in backends]
    for backend in backends:
        backend.enabled = False
    try:
        yield
    finally:
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled
