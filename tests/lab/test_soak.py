"""Hours of training take no more memory than minutes.

ONWARD_SOAK_MINUTES (60 if not given) are shared among the estimators.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from onward.estimators.base import ALGORITHMS
from onward.lab.run import checkpoint
from onward.lab.run.loop import Standing, evaluate, load_data, prepare, train_epoch
from onward.lab.settings import Heads, Network, Subset, Train
from onward.lab.system.memory import STATUS
from tests.lab.test_resume import FAMILIES

ESTIMATORS: dict[str, dict[str, Any]] = {
    **{name: {"algorithm": name} for name, algorithm in ALGORITHMS.items() if not algorithm.needs_heads()},
    **FAMILIES,
    "bp-checkpoint": {"algorithm": "bp:checkpoint=true"},
    "dfa-low-memory": {"algorithm": "dfa:low_memory=true"},
    "fg-local": {"algorithm": "fg:guess=local", "heads": Heads("mlp")},
    "fg-local-weights": {"algorithm": "fg:guess=local,space=weight,engine=reverse", "heads": Heads("linear")},
    "fg-span": {"algorithm": "fg:guess=local,space=span-weight,engine=reverse", "heads": Heads("linear")},
}
MINUTES = float(os.environ.get("ONWARD_SOAK_MINUTES", "60")) / len(ESTIMATORS)
WARM_UP = 0.3
"""Part of the time, after which memory has to stay as it is."""


def resident() -> int:
    """Bytes of the process that are in memory."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def soak(changes: dict[str, Any], folder: Path) -> tuple[int, list[int]]:
    """Train, test and save, epoch after epoch; gives the number of steps, and the memory after each epoch once warm."""
    torch.set_num_threads(1)
    small = Train(
        data="digits",
        model="cnn",
        epochs=10**6,
        device="cpu",
        network=Network(width=0.2),
        subset=Subset(train=256, test=64),
    )
    config = replace(small, transform=replace(small.transform, size=12), **changes)
    run = prepare(config, load_data(config))
    begin, steps, measured = time.monotonic(), 0, []
    while (passed := time.monotonic() - begin) < 60 * MINUTES:
        at = Standing()
        steps += sum(1 for _ in train_epoch(run, at))
        evaluate(run)
        checkpoint.save(folder / "checkpoint.pt", run.state(at))
        if passed > 60 * MINUTES * WARM_UP:
            measured.append(resident())
    return steps, measured or [resident()]


def test_every_algorithm_is_among_them() -> None:
    assert {changes["algorithm"].partition(":")[0] for changes in ESTIMATORS.values()} == set(ALGORITHMS)


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_memory_stays_flat(estimator: str, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        steps, measured = pool.apply(soak, (ESTIMATORS[estimator], tmp_path))
    least, most = min(measured), max(measured)
    print(f"{estimator}: {steps} steps, {least / 1e6:.1f} to {most / 1e6:.1f} MB, {100 * (most / least - 1):.2f} %")
    assert most < 1.02 * least
