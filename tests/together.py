"""Functions run by several processes at once, joined in a gloo group on the loopback device."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# Forked from one process that has torch in memory: starting one takes a moment, not seconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "sklearn.datasets",
        "onward",
        "onward.lab.run.loop",
    ]
)
PATIENCE = 60  # seconds


class Ended(NamedTuple):
    """How one process ended: what the function returned, or the traceback of what it raised; or neither, if it was killed."""

    result: Any
    error: str | None
    exit_code: int | None


def together(processes: int, function: Callable[..., Any], *args: Any, timeout: float = 30) -> list[Any]:
    """What `function(rank, *args)` returned in each process of a group; an exception in one of them is raised here."""
    ended = start(processes, partial(in_group, timeout, function), *args)
    for rank, one in enumerate(ended):
        if one.exit_code != 0:
            raise AssertionError(f"process {rank} of {processes} ended with {one.exit_code}: {one.error}")
    return [one.result for one in ended]


def start(processes: int, function: Callable[..., Any], *args: Any) -> list[Ended]:
    """Run `function(rank, *args)` in processes that find in their environment what `torchrun` gives them."""
    with TemporaryDirectory() as folder:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        started = [
            _context.Process(target=_run, args=(rank, processes, store.port, folder, function, args), daemon=True)
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        try:
            for process in started:
                process.join(PATIENCE)
            return [_read(Path(folder) / f"{rank}.pt", process.exitcode) for rank, process in enumerate(started)]
        finally:
            for process in started:
                process.kill()


def _read(path: Path, exit_code: int | None) -> Ended:
    result, error = torch.load(path, weights_only=False) if path.exists() else (None, None)
    return Ended(result, error, exit_code)


def in_group(timeout: float, function: Callable[..., Any], rank: int, *args: Any) -> Any:
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    result = function(rank, *args)
    dist.destroy_process_group()
    return result


def _run(rank: int, processes: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    torch.set_num_threads(1)
    try:
        outcome = function(rank, *args), None
    except BaseException:
        outcome = None, traceback.format_exc()
    partial_file = Path(folder) / f"{rank}.partial"
    torch.save(outcome, partial_file)
    partial_file.replace(Path(folder) / f"{rank}.pt")
    os._exit(0 if outcome[1] is None else 1)  # a broken group would keep the process waiting
