"""Local losses: every hidden block learns from a head of its own, and from nothing that comes after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from onward.derivatives.graph import backward
from onward.estimators.base import Estimator, Step
from onward.network.cuts import cut_graph
from onward.network.gradients import allocate_gradients, forget_unused
from onward.network.heads import Heads
from onward.network.padding import padding
from onward.network.run import call, detached, leaves


class LocalLoss(Estimator, name="local"):
    """Local losses, greedy layer by layer: ``delta_k = d l_k / d h_k``, with l_k the loss of the head at cut k.

    Every block and its head learn from l_k, the last block from the network's own loss. A block's graph is gone before the next
    block runs. ``heads`` maps each cut's name to its head, a module from h_k to the network's outputs
    (:func:`onward.make_heads` makes them); they are parameters of the role ``heads``.

    Belilovsky, Eickenberg and Oyallon, "Decoupled Greedy Learning of CNNs", 2020; Nokland and Eidnes, "Training Neural
    Networks with Local Error Signals", 2019.

    >>> import onward
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.randn(3, 4)
    >>> estimator = LocalLoss(model, heads=onward.make_heads(model, x, "linear"))
    >>> step = estimator.estimate(x, torch.tensor([0, 1, 1]))
    >>> model[0].weight.grad.shape, step.heads["1"][1].shape
    (torch.Size([8, 4]), torch.Size([3, 2]))
    """

    engine = "local"
    reads_rows = True

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        heads: Mapping[str, nn.Module],
        **options: Any,
    ) -> None:
        super().__init__(model, cuts, **options)
        self.heads = Heads(self.cuts, heads)

    @classmethod
    def needs_heads(cls, **settings: Any) -> bool:
        return True

    def _estimate(self, x: Any, y: Any) -> Step:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        fresh = allocate_gradients(self)

        def deliver(k: int, h: Tensor) -> Tensor:
            check(k, h)
            real = padding(x, self.cuts[k], y)
            signal, value, z = self.heads.differentiate(k, h, y, self.loss, self.mask_seed, self.step, learn=True, real=real)
            seen[self.cuts[k]] = value, z
            if h.requires_grad:
                backward(h, self.observed(k, signal))
            return h.detach()

        with self.separation() as check, cut_graph(self.model, self.cuts, deliver):
            output = call(self.model, x)
            check(len(self.cuts), *leaves(output))
        loss = self.learn_last(output, y)
        forget_unused(fresh)
        return Step(loss, detached(output), seen)

    def _roles(self) -> dict[str, list[nn.Parameter]]:
        return {**super()._roles(), "heads": list(self.heads.parameters())}
