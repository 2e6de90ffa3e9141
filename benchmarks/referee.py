"""At equal time, and at equal memory and time: zeroth order, forward mode, direct feedback, local losses or backpropagation?

    OMP_NUM_THREADS=1 python benchmarks/referee.py          a GPT-2 of 10.8 million parameters; 10 minutes of one core
    python benchmarks/referee.py --device cuda --layers 24 --features 2048 --batch-size 32 --seconds 60

Two tasks, in bytes of text that comes with Python. *scratch*: Python's reference, from random weights. *lora*: the standard
library's source, by adapters of rank 8 on weights that backpropagation has trained on the reference for `--pretrain` seconds.

Every candidate is a process of its own. It measures its peak memory at two batch sizes, from which follows the largest batch
within the budget: what backpropagation takes at `--budget-batch`. Then it trains twice for as long: with the common batch
size (equal time), and with the largest (equal memory and time, at most 128). Seconds are those of the processor, so that
other work on the machine does not count; on a GPU they are the clock's. Needs `pip install onward[hf]`.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import multiprocessing
import random
import tempfile
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import onward
from onward.lab.data import Data, load
from onward.lab.data.batches import batches
from onward.lab.data.text import of_text
from onward.lab.networks import models
from onward.lab.run import algorithms
from onward.lab.run.optimizers import make_optimizers
from onward.lab.settings import Network, Optimizer, Text, Train, Transform
from onward.lab.system import generators, memory
from onward.lab.tasks import NEXT

CANDIDATES = {
    "bp": {"scratch": 1e-3, "lora": 1e-3},
    "bp:checkpoint=true": {"scratch": 1e-3, "lora": 1e-3},
    "spsa": {"scratch": 1e-4, "lora": 5e-4},
    "fg:space=avg-weight": {"scratch": 1e-4, "lora": 5e-4},
    "fg:guess=local": {"scratch": 1e-3, "lora": 1e-3},
    "fdfa": {"scratch": 1e-3, "lora": 1e-3},
    "dfa": {"scratch": 1e-3, "lora": 1e-3},
    "local": {"scratch": 1e-3, "lora": 1e-3},
}
"""Learning rates by task, of Adam; those of the two that store no gradient are of plain descent (`lean`)."""
LEAN = ("spsa", "fg:space=avg-weight")
SIZES = 2, 8
"""Batch sizes at which memory is measured."""
LARGEST, RANK = 128, 8
SOURCES = (argparse, collections, datetime, random, typing)
TASK = NEXT["byte"]


def data_of(task: str, options: argparse.Namespace) -> Data:
    """What is learned."""
    text = Text(unit="bytes", window=options.tokens)
    if task == "scratch":
        return load("python-reference", text=text)
    return of_text("the standard library", b"\n".join(Path(str(module.__file__)).read_bytes() for module in SOURCES), text)


def config_of(name: str, task: str, folder: str, options: argparse.Namespace) -> Train:
    """The run, as `onward train` would be told it."""
    block = "network.base_model.model.transformer.h" if task == "lora" else "network.transformer.h"
    return Train(
        algorithm=name if name != "inference" else "bp",
        model=f"hf:{folder}",
        cuts=None if name in LEAN else tuple(f"{block}.{k}" for k in range(options.layers - 1)),
        lr=CANDIDATES.get(name, {task: 1e-3})[task],
        optimizer=Optimizer("lean" if name in LEAN else "adam"),
        network=Network(lora=RANK if task == "lora" else None),
        device=options.device,
    )


class Learner:
    """A network, its estimator and its optimizers."""

    def __init__(self, config: Train, tokens: int) -> None:
        generators.seed(0)
        self.device = torch.device(config.device)
        example = torch.zeros(2, tokens, dtype=torch.int64)
        sizes: dict[str, Any] = {"vocabulary": 256, "positions": (tokens,)}
        model = models.build(config.model, (tokens,), 256, config.network, example, **sizes).to(self.device)
        self.estimator = algorithms.build(model, config, example.to(self.device), TASK.loss)
        self.estimator.check = False  # a look at the first batch is no part of a step
        self.optimizers = list(make_optimizers(config, self.estimator).values())

    def step(self, x: Any, y: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.estimator.estimate(x, y)
        for optimizer in self.optimizers:
            optimizer.step()

    @torch.no_grad()
    def look(self, x: Any, y: Any) -> None:
        TASK.loss(self.estimator(x), y)

    @torch.no_grad()
    def bits(self, data: Data, windows: int = 64) -> float:
        """Bits per byte on the first windows of the test part."""
        found = [TASK.main.measure(self.estimator(x), y) for x, y in served(data.test.part(range(windows)), 32, self.device)]
        return TASK.main.value(torch.stack(found).sum(0).cpu(), windows)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def served(split: Any, size: int, device: torch.device, epoch: int | None = None) -> Iterator[Any]:
    """Batches of a part of the data, in an order of an epoch, or as they come."""
    return batches(split, size, transform=Transform(), train=epoch is not None, epoch=epoch or 0, device=device)


def train(config: Train, data: Data, size: int, options: argparse.Namespace) -> tuple[float, int, float]:
    """Bits per byte after training for so many seconds, the steps made, and the seconds of one."""
    learner = Learner(config, options.tokens)
    steps, spent, epoch = 0, 0.0, 0
    while spent < options.seconds:
        for x, y in served(data.train, size, learner.device, epoch):
            start = learner.clock()
            learner.step(x, y)
            steps, spent = steps + 1, spent + learner.clock() - start
            if spent >= options.seconds:
                break
        epoch += 1
    return learner.bits(data), steps, spent / steps


def peak(config: Train, size: int, tokens: int, *, learns: bool = True) -> int:
    """Bytes by which memory grew over three steps, the network included."""
    device = torch.device(config.device)
    x, y = torch.randint(256, (2, size, tokens), device=device)
    memory.keep_freed()
    memory.reset_peak(device)
    before = memory.peak(device)
    learner = Learner(config, tokens)
    for _ in range(3):
        (learner.step if learns else learner.look)(x, y)
    return memory.peak(device) - before


def judge(name: str, task: str, folder: str, budget: float | None, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a candidate: its row of the table."""
    torch.set_num_threads(1)
    config, learns = config_of(name, task, folder, options), name != "inference"
    if options.device == "cpu":
        Learner(config, options.tokens).step(*torch.zeros(2, 1, options.tokens, dtype=torch.int64))  # loads what steps need
    peaks = [isolated(peak, config, size, options.tokens, learns=learns) for size in SIZES]
    each = max(0.0, (peaks[1] - peaks[0]) / (SIZES[1] - SIZES[0]))
    rest = peaks[0] - SIZES[0] * each
    row: dict[str, Any] = {"peak": rest + options.batch_size * each}
    budget = budget or rest + options.budget_batch * each
    row["budget"] = budget
    if learns and not options.memory_alone:
        data = data_of(task, options)
        row["bits"], row["steps"], row["seconds"] = train(config, data, options.batch_size, options)
        fits = max(0, min(LARGEST, int(round((budget - rest) / each, 3)) if each else LARGEST))
        row["fits"] = fits
        if fits >= 1:
            row["bits fitting"], *_ = train(config, data, fits, options)
    return row


def isolated(function: Any, *arguments: Any, **named: Any) -> Any:
    """What a function returns in a process that is forked for it."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send(function(*arguments, **named)))
    process.start()
    send.close()  # so that a process which dies ends the waiting
    found = receive.recv()
    process.join()
    return found


def pretrained(folder: Path, options: argparse.Namespace) -> None:
    """Write the weights that adapters begin with."""
    torch.set_num_threads(1)
    config = config_of("bp", "scratch", str(folder / "drawn"), options)
    learner, data, spent = Learner(config, options.tokens), data_of("scratch", options), 0.0
    for epoch in range(10**6):
        for x, y in served(data.train, 8, learner.device, epoch):
            start = learner.clock()
            learner.step(x, y)
            spent += learner.clock() - start
            if spent >= options.pretrain:
                network: Any = learner.estimator.model.network
                network.save_pretrained(folder / "trained")
                known, new = learner.bits(data), learner.bits(data_of("lora", options))
                print(f"before adapters: {known:.3f} bits per byte on the reference, {new:.3f} on the library", flush=True)
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--features", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--budget-batch", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--pretrain", type=float, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", nargs="+", default=["scratch", "lora"], choices=["scratch", "lora"])
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--memory-alone", action="store_true", help="measure memory and leave out training")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu, 1 thread"
    size = f"{options.layers} layers x {options.features}, batches of {options.batch_size} x {options.tokens}"
    print(f"onward {onward.__version__}, torch {torch.__version__}, {where}; {size}, {options.seconds:g} s of training")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        transformers.GPT2Config(
            n_layer=options.layers, n_embd=options.features, n_head=max(1, options.features // 64), n_positions=options.tokens,
            vocab_size=256, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ).save_pretrained(folder / "drawn")  # fmt: skip
        if "lora" in options.tasks:
            isolated(pretrained, folder, options)
        for task in options.tasks:
            show(task, str(folder / ("trained" if task == "lora" else "drawn")), options)


def show(task: str, folder: str, options: argparse.Namespace) -> None:
    """Print the table of a task, row by row."""
    print(
        f"\n{task}\n{'':24}{'bits':>8}{'ms/step':>9}{'steps':>7}{'MB':>7}{'/inference':>11}{'fits':>6}{'bits':>8}", flush=True
    )
    budget, inference = None, None
    for name in ["inference", *options.candidates]:
        row = isolated(judge, name, task, folder, budget, options)
        inference = inference or row["peak"]
        budget = budget or (row["budget"] if name == "bp" else None)
        cells = f"{row['bits']:8.3f}{1e3 * row['seconds']:9.0f}{row['steps']:7}" if "bits" in row else " " * 24
        last = f"{row['fits']:6}" + (f"{row['bits fitting']:8.3f}" if "bits fitting" in row else "") if "fits" in row else ""
        print(f"{name:24}{cells}{row['peak'] / 1e6:7.0f}{row['peak'] / inference:11.2f}{last}", flush=True)


if __name__ == "__main__":
    main()
