"""What a command line of another code means, and how it is run: what is said about it names its own flags."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from onward.errors import UsageError
from onward.lab.plain import flat
from onward.lab.run import processes
from onward.lab.run.failure import TrainingFailed
from onward.lab.run.loop import train
from onward.lab.run.training import Row, load_data
from onward.lab.settings import Subset, Train
from onward.lab.system import memory
from onward.lab.system.extra import reason_of

OF_TRAIN = {
    "onward train --resume": "onward train --resume",  # goes on with any run, also with these codes'
    "or replace it with --overwrite": "or take it away",
    "start the run anew with --overwrite": "start the run anew",
    "or wait longer with --data-timeout": "or copy the images to another",
}
"""Phrases about flags of `onward train` that have no counterpart, and what is said instead."""


@dataclass(frozen=True)
class Command:
    """What a command line means."""

    config: Train
    flags: Mapping[str, str]
    """Of each flag of `onward train` that it can set, and of phrases with one, what it has in that place."""
    told: tuple[str, ...] = ()
    """What its user has to know: a line on each flag without effect, and where the run differs from the other code's."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that it sets."""

    def tell(self) -> None:
        """Print what is to be told on standard error."""
        if _first():
            for line in self.told:
                print(line, file=sys.stderr)


def given(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, str]:
    """The flags of a command line that the parser has accepted, as they are spelled there, by what they set.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--heads.width", "--width", dest="width")
    >>> given(parser, ["--width", "3"]), given(parser, ["--heads=3"])
    ({'width': '--width'}, {'width': '--heads.width'})
    """
    known = parser._option_string_actions
    found = {}
    for flag in (argument.partition("=")[0] for argument in arguments if argument[:2] == "--" != argument):
        whole = flag if flag in known else next((option for option in known if option.startswith(flag)), None)
        if whole is not None:  # a value may begin with dashes if it has a space in it
            found[known[whole].dest] = whole
    return found


def no_effect(flags: Mapping[str, str], reasons: Mapping[str, str]) -> list[str]:
    """A line on each flag that is given and has no effect, of the reasons by what the flags set."""
    return [f"{flags[name]} has no effect: {reason}" for name, reason in reasons.items() if name in flags]


def reworded(text: str, flags: Mapping[str, str]) -> str:
    """A sentence about flags of `onward train`, with a command line's own flags in their place.

    >>> reworded("--subset.train 9: ask for less, or for another --data-dir", {"--subset.train": "--num_train_sample"})
    "--num_train_sample 9: ask for less, or for another `onward train`'s data-dir"
    """
    names = [name.replace("_", "-") for name in flat(Train())]
    without = {f"--{name}": f"`onward train`'s {name}" for name in names}
    meant = {**without, **OF_TRAIN, **flags}
    longest_first = "|".join(rf"(?<![\w-]){re.escape(phrase)}" for phrase in sorted(meant, key=len, reverse=True))
    return re.sub(rf"({longest_first})(?![\w-]|\.\w)", lambda found: meant[found[0]], text)


@contextmanager
def in_own_words(flags: Mapping[str, str]) -> Iterator[None]:
    """Whatever stops the body is told with these flags in the place of those of `onward train`."""
    try:
        yield
    except (UsageError, TrainingFailed) as error:
        raise type(error)(reworded(str(error), flags)) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(reworded(str(error), flags)) from error
    except (MemoryError, RuntimeError) as error:
        if not memory.exhausted(error):
            raise
        remedy = reworded("use a smaller --batch-size, or a smaller network", flags)
        raise TrainingFailed(f"out of memory ({reason_of(error)}): {remedy}") from error


def run(command: Command) -> list[Row]:
    """Train as the command line means, into a folder that no other run has. Errors of `onward train` are told with the command
    line's own flags."""
    command.tell()
    os.environ.update(command.environment)
    with in_own_words(command.flags), _own_folder(Path(command.config.out or ".")) as folder:
        config = replace(command.config, out=str(folder))
        try:
            return train(config)
        except UsageError as error:
            if "--subset." not in str(error) or processes.asked_for() > 1:
                raise
            return train(_as_many_as_there_are(config))


def _as_many_as_there_are(config: Train) -> Train:
    """The configuration with a whole part where more of it is asked for than there is, as these codes do."""
    whole = load_data(replace(config, subset=Subset()))
    asked, there = vars(config.subset), {"train": len(whole.train), "test": len(whole.test)}
    train, test = (None if asked[part] and asked[part] > there[part] else asked[part] for part in there)
    return replace(config, subset=Subset(train, test))


@contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    """Create the folder, or one of that name with -2, -3, ... if there is one: two runs may start in the same second. If the
    body fails and leaves it empty, it goes again."""
    new = [path for path in folder.parents if not path.exists()]
    own = folder
    try:
        for number in itertools.count(2):
            try:
                if _first():
                    own.mkdir(parents=True)
                break
            except FileExistsError:
                own = folder.with_name(f"{folder.name}-{number}")
    except OSError:  # `train` says what is wrong
        pass
    try:
        yield own
    except BaseException:
        for path in (own, *new) if _first() else ():
            with suppress(OSError):  # it is not empty
                path.rmdir()
        raise


def _first() -> bool:
    """Whether this is the process that writes and speaks, of those that `torchrun` has started."""
    return processes.asked_for() == 1 or os.environ.get("RANK", "0") == "0"
