"""The memory of the machine, and the most of it that a run needed."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Measure the peak from now on, if the system can. On Linux, free memory is given back first, so its next use counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET.exists():
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it
            trim(0)
        RESET.write_text("5")


def keep_freed() -> None:
    """Make glibc keep freed memory for the next step, as it does in every process that has loaded data.

    glibc gives the end of its heap back to the system until the program frees its first large block, which raises glibc's
    thresholds. Until then, page faults make the steps of a small network half as long again.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def peak(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors took; on a CPU the largest resident size of the process, interpreter included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # for systems without /proc; Windows does not have the module

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def exhausted(error: BaseException) -> bool:
    """Whether the error says that no memory is left; on a CPU, PyTorch says it in a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def physical() -> int:
    """Bytes of memory that the machine has; 8 GB if the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 * 10**9
