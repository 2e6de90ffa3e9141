"""Bytes that training on several processes exchanges in a step, by estimator: handed over, and seen on the loopback device.

torchrun --nproc-per-node 2 --master-addr 127.0.0.1 benchmarks/exchange.py
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

import onward
from onward.lab.networks.models import build
from onward.lab.settings import Network

STEPS = 20
COUNTERS = Path("/sys/class/net/lo/statistics/tx_bytes")


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    for name, shape in (("mlp", (1, 28, 28)), ("cnn", (3, 32, 32))):
        x, y = torch.randn(32, *shape), torch.zeros(32).long()
        for label, make in ESTIMATORS.items():
            torch.manual_seed(0)
            model = build(name, shape, 10, Network())
            estimator = onward.distribute(make(model, x), statistics="local")
            estimator.estimate(x, y)
            dist.barrier()
            before, handed = int(COUNTERS.read_text()), estimator.shard.sent
            for _ in range(STEPS):
                estimator.zero_grad()
                estimator.estimate(x, y)
            dist.barrier()
            handed, seen = estimator.shard.sent - handed, int(COUNTERS.read_text()) - before
            if dist.get_rank() == 0:
                wire = seen / STEPS / dist.get_world_size()
                print(
                    f"{name:4} {label:32} {handed / STEPS:12,.0f} bytes handed over, {wire:12,.0f} sent, per process and step"
                )
    dist.destroy_process_group()


ESTIMATORS = {
    "bp": lambda model, x: onward.Backprop(model),
    "dfa": lambda model, x: onward.DFA(model),
    "fdfa": lambda model, x: onward.FDFA(model),
    "local": lambda model, x: onward.LocalLoss(model, heads=onward.make_heads(model, x, "linear")),
    "fg": lambda model, x: onward.ForwardGradient(model),
    "fg, avg-weight, without cuts": lambda model, x: onward.ForwardGradient(model, space="avg-weight"),
}

if __name__ == "__main__":
    main()
