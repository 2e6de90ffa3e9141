"""Time of one forward-mode pass, as a ratio to a plain forward pass of the same network in the same run.

    python benchmarks/forward_pass.py

The network: 16 layers of convolution, batch norm and ReLU, 64 wide, on 32x32 images, in train mode. Beside onward's tangents:
PyTorch's own dual numbers, and backpropagation.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.autograd.forward_ad as forward_ad
from measure import in_turn, ratio
from torch import nn

from onward.derivatives.tangents import Tangents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(options.layers):
        layers += [nn.Conv2d(options.width, options.width, 3, padding=1), nn.BatchNorm2d(options.width), nn.ReLU()]
    model = nn.Sequential(*layers)
    x = torch.randn(options.batch_size, options.width, 32, 32)
    u = torch.randn_like(x)

    @torch.no_grad()
    def plain() -> torch.Tensor:
        return model(x)

    @torch.no_grad()
    def tangents() -> torch.Tensor | None:
        with Tangents() as carried:
            carried.set(x, u)
            return carried.get(model(x))

    @torch.no_grad()
    def dual_numbers() -> torch.Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, u))).tangent

    def backprop() -> None:
        model(x).sum().backward()

    names = {"plain forward": plain, "onward tangents": tangents, "dual numbers": dual_numbers, "backprop": backprop}
    times = in_turn(names, options.turns, calls=1)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.layers} layers, batch {options.batch_size}")
    for name, seconds in times.items():
        middle, least, greatest = ratio(seconds, times["plain forward"])
        print(f"{name:18}{1e3 * statistics.median(seconds):9.1f} ms {middle:8.2f} ({least:.2f}, {greatest:.2f})")


if __name__ == "__main__":
    main()
