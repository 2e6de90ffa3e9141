"""Direct random target projection: the targets themselves, times a matrix, are the error signals."""

from __future__ import annotations

from torch import Tensor

from onward.errors import UsageError
from onward.estimators.dfa import RandomFeedback
from onward.estimators.feedback import DirectFeedback
from onward.estimators.signals import Known


class DRTP(DirectFeedback, name="drtp"):
    """Direct random target projection: ``delta_k = -(1/N) y B_k``, y one-hot (N x C), B_k random and fixed as in ``DFA``.

    The signal of a hidden block depends on no later block and on no error: it says where the right class is, always equally
    loud. Where tokens share B_k (``positions``), y has a target for each, and 1/N is one by the number of those that the loss
    does not ignore. Targets that are real numbers are taken as they are. Frenkel, Lefebvre and Bol, "Learning Without
    Feedback: Fixed Random Learning Signals Allow for Feedforward Training of Deep Neural Networks", 2021.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> step = DRTP(model).estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> model[0].weight.grad.shape
    torch.Size([8, 4])
    """

    engine = "targets"
    matrices = RandomFeedback
    _aligned = False

    def signal(self, k: int, h: Tensor, known: Known) -> Tensor:
        delta = self.feedback.carry(k, h, known.one_hot, known)
        if not self.feedback.layout(k, h, known).tokens:
            return delta.mul_(-known.share / len(h))
        if not self._aligned:
            self._aligned = True
            _check_targets(known)
        return delta.mul_(-known.share).div_(known.counted.sum().clamp(min=1))


def _check_targets(known: Known) -> None:
    """Raise where a position of the outputs is compared with the target of another, as by a loss that shifts them."""
    y, real = known.targets.reshape(known.counted.shape[0], -1), known.real(None)
    if y.is_floating_point() or y.shape != known.counted.shape:
        return
    wanted = y >= 0 if real is None or real.shape != y.shape else (y >= 0) & real
    if bool((wanted & ~known.counted).any()):
        raise UsageError(
            "this rule takes each position's target for its error signal, and there is a target where the loss does not depend "
            "on the output: shift the targets in the data, instead of in the loss, and ignore the others by -100"
        )
