"""A training: all that it works with, a step of it, an epoch, a test, a look at its gradients."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

import onward
from onward.alignment import Block, measure
from onward.derivatives.directions import seed_of
from onward.errors import UsageError, unknown
from onward.lab.data.batches import Transform, batches
from onward.lab.data.images import ImageData, held_out, load
from onward.lab.networks import models
from onward.lab.run import algorithms, checkpoint, processes
from onward.lab.run import folder as run_folder
from onward.lab.run.processes import ALONE, Processes
from onward.lab.run.schedules import Rate
from onward.lab.settings import Recipe, Train
from onward.lab.system import generators, own
from onward.network.replay import frozen_statistics
from onward.parallel.shards import STATISTICS

Row = dict[str, Any]
OPTIMIZERS = {"adam": partial(torch.optim.Adam, fused=True), "sgd": torch.optim.SGD}


class TrainingFailed(RuntimeError):
    """Training cannot go on: a loss or a gradient is no longer a finite number, or a step refuses its batch."""


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
    owns: tuple[own.Own | None, ...] = ()
    """The user's own files that it runs."""
    code: str | None = None
    """What `own.digest` says of the user's own network."""

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

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the test images."""
        return batches(
            self.data.test,
            self.config.test_batch_size,
            transform=self.transform,
            train=False,
            device=self.device,
            rank=self.processes.rank,
            processes=self.processes.count,
        )

    def step(self, x: Tensor, y: Tensor, where: str) -> onward.Step:
        """One step of training; `where` it is goes into the message if it fails.

        Raises:
            TrainingFailed: the loss or a gradient is not finite; the weights are still those before the step.
        """
        done = self.estimate(x, y, where)
        self.follow()
        return done

    def estimate(self, x: Tensor, y: Tensor, where: str) -> onward.Step:
        """The first half of a step: fill the gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        done = self.estimator.estimate(x, y)
        _check_finite(self.estimator, done.loss, x, where)
        return done

    def follow(self) -> None:
        """The second half of a step: let the parameters follow the gradients."""
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.rate.after_step()

    def place(self, at: Standing) -> str:
        """Where the step is that comes next, in words."""
        return f"epoch {at.epoch}, step {at.step + 1} of {self.steps}"

    def state(self, at: Standing) -> dict[str, Any]:
        """What a checkpoint holds: all that decides how the run goes on, and what it was trained on."""
        return {
            "data": run_folder.described(self.data),
            "code": self.code,
            "rows": at.rows,
            "progress": {name: value for name, value in vars(at).items() if name != "rows"},
            "estimator": self.estimator.state_dict(),
            "optimizers": {role: optimizer.state_dict() for role, optimizer in self.optimizers.items()},
            "schedule": self.rate.scheduler.state_dict(),
            "generators": self.processes.everyones(generators.states(self.device)),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint; where its run stands is for `standing` to say.

        Raises:
            UsageError: it is of another run.
        """
        try:
            self.estimator.load_state_dict(state["estimator"])
            for role, optimizer in self.optimizers.items():
                optimizer.load_state_dict(copy.deepcopy(state["optimizers"][role]))  # it keeps the tensors that it is given
                _check_shapes(optimizer)
            self.rate.scheduler.load_state_dict(state["schedule"])
            if self.processes.rank < len(state["generators"]):  # it may have been saved by fewer processes
                generators.restore(state["generators"][self.processes.rank], self.device)
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


def prepare(config: Train, data: ImageData, group: Processes = ALONE) -> Run:
    """The network, its estimator and its optimizers, before the first step.

    Raises:
        UsageError: the configuration and the data do not fit together.
    """
    if config.statistics not in STATISTICS:
        raise unknown("handling of batch norm's statistics", config.statistics, STATISTICS)
    device = choose_device(config.device)
    transform = replace(config.transform, size=config.transform.size or models.facts(config.model).image_size)
    batches(data.train, config.batch_size, transform=transform, train=True)  # says so now if they cannot be made as asked
    channels, *size = data.shape
    size = [transform.size] * 2 if transform.size else size
    generators.seed(config.seed)
    owns = (own.named("--model", config.model),)
    code = own.digest(owns[0])  # before it is run
    model = models.build(config.model, (channels, *size), data.classes, config.network).to(device)
    estimator = algorithms.build(model, config, torch.zeros(2, channels, *size, device=device))
    too_few = _leaves_too_few(len(data.train), config.batch_size, model, group.count)
    drop_last = too_few or (config.drop_last and len(data.train) >= config.batch_size)
    if group.rank:
        generators.seed(seed_of(config.seed, "process", group.rank))  # for masks of its own
    optimizers = make_optimizers(config, estimator)
    full, rest = divmod(len(data.train), config.batch_size)
    steps = full + (rest > 0 and not drop_last)
    rate = Rate(config.schedule, optimizers["network"], epochs=config.epochs, steps=steps)
    return Run(config, data, device, transform, estimator, optimizers, rate, steps, drop_last, group, owns, code)


def try_out(
    config: Train,
    data: ImageData,
    group: Processes = ALONE,
    state: dict[str, Any] | None = None,
    at: Standing | None = None,
) -> int:
    """Take the next step of a run, for nothing, so that what cannot work is told before anything is written or erased.

    A run of its own is made for it, from the state of a checkpoint if there is one, and forgotten: it is aligned if that was
    asked for, makes an estimate, tests a batch, and lets the optimizers follow. Processes do it each by itself. Returns the
    bytes of the tensors in a checkpoint.

    Raises:
        UsageError: it cannot work.
        TrainingFailed: the loss or a gradient is not finite.
    """
    at = at or Standing()
    owns = (own.named("--model", config.model),)
    with own.errors(owns, " in a step of training"):
        run = prepare(config, data, group)
        if state is not None:
            run.restore(state)
        checkpoint.check({"estimator": run.estimator.state_dict()})
        if config.align_every:
            align(replace(run, config=replace(config, align_estimates=1)))
        run.estimator.train()
        x, y = next(itertools.chain(run.training_batches(at.epoch, at.step), run.training_batches(at.epoch + 1)))
        run.estimate(x, y, run.place(at))
    with own.errors(owns, " in a test"), torch.no_grad():
        run.estimator.eval()
        for x, y in itertools.islice(run.test_batches(), 1):
            _test(run, x, y)
    run.follow()
    kept = (run.estimator.state_dict(), [optimizer.state_dict() for optimizer in run.optimizers.values()])
    size = sum(leaf.nbytes for leaf in tree_leaves(kept) if isinstance(leaf, Tensor))
    del run, kept
    gc.collect()  # what it has held is not the run's, whose memory is measured
    return size


def train_epoch(run: Run, at: Standing) -> Iterator[float]:
    """The steps that are left of an epoch; yields each one's loss, once `at` counts it."""
    run.estimator.train()
    start = time.perf_counter()
    for x, y in run.training_batches(at.epoch, at.step):
        try:
            with own.errors(run.owns, f" at {run.place(at)}"):
                done = run.step(x, y, run.place(at))
        except own.OwnError:
            raise
        except UsageError as error:
            if run.processes.count > 1:  # each says what is wrong with its own part
                raise
            raise TrainingFailed(f"{error} (at {run.place(at)})") from error
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
    x = torch.empty(0)
    for x, y in run.test_batches():
        with own.errors(run.owns, " in a test"):
            batch_loss, hits = _test(run, x, y)
        loss += batch_loss * len(y)
        correct += hits
    n = len(run.data.test)
    totals = torch.tensor([loss, correct], dtype=torch.float64, device=run.device)
    loss, correct = run.processes.total(totals).tolist()
    if not math.isfinite(loss):
        raise TrainingFailed(f"the test loss is {loss} after an epoch ({_culprit(run.estimator, x)})")
    return {"test_loss": loss / n, "test_accuracy": 100 * correct / n}


def _test(run: Run, x: Tensor, y: Tensor) -> tuple[float, int]:
    """The mean loss of one batch, and how many hits there are."""
    logits = run.estimator(x)
    return run.estimator.loss(logits, y).item(), int((logits.argmax(1) == y).sum())


def align(run: Run) -> dict[str, Block]:
    """How the estimates of each block agree with its true gradient, on the same batch every time."""
    run.estimator.train()
    x, y = next(run.training_batches(1))
    with generators.untouched(run.device), own.errors(run.owns, " as its gradients are looked at"):
        return measure(run.estimator, x, y, estimates=run.config.align_estimates, cuts=run.config.cuts)


def check_place(folder: Path, config: Recipe) -> None:
    """Raise a UsageError if a run there would be a class, or images of one, to whoever reads the images of `config` next."""
    if not config.data_dir:
        return
    root, place = Path(config.data_dir).expanduser().resolve(), folder.resolve()
    if not place.is_relative_to(root):
        return
    names = load_data(config).class_names
    above = [path for path in (place, *place.parents) if path.is_relative_to(root)]
    if any((path / name).is_dir() for path in above for name in names):
        raise UsageError(
            f"{folder} is among the class folders of --data-dir {config.data_dir}, where it would be a class: choose a folder "
            "elsewhere with --out"
        )


def load_data(config: Recipe) -> ImageData:
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


def _check_shapes(optimizer: Optimizer) -> None:
    """Raise a ValueError if the averages that it keeps are of other parameters."""
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}")


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
