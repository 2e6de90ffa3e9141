"""The processes that train together, as `torchrun` has started them: who writes, and what they tell one another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from onward.distributed import answering
from onward.errors import UsageError

PATIENCE = timedelta(seconds=40)
"""How long a process waits for the others before the run ends."""


@dataclass(frozen=True)
class Processes:
    """This process's number, and how many there are; each method is called by all of them at the same point."""

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        """Whether it is this process that writes to the run folder and to the terminal."""
        return self.rank == 0

    def total(self, numbers: Tensor) -> Tensor:
        """Sums over all processes."""
        if self.count > 1:
            with answering():
                dist.all_reduce(numbers)
        return numbers

    def everyones(self, thing: Any) -> list[Any]:
        """What each process has."""
        if self.count == 1:
            return [thing]
        things = [None] * self.count
        with answering():
            dist.all_gather_object(things, thing)
        return things

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether some process has raised it."""
        if self.count == 1:
            return list(flags)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return [bool(raised) for raised in self.total(torch.tensor(flags, dtype=torch.int64, device=device))]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """If the body cannot do what was asked in one process, it ends in all of them; the first one says why."""
        problem: str | None = None
        try:
            yield
        except UsageError as error:
            if self.count == 1:
                raise
            problem = str(error)
        for rank, theirs in enumerate(self.everyones(problem)):
            if theirs is not None:
                self.leave(2)
                raise UsageError(theirs if rank == 0 else f"in process {rank}: {theirs}")

    def leave(self, code: int) -> None:
        """End this process unless it is the one that speaks."""
        if not self.writes:
            raise SystemExit(code)


ALONE = Processes()


def asked_for() -> int:
    """How many processes `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Meet the others that `torchrun` has started; alone without it. `device` decides how they talk.

    Raises:
        UsageError: there are more processes here than GPUs.
    """
    if asked_for() == 1 or dist.is_initialized():
        yield ALONE
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}: give torchrun "
                f"--nproc-per-node {torch.cuda.device_count()}, or --device cpu"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    yield Processes(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: it could wait for those that are gone
