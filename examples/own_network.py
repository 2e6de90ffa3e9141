"""Train a network of your own, a small residual one, by forward direct feedback alignment: the library without the lab.

    python examples/own_network.py

It learns to tell which quarter of a noisy image is the brightest, and prints its accuracy on images it has not seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import onward


class Residual(nn.Module):
    """x + f(x), with f two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(4, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.f(x))


class Network(nn.Module):
    """Not a Sequential: its cuts are named by hand. Each skip connection lies within a block, so no path goes around a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.stage1 = Residual(16)
        self.stage2 = Residual(16)
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 2 * 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.stem(x))))


def batch(size: int) -> tuple[Tensor, Tensor]:
    y = torch.randint(4, (size,))
    x = torch.randn(size, 2, 4, 2, 4)
    x[torch.arange(size), y // 2, :, y % 2] += 1
    return x.reshape(size, 1, 8, 8), y


def main(steps: int = 150) -> float:
    torch.manual_seed(0)
    model = Network()
    for problem in onward.validate(model):
        print(problem)
    estimator = onward.FDFA(model, cuts=["stem", "stage1", "stage2"])
    groups = estimator.parameter_groups(network={"lr": 1e-3}, feedback={"lr": 1e-3})
    optimizer = torch.optim.Adam(groups)
    for number in range(1, steps + 1):
        optimizer.zero_grad()
        step = estimator.estimate(*batch(64))
        optimizer.step()
        if number % 50 == 0:
            print(f"step {number}: loss {step.loss:.3f}")
    x, y = batch(1000)
    with torch.no_grad():
        accuracy = (estimator(x).argmax(1) == y).float().mean().item()
    print(f"accuracy on new images: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
