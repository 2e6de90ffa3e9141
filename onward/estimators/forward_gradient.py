"""Forward gradients: a direction, scaled by the directional derivative that forward mode measures along it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward import directions as random_directions
from onward.errors import UsageError, unknown
from onward.estimators.base import Loss, Step, call
from onward.estimators.signals import OutputError, SignalEstimator
from onward.forward_mode import Tangents

SPACES = {
    "activation": "one direction per sample at the output of every hidden block",
    "avg-weight": "one direction per parameter, shared by the batch",
}
TARGETS = {"global": "the network's loss"}
GUESSES = {"random": "Gaussian or Rademacher noise"}


class ForwardGradient(SignalEstimator):
    """The gradient along random directions, measured by forward mode: no backward pass through the network.

    In ``space="activation"`` a direction u_k is added at every hidden block's output and, with ydot the tangent of the logits,

        delta_{k,n} = <e_n, ydot_n> u_{k,n},

    while the last block gets its exact gradient (Ren et al., "Scaling Forward Gradient with Local Losses", 2023, eq. 3).
    It estimates each sample's own derivative: with batch statistics, what a sample does to the losses of others is left out.

    In ``space="avg-weight"`` one direction v for all parameters is shared by the batch, ``grad = <G, v> v`` (Baydin et al.,
    "Gradients without Backpropagation", 2022). Nothing needs a cut, no graph exists at any time.

    Both are unbiased; their variance grows with the number of dimensions d (E|est - G|^2 = (d + 1)|G|^2 for one Gaussian
    direction, (d - 1)|G|^2 for one Rademacher direction). ``directions=m`` averages m of them in one pass.

    Raises :class:`onward.UsageError` for an unknown target, guess, space or noise.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = ForwardGradient(model, space="avg-weight", directions=4)
    >>> step = estimator.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> model[0].weight.grad.shape
    torch.Size([8, 4])
    """

    engine = "forward"

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        loss: Loss = F.cross_entropy,
        target: str = "global",
        guess: str = "random",
        noise: str = "gaussian",
        space: str = "activation",
        directions: int = 1,
        low_memory: bool = False,
        seed: int = 0,
        allow_bypass: bool = False,
    ) -> None:
        for kind, name, known in (
            ("target", target, TARGETS),
            ("guess", guess, GUESSES),
            ("space", space, SPACES),
            ("noise", noise, random_directions.NOISES),
        ):
            if name not in known:
                raise unknown(kind, name, known)
        if directions < 1:
            raise UsageError(f"directions={directions}: a forward gradient needs at least 1")
        if space == "avg-weight" and cuts is None:
            cuts = ()
        super().__init__(model, cuts, loss=loss, low_memory=low_memory, seed=seed, allow_bypass=allow_bypass)
        self.space, self.noise, self.directions = space, noise, directions

    def signal(self, k: int, h: Tensor, error: OutputError) -> Tensor:
        delta = torch.zeros_like(h)
        for tangent, u in zip(error.tangents, error.directions(self, k, h), strict=True):
            slopes = (error.e * tangent).sum(1).view(-1, *[1] * (h.dim() - 1))
            delta.addcmul_(slopes.to(h.dtype), u, value=1 / self.directions)
        return delta

    def _estimate(self, x: Any, y: Any) -> Step:
        return self._shared_direction(x, y) if self.space == "avg-weight" else super()._estimate(x, y)

    def _shared_direction(self, x: Any, y: Any) -> Step:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        drawn = {name: [self._weight_direction(name, p, i) for i in range(self.directions)] for name, p in trained.items()}
        with torch.no_grad(), Tangents(self.directions) as tangents:
            for name, p in trained.items():
                tangents.set(p, *drawn[name])
            logits = call(self.model, x)
            moved = [tangents.get(logits, i) for i in range(self.directions)]
        if any(t is None for t in moved):
            raise UsageError(
                "no tangent reached the network's output from any parameter: part of the network is invisible to forward mode "
                "(.detach(), NumPy, a custom operation), or nothing in it requires a gradient"
            )
        loss, e = self._output_error(logits, y)
        slopes = [float((e * t).sum()) if t is not None else 0.0 for t in moved]
        for name, p in trained.items():
            for slope, v in zip(slopes, drawn.pop(name), strict=True):
                # The direction itself becomes the gradient: no memory beyond the model's own.
                v.mul_(slope / self.directions)
                p.grad = v if p.grad is None else p.grad.add_(v)
        return Step(loss, logits)

    def _weight_direction(self, name: str, p: Tensor, index: int) -> Tensor:
        return random_directions.draw(
            p.shape,
            seed=self.seed,
            step=self.step,
            block=name,
            direction=index,
            noise=self.noise,
            dtype=p.dtype,
            device=p.device,
        )
