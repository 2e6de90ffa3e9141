"""The training loop."""

from __future__ import annotations

import contextlib
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer

import onward
from onward.alignment import Block, measure
from onward.cuts import frozen_statistics
from onward.directions import seed_of
from onward.distributed import STATISTICS
from onward.errors import UsageError, unknown
from onward.lab import algorithms, checkpoint, interrupt, log, memory, models, processes, run_folder
from onward.lab.batches import Transform, batches
from onward.lab.config import Train
from onward.lab.data import ImageData, held_out, load
from onward.lab.processes import ALONE, Processes
from onward.lab.schedules import Rate

Row = dict[str, Any]
OPTIMIZERS = {"adam": partial(torch.optim.Adam, fused=True), "sgd": torch.optim.SGD}


class TrainingFailed(RuntimeError):
    """Training cannot go on: a loss or a gradient is no longer a finite number."""


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
    processes: Processes = ALONE

    def training_batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's images of one epoch, in its own order, without its first `skip` batches."""
        return batches(
            self.data.train,
            self.config.batch_size,
            transform=self.transform,
            train=True,
            seed=self.config.seed,
            epoch=epoch,
            skip=skip,
            device=self.device,
            drop_last=self.drop_last,
            rank=self.processes.rank,
            processes=self.processes.count,
        )

    def step(self, x: Tensor, y: Tensor, where: str) -> onward.Step:
        """One step of training; `where` it is goes into the message if it fails.

        Raises:
            TrainingFailed: the loss or a gradient is not finite; the weights are still those before the step.
        """
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        done = self.estimator.estimate(x, y)
        _check_finite(self.estimator, done.loss, x, where)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.rate.after_step()
        return done

    def state(self, at: Standing) -> dict[str, object]:
        """What a checkpoint holds: all that decides how the run goes on."""
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "rows": at.rows,
            "progress": {name: value for name, value in vars(at).items() if name != "rows"},
            "estimator": self.estimator.state_dict(),
            "optimizers": {role: optimizer.state_dict() for role, optimizer in self.optimizers.items()},
            "schedule": self.rate.scheduler.state_dict(),
            "generators": self.processes.everyones(generators),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint; where its run stands is for `standing` to say.

        Raises:
            UsageError: it is of another run.
        """
        try:
            self.estimator.load_state_dict(state["estimator"])
            for role, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][role])
            self.rate.scheduler.load_state_dict(state["schedule"])
            if self.processes.rank < len(state["generators"]):  # it may have been saved by fewer processes
                generators = state["generators"][self.processes.rank]
                torch.set_rng_state(generators["cpu"])
                if self.device.type == "cuda" and "cuda" in generators:
                    torch.cuda.set_rng_state(generators["cuda"], self.device)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"the checkpoint does not fit the run's configuration ({type(error).__name__}: {reason})"
            ) from error


@dataclass
class Standing:
    """Where a run stands: the epoch that it is in, how many steps of it are done, and what they have added up to."""

    rows: list[Row] = field(default_factory=list)
    """Of the epochs that are complete."""
    aligned: list[dict[str, Any]] = field(default_factory=list)
    """Lines of alignment.jsonl."""
    epoch: int = 1
    step: int = 0
    loss: float = 0.0
    """Over samples."""
    seen: int = 0
    """Samples."""
    heads: dict[str, Tensor] = field(default_factory=dict)
    """For each cut the sum of losses, and the number of hits."""
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def row(self) -> Row:
        """The epoch's training figures: `seconds` is the time of its steps, `heads` each head's loss and accuracy (percent)."""
        row: Row = {"epoch": self.epoch, "train_loss": self.loss / self.seen, "seconds": self.seconds}
        if self.heads:
            sums = {cut: pair.tolist() for cut, pair in self.heads.items()}
            row["heads"] = {
                cut: {"loss": loss / self.seen, "accuracy": 100 * hits / self.seen} for cut, (loss, hits) in sums.items()
            }
        return row


def standing(state: dict[str, Any], config: Train) -> Standing:
    """Where the run of a checkpoint stands.

    Raises:
        UsageError: it says nothing of the kind, or of another run.
    """
    import dacite

    try:
        at = dacite.from_dict(Standing, {**state["progress"], "rows": state["rows"]}, dacite.Config(strict=True))
    except (KeyError, TypeError, dacite.DaciteError) as error:
        raise UsageError(f"the checkpoint does not say where its run stands ({error})") from error
    if at.epoch != len(at.rows) + 1 or at.epoch > config.epochs + 1:
        raise UsageError(f"the checkpoint is in epoch {at.epoch} of {config.epochs}, with {len(at.rows)} behind it")
    return at


def train(config: Train, data: ImageData | None = None, advance: Callable[[str], None] | None = None) -> list[Row]:
    """Train as `config` says, into a run folder; returns the rows of its metrics.jsonl, one per epoch.

    `data` saves loading it again. `advance`, if given, is called after every step, instead of anything being printed. Under
    `torchrun` every process trains on its part of each batch, and the first one writes.

    Raises:
        UsageError: something that was asked for cannot work; nothing has been written then.
        TrainingFailed: a loss or a gradient is not finite; the last checkpoint stays.
    """
    folder = Path(config.out or run_folder.default_path(config, f"{config.algorithm}-s{config.seed}"))
    with processes.joined(config.device) as group, contextlib.ExitStack() as until_the_end:
        with group.agreeing():
            algorithms.check(config.algorithm)
            models.check(config.model)
            log.check(config)
            claim = run_folder.claimed(folder, overwrite=config.overwrite) if group.writes else contextlib.nullcontext()
            with claim:
                if group.writes:
                    until_the_end.enter_context(run_folder.held(folder))
                run = prepare(config, data or load_data(config), group)
                aligned = align(run) if config.align_every else None  # says so now if there is nothing to align
        if group.writes:
            run_folder.begin(
                folder,
                config,
                engine=run.estimator.engine,
                parameters=sum(parameter.numel() for parameter in run.estimator.model.parameters()),
                device=describe(run.device),
                processes=group.count,
                onward=onward.__version__,
                torch=torch.__version__,
                python=platform.python_version(),
            )
        return _go_on(run, folder, Standing(), advance, aligned)


def resume(folder: Path, data: ImageData | None = None, advance: Callable[[str], None] | None = None) -> list[Row]:
    """Go on with the run in `folder` from its last checkpoint, as if it had never stopped; what is complete is left alone.

    Under `torchrun` with as many processes as there are now.

    Raises:
        UsageError: there is no run, or neither its configuration nor a checkpoint of it can be used.
        TrainingFailed: as `train`.
    """
    config = replace(run_folder.settings(folder), out=str(folder))
    with processes.joined(config.device) as group, contextlib.ExitStack() as until_the_end:
        aligned = None
        with group.agreeing():
            log.check(config)
            if group.writes:
                until_the_end.enter_context(run_folder.held(folder))
            state = checkpoint.load(folder / run_folder.CHECKPOINT)
            at = Standing() if state is None else standing(state, config)
            complete = len(at.rows) == config.epochs
            if not complete:
                run = prepare(config, data or load_data(config), group)
                if state is not None:
                    run.restore(state)
                aligned = align(run) if state is None and config.align_every else None
        if group.writes and state is not None:
            run_folder.write_metrics(folder, at.rows)
            run_folder.write_alignment(folder, at.aligned)
            run_folder.forget_failure(folder)
        if complete:
            _console(group, advance).print(f"{folder} is complete")
            return at.rows
        return _go_on(run, folder, at, advance, aligned)


def _go_on(
    run: Run,
    folder: Path,
    at: Standing,
    advance: Callable[[str], None] | None,
    aligned: dict[str, Block] | None = None,
) -> list[Row]:
    """Train from where the run stands to its end."""
    config = run.config
    group = run.processes
    console = _console(group, advance)
    several = f", {group.count} processes" if group.count > 1 else ""
    where = f", on from epoch {at.epoch}, step {at.step}" if at.rows or at.step else ""
    console.print(
        f"{config.algorithm} ({run.estimator.engine}), {config.model}, {run.data.name}: {len(run.data.train)} training and "
        f"{len(run.data.test)} test images of {run.data.classes} classes; {describe(run.device)}{several}, seed {config.seed}"
        f"{where}"
    )
    due = _due(config.checkpoint_every)

    def save() -> None:
        state = run.state(at)
        if group.writes:
            checkpoint.save(folder / run_folder.CHECKPOINT, state)

    def keep_alignment(epoch: int, measured: dict[str, Block]) -> list[dict[str, Any]]:
        shown = {name: block.cosines.flatten() for name, block in measured.items() if block.cosines is not None}
        write({"alignment": shown}, epoch * run.steps)
        return [*at.aligned, run_folder.alignment_entry(epoch, config.align_estimates, measured)]

    done = (at.epoch - 1) * run.steps + at.step
    try:
        if group.count > 1:
            onward.distribute(run.estimator, statistics=config.statistics)
        with (
            log.open_log(folder, config, done) if group.writes else contextlib.nullcontext(_nothing) as write,
            _advancing(advance, console, config.epochs * run.steps, done) as step_done,
            interrupt.requests() as asked_to_stop,
        ):
            if aligned:
                at.aligned = keep_alignment(0, aligned)
            memory.reset_peak(run.device)
            while at.epoch <= config.epochs:
                for loss in train_epoch(run, at):
                    step_done(f"epoch {at.epoch}/{config.epochs}, loss {loss:.3f}")
                    if at.step % config.log_interval == 0:
                        write({"step/train_loss": loss}, (at.epoch - 1) * run.steps + at.step)
                    request = asked_to_stop()
                    stop, save_now = group.any([request is not None, group.writes and due()])
                    if stop or save_now:
                        save()
                    if stop:
                        group.leave(130)
                        _stop(folder, at, request or "a request to another process")
                run.rate.after_epoch(at.loss / at.seen)
                peak = max(at.peak_memory_bytes, memory.peak(run.device))
                row = {**at.row(), **evaluate(run), "peak_memory_bytes": peak}
                epoch = at.epoch
                entries = at.aligned
                if config.align_every and (epoch % config.align_every == 0 or epoch == config.epochs):
                    entries = keep_alignment(epoch, align(run))
                memory.reset_peak(run.device)  # what testing and looking take is not the training's
                if group.writes and config.save_weights and (epoch % config.save_weights == 0 or epoch == config.epochs):
                    run_folder.write_weights(folder, epoch, run.estimator.model.state_dict())
                at = Standing([*at.rows, row], entries, epoch + 1, peak_memory_bytes=peak)
                save()
                if group.writes:
                    run_folder.write_metrics(folder, at.rows)
                    run_folder.write_alignment(folder, at.aligned)
                write(row, epoch * run.steps)
                console.print(
                    "epoch {epoch}  train loss {train_loss:.4f}  test loss {test_loss:.4f}  "
                    "test accuracy {test_accuracy:.2f} %  {seconds:.1f} s".format(**row)
                )
    except onward.ProcessLost as error:
        raise TrainingFailed(f"{error}; {_kept(folder)}: onward train --resume {folder} goes on") from None
    except TrainingFailed as error:  # in every process at once
        group.leave(1)
        with contextlib.suppress(OSError):  # a disk that is full too must not hide why
            run_folder.write_failure(folder, str(error))
        raise TrainingFailed(f"{error}; {_kept(folder)}") from None
    except OSError as error:  # a disk that is full, images that do not come
        raise OSError(f"{error}, then go on by onward train --resume {folder}; {_kept(folder)}") from error
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(str(stopped) or _kept(folder)) from None
    console.print(f"written to {folder}")
    return at.rows


def prepare(config: Train, data: ImageData, group: Processes = ALONE) -> Run:
    """The network, its estimator and its optimizers, before the first step.

    Raises:
        UsageError: the configuration and the data do not fit together.
    """
    if config.statistics not in STATISTICS:
        raise unknown("handling of batch norm's statistics", config.statistics, STATISTICS)
    device = choose_device(config.device)
    transform = replace(config.transform, size=config.transform.size or models.IMAGE_SIZE.get(config.model))
    batches(data.train, config.batch_size, transform=transform, train=True)  # says so now if they cannot be made as asked
    channels, *size = data.shape
    size = [transform.size] * 2 if transform.size else size
    torch.manual_seed(config.seed)
    model = models.build(config.model, (channels, *size), data.classes, config.network).to(device)
    estimator = algorithms.build(model, config, torch.zeros(2, channels, *size, device=device))
    drop_last = _leaves_too_few(len(data.train), config.batch_size, model, group.count)
    if group.rank:
        torch.manual_seed(seed_of(config.seed, "process", group.rank))  # for masks of its own
    optimizers = make_optimizers(config, estimator)
    full, rest = divmod(len(data.train), config.batch_size)
    steps = full + (rest > 0 and not drop_last)
    rate = Rate(config.schedule, optimizers["network"], epochs=config.epochs, steps=steps)
    return Run(config, data, device, transform, estimator, optimizers, rate, steps, drop_last, group)


def train_epoch(run: Run, at: Standing) -> Iterator[float]:
    """The steps that are left of an epoch; yields each one's loss, once `at` counts it."""
    run.estimator.train()
    start = time.perf_counter()
    for x, y in run.training_batches(at.epoch, at.step):
        done = run.step(x, y, f"epoch {at.epoch}, step {at.step + 1} of {run.steps}")
        loss = done.loss.item()
        samples = min(run.config.batch_size, len(run.data.train) - at.step * run.config.batch_size)
        at.step, at.loss, at.seen = at.step + 1, at.loss + loss * samples, at.seen + samples
        if done.heads:
            hits = run.processes.total(torch.stack([(logits.argmax(1) == y).sum() for _, logits in done.heads.values()]))
            for (cut, (head_loss, _)), hit in zip(done.heads.items(), hits, strict=True):
                sums = torch.stack([head_loss * samples, hit])
                at.heads[cut] = at.heads[cut] + sums if cut in at.heads else sums
        at.seconds += time.perf_counter() - start
        yield loss
        start = time.perf_counter()  # what is done with the loss is not the step's time


@torch.no_grad()
def evaluate(run: Run) -> Row:
    """Mean loss and accuracy (percent) on the test images, in eval mode."""
    run.estimator.eval()
    loss, correct = 0.0, 0
    stream = batches(
        run.data.test,
        run.config.test_batch_size,
        transform=run.transform,
        train=False,
        device=run.device,
        rank=run.processes.rank,
        processes=run.processes.count,
    )
    x = torch.empty(0)
    for x, y in stream:
        logits = run.estimator(x)
        loss += run.estimator.loss(logits, y).item() * len(y)
        correct += int((logits.argmax(1) == y).sum())
    n = len(run.data.test)
    totals = torch.tensor([loss, correct], dtype=torch.float64, device=run.device)
    loss, correct = run.processes.total(totals).tolist()
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
    data = load(
        config.data,
        config.data_dir,
        train_samples=config.subset.train,
        test_samples=config.subset.test,
        patience=config.data_timeout,
    )
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
    optimizers = {"network": OPTIMIZERS[config.optimizer.name]([group for group in groups if group["role"] != "feedback"])}
    if feedback:
        optimizers["feedback"] = OPTIMIZERS[config.feedback.optimizer](feedback)
    return optimizers


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU if there is one.

    Raises:
        UsageError: no such device here.
    """
    if name in ("auto", "cuda") and processes.asked_for() > 1 and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())  # each process has its own
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


def _leaves_too_few(images: int, batch_size: int, model: nn.Module, count: int) -> bool:
    """Whether the last batch would give a process no image, or a single one, which batch norm can do nothing with.

    Raises:
        UsageError: every batch would.
    """
    norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    least = (2 if norm else 1) * count
    why = "this network has batch norm, which needs at least 2 images in a batch" if norm else "each needs at least 1 image"
    of = f", divided among {count} processes" if count > 1 else ""
    for what, number in (("--batch-size", batch_size), ("training images:", images)):
        if number < least:
            raise UsageError(f"{what} {number}{of}: {why}")
    return 0 < images % batch_size < least


def _nothing(*_: object) -> None:
    """Where the log would be, in a process that does not write."""


def _console(group: Processes, advance: Callable[[str], None] | None) -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True, quiet=advance is not None or not group.writes)


def _check_finite(estimator: onward.Estimator, loss: Tensor, x: Tensor, where: str) -> None:
    if not math.isfinite(loss.item()):
        raise TrainingFailed(f"the training loss is {loss.item()} at {where} ({_culprit(estimator, x)})")
    gradients = [p.grad for p in estimator.parameters() if p.grad is not None]
    if not nn.utils.get_total_norm(gradients).isfinite():
        for name, p in estimator.named_parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                raise TrainingFailed(f"the gradient of {name.removeprefix('model.')} is not finite at {where}")


def _culprit(estimator: onward.Estimator, x: Tensor) -> str:
    """The first thing that is not finite: the input, a parameter, the output of a module, a statistic."""
    model = estimator.model
    outputs = () if torch.distributed.is_initialized() else _outputs(model, x)  # the others may not run it again
    for name, tensor in itertools.chain([("the input", x)], model.named_parameters(), outputs, model.named_buffers()):
        if not tensor.isfinite().all():
            return f"{name} is not finite"
    return "the network's parameters are finite, its loss is not"


def _outputs(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What each module of the network makes of a batch, from the first to the last that returns."""
    found: list[tuple[str, Tensor]] = []

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append((f"the output of {name}" if name else "the network's output", output))

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: note(name, output))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad(), frozen_statistics(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    yield from found


def _kept(folder: Path) -> str:
    """What is left of a run that has failed."""
    try:
        state = checkpoint.load(folder / run_folder.CHECKPOINT)
    except UsageError as error:
        return str(error)
    if state is None:
        return "no epoch was completed, so there is no checkpoint"
    at = state["progress"]  # our own
    where = f"step {at['step']} of epoch {at['epoch']}" if at["step"] else f"epoch {at['epoch'] - 1}"
    return f"{folder / run_folder.CHECKPOINT} keeps the state after {where}"


def _stop(folder: Path, at: Standing, request: str) -> NoReturn:
    raise KeyboardInterrupt(
        f"{request} after step {at.step} of epoch {at.epoch}, which {folder} keeps: onward train --resume {folder} goes on"
    )


def _due(every: str) -> Callable[[], bool]:
    """A function to be called after every step: is it time for a checkpoint, by steps ("500") or minutes ("10m")?"""
    taken, last = 0, time.monotonic()

    def due() -> bool:
        nonlocal taken, last
        taken += 1
        minutes = every.endswith("m")
        reached = time.monotonic() - last >= 60 * float(every[:-1]) if minutes else taken >= int(every)
        if reached:
            taken, last = 0, time.monotonic()
        return reached

    return due


def _advancing(
    advance: Callable[[str], None] | None, console: Console, total: int, done: int
) -> contextlib.AbstractContextManager[Callable[[str], None]]:
    return contextlib.nullcontext(advance) if advance else progress(console, total, done)


@contextlib.contextmanager
def progress(console: Console, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """One progress bar; the function that it gives advances it by a step, or by as many as it is told."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda description, steps=1: bar.update(task, advance=steps, description=description)
