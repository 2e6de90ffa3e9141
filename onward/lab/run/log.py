"""Where the numbers of a run go besides its folder: TensorBoard always, Weights & Biases if asked."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from onward.errors import UsageError
from onward.lab.settings import Train
from onward.lab.system import disk
from onward.lab.system.extra import lab_extra

EVENTS = "events.out.tfevents.*"
Sink = Callable[[Mapping[str, Any], int], None]
"""Takes values by name, numbers or tensors of many numbers to be shown as a histogram, and a step."""
Log = Callable[[Mapping[str, Any], int], None]
"""The same, and mappings of these."""


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
        raise UsageError(f"{what} cannot be imported ({_said(error)}): install it again") from error


@contextmanager
def begin(folder: Path, config: Train) -> Iterator[Sink | None]:
    """Find out if TensorBoard can write there, and begin with Weights & Biases if it is asked for: before there is a run.

    Once the latter has begun, what it does not take is told, and no longer offered; the run goes on.

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
    there = own.exists()
    name = config.wandb_name or folder.name
    try:
        session = _something(
            wandb.init(project=config.wandb_project, name=name, dir=str(folder), config=dataclasses.asdict(config))
        )
    except (Exception, SystemExit) as error:  # it has many kinds, and so have the libraries that it uses
        if not there:
            shutil.rmtree(own, ignore_errors=True)
        raise UsageError(
            f"--wandb: Weights & Biases refuses ({_said(error)}): mend that, set WANDB_MODE=offline, or leave it out"
        ) from error
    refused = False

    @contextmanager
    def offering() -> Iterator[None]:
        nonlocal refused
        try:
            yield
        except (Exception, SystemExit) as error:
            if not refused:
                print(f"warning: Weights & Biases takes no more ({_said(error)}); the run goes on without it", file=sys.stderr)
            refused = True

    def tell(values: Mapping[str, Any], step: int) -> None:
        if not refused:
            with offering():
                shown = {
                    name: wandb.Histogram(value.tolist()) if isinstance(value, Tensor) else value
                    for name, value in values.items()
                }
                run.log(shown, step=step)

    run = session.__enter__()
    try:
        yield tell
    except BaseException:
        with offering():
            session.__exit__(*sys.exc_info())
        raise
    with offering():
        session.__exit__(None, None, None)


def _something(session: Any) -> Any:
    """What wandb.init has returned, if that is anything."""
    if session is None:
        raise TypeError("wandb.init returned nothing")
    return session


@contextmanager
def open_log(folder: Path, tell: Sink | None, done: int = 0) -> Iterator[Log]:
    """A function that logs named values at a step, to TensorBoard and to what was begun before; what is nested has names such
    as heads/block1/loss.

    What an earlier part of the run logged after step `done` does not count.
    """
    with _tensorboard(folder, done) as write:

        def log(values: Mapping[str, Any], step: int) -> None:
            for sink in (write, tell):
                if sink is not None:
                    sink(dict(_flat(values)), step)

        yield log


@contextmanager
def _tensorboard(folder: Path, done: int) -> Iterator[Sink]:
    from torch.utils.tensorboard import SummaryWriter

    file = folder / EVENTS
    with _silent_threads():
        with disk.writing(file):
            # It opens its file later, in a thread of its own; by then the network may have changed the working folder.
            writer = SummaryWriter(str(folder.absolute()), purge_step=done + 1 if done else None)

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


def _try_tensorboard(folder: Path) -> None:
    """Let it write a file in a folder that goes again."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        with _silent_threads(), disk.writing(folder / EVENTS), tempfile.TemporaryDirectory(dir=folder) as place:
            writer = SummaryWriter(place)
            writer.add_scalar("trial", 0.0, 0)
            writer.close()
    except OSError:
        raise
    except Exception as error:  # of a path that is no UTF-8, of packages that do not fit one another
        raise UsageError(f"TensorBoard cannot write to {folder} ({_said(error)}): choose another folder with --out") from error


@contextmanager
def _silent_threads() -> Iterator[None]:
    """TensorBoard writes in a thread; what fails there is raised here by its next call, and need not be printed too."""
    before = threading.excepthook
    threading.excepthook = lambda failed: None if issubclass(failed.exc_type, OSError) else before(failed)
    try:
        yield
    finally:
        threading.excepthook = before


def _said(error: BaseException) -> str:
    """The first line of an error, without the stop at its end; or its kind if it says nothing.

    >>> _said(ValueError("It is late. Go home.\\nNow."))
    'It is late. Go home'
    """
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


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
