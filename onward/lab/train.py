"""The training loop."""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer

import onward
from onward.alignment import Block, measure
from onward.errors import UsageError
from onward.lab import algorithms, log, memory, models, run_folder
from onward.lab.batches import Transform, batches
from onward.lab.config import Train
from onward.lab.data import ImageData, held_out, load
from onward.lab.schedules import Rate

Row = dict[str, Any]
OPTIMIZERS = {"adam": partial(torch.optim.Adam, fused=True), "sgd": torch.optim.SGD}


class TrainingFailed(RuntimeError):
    """Training cannot go on: a loss is no longer a finite number."""


@dataclass(frozen=True)
class Run:
    """Everything that one training works with."""

    config: Train
    data: ImageData
    device: torch.device
    transform: Transform
    estimator: onward.Estimator
    optimizers: dict[str, Optimizer]
    rate: Rate
    steps: int
    """Of one epoch."""
    drop_last: bool
    """Leave out the last batch of an epoch, which is not full."""

    def training_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of one epoch, in its own order."""
        return batches(
            self.data.train,
            self.config.batch_size,
            transform=self.transform,
            train=True,
            seed=self.config.seed,
            epoch=epoch,
            device=self.device,
            drop_last=self.drop_last,
        )

    def state(self, epoch: int) -> dict[str, object]:
        """What a checkpoint holds."""
        return {
            "epoch": epoch,
            "estimator": self.estimator.state_dict(),
            "optimizers": {role: optimizer.state_dict() for role, optimizer in self.optimizers.items()},
            "schedule": self.rate.scheduler.state_dict(),
        }


def train(config: Train, data: ImageData | None = None, advance: Callable[[str], None] | None = None) -> list[Row]:
    """Train as `config` says, into a run folder; returns the rows of its metrics.jsonl, one per epoch.

    `data` saves loading it again. `advance`, if given, is called after every step, instead of anything being printed.

    Raises:
        UsageError: something that was asked for cannot work; nothing has been written then.
        TrainingFailed: a loss is not finite; the checkpoint of the last good epoch stays.
    """
    algorithms.check(config.algorithm)
    models.check(config.model)
    log.check(config)
    folder = Path(config.out or run_folder.default_path(config, f"{config.algorithm}-s{config.seed}"))
    with run_folder.claimed(folder, overwrite=config.overwrite):
        run = prepare(config, data or load_data(config))
        aligned = align(run) if config.align_every else None  # says so now if there is nothing to align
    device = describe(run.device)
    run_folder.begin(
        folder,
        config,
        engine=run.estimator.engine,
        parameters=sum(parameter.numel() for parameter in run.estimator.model.parameters()),
        device=device,
        onward=onward.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
    )
    console = Console(highlight=False, soft_wrap=True, quiet=advance is not None)
    console.print(
        f"{config.algorithm} ({run.estimator.engine}), {config.model}, {run.data.name}: {len(run.data.train)} training and "
        f"{len(run.data.test)} test images of {run.data.classes} classes; {device}, seed {config.seed}"
    )
    rows: list[Row] = []
    peak = 0
    try:
        with log.open_log(folder, config) as write, _advancing(advance, console, config.epochs * run.steps) as step_done:

            def keep_alignment(epoch: int, measured: dict[str, Block]) -> None:
                run_folder.add_alignment(folder, run_folder.alignment_entry(epoch, config.align_estimates, measured))
                shown = {name: block.cosines.flatten() for name, block in measured.items() if block.cosines is not None}
                write({"alignment": shown}, epoch * run.steps)

            if aligned:
                keep_alignment(0, aligned)
            memory.reset_peak(run.device)
            for epoch in range(1, config.epochs + 1):

                def report(step: int, loss: float, epoch: int = epoch) -> None:
                    step_done(f"epoch {epoch}/{config.epochs}, loss {loss:.3f}")
                    if step % config.log_interval == 0:
                        write({"step/train_loss": loss}, (epoch - 1) * run.steps + step)

                row = {"epoch": epoch, **train_epoch(run, epoch, report), **evaluate(run)}
                peak = max(peak, memory.peak(run.device))
                row["peak_memory_bytes"] = peak
                run_folder.write_checkpoint(folder, run.state(epoch))
                run_folder.add_metrics(folder, row)
                rows.append(row)
                write(row, epoch * run.steps)
                if config.save_weights and (epoch % config.save_weights == 0 or epoch == config.epochs):
                    run_folder.write_weights(folder, epoch, run.estimator.model.state_dict())
                if config.align_every and (epoch % config.align_every == 0 or epoch == config.epochs):
                    keep_alignment(epoch, align(run))
                    memory.reset_peak(run.device)  # what looking takes is not the training's
                console.print(
                    "epoch {epoch}  train loss {train_loss:.4f}  test loss {test_loss:.4f}  "
                    "test accuracy {test_accuracy:.2f} %  {seconds:.1f} s".format(**row)
                )
    except TrainingFailed as error:
        run_folder.write_failure(folder, str(error))
        raise TrainingFailed(f"{error}; {_kept(folder, rows)}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(folder, rows)) from None
    console.print(f"written to {folder}")
    return rows


def prepare(config: Train, data: ImageData) -> Run:
    """The network, its estimator and its optimizers, before the first step.

    Raises:
        UsageError: the configuration and the data do not fit together.
    """
    device = choose_device(config.device)
    transform = replace(config.transform, size=config.transform.size or models.IMAGE_SIZE.get(config.model))
    batches(data.train, config.batch_size, transform=transform, train=True)  # says so now if they cannot be made as asked
    channels, *size = data.shape
    size = [transform.size] * 2 if transform.size else size
    torch.manual_seed(config.seed)
    model = models.build(config.model, (channels, *size), data.classes, config.network).to(device)
    estimator = algorithms.build(model, config, torch.zeros(2, channels, *size, device=device))
    optimizers = make_optimizers(config, estimator)
    drop_last = _leaves_one(len(data.train), config.batch_size, model)
    full, rest = divmod(len(data.train), config.batch_size)
    steps = full + (rest > 0 and not drop_last)
    rate = Rate(config.schedule, optimizers["network"], epochs=config.epochs, steps=steps)
    return Run(config, data, device, transform, estimator, optimizers, rate, steps, drop_last)


def train_epoch(run: Run, epoch: int, report: Callable[[int, float], None]) -> Row:
    """One pass over the training images; `seconds` is the time it took, `heads` each head's loss and accuracy (percent)."""
    start = time.perf_counter()
    total, seen = 0.0, 0
    heads: dict[str, Tensor] = {}
    run.estimator.train()
    for step, (x, y) in enumerate(run.training_batches(epoch), start=1):
        for optimizer in run.optimizers.values():
            optimizer.zero_grad()
        done = run.estimator.estimate(x, y)
        loss = done.loss.item()
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the training loss is {loss} at epoch {epoch}, step {step} of {run.steps} ({_culprit(run.estimator, x)})"
            )
        for optimizer in run.optimizers.values():
            optimizer.step()
        run.rate.after_step()
        total, seen = total + loss * len(y), seen + len(y)
        for cut, (head_loss, logits) in done.heads.items():
            sums = torch.stack([head_loss * len(y), (logits.argmax(1) == y).sum()])
            heads[cut] = heads[cut] + sums if cut in heads else sums
        report(step, loss)
    run.rate.after_epoch(total / seen)
    row: Row = {"train_loss": total / seen, "seconds": time.perf_counter() - start}
    if heads:
        totals = {cut: sums.tolist() for cut, sums in heads.items()}
        row["heads"] = {cut: {"loss": loss / seen, "accuracy": 100 * hits / seen} for cut, (loss, hits) in totals.items()}
    return row


@torch.no_grad()
def evaluate(run: Run) -> Row:
    """Mean loss and accuracy (percent) on the test images, in eval mode."""
    run.estimator.eval()
    loss, correct = 0.0, 0
    stream = batches(run.data.test, run.config.test_batch_size, transform=run.transform, train=False, device=run.device)
    for x, y in stream:
        logits = run.estimator(x)
        loss += run.estimator.loss(logits, y).item() * len(y)
        correct += int((logits.argmax(1) == y).sum())
    n = len(run.data.test)
    if not math.isfinite(loss):
        raise TrainingFailed(f"the test loss is {loss} after an epoch ({_culprit(run.estimator, x)})")
    return {"test_loss": loss / n, "test_accuracy": 100 * correct / n}


def align(run: Run) -> dict[str, Block]:
    """How the estimates of each block agree with its true gradient, on the same batch every time."""
    run.estimator.train()
    x, y = next(run.training_batches(1))
    return measure(run.estimator, x, y, estimates=run.config.align_estimates, cuts=run.config.cuts)


def load_data(config: Train) -> ImageData:
    """The images that `config` names."""
    data = load(config.data, config.data_dir, train_samples=config.subset.train, test_samples=config.subset.test)
    return held_out(data) if config.subset.held_out else data


def make_optimizers(config: Train, estimator: onward.Estimator) -> dict[str, Optimizer]:
    """One optimizer for the network and its heads, and one for feedback if the estimator has any."""
    options = {"lr": config.lr, "weight_decay": config.optimizer.weight_decay}
    if config.optimizer.name == "sgd":
        options["momentum"] = config.optimizer.momentum
    groups = estimator.parameter_groups(
        network=options, heads=options, feedback={"lr": config.feedback.lr, "weight_decay": config.feedback.decay}
    )
    feedback = [group for group in groups if group["role"] == "feedback"]
    optimizers = {"network": OPTIMIZERS[config.optimizer.name]([group for group in groups if group not in feedback])}
    if feedback:
        optimizers["feedback"] = OPTIMIZERS[config.feedback.optimizer](feedback)
    return optimizers


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU if there is one.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(f"--device {name} cannot be used ({reason}): use cpu, or auto") from error
    return device


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _leaves_one(images: int, batch_size: int, model: nn.Module) -> bool:
    """Whether the last batch would be a single image, which batch norm can do nothing with.

    Raises:
        UsageError: every batch would be one.
    """
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return False
    for what, number in (("--batch-size", batch_size), ("training images:", images)):
        if number == 1:
            raise UsageError(f"{what} 1: this network has batch norm, which needs at least 2 images in a batch")
    return images % batch_size == 1


def _culprit(estimator: onward.Estimator, x: Tensor) -> str:
    """The first thing that is not finite, from the input on."""
    named: Iterable[tuple[str, Tensor]] = [("the input", x), *estimator.model.state_dict().items()]
    for name, tensor in named:
        if not tensor.isfinite().all():
            return f"{name} is not finite"
    return "the network's parameters are finite, its output is not"


def _kept(folder: Path, rows: list[Row]) -> str:
    if not rows:
        return "no epoch was completed, so there is no checkpoint"
    return f"{folder / run_folder.CHECKPOINT} keeps the state after epoch {len(rows)}"


def _advancing(
    advance: Callable[[str], None] | None, console: Console, total: int
) -> contextlib.AbstractContextManager[Callable[[str], None]]:
    return contextlib.nullcontext(advance) if advance else progress(console, total)


@contextlib.contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """One progress bar; the function that it gives advances it by a step, or by as many as it is told."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda description, steps=1: bar.update(task, advance=steps, description=description)
