"""The memory of the machine, and the most of it that a run needed."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Forget earlier peaks, where the system can; on Linux, give back what is free, so that using it again is seen."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET.exists():
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it
            trim(0)
        RESET.write_text("5")


def keep_freed() -> None:
    """Make glibc keep what is freed for the next step, as it does in any process that has loaded data.

    It returns the end of its heap to the system until the first large block has been freed, which moves its thresholds; until
    then a small network's steps take half as long again, for page faults.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def peak(device: torch.device) -> int:
    """Bytes: the most tensors held on a GPU; on a CPU the process's largest resident size, interpreter and data included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # where there is no /proc, but not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def exhausted(error: Exception) -> bool:
    """Whether the error says that there is no memory left; the CPU's allocator has no type of its own for that."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def physical() -> int:
    """Bytes of memory that the machine has; 8 GB where it does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 * 10**9
