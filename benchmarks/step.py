"""Time and peak memory of one training step, as ratios to backpropagation in the same run.

    python benchmarks/step.py                                  # mlp, cnn and alexnet, batch 64
    python benchmarks/step.py --networks cnn --estimators fdfa dfa --turns 15 --json step.json
    python benchmarks/step.py --networks resnet18-8b --batch-size 32 --estimators local fg-local-activation fg-local-weight

A step is ``zero_grad``, ``estimate`` and Adam's update of everything that learns. Times: medians of ratios taken in turn.
Memory: growth of a fresh process's largest resident size over three steps, network, gradients and optimizer included.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from measure import ESTIMATORS, in_a_fresh_process, in_turn, peak_of, ratio

from onward.lab.config import Network
from onward.lab.models import build

NETWORKS = {  # image shape, classes, steps in a turn
    "mlp": ((1, 28, 28), 10, 20),
    "cnn": ((3, 32, 32), 10, 5),
    "alexnet": ((3, 224, 224), 100, 1),
    "resnet18-8b": ((3, 32, 32), 10, 1),
}


def make_step(network: str, estimator: str, batch_size: int, fused: bool) -> Callable[[], object]:
    shape, classes, _ = NETWORKS[network]
    torch.manual_seed(0)
    x = torch.randn(batch_size, *shape)
    learner = ESTIMATORS[estimator](build(network, shape, classes, Network()), x)
    optimizer = torch.optim.Adam(learner.parameter_groups(), lr=1e-4, fused=fused)

    def step() -> None:
        # Labels that cannot be learned: gradients that fade would fill Adam's averages with slow denormal numbers.
        y = torch.randint(classes, (batch_size,))
        optimizer.zero_grad()
        learner.estimate(x, y)
        optimizer.step()

    return step


def peak(network: str, estimator: str, batch_size: int, fused: bool, threads: int) -> int:
    torch.set_num_threads(threads)

    def work() -> None:
        step = make_step(network, estimator, batch_size, fused)
        for _ in range(3):
            step()

    return peak_of(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["mlp", "cnn", "alexnet"])
    direct = [name for name in ESTIMATORS if "local" not in name]
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=direct)
    parser.add_argument("--turns", type=int, default=7, help="turns that each estimator takes")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fused", action="store_true", help="the fused form of Adam, as `onward train` uses it")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ["bp", *(name for name in options.estimators if name != "bp")]
    print(f"torch {torch.__version__}, {options.threads} threads, batch {options.batch_size}, Adam{' (fused)' * options.fused}")
    rows = []
    for network in options.networks:
        steps = {name: make_step(network, name, options.batch_size, options.fused) for name in names}
        times = in_turn(steps, options.turns, NETWORKS[network][2])
        del steps
        peaks = {
            name: in_a_fresh_process(peak, network, name, options.batch_size, options.fused, options.threads) for name in names
        }
        print(f"\n{network:26}{'ms/step':>9}  time / bp (least, greatest)   peak MB  memory / bp")
        for name in names:
            middle, least, greatest = ratio(times[name], times["bp"])
            rows.append(
                {
                    "network": network,
                    "estimator": name,
                    "seconds": statistics.median(times[name]),
                    "time_ratio": middle,
                    "time_ratio_range": [least, greatest],
                    "peak_bytes": peaks[name],
                    "memory_ratio": peaks[name] / peaks["bp"],
                }
            )
            print(
                f"  {name:24}{1e3 * statistics.median(times[name]):9.1f}  {middle:9.2f} ({least:.2f}, {greatest:.2f})"
                f"{peaks[name] / 1e6:18.0f}{peaks[name] / peaks['bp']:13.2f}"
            )
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "threads": options.threads, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
