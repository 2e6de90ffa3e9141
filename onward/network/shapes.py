"""The shapes of what a network's modules return, from one pass that changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onward.network.cuts import cut_graph
from onward.network.replay import Replay, understudy
from onward.network.run import batch_statistics, call


def outputs_at(model: nn.Module, x: Any, cuts: Sequence[str]) -> tuple[list[Tensor], Any]:
    """The outputs of the cuts, as tensors without memory (on the ``meta`` device), and the network's output for a batch.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [h.shape for h in outputs_at(model, torch.zeros(3, 4), ["1"])[0]]
    [torch.Size([3, 8])]
    """
    outputs: list[Tensor] = []

    def note(k: int, h: Tensor) -> Tensor:
        outputs.append(h.to("meta"))
        return h

    tried = understudy(model)
    with Replay(tried).untouched(), torch.no_grad(), batch_statistics(tried), cut_graph(tried, cuts, note):
        output = call(tried, x)
    return outputs, output
