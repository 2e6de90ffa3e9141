"""Block pipelines: throughput on two processes, what waiting costs on many, and what stale signals do to accuracy.

    python benchmarks/pipeline.py throughput    # 2 processes of one thread against 1; the machine's own limit beside it
    python benchmarks/pipeline.py bubble        # simulated schedules: the share of time that processes wait
    python benchmarks/pipeline.py staleness     # digits, signals 0 to 8 batches late

Throughput: a network of equal blocks of convolution, batch norm and ReLU, half of them in each process. The limit is what two
trainings that know nothing of each other reach at the same time: less than 2 where processors share a core, caches or memory.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import ratio
from torch import Tensor, nn

import onward

ALGORITHMS: dict[str, Callable[..., onward.Estimator]] = {
    "bp": onward.Backprop,
    "local": lambda model, x: onward.LocalLoss(model, heads=onward.make_heads(model, x, "linear")),
    "dfa": onward.DFA,
    "dkp": onward.DKP,
    "fdfa": onward.FDFA,
}
DIRECT = ("dfa", "dkp", "fdfa")
TRAIN = 1437
"""Of the digits, how many are trained on; the rest is for the test."""


def estimator_of(algorithm: str, model: nn.Module, x: Tensor) -> onward.Estimator:
    make = ALGORITHMS[algorithm]
    return make(model, x) if algorithm == "local" else make(model)


def together(processes: int, function: Callable[..., None], *args: object) -> None:
    """Run ``function(rank, *args)`` in several processes of one thread, in one group."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (processes, folder, function, args), nprocs=processes)


def _run(rank: int, processes: int, folder: str, function: Callable[..., None], args: tuple[object, ...]) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {available[rank % len(available)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    function(rank, *args)
    dist.destroy_process_group()


def throughput(options: argparse.Namespace) -> None:
    together(2, _throughput, options)


def _throughput(rank: int, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    x = torch.randn(options.batch_size, options.width, options.size, options.size)
    y = torch.randint(10, (options.batch_size,))
    if rank == 0:
        print(
            f"torch {torch.__version__}, {options.blocks} blocks {options.width} wide on {options.size}x{options.size}, batch "
            f"{options.batch_size}, {options.turns} turns of {options.steps} steps\nthroughput, as a ratio to one process with "
            "one thread: of the fastest turns; median (least, greatest) turn by turn; if no process ever waited, by processor "
            "time; limit: two independent trainings at once"
        )
    for algorithm in options.algorithms:
        alone, both, stages = _contestants(algorithm, options, x)
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ("one", *stages, "both")}
        for _ in range(options.turns):
            measured["one"].append(_turn(alone, alone, x, y, options.steps if rank == 0 else 0))
            for name, stage in stages.items():
                measured[name].append(_turn(stage, stage.estimator, x, y, options.steps))
            measured["both"].append(_turn(both, both, x, y, options.steps))
        if rank == 0:
            times = {name: [wall for wall, _ in values] for name, values in measured.items()}
            work = {name: statistics.median(cpu for _, cpu in values) for name, values in measured.items()}
            print(f"{algorithm:6}{1e3 * min(times['one']) / options.steps:8.1f} ms a step in one process", flush=True)
            for name in stages:
                report(name, times["one"], times[name], f"{work['one'] / work[name]:6.2f} by processor time")
            report("limit", [2 * wall for wall in times["one"]], times["both"], "")


def _contestants(
    algorithm: str, options: argparse.Namespace, x: Tensor
) -> tuple[onward.Estimator, onward.Estimator, dict[str, onward.Stage]]:
    """Two estimators that work alone, and a pipeline by every schedule that the algorithm can follow."""

    def build() -> onward.Estimator:
        torch.manual_seed(0)
        equal = [
            nn.Sequential(nn.Conv2d(options.width, options.width, 3, padding=1), nn.BatchNorm2d(options.width), nn.ReLU())
            for _ in range(options.blocks)
        ]
        last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(options.width, 10))
        return estimator_of(algorithm, nn.Sequential(*equal, last), x)

    half = [options.blocks // 2, options.blocks - options.blocks // 2 + 1]
    schedules: dict[str, dict[str, int]] = {} if algorithm == "bp" else {"plain": {}}
    if algorithm in DIRECT:
        late = {"microbatches=2": {"microbatches": 2}, "microbatches=4": {"microbatches": 4}, "staleness=1": {"staleness": 1}}
        schedules |= late
    return build(), build(), {name: onward.Stage(build(), half, **schedule) for name, schedule in schedules.items()}


def _turn(
    trained: onward.Estimator | onward.Stage, estimator: onward.Estimator, x: Tensor, y: Tensor, count: int
) -> tuple[float, float]:
    """Seconds for so many steps between two barriers, and of processor time in the process that took more of it.

    With a count of 0 this process does nothing but wait.
    """
    optimizer = torch.optim.SGD(estimator.parameters(), lr=1e-3)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            trained.estimate(x, y)
            optimizer.step()
        while isinstance(trained, onward.Stage) and trained.flush():
            optimizer.step()

    steps(min(count, 1))
    dist.barrier()
    start, worked = time.perf_counter(), time.process_time()
    steps(count)
    work = torch.tensor(time.process_time() - worked)
    dist.barrier()
    end = time.perf_counter()
    dist.all_reduce(work, dist.ReduceOp.MAX)
    return end - start, work.item()


def report(name: str, base: list[float], times: list[float], remark: str) -> None:
    middle, least, greatest = ratio(base, times)
    print(f"      {name:16} {min(base) / min(times):5.2f}   {middle:5.2f} ({least:.2f}, {greatest:.2f}) {remark}", flush=True)


def simulate(
    method: str, p: int, m: int = 1, s: int = 0, forward: float = 1.0, backward: float = 2.0, batches: int = 60
) -> float:
    """The share of time that processes wait, once the pipeline is filled.

    Every process works through its tasks in order; a task starts when the process is free and what it needs is there.
    ``forward`` and ``backward`` are what a whole batch takes each process, ``m`` microbatches, ``s`` the staleness.

    >>> simulate("gpipe", 8, m=8), simulate("direct", 8, m=8), simulate("local", 8)
    (0.4666666666666667, 0.0, 0.0)
    """
    orders = {"gpipe": _gpipe, "1f1b": _1f1b, "direct": _direct, "local": _local}
    queues = [list(orders[method](p, m, s, r, batches)) for r in range(p)]
    duration = {"F": forward / m, "B": backward / m}
    ended: dict[tuple[str, int, int, int], float] = {}
    free, starts, at = [0.0] * p, [[0.0] * batches for _ in range(p)], [0] * p
    while any(at[r] < len(queues[r]) for r in range(p)):
        moved = False
        for r in range(p):
            while at[r] < len(queues[r]):
                (kind, batch, i), needed = queues[r][at[r]]
                if needed is not None and needed not in ended:
                    break
                start = max(free[r], ended[needed] if needed is not None else 0.0)
                if kind == "F" and i == 0:
                    starts[r][batch] = start
                free[r] = ended[kind, r, batch, i] = start + duration[kind]
                at[r], moved = at[r] + 1, True
        assert moved, "the schedule waits for itself"
    first, last = batches // 2, batches - 1
    cycle = (starts[-1][last] - starts[-1][first]) / (last - first)
    return round(1 - (forward + backward) / cycle, 12) + 0.0


Task = tuple[tuple[str, int, int], tuple[str, int, int, int] | None]


def _forward(r: int, batch: int, i: int) -> Task:
    return ("F", batch, i), ("F", r - 1, batch, i) if r > 0 else None


def _backward(p: int, r: int, batch: int, i: int) -> Task:
    return ("B", batch, i), ("B", r + 1, batch, i) if r < p - 1 else ("F", r, batch, i)


def _gpipe(p: int, m: int, s: int, r: int, batches: int) -> Iterator[Task]:
    for batch in range(batches):
        yield from (_forward(r, batch, i) for i in range(m))
        yield from (_backward(p, r, batch, i) for i in range(m))


def _1f1b(p: int, m: int, s: int, r: int, batches: int) -> Iterator[Task]:
    ahead = min(m, p - 1 - r)
    for batch in range(batches):
        yield from (_forward(r, batch, i) for i in range(ahead))
        for i in range(m):
            if i + ahead < m:
                yield _forward(r, batch, i + ahead)
            yield _backward(p, r, batch, i)


def _direct(p: int, m: int, s: int, r: int, batches: int) -> Iterator[Task]:
    late = s if r < p - 1 else 0
    for batch in range(batches):
        yield from (_forward(r, batch, i) for i in range(m))
        if batch >= late:
            yield from ((("B", batch - late, i), ("F", p - 1, batch - late, i)) for i in range(m))


def _local(p: int, m: int, s: int, r: int, batches: int) -> Iterator[Task]:
    for batch in range(batches):
        yield _forward(r, batch, 0)
        yield ("B", batch, 0), ("F", r, batch, 0)


def bubble(options: argparse.Namespace) -> None:
    b = options.backward
    rows: list[tuple[str, str, Callable[[int], int], Callable[[int], int]]] = [
        ("gpipe", "m = p", lambda p: p, lambda p: 0),
        ("gpipe", "m = 4p", lambda p: 4 * p, lambda p: 0),
        ("1f1b", "m = p", lambda p: p, lambda p: 0),
        ("1f1b", "m = 4p", lambda p: 4 * p, lambda p: 0),
        ("direct", "m = 1", lambda p: 1, lambda p: 0),
        ("direct", "m = p / 2", lambda p: p // 2, lambda p: 0),
        ("direct", "m = p", lambda p: p, lambda p: 0),
        ("direct", "m = 1, s = (p - 1) / (1 + b / f)", lambda p: 1, lambda p: -int(-(p - 1) // (1 + b))),
        ("local", "", lambda p: 1, lambda p: 0),
    ]
    print(
        f"share of time that processes wait; a forward pass takes 1, learning {b:g}\n{'':44}"
        + "".join(f"{p:>8}" for p in (2, 8, 64))
    )
    for method, name, m, s in rows:
        waiting = [simulate(method, p, m(p), s(p), backward=b) for p in (2, 8, 64)]
        print(f"{method:8}{name:36}" + "".join(f"{share:8.1%}" for share in waiting))


def staleness(options: argparse.Namespace) -> None:
    print(f"digits, test accuracy in %, mean ± standard deviation over {options.seeds} seeds, {options.epochs} epochs")
    together(2, _staleness, options)


def _staleness(rank: int, options: argparse.Namespace) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data, dtype=torch.float32)[order] / 8 - 1, torch.tensor(data.target)[order]
    for algorithm in options.algorithms:
        for late in options.staleness:
            found = [_accuracy(algorithm, late, seed, options, x, y) for seed in range(options.seeds)]
            if rank == 1:
                print(f"{algorithm:6} s={late:<3} {statistics.mean(found):6.2f} ± {statistics.stdev(found):.2f}", flush=True)


def _accuracy(algorithm: str, late: int, seed: int, options: argparse.Namespace, x: Tensor, y: Tensor) -> float:
    """Test accuracy in %; in the first process, which never sees an output, nan.

    All hidden blocks are in the first process, so that every one of their signals is late.
    """
    torch.manual_seed(seed)
    sizes = [64] + [options.width] * options.layers
    hidden = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(sizes)]
    estimator = ALGORITHMS[algorithm](nn.Sequential(*hidden, nn.Linear(options.width, 10)), seed=seed)
    stage = onward.Stage(estimator, [options.layers, 1], staleness=late)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=options.lr)
    for _ in range(options.epochs):
        for batch in torch.randperm(TRAIN).split(64)[:-1]:
            optimizer.zero_grad()
            stage.estimate(x[batch], y[batch])
            optimizer.step()
    optimizer.zero_grad()
    while stage.flush():
        optimizer.step()
        optimizer.zero_grad()
    estimator.eval()
    output = stage(x[TRAIN:])
    stage.flush()
    return math.nan if output is None else 100 * (output.argmax(1) == y[TRAIN:]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("throughput")
    command.set_defaults(run=throughput)
    command.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    command.add_argument("--blocks", type=int, default=8)
    command.add_argument("--width", type=int, default=32)
    command.add_argument("--size", type=int, default=16)
    command.add_argument("--batch-size", type=int, default=32)
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--turns", type=int, default=5)
    command = commands.add_parser("bubble")
    command.set_defaults(run=bubble)
    command.add_argument("--backward", type=float, default=2.0)
    command = commands.add_parser("staleness")
    command.set_defaults(run=staleness)
    command.add_argument("--algorithms", nargs="+", default=["dfa", "fdfa"], choices=DIRECT)
    command.add_argument("--staleness", nargs="+", type=int, default=[0, 1, 2, 4, 8])
    command.add_argument("--layers", type=int, default=3)
    command.add_argument("--width", type=int, default=100)
    command.add_argument("--epochs", type=int, default=10)
    command.add_argument("--lr", type=float, default=1e-3)
    command.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
