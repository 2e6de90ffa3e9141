"""The derivative of attention along a direction: time and memory of `onward.jvp` beside those of PyTorch's math backend.

    OMP_NUM_THREADS=1 python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --tokens 4096 16384 --dtype bfloat16

PyTorch's forward mode refuses fused attention; on its math backend it holds several matrices of all queries by all keys.
`onward.jvp` runs the fused kernel, and its tangent some queries at a time. The two take turns; the ratio is of processor time,
a median over turns, with the least and greatest. The error is the largest difference from the math backend's tangent in
float64, of a part of the heads, relative to the largest number in it. Memory is what tensors took at most beyond the arguments.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import onward


class Peak(TorchDispatchMode):
    """The most bytes at once of tensors that are made within the block, of any operation that PyTorch's dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := (storage := leaf.untyped_storage())._cdata) not in {*self.alive, *given}:
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key, None)
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return result


def by_math(causal: bool, given: list[Tensor], directions: list[Tensor]) -> Tensor:
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        q, k, v = (forward_ad.make_dual(a, u) for a, u in zip(given, directions, strict=True))
        moved = forward_ad.unpack_dual(F.scaled_dot_product_attention(q, k, v, is_causal=causal)).tangent
    assert moved is not None
    return moved


def by_parts(causal: bool, given: list[Tensor], directions: list[Tensor]) -> Tensor:
    return onward.jvp(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), given, directions)[1]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Processor time on a CPU, which other processes do not lengthen; on a GPU until it is done."""
    if device.type != "cuda":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(work: Callable[[], object], device: torch.device) -> int:
    if device.type != "cuda":
        with Peak() as seen:
            work()
        return seen.bytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--features", type=int, default=64, help="of a head")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, {options.heads} heads of {options.features}, {options.dtype}")
    print("tokens  causal    onward     math    ratio (least, greatest)     MB onward    math     error")
    for causal in (False, True):
        for tokens in options.tokens:
            torch.manual_seed(0)
            shape = (options.batch_size, options.heads, tokens, options.features)
            given, directions = ([torch.randn(shape, device=device, dtype=dtype) for _ in range(3)] for _ in range(2))
            ways = [partial(way, causal, given, directions) for way in (by_parts, by_math)]
            times = [[seconds(way, device) for way in ways] for _ in range(1 + options.turns)][1:]  # the first warms up
            ratios = [mine / others for mine, others in times]
            memory = [peak(way, device) / 1e6 for way in ways]
            exact = by_math(causal, [a[:, :1].double() for a in given], [u[:, :1].double() for u in directions])
            error = (by_parts(causal, given, directions)[:, :1].double() - exact).abs().max() / exact.abs().max()
            middle = [1e3 * statistics.median(found) for found in zip(*times, strict=True)]
            print(
                f"{tokens:6}  {causal!s:6}{middle[0]:8.1f} ms{middle[1]:8.1f} ms  {statistics.median(ratios):5.2f} "
                f"({min(ratios):.2f}, {max(ratios):.2f})  {memory[0]:15.1f}{memory[1]:8.1f}   {error:.1e}"
            )


if __name__ == "__main__":
    main()
