"""What a step costs where arithmetic is next to nothing: Python and dispatch, as ratios to plain backpropagation.

    python benchmarks/overhead.py                       both networks, eager
    python benchmarks/overhead.py --network chain --backends eager replay inductor

Two networks whose tensors are tiny, on one thread: `chain`, 16 linear blocks 8 wide, batch 4; `resnet`, resnet18-8b at a
sixteenth of its width on 8x8 images, batch 4. Candidates take turns within one process; a ratio is taken within a turn, and the
table has the median over turns, with the least and the greatest. A step is `zero_grad` and `estimate`, without an optimizer.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import onward
from onward.lab.networks import models
from onward.lab.settings import Network

Make = Callable[[nn.Module, Tensor], onward.Estimator]


class Problem(NamedTuple):
    """A network and its batch."""

    model: nn.Module
    x: Tensor
    y: Tensor


def chain() -> Problem:
    """16 linear blocks."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(16)]
    return Problem(nn.Sequential(*blocks, nn.Linear(8, 3)), torch.randn(4, 8), torch.tensor([0, 1, 2, 1]))


def image_network(name: str, width: float, size: int, batch: int) -> Problem:
    """A network of the lab for colour images."""
    torch.manual_seed(0)
    model = models.build(name, (3, size, size), 10, Network(width=width))
    return Problem(model, torch.randn(batch, 3, size, size), torch.arange(batch) % 10)


NETWORKS: dict[str, Callable[[], Problem]] = {
    "chain": chain,
    "resnet": partial(image_network, "resnet18-8b", 1 / 16, 8, 4),
    "cnn": partial(image_network, "cnn", 1.0, 32, 64),
    "resnet-quarter": partial(image_network, "resnet18-8b", 0.25, 32, 32),
}
"""The last two are bound by arithmetic, for comparison."""


def fg(**settings: Any) -> Make:
    """Forward gradients, with linear heads where they need some."""

    def make(model: nn.Module, x: Tensor) -> onward.Estimator:
        heads = {"heads": onward.make_heads(model, x, "linear")} if onward.ForwardGradient.needs_heads(**settings) else {}
        return onward.ForwardGradient(model, **settings, **heads)

    return make


ESTIMATORS: dict[str, Make] = {
    "bp": lambda model, x: onward.Backprop(model),
    "dfa": lambda model, x: onward.DFA(model),
    "dkp": lambda model, x: onward.DKP(model),
    "drtp": lambda model, x: onward.DRTP(model),
    "fdfa": lambda model, x: onward.FDFA(model),
    "fdfa, low memory": lambda model, x: onward.FDFA(model, low_memory=True),
    "local": lambda model, x: onward.LocalLoss(model, heads=onward.make_heads(model, x, "linear")),
    "fg activation": fg(),
    "fg avg-weight, no cuts": fg(space="avg-weight"),
    "fg local, forward": fg(guess="local"),
    "fg local, one pass": fg(guess="local", passes="one"),
    "fg local, reverse": fg(guess="local", engine="reverse"),
    "fg local, reverse, weight": fg(guess="local", engine="reverse", space="weight"),
}


class Candidate(NamedTuple):
    """An estimator with a backend, ready to be timed."""

    step: Callable[[], object]
    ready: float
    """Seconds that the first steps took, tracing and compiling included."""
    engine: str


def prepared(make: Make, problem: Problem, backend: str) -> Candidate:
    """An estimator after the steps that allocate, trace and compile."""
    model, x, y = problem
    estimator = make(model, x)
    estimator.check = False  # the look at the first batch is no part of a step
    if backend != "eager":
        onward.capture(estimator, backend=backend)

    def step() -> None:
        estimator.zero_grad()
        estimator.estimate(x, y)

    start = time.perf_counter()
    for _ in range(6):
        step()
    return Candidate(step, time.perf_counter() - start, estimator.engine)


def measured(candidates: Mapping[Any, Candidate], turns: int, steps: int) -> dict[Any, list[float]]:
    """Seconds of one step of each candidate, in each turn."""
    seconds: dict[Any, list[float]] = {key: [] for key in candidates}
    for _ in range(turns):
        for key, candidate in candidates.items():
            start = time.perf_counter()
            for _ in range(steps):
                candidate.step()
            seconds[key].append((time.perf_counter() - start) / steps)
    return seconds


def table(network: str, backends: Iterable[str], names: Iterable[str], turns: int, steps: int) -> None:
    """Print the ratios to plain eager backpropagation on a network."""
    warnings.simplefilter("ignore")  # what runs eagerly after all is seen by its engine
    wanted = [("bp", "eager"), *((name, backend) for name in names for backend in backends)]
    candidates = {(name, b): prepared(ESTIMATORS[name], NETWORKS[network](), b) for name, b in dict.fromkeys(wanted)}
    seconds = measured(candidates, turns, steps)
    print(f"{network}: ratio to eager bp, median of {turns} turns of {steps} steps [least, greatest]; 1 thread")
    for (name, backend), found in seconds.items():
        ratios = [one / base for one, base in zip(found, seconds["bp", "eager"], strict=True)]
        middle = f"{statistics.median(ratios):6.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        ready = candidates[name, backend].ready
        print(f"  {name:26} {backend:9} {middle:22} {1e3 * min(found):8.2f} ms  ready after {ready:5.1f} s", flush=True)


def main(backends: Iterable[str] = ("eager",), networks: Iterable[str] = ("chain", "resnet")) -> None:
    """Read the command line and print the tables."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--network", nargs="+", choices=NETWORKS, default=list(networks))
    flags.add_argument("--backends", nargs="+", choices=["eager", "auto", "replay", "inductor"], default=list(backends))
    flags.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    flags.add_argument("--turns", type=int, default=7)
    flags.add_argument("--steps", type=int, default=10)
    asked = flags.parse_args()
    torch.set_num_threads(1)
    for network in asked.network:
        table(network, asked.backends, asked.estimators, asked.turns, asked.steps)


if __name__ == "__main__":
    main()
