"""Where the numbers of a run go besides its folder: TensorBoard always, Weights & Biases if asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from onward.errors import UsageError
from onward.lab.config import Train
from onward.lab.extra import lab_extra

Log = Callable[[Mapping[str, float], int], None]


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
def open_log(folder: Path, config: Train) -> Iterator[Log]:
    """A function that logs named numbers at a step."""
    with ExitStack() as stack:
        sinks = [stack.enter_context(_tensorboard(folder))]
        if config.wandb:
            sinks.append(stack.enter_context(_wandb(folder, config)))

        def log(values: Mapping[str, float], step: int) -> None:
            for sink in sinks:
                sink(values, step)

        yield log


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def log(values: Mapping[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield log


@contextmanager
def _wandb(folder: Path, config: Train) -> Iterator[Log]:
    import wandb

    with wandb.init(project="onward", name=folder.name, dir=str(folder), config=dataclasses.asdict(config)) as run:
        yield lambda values, step: run.log(dict(values), step=step)
