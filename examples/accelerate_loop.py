"""A training loop of Accelerate, without backpropagation: accumulated batches, clipping, bfloat16 and several processes.

    python examples/accelerate_loop.py            (or: accelerate launch examples/accelerate_loop.py)

A small network learns which of four numbers is the largest, and prints how often it is right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import onward

ACCUMULATED = 2


def loss(z: Tensor, y: Tensor) -> Tensor:
    """Divided, so that the accumulated batches add up to their mean."""
    return F.cross_entropy(z, y) / ACCUMULATED


def main() -> float:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=ACCUMULATED)
    torch.manual_seed(0)
    x = torch.randn(4096, 4)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).to(accelerator.device)
    estimator = onward.FDFA(model, loss=loss)  # the network is not prepared: no wrapper exchanges its gradients ...
    if accelerator.num_processes > 1:
        onward.distribute(estimator)  # ... the estimator does
    optimizer = torch.optim.Adam(estimator.parameter_groups(network={"lr": 3e-3}, feedback={"lr": 1e-2}))
    loader = DataLoader(TensorDataset(x, x.argmax(1)), batch_size=64, shuffle=True, drop_last=True)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    for _ in range(4):
        for inputs, targets in loader:
            with accelerator.accumulate(model), accelerator.autocast():
                estimator.estimate(inputs, targets)  # in the place of accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    test = torch.randn(1000, 4, device=accelerator.device)
    with torch.no_grad():
        return (model(test).argmax(1) == test.argmax(1)).float().mean().item()


if __name__ == "__main__":
    print(f"right {main():.1%} of the time")
