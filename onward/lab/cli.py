"""The `onward` command."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Union

from onward.errors import UsageError
from onward.lab.system import surroundings
from onward.lab.system.extra import lab_extra


@dataclass(frozen=True)
class List:
    """Name the algorithms, networks, heads, targets, guesses, spaces and data sets that there are."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 1 if training failed, 2 if what was asked for cannot work."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words == ["--version"]:  # asked of an installation without the lab too
        with surroundings.settled():
            print(_version())
        return 0
    return guarded(lambda: _run(words or ["--help"]))


def _version() -> str:
    import torch

    import onward

    return f"onward {onward.__version__} (torch {torch.__version__}, python {platform.python_version()})"


def guarded(work: Callable[[], object]) -> int:
    """Do the work; one sentence on standard error and the exit code say what went wrong.

    A reader may close the pipe early, as in `onward list | head`. That is no error: nothing is said, and the exit code is that
    of a program which SIGPIPE has ended.
    """
    with surroundings.settled():
        try:
            try:
                return _told(work)
            finally:
                surroundings.flush()
        except (BrokenPipeError, SystemExit) as stopped:
            if not isinstance(stopped, BrokenPipeError) and not isinstance(stopped.__context__, BrokenPipeError):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes as it ends
            return 128 + signal.SIGPIPE


def _told(work: Callable[[], object]) -> int:
    try:
        with lab_extra():
            from onward.lab.run.failure import TrainingFailed
            from onward.lab.system import memory
        try:
            work()
        except TrainingFailed as error:
            return _complain(error, 1)
        except (MemoryError, RuntimeError) as error:
            if not memory.exhausted(error):
                raise
            reason = str(error).partition("\n")[0]
            return _complain(f"out of memory ({reason}): use a smaller --batch-size, or a smaller network", 1)
    except UsageError as error:
        return _complain(error, 2)
    except BrokenPipeError:
        raise
    except OSError as error:  # a disk that is full, a folder that is gone
        return _complain(error, 1)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", file=sys.stderr)
        return 130
    return 0


def _complain(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def _run(argv: Sequence[str]) -> None:
    asked = _asked(argv)
    with lab_extra():
        from onward.lab.report.page import report
        from onward.lab.run.loop import train
        from onward.lab.settings import Align, Bench, Compare, Doctor, Report, Results, Train
        from onward.lab.studies.align import align
        from onward.lab.studies.bench import bench
        from onward.lab.studies.compare import compare
        from onward.lab.studies.doctor import doctor
        from onward.lab.studies.results import results

    match asked:
        case Train(resume=str()):
            _resume(asked)
        case Train():
            train(asked)
        case Compare():
            compare(asked)
        case Align():
            align(asked)
        case Bench():
            bench(asked)
        case Report():
            report(asked)
        case Results():
            results(asked)
        case List():
            _list()
        case Doctor():
            doctor(asked)


def _asked(argv: Sequence[str]) -> Any:
    """What the command line asks for, as the settings of a command."""
    with lab_extra():
        import tyro

        from onward.lab.recipes.recipe import asked_for
        from onward.lab.run import processes
        from onward.lab.settings import Align, Bench, Compare, Doctor, Report, Results, Train

    recipe = asked_for(argv)
    commands = [
        Annotated[kind, tyro.conf.subcommand(kind.__name__.lower(), default=default, description=kind.__doc__)]
        for kind in (Train, Compare, Align, Bench, Report, Results, List, Doctor)
        for default in [recipe.config if recipe and kind is Train else kind()]
    ]
    kinds: Any = Union[tuple(commands)]  # noqa: UP007 (made at run time)
    asked = tyro.cli(
        kinds,
        prog="onward",
        description="Train PyTorch networks without backpropagating through them. `onward --version` says which one this is.",
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if isinstance(asked, Train) and asked.recipe != (recipe and recipe.name):
        raise UsageError(f"--recipe {asked.recipe} comes too late, or twice: give one, right behind onward train")
    if (left := os.environ.get("WORLD_SIZE", "1")) != "1" and processes.asked_for() == 1 and isinstance(asked, Train):
        print(f"WORLD_SIZE={left} is not from torchrun: this process trains alone", file=sys.stderr)
    if processes.asked_for() > 1 and not isinstance(asked, Train):
        raise UsageError(f"onward {type(asked).__name__.lower()} is one process's work: start it without torchrun")
    return asked


def _resume(asked: Any) -> None:
    """Go on with a run, with the settings that may change for the rest of it."""
    from onward.lab.plain import flat
    from onward.lab.run.folder import MAY_CHANGE
    from onward.lab.run.loop import resume
    from onward.lab.settings import Train

    keeps = f"--resume {asked.resume} keeps what decides the result of the run: leave out"
    if asked.recipe:
        raise UsageError(f"{keeps} --recipe")
    given, defaults = flat(replace(asked, resume=None)), flat(Train())
    changes = {name: value for name, value in given.items() if value != defaults[name]}
    if others := " ".join(f"--{name.replace('_', '-')}" for name in changes if name not in MAY_CHANGE):
        raise UsageError(f"{keeps} {others}")
    resume(Path(asked.resume), changes=changes)


def _list() -> None:
    from onward.estimators.base import ALGORITHMS
    from onward.estimators.settings import settings_of
    from onward.lab.data import DATASETS
    from onward.lab.networks.models import MODELS
    from onward.lab.recipes.recipe import RECIPES, read
    from onward.lab.tasks import TASKS
    from onward.network.heads import HEADS

    of_algorithms = {name: list(settings_of(algorithm).values()) for name, algorithm in ALGORITHMS.items()}
    kinds: dict[str, Mapping[str, object]] = {"algorithms": ALGORITHMS, "models": MODELS, "heads": HEADS}
    for name, settings in of_algorithms.items():
        for setting in settings:
            if isinstance(setting.choices, Mapping) and all(_line(choice) for choice in setting.choices.values()):
                kinds[f"{setting.name} of {name}"] = setting.choices
    recipes = {name: read(name) for name in RECIPES}
    for kind, entries in {**kinds, "tasks": TASKS, "data sets": DATASETS, "recipes": recipes}.items():
        print(f"{kind}:")
        for name, entry in entries.items():
            print(f"  {name:18} {_line(entry)}")
            for setting in of_algorithms[name] if kind == "algorithms" else ():
                print(f"  {'':18}   {setting.name}={setting.written(setting.default)}: {setting.line.rstrip('.')}")


def _line(entry: object) -> str:
    """What something is, in a line: the text itself, its `line`, or the first line of its docstring."""
    said = entry if isinstance(entry, str) else getattr(entry, "line", None) or getattr(entry, "__doc__", None) or ""
    return said.partition("\n")[0].rstrip(".").replace("``", "")
