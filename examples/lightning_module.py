"""A Lightning module that learns without backpropagation: manual optimization, the estimator in the place of the backward.

    python examples/lightning_module.py

A small network learns which of four numbers is the largest, and prints how often it is right.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import onward


class Learner(lightning.LightningModule):
    """Owns an estimator, which owns the network."""

    def __init__(self, estimator: onward.Estimator) -> None:
        super().__init__()
        self.estimator = estimator
        self.automatic_optimization = False  # Lightning's own would call loss.backward()

    def forward(self, x: Tensor) -> Any:
        return self.estimator(x)

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        step = self.estimator.estimate(*batch)
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        self.log("train_loss", step.loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.estimator.parameter_groups(network={"lr": 3e-3}, feedback={"lr": 1e-2}))


def main() -> float:
    torch.manual_seed(0)
    x, test = torch.randn(4096, 4), torch.randn(1000, 4)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    learner = Learner(onward.FDFA(model))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", devices=1, **quiet)
    trainer.fit(learner, DataLoader(TensorDataset(x, x.argmax(1)), batch_size=64, shuffle=True))
    with torch.no_grad():
        return (learner(test).argmax(1) == test.argmax(1)).float().mean().item()


if __name__ == "__main__":
    print(f"right {main():.1%} of the time")
