"""Where the numbers of a run go besides its folder: TensorBoard always, Weights & Biases if asked."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from onward.errors import UsageError
from onward.lab import disk
from onward.lab.config import Train
from onward.lab.extra import lab_extra

Log = Callable[[Mapping[str, Any], int], None]
"""Takes named values and a step: numbers, tensors of many numbers to be shown as a histogram, mappings of these."""


def check(config: Train) -> None:
    """Raise a UsageError if what the log needs is not installed."""
    with lab_extra():
        import torch.utils.tensorboard  # noqa: F401
    if config.wandb:
        try:
            import wandb  # noqa: F401
        except ModuleNotFoundError as error:
            raise UsageError("--wandb: wandb is not installed: pip install onward[wandb]") from error


@contextmanager
def open_log(folder: Path, config: Train, done: int = 0) -> Iterator[Log]:
    """A function that logs named values at a step; what is nested has names such as heads/block1/loss.

    What an earlier part of the run logged after step `done` does not count.
    """
    with ExitStack() as stack:
        sinks = [stack.enter_context(_tensorboard(folder, done))]
        if config.wandb:
            sinks.append(stack.enter_context(_wandb(folder, config)))

        def log(values: Mapping[str, Any], step: int) -> None:
            for sink in sinks:
                sink(dict(_flat(values)), step)

        yield log


@contextmanager
def _tensorboard(folder: Path, done: int) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    file = folder / "events.out.tfevents.*"
    with _silent_threads():
        with disk.writing(file):
            writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

        def log(values: Mapping[str, Any], step: int) -> None:
            with disk.writing(file):
                for name, value in values.items():
                    (writer.add_histogram if isinstance(value, Tensor) else writer.add_scalar)(name, value, step)

        try:
            yield log
        except BaseException:
            with suppress(OSError):  # the body's own failure is the one to tell
                writer.close()
            raise
        with disk.writing(file):
            writer.close()


@contextmanager
def _silent_threads() -> Iterator[None]:
    """TensorBoard writes in a thread; what fails there is raised here by its next call, and need not be printed too."""
    before = threading.excepthook
    threading.excepthook = lambda failed: None if issubclass(failed.exc_type, OSError) else before(failed)
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def _wandb(folder: Path, config: Train) -> Iterator[Log]:
    import wandb

    name = config.wandb_name or folder.name
    with wandb.init(project=config.wandb_project, name=name, dir=str(folder), config=dataclasses.asdict(config)) as run:

        def log(values: Mapping[str, Any], step: int) -> None:
            shown = {
                name: wandb.Histogram(value.tolist()) if isinstance(value, Tensor) else value for name, value in values.items()
            }
            run.log(shown, step=step)

        yield log


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by the path to them.

    >>> dict(_flat({"epoch": 1, "heads": {"block1": {"loss": 0.5}}}))
    {'epoch': 1, 'heads/block1/loss': 0.5}
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
