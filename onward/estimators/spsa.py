"""Simultaneous perturbation: the loss at weights moved a little along a random direction, and back. Forward passes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from onward.derivatives.directions import NOISES, shift
from onward.derivatives.graph import is_traced
from onward.errors import UsageError
from onward.estimators.base import Estimator, Step
from onward.estimators.lean import Along, deliver
from onward.estimators.settings import AtLeast, OneOf
from onward.network.cuts import check_names
from onward.network.embeddings import padding_rows_in, settle
from onward.network.replay import Replay, check_same_output, understudy
from onward.network.run import call, compute_number, detached, device_of, leaves, without_graph

SIDES = {
    "two": "(L(theta + eps v) - L(theta - eps v)) / (2 eps)",
    "one": "(L(theta + eps v) - L(theta)) / eps",
}
"""How the loss's change along a direction is measured."""


class SPSA(Estimator, name="spsa"):
    """SPSA, as MeZO has it: the loss's change along a random direction v of all weights, times v. Forward passes alone.

        c = (L(theta + eps v) - L(theta - eps v)) / (2 eps),    estimate c v,    mean over ``directions``

    Nothing is differentiated, so a network may compute anything, and the loss may be any number: an accuracy, a Python float, a
    score of decoded text. It is a mean over samples where several processes work together, which exchange that number alone.
    With ``onward.Lean`` as the optimizer nothing is stored either: v is drawn again, piece by piece, each time that the weights
    move along it, and a step has the peak memory of inference.

    The weights are moved in place and are back when ``estimate`` returns, or raises: up to rounding, which mostly cancels. All
    passes of a step draw the same dropout masks, and running statistics move once, in the last pass. ``loss`` is the mean over
    the passes (``sided="one"``: that of the weights as they are), ``output`` that of the last. In half precision a move by eps
    is lost on weights that are large beside it (bfloat16: above 256 eps): take a larger ``eps``. As eps goes to 0 the estimate
    becomes that of ``ForwardGradient(space="avg-weight")`` with the same direction.

    Spall, "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation", 1992; Malladi et
    al., "Fine-Tuning Language Models with Just Forward Passes" (MeZO), 2023, algorithm 1.

    Raises :class:`onward.UsageError` for ``eps`` that is not positive, and for parameters of complex numbers.

    Settings:
        eps: how far the weights are moved, in units of the direction.
        noise: what directions are drawn from.
        directions: how many are averaged in each step; each takes one or two passes.
        sided: two evaluations for each direction (the antithetic pairs of evolution strategies), or one, and one for all at
            the weights as they are.

    >>> import onward
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> def accuracy(output, y):
    ...     return (output.argmax(1) == y).float().mean().item()
    >>> step = SPSA(model, loss=accuracy).estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> model[0].weight.grad.shape
    torch.Size([8, 4])
    """

    sums_samples = False  # every process makes the same estimate of numbers that it has exchanged
    can_be_lean = True

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        loss: Callable[[Any, Any], Any] | None = None,
        eps: float = 1e-3,
        noise: Annotated[str, OneOf(NOISES)] = "gaussian",
        directions: Annotated[int, AtLeast(1)] = 1,
        sided: Annotated[str, OneOf(SIDES)] = "two",
        **options: Any,
    ) -> None:
        super().__init__(model, check_names(model, cuts or ())[:0], loss=loss, uncut=True, **options)
        if not eps > 0:
            raise UsageError(f"eps={eps}: use a positive number, by which the weights are moved")
        if odd := [name for name, p in model.named_parameters() if p.is_complex()]:
            raise UsageError(f"{odd[0]} is complex, and directions are real: use parameters of real numbers, or Backprop")
        self.eps, self.noise, self.directions, self.sided = eps, noise, directions, sided
        self.engine = f"forward passes alone, {sided}-sided"
        self._padding: dict[str, int] | None = None

    def look(self, x: Any, y: Any) -> None:
        """Two runs on the same weights have to give the same: else their difference would count as the loss's change."""
        model = understudy(self.model)
        settle(model, x)
        again = Replay(model)

        def run() -> list[Tensor]:
            with again.unseen(), without_graph(model):
                return [leaf.clone() for leaf in leaves(call(model, x, any_output=True))]

        check_same_output(run(), run(), "use Backprop")

    def _estimate(self, x: Any, y: Any) -> Step:
        if is_traced():
            raise UsageError("it moves the weights between passes, by directions that no trace holds")
        settle(self.model, x)
        again = Replay(self)
        if self._padding is None:
            with again.unseen(), without_graph(self.model):
                self._padding = padding_rows_in(self.model, lambda: call(self.model, x, any_output=True))
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not named:
            raise UsageError("no parameter of the network requires a gradient: unfreeze what is to be trained")
        output: Any = None

        def evaluated(last: bool) -> Tensor:
            """The loss of one pass; the last one moves running statistics."""
            nonlocal output
            output = None  # the memory of the pass before it
            with again if last else again.frozen(), without_graph(self.model):
                output = detached(call(self.model, x, any_output=True))
                return compute_number(self.loss, output, y).to(device_of(self.model))

        plus, minus = [], []
        for i in range(self.directions):
            with _Moved(self, named, i) as moved:
                moved.to(1)
                plus.append(evaluated(last=False))
                if self.sided == "two":
                    moved.to(-1)
                    minus.append(evaluated(last=i + 1 == self.directions))
        if self.sided == "one":
            minus = [evaluated(last=True)]
        above, below = torch.stack(plus), torch.stack(minus)
        slopes = (above - below) / (2 * self.eps if self.sided == "two" else self.eps)
        numbers = (self.shard.mean([slopes])[0] / self.directions).tolist()
        deliver(self, Along(self.seed, self.step, self.noise, dict.fromkeys(named, numbers), self._padding))
        loss = below.mean() if self.sided == "one" else (above.mean() + below.mean()) / 2
        return Step(loss, output)


class _Moved:
    """The parameters at ``theta + place eps v``; on leaving they are back at theta, whatever has happened."""

    def __init__(self, spsa: SPSA, named: Mapping[str, nn.Parameter], direction: int) -> None:
        self.spsa, self.named, self.direction = spsa, named, direction
        self.places = dict.fromkeys(named, 0)

    def to(self, place: int) -> None:
        """Move each parameter to a place, by one eps at a time: the way back then takes the roundings of the way there."""
        spsa = self.spsa
        for name, p in self.named.items():
            way = place - self.places[name]
            if way:
                shift(
                    p,
                    *[spsa.eps if way > 0 else -spsa.eps] * abs(way),
                    seed=spsa.seed,
                    step=spsa.step,
                    block=name,
                    direction=self.direction,
                    noise=spsa.noise,
                    without=(spsa._padding or {}).get(name),
                )
            self.places[name] = place

    def __enter__(self) -> _Moved:
        return self

    def __exit__(self, *failure: Any) -> None:
        self.to(0)
