"""Growth of peak memory with network depth, as a ratio to backpropagation's.

    python benchmarks/depth.py

The network: blocks of convolution, batch norm and ReLU on 32x32 images, cut after every block. Each figure is the growth of a
fresh process's largest resident size over three estimates, above the estimator's own (parameters, feedback matrices, their
gradients, buffers). The slope is a least-squares fit over the depths, in MB per block.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import chain

import torch
from measure import ESTIMATORS, in_a_fresh_process, own_bytes, peak_of
from torch import nn


def peak_above_own(name: str, depth: int, width: int, batch_size: int) -> int:
    torch.set_num_threads(1)
    own = 0

    def work() -> None:
        nonlocal own
        blocks = (nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()) for _ in range(depth))
        output = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
        x, y = torch.randn(batch_size, width, 32, 32), torch.randint(10, (batch_size,))
        estimator = ESTIMATORS[name](nn.Sequential(*chain(blocks, [output])), x)
        for _ in range(3):
            estimator.estimate(x, y)
        own = own_bytes(estimator)

    return peak_of(work) - own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=64)
    forward = ["fg-activation", "fg-weight", "fg-local-activation-one-pass", "fg-local-activation-forward"]
    names = ["bp", "bp-checkpoint", "fdfa-low-memory", *forward, "local"]
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=names)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, width {options.width}, batch {options.batch_size}; peak MB above the estimator's own")
    print(f"{'blocks':26}" + "".join(f"{depth:8}" for depth in options.depths) + "   MB/block   / bp")
    base = None
    for name in dict.fromkeys(["bp", *options.estimators]):
        peaks = [
            in_a_fresh_process(peak_above_own, name, depth, options.width, options.batch_size) / 1e6 for depth in options.depths
        ]
        slope = statistics.linear_regression(options.depths, peaks).slope
        base = base or slope
        print(f"{name:26}" + "".join(f"{value:8.0f}" for value in peaks) + f"{slope:11.3f}{slope / base:7.1%}")


if __name__ == "__main__":
    main()
