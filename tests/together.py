"""Functions run by several processes at once, joined in a gloo group on the loopback device."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

# Forked from one process that has torch in memory: starting one takes a moment, not seconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "onward"])
PATIENCE = 60  # seconds


def together(processes: int, function: Callable[..., Any], *args: Any, timeout: float = 30) -> list[Any]:
    """What `function(rank, *args)` returned in each process; an exception in one of them is raised here, with its traceback."""
    with TemporaryDirectory() as folder:
        started = [
            _context.Process(target=_run, args=(rank, processes, folder, timeout, function, args), daemon=True)
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        try:
            for process in started:
                process.join(PATIENCE)
            results = [_read(Path(folder) / f"{rank}.pt", started[rank].exitcode) for rank in range(processes)]
        finally:
            for process in started:
                process.kill()
    for rank, (_, error) in enumerate(results):
        if error is not None:
            raise AssertionError(f"process {rank}: {error}")
    return [result for result, _ in results]


def _read(path: Path, exit_code: int | None) -> tuple[Any, str | None]:
    if not path.exists():
        return None, f"ended with {exit_code} and left nothing"
    return torch.load(path, weights_only=False)


def _run(rank: int, processes: int, folder: str, timeout: float, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes, timeout=timedelta(seconds=timeout)
    )
    try:
        outcome = function(rank, *args), None
    except BaseException:
        outcome = None, traceback.format_exc()
    partial = Path(folder) / f"{rank}.partial"
    torch.save(outcome, partial)
    partial.replace(Path(folder) / f"{rank}.pt")
    if outcome[1] is None:
        dist.destroy_process_group()
    os._exit(0)  # a broken group would keep the process waiting
