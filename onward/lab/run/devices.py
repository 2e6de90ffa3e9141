"""Where a run computes."""

from __future__ import annotations

import platform

import torch

from onward.errors import UsageError
from onward.lab.run import processes


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU if there is one.

    Raises:
        UsageError: no such device here.
    """
    if name in ("auto", "cuda") and processes.asked_for() > 1 and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())  # each process has its own
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(f"--device {name} cannot be used ({reason}): use cpu, or auto") from error
    return device


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
