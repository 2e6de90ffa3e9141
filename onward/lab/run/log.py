"""Where the numbers of a run go besides its folder: TensorBoard always, Weights & Biases if asked."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from onward.errors import UsageError
from onward.lab.plain import flat
from onward.lab.settings import Train
from onward.lab.system import disk
from onward.lab.system.extra import lab_extra, reason_of

EVENTS = "events.out.tfevents.*"
Log = Callable[[dict[str, Any], int], None]
"""Takes values by name, and a step. A value is a number, a tensor of many, shown as a histogram, or a dict of values."""


def check(config: Train) -> None:
    """Raise a UsageError if what the log needs is not installed, or not whole."""
    with lab_extra(), _importing("TensorBoard"):
        import torch.utils.tensorboard  # noqa: F401
    if config.wandb:
        try:
            with _importing("--wandb: wandb"):
                import wandb  # noqa: F401
        except ModuleNotFoundError as error:
            raise UsageError("--wandb: wandb is not installed: pip install onward[wandb]") from error


@contextmanager
def _importing(what: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:  # packages that do not fit one another raise anything
        raise UsageError(f"{what} cannot be imported ({reason_of(error)}): install it again") from error


@contextmanager
def begin(folder: Path, config: Train) -> Iterator[Log | None]:
    """Find out if TensorBoard can write there, and begin with Weights & Biases if it is asked for: before there is a run.

    If Weights & Biases fails later, a warning says so, it is offered nothing more, and the run goes on.

    Raises:
        UsageError: either refuses. Nothing of it is left in the folder.
        OSError: TensorBoard's file cannot be written.
    """
    _try_tensorboard(folder)
    if not config.wandb:
        yield None
        return
    import wandb

    own = folder / "wandb"
    there, name = own.exists(), config.wandb_name or folder.name
    try:
        session = wandb.init(project=config.wandb_project, name=name, dir=str(folder), config=dataclasses.asdict(config))
        if session is None:
            raise TypeError("wandb.init returned nothing")  # noqa: TRY301 (told below)
    except (Exception, SystemExit) as error:  # it has many kinds, and so have the libraries that it uses
        if not there:
            shutil.rmtree(own, ignore_errors=True)
        why = f"--wandb: Weights & Biases refuses ({reason_of(error)})"
        raise UsageError(f"{why}: mend that, set WANDB_MODE=offline, or leave it out") from error
    refused = False

    def offer(work: Callable[..., object], *given: object) -> None:
        nonlocal refused
        try:
            work(*given)
        except (Exception, SystemExit) as error:
            if not refused:
                said = f"Weights & Biases takes no more ({reason_of(error)}); the run goes on without it"
                print(f"warning: {said}", file=sys.stderr)
            refused = True

    def histogram_or(value: Any) -> Any:
        return wandb.Histogram(value.tolist()) if isinstance(value, Tensor) else value

    def tell(values: dict[str, Any], step: int) -> None:
        if not refused:
            offer(lambda: run.log({name: histogram_or(value) for name, value in values.items()}, step=step))

    run = session.__enter__()
    try:
        yield tell
    except BaseException:
        offer(session.__exit__, *sys.exc_info())
        raise
    offer(session.__exit__, None, None, None)


@contextmanager
def open_log(folder: Path, tell: Log | None, done: int = 0) -> Iterator[Log]:
    """A function that logs values to TensorBoard and to what was begun before; nested ones have names as heads/block1/loss.

    What an earlier part of the run logged after step `done` does not count.
    """
    with _tensorboard(folder, done) as write:

        def log(values: dict[str, Any], step: int) -> None:
            for sink in (write, tell):
                if sink is not None:
                    sink(flat(values, between="/"), step)

        yield log


@contextmanager
def _tensorboard(folder: Path, done: int) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    file = folder / EVENTS
    with _silent_threads():
        with disk.writing(file):
            # It opens its file later, in a thread of its own; by then the network may have changed the working folder.
            writer = SummaryWriter(str(folder.absolute()), purge_step=done + 1 if done else None)

        def log(values: dict[str, Any], step: int) -> None:
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


def _try_tensorboard(folder: Path) -> None:
    """Find out if TensorBoard can write, by a file in a temporary folder."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        with _silent_threads(), disk.writing(folder / EVENTS), tempfile.TemporaryDirectory(dir=folder) as place:
            writer = SummaryWriter(place)
            writer.add_scalar("trial", 0.0, 0)
            writer.close()
    except OSError:
        raise
    except Exception as error:  # of a path that is no UTF-8, of packages that do not fit one another
        why = f"TensorBoard cannot write to {folder} ({reason_of(error)})"
        raise UsageError(f"{why}: choose another folder with --out") from error


@contextmanager
def _silent_threads() -> Iterator[None]:
    """Do not print the errors of the thread in which TensorBoard writes: its next call raises them here."""
    before = threading.excepthook
    threading.excepthook = lambda failed: None if issubclass(failed.exc_type, OSError) else before(failed)
    try:
        yield
    finally:
        threading.excepthook = before
