"""What a step costs where arithmetic is next to nothing: Python and dispatch, as ratios to plain backpropagation.

    python benchmarks/overhead.py                       both networks, eager
    python benchmarks/overhead.py --network chain --backends eager replay inductor

Two networks whose tensors are tiny, on one thread: `chain`, 16 linear blocks 8 wide, batch 4; `resnet`, resnet18-8b at a
sixteenth of its width on 8x8 images, batch 4. Candidates take turns within one process; a ratio is taken within a turn, and the
table has the median over turns, with the least and the greatest. Time is that of the processor, so that other programs disturb
less. A step is `zero_grad` and `estimate`; with `--optimizer` the optimizer's step too, captured where the estimate is.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import onward
from onward.capturing.backends import BACKENDS
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


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-4, fused=True),
}


def prepared(make: Make, problem: Problem, backend: str, optimizer: str | None = None) -> Candidate:
    """An estimator after the steps that allocate, trace and compile."""
    model, x, y = problem
    estimator = make(model, x)
    estimator.check = False  # the look at the first batch is no part of a step
    step, settled = plain_step(estimator, x, y), lambda: True
    if optimizer is not None:
        moved = OPTIMIZERS[optimizer](estimator.parameters())
        if backend == "eager":
            step = plain_step(estimator, x, y, moved)
        else:
            whole = onward.capture(estimator, moved, backend=backend)
            step, settled = partial(whole, x, y), lambda: whole.settled
    elif backend != "eager":
        capture = onward.capture(estimator, backend=backend).captured
        settled = lambda: capture.settled  # type: ignore[union-attr]  # noqa: E731

    start = time.perf_counter()
    step()
    step()
    while not settled():
        step()
    ready = time.perf_counter() - start
    for _ in range(3):
        step()
    return Candidate(step, ready, estimator.engine)


def plain_step(
    estimator: onward.Estimator, x: Tensor, y: Tensor, moved: torch.optim.Optimizer | None = None
) -> Callable[[], object]:
    """A step as a training loop writes it."""

    def step() -> None:
        estimator.zero_grad()
        estimator.estimate(x, y)
        if moved is not None:
            moved.step()

    return step


def measured(candidates: Mapping[Any, Candidate], turns: int, steps: int) -> dict[Any, list[float]]:
    """Seconds of one step of each candidate, in each turn."""
    seconds: dict[Any, list[float]] = {key: [] for key in candidates}
    for _ in range(turns):
        for key, candidate in candidates.items():
            start = time.process_time()
            for _ in range(steps):
                candidate.step()
            seconds[key].append((time.process_time() - start) / steps)
    return seconds


def table(network: str, backends: Iterable[str], names: Iterable[str], asked: argparse.Namespace) -> None:
    """Print the ratios to plain eager backpropagation on a network."""
    warnings.simplefilter("ignore")  # what runs eagerly after all is seen by its engine
    wanted = [("bp", "eager"), *((name, backend) for name in names for backend in backends)]
    candidates = {
        (name, b): prepared(ESTIMATORS[name], NETWORKS[network](), b, asked.optimizer) for name, b in dict.fromkeys(wanted)
    }
    seconds = measured(candidates, asked.turns, asked.steps)
    what = f"with {asked.optimizer}" if asked.optimizer else "without an optimizer"
    print(f"{network}: ratio to eager bp, {what}, median of {asked.turns} x {asked.steps} steps [least, greatest]; 1 thread")
    for (name, backend), found in seconds.items():
        ratios = [one / base for one, base in zip(found, seconds["bp", "eager"], strict=True)]
        middle = f"{statistics.median(ratios):6.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        how = f"ready after {candidates[name, backend].ready:5.1f} s  ({candidates[name, backend].engine})"
        print(f"  {name:26} {backend:9} {middle:22} {1e3 * min(found):8.2f} ms  {how}", flush=True)


def flags(
    description: str | None, networks: Sequence[str], backends: Sequence[str], names: Sequence[str]
) -> argparse.ArgumentParser:
    """The command line of this benchmark and of capture.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(networks))
    parser.add_argument("--backends", nargs="+", choices=["eager", *BACKENDS], default=list(backends))
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(names))
    parser.add_argument("--optimizer", choices=OPTIMIZERS)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    return parser


def main() -> None:
    """Read the command line and print the tables."""
    asked = flags(__doc__, ("chain", "resnet"), ("eager",), list(ESTIMATORS)).parse_args()
    torch.set_num_threads(1)
    for network in asked.network:
        table(network, asked.backends, asked.estimators, asked)


if __name__ == "__main__":
    main()
