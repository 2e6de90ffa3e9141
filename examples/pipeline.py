"""Train one network on several processes, each with some of its blocks: forward direct feedback alignment, no gradient sent.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/pipeline.py

It learns to tell which of four random directions an input is closest to; the last process prints the accuracy.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

import onward


def main() -> float | None:
    torch.manual_seed(0)  # the same network and the same batches in every process
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(5)]
    estimator = onward.FDFA(nn.Sequential(*blocks, nn.Linear(64, 4)))
    stage = onward.Stage(estimator, microbatches=2)  # from here on this process's blocks are all that the estimator has
    optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-3)
    centres = torch.randn(4, 64)
    for _ in range(100):
        x = torch.randn(128, 64)
        y = (x @ centres.T).argmax(1)
        optimizer.zero_grad()
        stage.estimate(x, y)
        optimizer.step()
    estimator.eval()
    x = torch.randn(1000, 64)
    logits = stage(x)
    while stage.flush():  # nothing here, without stale signals
        optimizer.step()
    state = stage.full_state_dict()  # in the first process: torch.save(state, "network.pt")
    assert (state is None) == (dist.get_rank() > 0)
    return None if logits is None else ((logits.argmax(1) == (x @ centres.T).argmax(1)).float().mean().item())


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(minutes=1))
    accuracy = main()
    if accuracy is not None:
        print(f"accuracy {accuracy:.1%}")
    dist.destroy_process_group()
