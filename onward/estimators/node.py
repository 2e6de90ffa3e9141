"""Node perturbation: noise at the outputs of all blocks, and what it does to each sample's part of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from onward.derivatives.directions import NOISES
from onward.derivatives.graph import is_traced
from onward.errors import UsageError
from onward.estimators.base import Step
from onward.estimators.settings import AtLeast, OneOf
from onward.estimators.signals import Known, SignalEstimator
from onward.network.cuts import cut_graph
from onward.network.padding import padding, without_padding
from onward.network.replay import Replay
from onward.network.run import call, check_samples, compute_loss, leaves, replaced, samples_of, without_graph


class NodePerturbation(SignalEstimator, name="node"):
    """Node perturbation: ``delta_{k,n} = (L_n - L) / sigma u_{k,n}``, u_k random, mean over ``directions``.

    ``sigma u_k`` is added at the output of every hidden block in one pass; L_n is the loss of the clean pass's output, of which
    sample n's row is that of the noisy pass. The last block gets the exact gradient of the loss. Besides the pass that
    differentiates, a step takes a clean pass and one for each direction, without a graph. All draw the same dropout masks, and
    running statistics move once. The loss is computed once for each sample and direction. As sigma goes to 0 the estimate
    becomes that of ``ForwardGradient`` with random guesses in activation space, with the same directions.

    Widrow and Lehr, "30 Years of Adaptive Neural Networks", 1990 (Madaline rule III); Hiratani, Mehta, Lillicrap and Latham,
    "On the Stability and Scalability of Node Perturbation Learning", 2022.

    Raises :class:`onward.UsageError` for ``sigma`` that is not positive.

    Settings:
        sigma: the size of the noise.
        noise: what it is drawn from.
        directions: how many are averaged in each step; each takes a pass.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> step = NodePerturbation(model).estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> model[0].weight.grad.shape
    torch.Size([8, 4])
    """

    engine = "forward passes, noise at all blocks"
    in_one_piece = True

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        sigma: float = 1e-3,
        noise: Annotated[str, OneOf(NOISES)] = "gaussian",
        directions: Annotated[int, AtLeast(1)] = 1,
        **options: Any,
    ) -> None:
        super().__init__(model, cuts, **options)
        if not sigma > 0:
            raise UsageError(f"sigma={sigma}: use a positive number, the size of the noise")
        self.sigma, self.noise, self.count = sigma, noise, directions
        self._slopes: list[Tensor] = []

    def _estimate(self, x: Any, y: Any) -> Step:
        if is_traced():
            raise UsageError("it compares passes of the network with one another, which draw the same masks")
        again = Replay(self)
        clean = self._run(x, y, again, None)
        self._slopes = [self._changes(clean, self._run(x, y, again, i), x, y) for i in range(self.count)]
        try:
            with again:
                return super()._estimate(x, y)
        finally:
            self._slopes = []

    def _run(self, x: Any, y: Any, again: Replay, direction: int | None) -> Any:
        """The output of a pass with noise, or without."""

        def deliver(k: int, h: Tensor) -> Tensor:
            if direction is None:
                return h.detach()
            u = without_padding(self.direction(k, h, direction), padding(x, self.cuts[k], y))
            return h.detach() + self.sigma * u

        with again.frozen(), without_graph(self), cut_graph(self.model, self.cuts, deliver):
            return call(self.model, x)

    @torch.no_grad()
    def _changes(self, clean: Any, noisy: Any, x: Any, y: Any) -> Tensor:
        """What each sample's row of the noisy output does to the loss, over sigma (N)."""
        base = compute_loss(self.loss, clean, y)
        losses = []
        for n in range(samples_of(x)):
            parts = iter(leaves(noisy))

            def with_row(z: Tensor, n: int = n, parts: Iterator[Tensor] = parts) -> Tensor:
                return torch.cat([z[:n], next(parts)[n : n + 1], z[n + 1 :]])

            losses.append(compute_loss(self.loss, replaced(clean, with_row), y))
        return (torch.stack(losses) - base) / self.sigma

    def signal(self, k: int, h: Tensor, known: Known) -> Tensor:
        delta = torch.zeros_like(h)
        for i, slopes in enumerate(self._slopes):
            check_samples(self.cuts[k], h.shape, len(slopes), "node perturbation")
            u = without_padding(self.direction(k, h, i), known.real(k))
            delta += (slopes.to(h.dtype) / self.count).view(-1, *[1] * (h.dim() - 1)) * u
        return delta
