"""A training: all that it works with, a step of it, an epoch, a test, a look at its gradients."""

from __future__ import annotations

import copy
import gc
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

import onward
from onward.alignment import Alignment, measure
from onward.derivatives.directions import seed_of
from onward.errors import UsageError, unknown
from onward.lab import tasks
from onward.lab.data import Data, Split, held_out, load
from onward.lab.data.batches import batches
from onward.lab.data.inputs import Batch, Inputs, leaves, mapped, shape_of
from onward.lab.networks import models
from onward.lab.run import algorithms, checkpoint, precision
from onward.lab.run import folder as run_folder
from onward.lab.run.failure import TrainingFailed, check_finite, culprit
from onward.lab.run.optimizers import Rate, check_shapes, make_optimizers
from onward.lab.run.processes import ALONE, Processes, choose_device
from onward.lab.settings import Recipe, Train, Transform
from onward.lab.system import generators, own
from onward.network.run import call, compute_loss
from onward.parallel.shards import STATISTICS

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything that one training works with."""

    config: Train
    data: Data
    task: tasks.Task
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
    """A digest of these files."""

    def training_batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """This process's samples of one epoch, in its own order, without its first `skip` batches."""
        order: dict[str, Any] = {"seed": self.config.seed, "epoch": epoch, "skip": skip, "drop_last": self.drop_last}
        return self._batches(self.data.train, self.config.batch_size, train=True, **order)

    def test_batches(self) -> Iterator[Batch]:
        """This process's part of the test samples."""
        return self._batches(self.data.test, self.config.test_batch_size, train=False)

    def _batches(self, split: Split, size: int, **order: Any) -> Iterator[Batch]:
        order |= {"rank": self.processes.rank, "processes": self.processes.count}
        found = batches(split, size, transform=self.transform, device=self.device, **order)
        return ((precision.inputs(self.config, x), y) for x, y in found)

    def step(self, x: Inputs, y: Tensor, where: str) -> onward.Step:
        """One step of training; `where` it is goes into the message if it fails. Raises a TrainingFailed if the loss or a
        gradient is not finite; the weights are still those before the step."""
        done = self.estimate(x, y, where)
        self.follow()
        return done

    def estimate(self, x: Inputs, y: Tensor, where: str) -> onward.Step:
        """The first half of a step: fill the gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        with precision.autocast(self.config, self.device):
            done = self.estimator.estimate(x, y)
        check_finite(self.estimator, done.loss, x, where)
        return done

    def follow(self) -> None:
        """The second half of a step: let the parameters follow the gradients."""
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.rate.after_step()

    @contextmanager
    def undone_if_own_fails(self) -> Iterator[None]:
        """Put buffers and generators back if a file of the user's own fails in the body, for the state that is then saved must
        be the one before it."""
        if not any(self.owns):
            yield
            return
        drawn = generators.states(self.device)
        held = [
            (module, name, buffer.clone())
            for module in self.estimator.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]
        try:
            yield
        except own.OwnError:
            for module, name, buffer in held:
                module._buffers[name] = buffer
            generators.restore(drawn, self.device)
            raise

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
        """Take up the state of a checkpoint; where its run stands is for `standing` to say. Raises a UsageError if it is of
        another run."""
        try:
            self.estimator.load_state_dict(state["estimator"])
            for role, optimizer in self.optimizers.items():
                optimizer.load_state_dict(copy.deepcopy(state["optimizers"][role]))  # it keeps the tensors that it is given
                check_shapes(optimizer)
            self.rate.scheduler.load_state_dict(state["schedule"])
            if self.processes.rank < len(state["generators"]):  # it may have been saved by fewer processes
                generators.restore(state["generators"][self.processes.rank], self.device)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            why = f"the checkpoint does not fit the run's configuration ({type(error).__name__}"
            raise UsageError(f"{why}: {reason})") from error


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
    """Summed over samples."""
    seen: int = 0
    """Samples."""
    heads: dict[str, Tensor] = field(default_factory=dict)
    """For each cut the sum of losses, and what the task's main metric adds up."""
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def complete(self, row: Row, peak: int) -> None:
        """Stand at the beginning of the next epoch."""
        vars(self).update(vars(Standing([*self.rows, row], self.aligned, self.epoch + 1, peak_memory_bytes=peak)))

    def row(self, metric: tasks.Metric) -> Row:
        """The epoch's training figures: `seconds` is the time of its steps, `heads` each head's loss and the metric."""
        row: Row = {"epoch": self.epoch, "train_loss": self.loss / self.seen, "seconds": self.seconds}
        if self.heads:
            row["heads"] = {
                cut: {"loss": float(sums[0]) / self.seen, metric.name: metric.value(sums[1:], self.seen)}
                for cut, sums in self.heads.items()
            }
        return row


def standing(state: dict[str, Any], config: Train) -> Standing:
    """Where the run of a checkpoint stands. Raises a UsageError if the checkpoint does not say it, or is of another run."""
    import dacite

    try:
        at = dacite.from_dict(Standing, {**state["progress"], "rows": state["rows"]}, dacite.Config(strict=True))
    except (KeyError, TypeError, dacite.DaciteError) as error:
        raise UsageError(f"the checkpoint does not say where its run stands ({error})") from error
    if at.epoch != len(at.rows) + 1 or at.epoch > config.epochs + 1:
        raise UsageError(f"the checkpoint is in epoch {at.epoch} of {config.epochs}, with {len(at.rows)} behind it")
    return at


def prepare(config: Train, data: Data, group: Processes = ALONE) -> Run:
    """The network, its estimator and its optimizers, before the first step. Raises a UsageError if the configuration and the
    data do not fit together."""
    if config.statistics not in STATISTICS:
        raise unknown("handling of batch norm's statistics", config.statistics, STATISTICS)
    device = choose_device(config.device)
    precision.check(config, device)
    task = tasks.measured_from(tasks.named(data.task), data.test.targets)
    task = tasks.configured(task, config.task, data.outputs)
    transform = _transform(config, data)
    batches(data.train, config.batch_size, transform=transform, train=True)  # says so now if they cannot be made as asked
    example = _example(data, transform)
    generators.seed(config.seed)
    owns = algorithms.files(config)
    code = algorithms.digest(config)  # before they are run
    _check_kind(config.model, example)
    sizes: dict[str, Any] = {"vocabulary": data.tokens, "padding": data.padding}
    sizes["positions"] = data.train.targets.shape[1:] if task.of_positions else ()
    model = models.build(config.model, shape_of(example, start=1), data.outputs, config.network, example, **sizes).to(device)
    example = mapped(example, lambda tensor: tensor.to(device))
    config = algorithms.with_cuts(config, model, example)
    estimator = algorithms.build(model, config, example, task.loss)
    too_few = _leaves_too_few(data, config.batch_size, estimator, group.count)  # which has the heads
    drop_last = too_few or (config.drop_last and len(data.train) >= config.batch_size)
    if group.rank:
        generators.seed(seed_of(config.seed, "process", group.rank))  # for masks of its own
    optimizers = make_optimizers(config, estimator)
    full, rest = divmod(len(data.train), config.batch_size)
    steps = full + (rest > 0 and not drop_last)
    rate = Rate(config.schedule, optimizers["network"], epochs=config.epochs, steps=steps)
    return Run(config, data, task, device, transform, estimator, optimizers, rate, steps, drop_last, group, owns, code)


def _check_kind(model: str, example: Inputs) -> None:
    """Raise a UsageError if a network of ours does not take such numbers."""
    kinds = {part.dtype for part in leaves(example).values() if not part.is_floating_point()}
    if kinds and not models.facts(model).tokens and own.named("--model", model) is None:
        takers = ", ".join(f"--model {name}" for name in models.MODELS if models.facts(name).tokens)
        why = f"{model} takes real numbers, and the inputs are {str(kinds.pop()).removeprefix('torch.')}"
        raise UsageError(f"{why}: give {takers} for tokens of text, return floats, or give a network of your own")


def _transform(config: Train, data: Data) -> Transform:
    """What is done to images, in the size that the network is for if none is asked for; other data are left as they are."""
    asked = config.transform
    if data.train.pixels:
        return replace(asked, size=asked.size or models.facts(config.model).image_size)
    for entry in fields(Transform):
        if getattr(asked, entry.name) != entry.default:
            why = f"--transform.{entry.name} {getattr(asked, entry.name)}: {data.name} holds no images"
            raise UsageError(f"{why}, its inputs are taken as they are: leave it out, or do it where the data are made")
    return asked


def _example(data: Data, transform: Transform) -> Inputs:
    """A batch of two inputs, or of one if there is no other; images are black."""
    if not data.train.pixels:
        return next(batches(data.train, 2, transform=transform, train=False))[0]
    channels, *size = data.shape
    return torch.zeros(2, channels, *([transform.size] * 2 if transform.size else size))


def try_out(
    config: Train, data: Data, group: Processes = ALONE, state: dict[str, Any] | None = None, at: Standing | None = None
) -> int:
    """Take the next step of a run on trial, so that what cannot work is told before anything is written or erased.

    A run of its own is made for it, from the state of a checkpoint if there is one, and forgotten: it is aligned if that was
    asked for, makes an estimate, tests a batch, and lets the optimizers follow. Each process does it alone. Returns the
    bytes of the tensors in a checkpoint.

    Raises:
        UsageError: it cannot work.
        TrainingFailed: the loss or a gradient is not finite.
    """
    at = at or Standing()
    owns = algorithms.files(config)
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
            with run.undone_if_own_fails(), own.errors(run.owns, f" at {run.place(at)}"):
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
            measured = torch.stack([run.task.main.measure(output, y) for _, output in done.heads.values()])
            for (cut, (head_loss, _)), sums in zip(done.heads.items(), run.processes.total(measured), strict=True):
                sums = torch.cat([head_loss.double().view(1) * samples, sums]).cpu()  # where a resumed run has them too
                at.heads[cut] = at.heads[cut].cpu() + sums if cut in at.heads else sums
        at.seconds += time.perf_counter() - start
        yield loss
        start = time.perf_counter()  # what is done with the loss is not the step's time


@torch.no_grad()
def evaluate(run: Run) -> Row:
    """Mean loss and the task's metrics on the test data, in eval mode."""
    run.estimator.eval()
    sums: list[Tensor] = []
    x: Inputs = torch.empty(0)
    for x, y in run.test_batches():
        with own.errors(run.owns, " in a test"):
            measured = _test(run, x, y)
        sums = [a + b for a, b in zip(sums, measured, strict=True)] if sums else measured
    n = len(run.data.test)
    sizes = next(found for found in run.processes.everyones([len(part) for part in sums]) if found)
    # Where there are fewer samples than processes, some have none.
    mine = torch.cat(sums) if sums else torch.zeros(sum(sizes), dtype=torch.float64, device=run.device)
    loss, *parts = run.processes.total(mine).cpu().split(sizes)
    if not loss.isfinite():
        raise TrainingFailed(f"the test loss is {loss.item()} after an epoch ({culprit(run.estimator, x)})")
    values = {metric.key: metric.value(part, n) for metric, part in zip(run.task.metrics, parts, strict=True)}
    return {"test_loss": loss.item() / n, **values}


def _test(run: Run, x: Inputs, y: Tensor) -> list[Tensor]:
    """What one batch adds to the loss and to each metric."""
    with precision.autocast(run.config, run.device):
        output = call(run.estimator, x)
    loss = compute_loss(run.estimator.loss, output, y).double().view(1) * len(y)
    return [loss, *(metric.measure(output, y) for metric in run.task.metrics)]


def align(run: Run) -> Alignment:
    """How the estimates of each block agree with its true gradient, on the same batch every time."""
    run.estimator.train()
    x, y = next(run.training_batches(1))
    half = precision.autocast(run.config, run.device)
    with generators.untouched(run.device), own.errors(run.owns, " as its gradients are looked at"), half:
        return measure(run.estimator, x, y, estimates=run.config.align_estimates, cuts=run.config.cuts)


def check_place(folder: Path, config: Recipe) -> None:
    """Raise a UsageError if the folder is among the class folders of `config`, whose next reader would take it for a class."""
    if not config.data_dir:
        return
    root, place = Path(config.data_dir).expanduser().resolve(), folder.resolve()
    if not place.is_relative_to(root):
        return
    names = load_data(config).class_names
    above = [path for path in (place, *place.parents) if path.is_relative_to(root)]
    if any((path / name).is_dir() for path in above for name in names):
        why = f"{folder} is among the class folders of --data-dir {config.data_dir}, where it would be a class"
        raise UsageError(f"{why}: choose a folder elsewhere with --out")


def load_data(config: Recipe, seed: int | None = None) -> Data:
    """The data that `config` names; a function of the user's own is given the `seed`, or that of `config`."""
    asked = {"train_samples": config.subset.train, "test_samples": config.subset.test}
    seed = getattr(config, "seed", 0) if seed is None else seed
    data = load(
        config.data, config.data_dir, **asked, patience=config.data_timeout, task=config.task.name, seed=seed, text=config.text
    )
    return held_out(data) if config.subset.held_out else data


def _leaves_too_few(data: Data, batch_size: int, model: nn.Module, count: int) -> bool:
    """Whether the last batch would give a process no sample, or a single one, which batch norm can do nothing with. Raises a
    UsageError if every batch would."""
    norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    least = (2 if norm else 1) * count
    why = f"each needs at least 1 {data.noun.removesuffix('s')}"
    if norm:
        why = f"this network has batch norm, which needs at least 2 {data.noun} in a batch"
    of = f", divided among {count} processes" if count > 1 else ""
    for what, number in (("--batch-size", batch_size), (f"training {data.noun}:", len(data.train))):
        if number < least:
            raise UsageError(f"{what} {number}{of}: {why}")
    return 0 < len(data.train) % batch_size < least
