"""Where a run computes, and the processes that train together, as `torchrun` has started them: who writes, what they tell."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import onward
from onward.errors import UsageError
from onward.lab.system.extra import reason_of
from onward.parallel.shards import answering

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
    def agreeing(self, *kinds: type[Exception]) -> Iterator[None]:
        """If the body raises a UsageError, or one of these `kinds`, in one process, it ends in all, and the first says why."""
        problem: tuple[type[Exception], str] | None = None
        caught: tuple[type[Exception], ...] = (UsageError, *kinds)
        try:
            yield
        except caught as error:
            if self.count == 1:
                raise
            problem = type(error), str(error)
        for rank, theirs in enumerate(self.everyones(problem)):
            if theirs is not None:
                kind, said = theirs
                self.leave(2 if issubclass(kind, UsageError) else 1)
                raise kind(said if rank == 0 else f"in process {rank}: {said}")

    def leave(self, code: int) -> None:
        """End this process unless it is the one that speaks."""
        if not self.writes:
            raise SystemExit(code)


ALONE = Processes()


def asked_for() -> int:
    """How many processes `torchrun` has started; 1 if it has not started us.

    WORLD_SIZE alone says nothing: schedulers, other launchers and notebooks leave it to programs that they do not start as one
    of several. `torchrun` sets more, and answers where it says that it does.
    """
    found = os.environ
    if not any(name.startswith("TORCHELASTIC_") for name in found):
        return 1
    try:
        rank, count, port = (int(found[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        address = found["MASTER_ADDR"]
    except (KeyError, ValueError):
        return 1
    if not 0 <= rank < count:
        return 1
    kept_by_torchrun = found.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return count if not kept_by_torchrun or _answers(address, port) else 1


@cache
def _answers(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((address, port), timeout=PATIENCE.total_seconds()).close()
    except OSError:
        return False
    return True


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Meet the others that `torchrun` has started; alone without it. `device` decides how they talk. Raises a UsageError if
    there are more processes here than GPUs."""
    if asked_for() == 1 or dist.is_initialized():
        yield ALONE
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            why = f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}"
            raise UsageError(f"{why}: give torchrun --nproc-per-node {torch.cuda.device_count()}, or --device cpu")
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        why = f"the {asked_for()} processes do not meet ({reason_of(error)})"
        raise UsageError(f"{why}: start them all by one torchrun") from error
    yield Processes(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: it could wait for those that are gone


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU if there is one. Raises a UsageError if there is no such device here."""
    if name in ("auto", "cuda") and asked_for() > 1 and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())  # each process has its own
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used ({reason_of(error)}): use cpu, or auto") from error
    return device


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers of a run depend on besides its settings: the device, and versions."""
    versions = {"onward": onward.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"device": describe(device), **versions}
