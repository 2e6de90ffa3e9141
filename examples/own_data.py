"""Data of your own for the command: a function that returns training and test samples.

    onward train --data examples/own_data.py:make --model mlp --algorithm fdfa --lr 1e-3

Six numbers go in, and the network learns a formula of them from noisy values: a regression, since the targets are real
numbers. Whole numbers would be the classes of a classification.
"""

from __future__ import annotations

import torch
from torch import Tensor


def make() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(train, test), each a pair of inputs and targets with a row for each sample; a torch Dataset of pairs would do too.

    Before the command calls it, it seeds torch, so that these are the same samples every time.
    """
    return samples(4000), samples(1000)


def samples(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6)
    y = torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + x[:, 3]
    return x, y + 0.1 * torch.randn(count)
