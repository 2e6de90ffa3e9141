"""What one training step costs: seconds, which phases they go to, memory and arithmetic.

- A step is `zero_grad`, `estimate` and the step of the optimizers that `onward train` makes. Inputs are random. Targets are
  random and change every step, so that they cannot be learned: once gradients fade, Adam's averages fill with denormal numbers,
  which are slow. Freed memory is kept for the next step, as in a process that has loaded data (`memory.keep_freed`).
- Memory: how far the largest resident size of a fresh process grows over three steps, as the median over three processes. This
  includes network, gradients and optimizer; it leaves out the interpreter and what the first step of any network loads. On a
  GPU: the most that tensors took. `state_bytes` is what outlives a step: parameters, gradients, buffers, feedback, the
  optimizers' averages.
- Parts: the seconds of one more step by the phases that the library marks (`onward.phases`). `primal` is the network's forward
  passes; `tangent` the rules of forward mode and the random directions; `backward` every call of autograd's engine, with what
  checkpointing runs again inside it; `optimizer` the optimizers; `other` the rest: heads, error signals, feedback, sums over
  samples, losses. The seconds of a phase do not include those of phases inside it.
- FLOPs: of one `estimate`, by the formulas of `torch.utils.flop_counter`: matrix products, convolutions, attention.
"""

from __future__ import annotations

import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import onward
from onward.lab import tasks
from onward.lab.networks import models
from onward.lab.run import algorithms, precision
from onward.lab.run.optimizers import make_optimizers
from onward.lab.settings import Heads, Network, TaskSettings, Train
from onward.lab.system import generators, interrupt, memory, own
from onward.phases import phase, timed

PHASES = ("primal", "tangent", "backward", "optimizer", "other")
PROCESSES = 3
"""How many fresh processes measure memory, one after the other."""
_MOST_TO_SETTLE = 20
SECONDS = 0.5
"""How long the first candidate's timed steps of a turn should take, if their number is not given."""


class Learner(NamedTuple):
    """A network, its estimator and its optimizers: what a step needs."""

    estimator: onward.Estimator
    optimizers: Sequence[Optimizer]
    x: Tensor
    classes: int
    config: Train

    @classmethod
    def of(cls, config: Train, shape: Sequence[int], classes: int, device: torch.device) -> Learner:
        """Build the network and the algorithm of a configuration, for random inputs of that shape."""
        precision.check(config, device)
        generators.seed(config.seed)
        model, x = network_for(config, shape, classes)
        model, x = model.to(device), x.to(device)
        estimator = algorithms.build(model, algorithms.with_cuts(config, model, x[:2]), x[:2], task_of(config).loss)
        estimator.check = False  # the first batch is examined once before training, which is no part of a step
        return cls(estimator, list(make_optimizers(config, estimator).values()), precision.inputs(config, x), classes, config)

    def step(self) -> None:
        """One step of training, on new labels."""
        with phase("optimizer"):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        self.estimate()
        with phase("optimizer"):
            for optimizer in self.optimizers:
                optimizer.step()

    def estimate(self) -> None:
        """Fill the gradients, for new labels."""
        y = task_of(self.config).draw(self.x.shape, self.classes).to(self.x.device)
        with precision.autocast(self.config, self.x.device):
            self.estimator.estimate(self.x, y)

    def state_bytes(self) -> int:
        """Bytes of what outlives a step."""
        held = [t for p in self.estimator.parameters() for t in (p, p.grad) if t is not None]
        held += self.estimator.buffers()
        held += [t for o in self.optimizers for state in o.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in held)


def task_of(config: Train) -> tasks.Task:
    """What the network learns: what was asked for, or else what it is made for."""
    name = config.task.name
    return tasks.named(models.facts(config.model).task if name == "auto" else name)


def network_for(config: Train, shape: Sequence[int], classes: int) -> tuple[nn.Module, Tensor]:
    """The network of a configuration, and a random batch for it."""
    x = inputs_for(config, shape, classes)
    sizes: dict[str, Any] = {"vocabulary": classes, "positions": shape[:1] if task_of(config).of_positions else ()}
    return models.build(config.model, shape, classes, config.network, x[:2], **sizes), x


def inputs_for(config: Train, shape: Sequence[int], classes: int) -> Tensor:
    """A random batch: numbers, or tokens."""
    if task_of(config).of_positions or models.facts(config.model).tokens:
        return torch.randint(classes, (config.batch_size, *shape))
    return torch.randn(config.batch_size, *shape)


class Turn(NamedTuple):
    """What one turn of a candidate measured; seconds are of one step."""

    steps: int
    seconds: float
    parts: dict[str, float]
    flops: int | None
    engine: str


def take_turn(learner: Learner, device: torch.device, steps: int | None, *, count: bool) -> Turn:
    """Time `steps` steps after some that are not timed: the first allocates, the second fills the caches.

    If `steps` is None, as many are timed as half a second holds, at most 20. FLOPs are counted if `count` is true.
    """
    for done in range(_MOST_TO_SETTLE):
        if done >= 2 and getattr(learner.estimator.captured, "settled", True):  # traced, and a backend chosen
            break
        learner.step()
    if steps is None:
        steps = min(20, max(1, round(SECONDS / seconds_of(learner.step, device))))
    seconds = seconds_of(lambda: [learner.step() for _ in range(steps)], device) / steps
    clock = Clock(device)
    with timed(clock), clock("other"):
        learner.step()
    return Turn(steps, seconds, clock.seconds, flops(learner) if count else None, learner.estimator.engine)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long the work takes, until the device has finished it."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def flops(learner: Learner) -> int:
    """Floating-point operations of one `estimate`."""

    class Count(TorchDispatchMode):
        # FlopCounterMode follows modules by hooks on the graph, which refuse autograd.grad.
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if formula := flop_registry.get(func.overloadpacket):
                self.total += formula(*args, **(kwargs or {}), out_val=out)
            return out

    with Count() as counted:
        learner.estimate()
    return counted.total


class Clock:
    """A stopwatch for `phases.timed`: the seconds of each phase, without those of phases inside it.

    >>> clock = Clock(torch.device("cpu"))
    >>> with timed(clock), phase("primal"):
    ...     time.sleep(0.01)
    ...     with phase("backward"):
    ...         time.sleep(0.03)
    >>> 0.01 <= clock.seconds["primal"] < clock.seconds["backward"]
    True
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._at, self._since = device, "", time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        around = self._go_to(name)
        try:
            yield
        finally:
            self._go_to(around)

    def _go_to(self, name: str) -> str:
        """Leave the current phase for another one; returns the one that was left."""
        _synchronize(self._device)
        now, left = time.perf_counter(), self._at
        if left:
            self.seconds[left] = self.seconds.get(left, 0.0) + now - self._since
        self._at, self._since = name, now
        return left


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(config: Train, shape: Sequence[int], classes: int, device: torch.device) -> dict[str, Any]:
    """The memory that steps need: median, least and greatest peak, and the bytes that outlive a step."""
    arguments = (config, shape, classes, device, torch.get_num_threads())
    # A GPU counts what tensors take; of a processor, only the peak of a whole process is known.
    on_gpu = device.type == "cuda"
    found = [peak(*arguments)] if on_gpu else [in_a_fresh_process(peak, *arguments) for _ in range(PROCESSES)]
    peaks = [measured for measured, _ in found]
    return {"peak_bytes": statistics.median(peaks), "peak_bytes_range": [min(peaks), max(peaks)], "state_bytes": found[0][1]}


def peak(config: Train, shape: Sequence[int], classes: int, device: torch.device, threads: int) -> tuple[int, int]:
    """Bytes by which memory grew over three steps, and bytes of what outlives a step."""
    if device.type == "cpu":
        torch.set_num_threads(threads)
    # Memory for what the first step in a process loads, or a file of the user's own imports, is not this network's.
    models.options_of(config.model)
    if config.model.startswith(models.HUGGING_FACE):
        with torch.device("meta"), suppress(Exception):  # it imports, at least
            network_for(config, shape, classes)
    tiny = replace(
        config,
        model="mlp",
        network=Network(width=0.01),
        heads=Heads(),
        input=None,
        cuts=None,
        batch_size=2,
        task=TaskSettings(),
    )
    with suppress(Exception):  # a rule of the user's own may be for other networks
        Learner.of(tiny, (1, 2, 2), 2, device).step()
    memory.keep_freed()
    memory.reset_peak(device)
    before = memory.peak(device)
    with own.errors(algorithms.files(config), " in a step"):  # here, where the lines of the error are known
        learner = Learner.of(config, shape, classes, device)
        for _ in range(3):
            learner.step()
    return memory.peak(device) - before, learner.state_bytes()


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a process that has only imported, and return what it returns.

    If memory runs out, the system kills that process before any other.
    """
    with ProcessPoolExecutor(1, _context(), _first_to_go, (signal.getsignal(signal.SIGINT),)) as pool:
        return pool.submit(function, *arguments).result()


@cache
def _context() -> BaseContext:
    """Start the server that fresh processes fork from. Ctrl-C waits until it has imported, and afterwards ends it quietly."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # the first optimizer would import it
    with interrupt.requests() as asked:
        with interrupt.ours_alone():
            forkserver.ensure_running()
        first = context.Process()
        first.start()
        first.join()
    if asked():
        raise KeyboardInterrupt
    return context


def _first_to_go(on_ctrl_c: Any) -> None:
    if on_ctrl_c is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process at once, and without a traceback
    with suppress(OSError):  # where there is no /proc
        Path("/proc/self/oom_score_adj").write_text("1000")
