"""Feedback that positions share, on shards of a batch and in a pipeline: the numbers of one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from cases import DIRECT, normal
from together import together
from torch import Tensor, nn

import onward

SAMPLES, TOKENS, CLASSES = 6, 4, 5
CUTS = ("0", "1", "2")
KINDS = ("drtp", "grape")


class Mix(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, h: Tensor) -> Tensor:
        h = self.linear(h)
        return torch.tanh(h + 0.4 * h.cumsum(1))


def of_tokens(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def text(kind: str, **options: Any) -> onward.DirectFeedback:
    torch.manual_seed(0)
    model = nn.Sequential(Mix(3, 4), Mix(4, 6), Mix(6, 3), nn.Linear(3, CLASSES)).double()
    return DIRECT[kind](model, CUTS, loss=of_tokens, seed=3, check=False, **options)


def maps(kind: str) -> onward.DirectFeedback:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.Tanh()) for inputs, outputs in ((2, 3), (3, 4), (4, 3))
    ]
    model = nn.Sequential(*blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES))).double()
    return DIRECT[kind](model, CUTS, seed=3, check=False, positions="shared")


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, of which the last of each sample has no target; maps have the targets of the first."""
    torch.manual_seed(1)
    y = torch.randint(CLASSES, (SAMPLES, TOKENS))
    y[:, -1] = -100
    return normal(SAMPLES, TOKENS, 3), normal(SAMPLES, 2, 3, 3), y


def gradients(estimator: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in estimator.named_parameters() if p.grad is not None}


def two_steps(estimator: Any, step_of: Any, x: Any, y: Any) -> dict[str, Tensor]:
    for _ in range(2):
        step_of.estimate(x, y)
        with torch.no_grad():
            for p in estimator.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)
    return gradients(estimator)


def both(rank: int) -> dict[str, list[dict[str, Tensor]]]:
    tokens, pixels, y = batch()
    mine = slice(0, 4) if rank == 0 else slice(4, SAMPLES)
    found = {}
    for kind in KINDS:
        shard, low = (onward.distribute(text(kind, low_memory=low)) for low in (False, True))
        pooled = onward.distribute(maps(kind))
        found[kind] = [
            two_steps(shard, shard, tokens[mine], y[mine]),
            two_steps(low, low, tokens[mine], y[mine]),
            two_steps(pooled, pooled, pixels[mine], y[mine, 0]),
        ]
        for make, x, targets in ((text, tokens, y), (maps, pixels, y[:, 0])):
            estimator = make(kind)
            stage = onward.Stage(estimator, [2, 2], microbatches=2)
            # The targets of the last process say what the output's dimensions are.
            given = targets if rank == 1 or kind == "drtp" else None
            found[kind].append(two_steps(estimator, stage, x if rank == 0 else None, given))
            stage.flush()
    return found


def test_shards_and_stages_give_the_gradients_of_one_process() -> None:
    everyone = together(2, both)
    tokens, pixels, y = batch()
    for kind in KINDS:
        alone_text, alone_maps = text(kind), maps(kind)
        of_text = two_steps(alone_text, alone_text, tokens, y)
        of_maps = two_steps(alone_maps, alone_maps, pixels, y[:, 0])
        expected = [of_text, of_text, of_maps, of_text, of_maps]
        for rank, results in enumerate(everyone):
            for index, (found, whole) in enumerate(zip(results[kind], expected, strict=True)):
                assert index > 2 or found.keys() == whole.keys()
                assert found
                for name, value in found.items():
                    where = f"{kind} {index} in process {rank}: {name}"
                    torch.testing.assert_close(
                        value, whole[name], rtol=1e-9, atol=1e-12, msg=lambda m, where=where: f"{where} {m}"
                    )
