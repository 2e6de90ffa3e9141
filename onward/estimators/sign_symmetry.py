"""Sign-symmetric feedback: what carries the error back has the signs of the weights, and sizes of its own."""

from __future__ import annotations

from torch import Tensor

from onward.estimators.feedback_alignment import FeedbackAlignment, scale


class USF(FeedbackAlignment, name="usf"):
    """Uniform sign-concordant feedback: as ``fa``, with ``B = s sign(W)``, s so that B has the norm that W starts with.

    s is the root mean square of W at the start (``1 / sqrt(fan_in)`` where W starts at zero), and stays. Liao, Leibo and
    Poggio, "How Important Is Weight Symmetry in Backpropagation?", 2016; Moskovitz, Litwin-Kumar and Abbott, "Feedback
    alignment in deep convolutional networks", 2018.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> step = USF(model).estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> model[0].weight.grad.shape
    torch.Size([8, 4])
    """

    def held(self, name: str, weight: Tensor) -> Tensor:
        return scale(weight)

    def carrier(self, name: str, weight: Tensor, kept: Tensor) -> Tensor:
        return weight.sign().mul_(kept)


class BRSF(USF, name="brsf"):
    """Batchwise random sign-concordant feedback: as ``usf``, with ``B = |R| sign(W)``, R ~ N(0, s^2) drawn anew in every step.

    Liao, Leibo and Poggio, "How Important Is Weight Symmetry in Backpropagation?", 2016.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> step = BRSF(model).estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> model[0].weight.grad.shape
    torch.Size([8, 4])
    """

    def carrier(self, name: str, weight: Tensor, kept: Tensor) -> Tensor:
        return self.drawn(weight.shape, f"feedback {name}", weight).abs().mul_(kept).mul(weight.sign())


class FRSF(FeedbackAlignment, name="frsf"):
    """Fixed random sign-concordant feedback: as ``brsf``, with ``B = |R| sign(W)``, R ~ N(0, s^2) drawn once.

    Liao, Leibo and Poggio, "How Important Is Weight Symmetry in Backpropagation?", 2016.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> step = FRSF(model).estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> model[0].weight.grad.shape
    torch.Size([8, 4])
    """

    def held(self, name: str, weight: Tensor) -> Tensor:
        return self.initial(name, weight).abs_()

    def carrier(self, name: str, weight: Tensor, kept: Tensor) -> Tensor:
        return weight.sign().mul_(kept)
