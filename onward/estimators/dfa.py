"""Direct feedback alignment: the matrices are random, and stay as they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onward.derivatives.directions import seed_of
from onward.estimators.feedback import DirectFeedback, Feedback


class RandomFeedback(Feedback):
    """B_k random and fixed, U(-sqrt(6/d_k), sqrt(6/d_k))."""

    learns = False

    def initial(self, k: int, matrix: Tensor) -> None:
        fill_at_random(matrix, self.seed, k)


def fill_at_random(matrix: Tensor, seed: int, k: int) -> None:
    """Draw B_k from U(-sqrt(6/d_k), sqrt(6/d_k))."""
    generator = torch.Generator(device=matrix.device).manual_seed(seed_of(seed, "feedback", k))
    bound = math.sqrt(6 / matrix.shape[1])
    matrix.uniform_(-bound, bound, generator=generator)


class DFA(DirectFeedback, name="dfa"):
    """Direct feedback alignment: ``delta_k = e B_k`` with B_k random and fixed, U(-sqrt(6/d_k), sqrt(6/d_k)).

    Nokland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", 2016.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = DFA(model)
    >>> step = estimator.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> estimator.feedback[0].shape, model[0].weight.grad.shape
    (torch.Size([2, 8]), torch.Size([8, 4]))
    """

    matrices = RandomFeedback
