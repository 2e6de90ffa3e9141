"""How the benchmarks measure: candidates in turn within one process for time, each in a fresh process for memory."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

import onward
from onward.lab import memory

CPU = torch.device("cpu")
LOCAL_SPACES = ("activation", "activation-2", "avg-weight", "weight")

Make = Callable[[nn.Module, Tensor], onward.Estimator]


def _forward_gradient(**options: Any) -> Make:
    """Forward gradients of a network that sees batches like x, with cnn heads where the guess is theirs."""

    def make(model: nn.Module, x: Tensor) -> onward.Estimator:
        heads = onward.make_heads(model, x) if options.get("guess") == "local" else None
        return onward.ForwardGradient(model, heads=heads, **options)

    return make


ESTIMATORS: dict[str, Make] = {
    "bp": lambda model, x: onward.Backprop(model),
    "bp-checkpoint": lambda model, x: onward.Backprop(model, checkpoint=True),
    "dfa": lambda model, x: onward.DFA(model),
    "dkp": lambda model, x: onward.DKP(model),
    "fdfa": lambda model, x: onward.FDFA(model),
    "fdfa-low-memory": lambda model, x: onward.FDFA(model, low_memory=True),
    "fg-activation": _forward_gradient(),
    "fg-weight": _forward_gradient(space="avg-weight"),
    "fg-weight-rademacher": _forward_gradient(space="avg-weight", noise="rademacher"),
    "local": lambda model, x: onward.LocalLoss(model, heads=onward.make_heads(model, x)),
    **{f"fg-local-{space}": _forward_gradient(guess="local", space=space, engine="reverse") for space in LOCAL_SPACES},
    "fg-local-activation-forward": _forward_gradient(guess="local"),
    "fg-local-activation-one-pass": _forward_gradient(guess="local", passes="one"),
}
"""By the names that tables use: each makes an estimator of a network for batches like x."""


def in_turn(candidates: dict[str, Callable[[], object]], turns: int, calls: int = 5) -> dict[str, list[float]]:
    """Seconds per call in each turn; candidates take turns (A B C A B C ...), so that a slow spell of the machine hits all.

    A turn is one call that is not timed, which brings the candidate's own data back into the caches, and ``calls`` that are:
    the conditions of training, where one step follows the other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, candidate in candidates.items():
            candidate()
            start = time.perf_counter()
            for _ in range(calls):
                candidate()
            seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def ratio(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest of the ratios taken pair by pair."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_of(work: Callable[[], object]) -> int:
    """Bytes by which the process's largest resident size grew over its size before ``work``."""
    memory.reset_peak(CPU)
    before = memory.peak(CPU)
    work()
    return memory.peak(CPU) - before


def own_bytes(estimator: onward.Estimator) -> int:
    """Bytes of parameters, feedback matrices, their gradients, and buffers: what training needs under any algorithm."""
    parameters = [tensor for p in estimator.parameters() for tensor in (p, p.grad) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*parameters, *estimator.buffers()])
