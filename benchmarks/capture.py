"""What capturing a step brings: eager, replayed and compiled, as ratios to plain eager backpropagation.

    python benchmarks/capture.py                                     the four networks, a few estimators each
    python benchmarks/capture.py --network chain --estimators dfa fdfa "fg local, reverse"
    python benchmarks/capture.py --network chain --optimizer adam    whole steps, with the optimizer's
    python benchmarks/capture.py --curve 10000                       is the loss curve of replayed steps the eager one?
    python benchmarks/capture.py --memory                            what a captured step needs, by depth

How time is measured: see overhead.py. "Ready after" is the time of the steps before all is traced, compiled, and chosen (by
`auto`); a second run finds what inductor has compiled on disk. Networks whose time is Python are `chain` and `resnet`; `cnn`
and `resnet-quarter` are bound by arithmetic, and there only dfa and fdfa are measured unless estimators are named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import overhead
import torch

import onward

MAIN = ("bp", "dfa", "fdfa", "local", "fg activation", "fg avg-weight, no cuts", "fg local, reverse")
OF_ARITHMETIC = ("bp", "dfa", "fdfa")


def curve(steps: int) -> None:
    """Train eagerly and replayed, and print in how many steps the losses are the same number."""
    torch.set_num_threads(1)
    for name in ("dfa", "fdfa", "fg local, reverse"):
        losses = []
        for captured in (False, True):
            model, x, y = overhead.NETWORKS["chain"]()
            estimator = overhead.ESTIMATORS[name](model, x)
            optimizer = torch.optim.SGD(estimator.parameters(), lr=1e-2, momentum=0.9)
            if captured:
                onward.capture(estimator, backend="replay")
            found = []
            for _ in range(steps):
                optimizer.zero_grad()
                found.append(float(estimator.estimate(x, y).loss))
                optimizer.step()
            losses.append(found)
        same = sum(a == b for a, b in zip(*losses, strict=True))
        print(f"{name}: {same} of {steps} losses are the same; from {losses[0][0]:.4f} to {losses[0][-1]:.4f}", flush=True)


def memory() -> None:
    """Print the peak memory above what outlives a step, by depth, of eager and captured steps in fresh processes."""
    rows = [f"{form},compile={how}" for form in ("fdfa:low_memory=true", "fg", "dfa") for how in ("off", "replay", "inductor")]
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        shared = ["--model", "chain", "--sweep", "depth", "8", "16", "32", "--turns", "1", "--steps", "1", "--batch-size", "32"]
        files = ["--json", str(figures), "--plot", str(Path(folder, "sweep.png"))]
        subprocess.run([sys.executable, "-m", "onward", "bench", *shared, *files, "--algorithms", *rows], check=True)
        for row in json.loads(figures.read_text())["rows"]:
            if row["error"] is None:
                print(f"{row['algorithm']:40} depth {row['value']:3}  {(row['peak_bytes'] - row['state_bytes']) / 1e6:8.1f} MB")


def main() -> None:
    parser: argparse.ArgumentParser = overhead.flags(__doc__, list(overhead.NETWORKS), ("eager", "replay", "inductor"), ())
    parser.add_argument("--curve", type=int, help="compare the losses of so many steps instead")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    asked = parser.parse_args()
    if asked.curve:
        curve(asked.curve)
        return
    if asked.memory:
        memory()
        return
    torch.set_num_threads(1)
    for network in asked.network:
        tiny = network in ("chain", "resnet")
        overhead.table(network, asked.backends, asked.estimators or (MAIN if tiny else OF_ARITHMETIC), asked)


if __name__ == "__main__":
    main()
