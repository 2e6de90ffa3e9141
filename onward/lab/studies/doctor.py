"""What onward finds on this machine, and whether its estimators are right on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Mapping

import torch
from rich.console import Console

import onward
from onward.errors import UsageError
from onward.lab.run.processes import describe
from onward.lab.settings import Doctor
from onward.lab.studies import selftest

EXTRAS = {"hf": ("transformers", "peft"), "wandb": ("wandb",)}
"""The packages of every extra but `lab`, without which no command runs."""
OF_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
OF_MEMORY = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""Variables that decide how fast a step is on a CPU, and how much memory a process seems to need."""


def doctor(config: Doctor) -> None:
    """Print what there is, then try every algorithm against its formula on every device.

    Raises a UsageError that names the algorithms whose numbers differ: on this machine they cannot be trusted.
    """
    out = Console(highlight=False, soft_wrap=True)
    for name, found in facts().items():
        out.print(f"{name:10} {found}", markup=False)
    begun, wrong = time.perf_counter(), []
    for device in ["cpu", *["cuda"] * torch.cuda.is_available()]:
        for entry in selftest.REFERENCES:
            try:
                off = selftest.deviation(entry, device=device)
                said = f"{off:.0e} from its formula"
            except (UsageError, RuntimeError) as error:
                off, said = float("inf"), f"{type(error).__name__}: {error}"
            right = off <= selftest.TOLERANCE
            out.print(f"self-test  {'right' if right else 'WRONG'}: {entry} on {device}, {said}", markup=False)
            wrong += [] if right else [f"{entry} on {device}"]
    if wrong:
        raise UsageError(
            f"wrong numbers by {', '.join(wrong)}: do not train with these here. Compare `onward doctor` in an environment "
            "made with the project's constraints.txt, and report both outputs"
        )
    count = len(selftest.REFERENCES)
    out.print(f"all {count} are right, in float64, in {time.perf_counter() - begun:.0f} s", markup=False)


def facts() -> dict[str, str]:
    """What numbers and speed depend on here, in words.

    >>> list(facts())
    ['versions', 'system', 'devices', 'threads', 'memory', 'compiler', 'extras']
    """
    compiler = next((name for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl") if name and shutil.which(name)), None)
    cuda = [describe(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return {
        "versions": f"onward {onward.__version__}, torch {torch.__version__}, python {platform.python_version()}",
        "system": " ".join([platform.platform(), *platform.libc_ver()]).strip(),
        "devices": ", ".join([f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})", *cuda]),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores{_set(OF_THREADS)}",
        "memory": _set(OF_MEMORY)[2:] or "the allocator as the system has it",
        "compiler": compiler or "none: --compile inductor needs a C++ compiler (g++, clang++, or the one that CXX names)",
        "extras": "; ".join(f"{name}: {_extra(packages)}" for name, packages in EXTRAS.items()),
    }


def _set(names: tuple[str, ...], environment: Mapping[str, str] = os.environ) -> str:
    """Those environment variables that are set."""
    return "".join(f", {name}={environment[name]}" for name in names if name in environment)


def _extra(packages: tuple[str, ...]) -> str:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        return f"without {', '.join(missing)}"
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
