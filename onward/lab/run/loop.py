"""The training loop."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import onward
from onward.alignment import Alignment
from onward.errors import UsageError
from onward.lab.data import Data
from onward.lab.networks import models
from onward.lab.recipes import recipe as recipes
from onward.lab.run import algorithms, checkpoint, log, processes, record
from onward.lab.run import folder as run_folder
from onward.lab.run.failure import TrainingFailed
from onward.lab.run.processes import Processes, describe
from onward.lab.run.training import (
    Row,
    Run,
    Standing,
    align,
    check_place,
    evaluate,
    load_data,
    prepare,
    standing,
    train_epoch,
    try_out,
)
from onward.lab.settings import Train
from onward.lab.system import interrupt, memory, own

Advance = Callable[[str], None] | None
"""Called after every step with what to say of it; None prints a progress bar, and the rest."""


def train(config: Train, data: Data | None = None, advance: Advance = None) -> list[Row]:
    """Train as `config` says, into a run folder; returns the rows of its metrics.jsonl, one per epoch.

    `data` saves loading it again. `advance`, if given, is called after every step, instead of anything being printed. Under
    `torchrun` every process trains on its part of each batch, and the first one writes.

    Raises:
        UsageError: something that was asked for cannot work; nothing has been written or erased then.
        TrainingFailed: a loss or a gradient is not finite; the last checkpoint stays, or the run that was to be replaced.
    """
    recipe = recipes.followed(config)
    config = algorithms.variant(config.algorithm, config)
    folder = Path(config.out or run_folder.default_path(config, f"{config.algorithm}-s{config.seed}", config.recipe))
    with processes.joined(config.device) as group, contextlib.ExitStack() as until_the_end:
        with _before_anything_is_written(lambda: "nothing was written"):
            with group.agreeing(TrainingFailed):
                models.check(config.model)
                log.check(config)
                check_place(folder, config)
                if group.writes:
                    until_the_end.enter_context(run_folder.claimed(folder, overwrite=config.overwrite))
                    until_the_end.enter_context(run_folder.held(folder))
                run, aligned = _tried(config, data, group, folder, None, Standing())
                tell = until_the_end.enter_context(log.begin(folder, config)) if group.writes else None
            _distribute(run)
        if group.writes:
            parameters = sum(parameter.numel() for parameter in run.estimator.model.parameters())
            found = {"engine": run.estimator.engine, "parameters": parameters, "processes": group.count}
            found |= processes.environment(run.device) | ({"code": run.code} if run.code else {})
            run_folder.begin(folder, config, run.data, recipe, **found)
        if recipe:
            _console(group, advance).print(recipes.said(recipe))
        return _go_on(run, folder, Standing(), advance, tell, aligned)


def resume(
    folder: Path, data: Data | None = None, advance: Advance = None, changes: Mapping[str, Any] | None = None
) -> list[Row]:
    """Go on with the run in `folder` from its last checkpoint, as if it had never stopped; what is complete is left alone.

    The `changes` are settings for the rest of it, of those that `run_folder.MAY_CHANGE` names; config.json keeps its own.
    Under `torchrun` it goes on with the processes that there are now.

    Raises:
        UsageError: there is no run, neither its configuration nor a checkpoint of it can be used, or the data are others.
        TrainingFailed: as `train`.
    """
    found = record.read(folder)
    config = replace(found.config, out=str(folder), **(changes or {}))
    with processes.joined(config.device) as group, contextlib.ExitStack() as until_the_end:
        with _before_anything_is_written(lambda: _kept(folder)):
            with group.agreeing(TrainingFailed):
                log.check(config)
                if group.writes:
                    until_the_end.enter_context(run_folder.held(folder))
                state = checkpoint.load(folder / run_folder.CHECKPOINT)
                at = Standing(found.rows if found.complete else []) if state is None else standing(state, config)
                complete = len(at.rows) == config.epochs
                if not complete:
                    images = data or load_data(config)
                    run_folder.check_data(folder, images, state)
                    run, aligned = _tried(config, images, group, folder, state, at)
                    run_folder.check_code(folder, config, state)
                    tell = until_the_end.enter_context(log.begin(folder, config)) if group.writes else None
            if not complete:
                _distribute(run)
        if group.writes and state is not None:
            run_folder.write_lines(folder, at.rows, at.aligned)
            run_folder.note_failure(folder, None)
        if complete:
            _console(group, advance).print(f"{folder} is complete")
            return at.rows
        if group.writes:
            run_folder.note(folder, run_folder.described(run.data), run.code)
        if state is None:
            _console(group, advance).print(f"{folder} has no checkpoint: it is trained from its beginning")
        return _go_on(run, folder, at, advance, tell, aligned)


def _tried(
    config: Train, data: Data | None, group: Processes, folder: Path, state: dict[str, Any] | None, at: Standing
) -> tuple[Run, Alignment | None]:
    """A run that is known to work, from the state of a checkpoint if there is one, and how its estimates align before it."""
    images = data or load_data(config)
    size = try_out(config, images, group, state, at)
    if group.writes:
        run_folder.check_space(folder, size, overwrite=config.overwrite and state is None)
    run = prepare(config, images, group)
    run.estimator.check = False  # the one that was tried out has looked at the network
    if state is not None:
        run.restore(state)
    return run, align(run) if config.align_every and state is None else None


@contextlib.contextmanager
def _before_anything_is_written(left: Callable[[], str]) -> Iterator[None]:
    """Add to a failure in the body what is left of the run."""
    try:
        yield
    except (TrainingFailed, onward.ProcessLost) as error:
        raise TrainingFailed(f"{error}; {left()}") from None


def _distribute(run: Run) -> None:
    """Let the processes, if there are several, estimate together from now on."""
    if run.processes.count > 1:
        with run.processes.agreeing():
            onward.distribute(run.estimator, statistics=run.config.statistics)


def _go_on(
    run: Run, folder: Path, at: Standing, advance: Advance, tell: log.Log | None, aligned: Alignment | None
) -> list[Row]:
    """Train from where the run stands to its end."""
    config, group = run.config, run.processes
    console = _console(group, advance)
    console.print(_introduction(run, at))
    due = _due(config.checkpoint_every)
    done = (at.epoch - 1) * run.steps + at.step
    with (
        _failures_told(run, folder, at),
        log.open_log(folder, tell, done) if group.writes else contextlib.nullcontext(lambda *_: None) as write,
        contextlib.nullcontext(advance) if advance else progress(console, config.epochs * run.steps, done) as step_done,
        interrupt.requests() as asked_to_stop,
    ):
        if aligned:
            _keep_alignment(run, at, 0, aligned, write)
        memory.reset_peak(run.device)
        while at.epoch <= config.epochs:
            for loss in train_epoch(run, at):
                step_done(f"epoch {at.epoch}/{config.epochs}, loss {loss:.3f}")
                if at.step % config.log_interval == 0:
                    write({"step/train_loss": loss}, (at.epoch - 1) * run.steps + at.step)
                request = asked_to_stop()
                stop, save_now = group.any([request is not None, group.writes and due()])
                if stop or save_now:
                    _save(run, folder, at)
                if stop:
                    group.leave(130)
                    where = f"{request or 'a request to another process'} after step {at.step} of epoch {at.epoch}"
                    raise KeyboardInterrupt(f"{where}, which {folder} keeps: onward train --resume {folder} goes on")
            row = _end_epoch(run, folder, at, write)
            metrics = "  ".join(f"{metric.title} {metric.text(row[metric.key])}" for metric in run.task.metrics)
            console.print(
                "epoch {epoch}  train loss {train_loss:.4f}  test loss {test_loss:.4f}  ".format(**row)
                + f"{metrics}  {row['seconds']:.1f} s"
            )
    console.print(f"written to {folder}")
    return at.rows


def _introduction(run: Run, at: Standing) -> str:
    """The first line that is printed: algorithm, network, data and device."""
    config, data, count = run.config, run.data, run.processes.count
    outputs = f"{data.outputs} {run.task.outputs}" if data.outputs > 1 else f"1 {run.task.outputs.removesuffix('s')}"
    several = f", {count} processes" if count > 1 else ""
    where = f", on from epoch {at.epoch}, step {at.step}" if at.rows or at.step else ""
    return (
        f"{config.algorithm} ({run.estimator.engine}), {config.model}, {data.name}: {len(data.train)} training and "
        f"{len(data.test)} test {data.noun} of {outputs}; {describe(run.device)}{several}, seed {config.seed}{where}"
    )


def _save(run: Run, folder: Path, at: Standing) -> None:
    state = run.state(at)  # every process has a part of it
    if run.processes.writes:
        checkpoint.save(folder / run_folder.CHECKPOINT, state)


def _keep_alignment(run: Run, at: Standing, epoch: int, measured: Alignment, write: log.Log) -> None:
    shown = {name: block.cosines.flatten() for name, block in measured.items() if block.cosines is not None}
    write({"alignment": shown}, epoch * run.steps)
    at.aligned = [*at.aligned, run_folder.alignment_entry(epoch, run.config.align_estimates, measured)]


def _end_epoch(run: Run, folder: Path, at: Standing, write: log.Log) -> Row:
    """Test, look at gradients if that is due, and write what is known; returns the epoch's row."""
    config, epoch, writes = run.config, at.epoch, run.processes.writes

    def due(every: int) -> bool:
        return every > 0 and (epoch % every == 0 or epoch == config.epochs)

    peak = max(at.peak_memory_bytes, memory.peak(run.device))
    with run.undone_if_own_fails():
        row = {**at.row(run.task.main), **evaluate(run), "peak_memory_bytes": peak}
        if due(config.align_every):
            _keep_alignment(run, at, epoch, align(run), write)
    memory.reset_peak(run.device)  # what testing and looking take is not the training's
    if writes and due(config.save_weights):
        run_folder.write_weights(folder, epoch, run.estimator.model.state_dict())
    run.rate.after_epoch(at.loss / at.seen)  # now that nothing more has to be read
    at.complete(row, peak)
    _save(run, folder, at)
    if writes:
        run_folder.write_lines(folder, at.rows, at.aligned)
    write(row, epoch * run.steps)
    return row


@contextlib.contextmanager
def _failures_told(run: Run, folder: Path, at: Standing) -> Iterator[None]:
    """Add to an error that ends the body what is kept of the run, and how to go on."""
    again = f"then go on by onward train --resume {folder}"
    try:
        yield
    except onward.ProcessLost as error:
        raise TrainingFailed(f"{error}; {_kept(folder)}: onward train --resume {folder} goes on") from None
    except TrainingFailed as error:  # in every process at once
        run.processes.leave(1)
        with contextlib.suppress(OSError):  # a disk that is full too must not hide why
            run_folder.note_failure(folder, str(error))
        raise TrainingFailed(f"{error}; {_kept(folder)}") from None
    except (UsageError, TimeoutError) as error:  # a sample is broken, or does not come, or a file of the user's own fails:
        with contextlib.suppress(OSError):  # before a step is complete, or after the last
            if run.processes.count == 1:  # else the others are in a step
                _save_to_mend(run, folder, at, error)
        said = str(error).replace("replace or remove it", "replace it")  # without it, the data would be others
        said += ": mend it" if isinstance(error, own.OwnError) else ""
        raise OSError(f"{said}, {again}; {_kept(folder)}") from error
    except OSError as error:  # a disk that is full
        raise OSError(f"{error}, {again}; {_kept(folder)}") from error
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(str(stopped) or _kept(folder)) from None


def _save_to_mend(run: Run, folder: Path, at: Standing, error: Exception) -> None:
    """Save the run so that it can go on though the data, or a file of the user's own, will have changed by then."""
    state = run.state(at)
    if isinstance(error, own.OwnError):
        state["code"] = None
    if not isinstance(error, own.OwnError) or own.named("--data", run.config.data):
        state["data"]["digest"] = None
    checkpoint.save(folder / run_folder.CHECKPOINT, state)
    run_folder.note(folder, state["data"], state["code"])


def _console(group: Processes, advance: Advance) -> Console:
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=advance is not None or not group.writes)


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


def _due(every: str) -> Callable[[], bool]:
    """A function to be called after every step: is it time for a checkpoint, by steps ("500") or minutes ("10m")?"""
    clock = (lambda: time.monotonic() / 60) if every.endswith("m") else itertools.count().__next__
    period, last = float(every.removesuffix("m")), clock()

    def due() -> bool:
        nonlocal last
        reached = (now := clock()) - last >= period
        last = now if reached else last
        return reached

    return due


@contextlib.contextmanager
def progress(console: Console, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """One progress bar; the function that it gives advances it by a step, or by as many as it is told."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)
        with _library_told(lambda said: bar.update(task, description=said)):
            yield lambda description, steps=1: bar.update(task, advance=steps, description=description)


@contextlib.contextmanager
def _library_told(show: Callable[[str], None]) -> Iterator[None]:
    """Within the block, what the library is at (tracing and compiling a step, which takes a while) is shown."""
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: show(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("onward")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
