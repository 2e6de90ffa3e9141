"""Two algorithms of your own, each a rule for the error signals of hidden blocks. docs/write-an-algorithm.md explains them.

onward train --algorithm examples/own_rule.py:OneBit:quiet=0.1 --model mlp --data digits
onward compare --algorithms bp dfa examples/own_rule.py:OneBit --model mlp --data digits --lr 1e-3
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

import onward


class OneBit(onward.DFA):
    """Direct feedback that sends one bit for each output: ``delta_k = s sign(e) B_k``, s a sample's mean absolute error.

    Settings:
        quiet: errors smaller than this part of a sample's largest one are not sent.
    """

    engine = "feedback, one bit"

    def __init__(
        self,
        model: nn.Module,
        cuts: Any = None,
        *,
        quiet: Annotated[float, onward.AtLeast(0)] = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(model, cuts, **options)
        self.quiet = quiet

    def signal(self, k: int, h: Tensor, known: onward.Known) -> Tensor:
        size = known.e.abs()
        sent = size >= self.quiet * size.amax(1, keepdim=True)
        return self.feedback.carry(k, h, size.mean(1, keepdim=True) * known.e.sign() * sent, known)


class Perturbed(onward.SignalEstimator):
    """Activity perturbation: ``delta_k = <e, ydot> u_k``, ydot the output's tangent along random directions u of all blocks.

    Settings:
        directions: how many directions are averaged.
    """

    engine = "forward, all blocks in one tangent"

    def __init__(
        self,
        model: nn.Module,
        cuts: Any = None,
        *,
        directions: Annotated[int, onward.AtLeast(1)] = 1,
        **options: Any,
    ) -> None:
        super().__init__(model, cuts, **options)
        self.directions = directions

    def signal(self, k: int, h: Tensor, known: onward.Known) -> Tensor:
        delta = torch.zeros_like(h)
        for ydot, u in zip(known.tangents, known.directions(k, h), strict=True):
            slope = (known.e * ydot).sum(1) / self.directions
            delta += slope.view(-1, *[1] * (h.dim() - 1)) * u
        return delta
