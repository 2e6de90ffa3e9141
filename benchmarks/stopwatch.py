"""Checks `onward bench` from outside: with a stopwatch, and with what the kernel says a process needed.

    OMP_NUM_THREADS=1 python benchmarks/stopwatch.py mlp
    OMP_NUM_THREADS=1 python benchmarks/stopwatch.py cnn

The turns alternate between `onward bench` and a plain training script (the second half of this file), so that a slow spell of
the machine hits both. Time: the script runs as a process of its own for few and for many steps; the difference of how long the
two lived, over the difference in steps. Memory: the largest resident size that the kernel reports of the process with few steps
when it ends (`ru_maxrss`), less that of one that trains a network of a few parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

INPUTS = {"mlp": (1, 28, 28), "cnn": (3, 32, 32), "tiny": (1, 2, 2)}
FEW, SECONDS = 3, 6.0


def lifetime(model: str, algorithm: str, steps: int) -> tuple[float, int]:
    """Seconds that a process with so many steps lives, and its largest resident size in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, model, "--algorithm", algorithm, "--steps", str(steps)])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"training {model} with {algorithm} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024


def benched(model: str) -> dict[str, dict[str, float]]:
    """The rows of `onward bench`, by algorithm."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        shape = ",".join(map(str, INPUTS[model]))
        options = ["--model", model, "--input", shape, "--algorithms", "fdfa", "--turns", "5", "--json", str(figures)]
        subprocess.run([sys.executable, "-m", "onward", "bench", *options], check=True, stdout=subprocess.DEVNULL)
        return {row["algorithm"]: row for row in json.loads(figures.read_text())["rows"]}


def compare(model: str, turns: int) -> None:
    """Measure in both ways, in turn, and print what they say."""
    found: dict[str, list[tuple[float, ...]]] = {"bp": [], "fdfa": []}
    for turn in range(turns):
        rows = benched(model)
        for algorithm, said in found.items():
            row = rows[algorithm]
            more = max(20, round(SECONDS / row["seconds"]))
            _, without = lifetime("tiny", algorithm, 1)
            short, needed = lifetime(model, algorithm, FEW)
            long, _ = lifetime(model, algorithm, FEW + more)
            said.append((row["seconds"], (long - short) / more, row["peak_bytes"], needed - without))
        print(f"turn {turn + 1} of {turns}", file=sys.stderr)
    print(f"{model}: medians over {turns} turns (least, greatest)")
    for algorithm, said in found.items():
        for unit, scale, at in (("ms", 1e3, 0), ("MB", 1e-6, 2)):
            inside, outside = ([scale * values[index] for values in said] for index in (at, at + 1))
            pairs = [b / a for a, b in zip(inside, outside, strict=True)]
            print(f"{algorithm:5} {unit}   bench {_spread(inside)}   outside {_spread(outside)}   ratio {_spread(pairs, 2)}")
    for who, at in (("bench", 0), ("outside", 1)):
        ratios = [one[at] / base[at] for one, base in zip(found["fdfa"], found["bp"], strict=True)]
        print(f"time of fdfa / bp, {who}: {_spread(ratios, 2)}")


def _spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}, {max(values):.{digits}f})"


def train(model: str, algorithm: str, steps: int) -> None:
    """Training as a script of one's own would: nothing here knows of the bench."""
    import torch

    import onward
    from onward.lab.networks import models
    from onward.lab.settings import Network

    shape = INPUTS[model]
    name, width, batch, classes = ("mlp", 0.01, 2, 2) if model == "tiny" else (model, 1.0, 64, 10)
    network = models.build(name, shape, classes, Network(width=width))
    estimator = onward.FDFA(network) if algorithm == "fdfa" else None
    optimizer = torch.optim.Adam(list(estimator.parameters() if estimator else network.parameters()), lr=1e-4, fused=True)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # a block freed, as by loading data: glibc keeps smaller ones from now on
    x = torch.randn(batch, *shape)
    for _ in range(steps):
        y = torch.randint(classes, (batch,))
        optimizer.zero_grad()
        if estimator:
            estimator.estimate(x, y)
        else:
            torch.nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=INPUTS, nargs="?", default="mlp")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--algorithm", choices=("bp", "fdfa"), default="bp", help="with --steps: train with this")
    parser.add_argument("--steps", type=int, help="train for so many steps instead of comparing")
    options = parser.parse_args()
    if options.steps is None:
        compare(options.model, options.turns)
    else:
        train(options.model, options.algorithm, options.steps)


if __name__ == "__main__":
    main()
