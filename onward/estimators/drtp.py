"""Direct random target projection: the targets themselves, times a matrix, are the error signals."""

from __future__ import annotations

from torch import Tensor

from onward.estimators.dfa import RandomFeedback
from onward.estimators.feedback import DirectFeedback
from onward.estimators.signals import Known


class DRTP(DirectFeedback, name="drtp"):
    """Direct random target projection: ``delta_k = -(1/N) y B_k``, y one-hot (N x C), B_k random and fixed as in ``DFA``.

    The signal of a hidden block depends on no later block and on no error: it says where the right class is, always equally
    loud. Targets that are real numbers are taken as they are. Frenkel, Lefebvre and Bol, "Learning Without Feedback: Fixed
    Random Learning Signals Allow for Feedforward Training of Deep Neural Networks", 2021.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> step = DRTP(model).estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> model[0].weight.grad.shape
    torch.Size([8, 4])
    """

    engine = "targets"
    matrices = RandomFeedback

    def signal(self, k: int, h: Tensor, known: Known) -> Tensor:
        return self.feedback.carry(k, h, known.one_hot).mul_(-known.share / len(h))
