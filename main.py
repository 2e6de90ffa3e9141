"""The command lines of two papers' codes, run by `onward`: FDFA's, and ForwardLocalGradient's.

Each command is turned into the configuration that `onward train` uses. It is read as ForwardLocalGradient's if it has a flag
that only that code has, such as --algo or --arch, and as FDFA's if not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

try:
    from onward.lab.cli import guarded
    from onward.lab.dialects import commands, fdfa, flg
    from onward.lab.settings import Train
except KeyboardInterrupt:  # they take seconds
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def dialect(arguments: Sequence[str]) -> ModuleType:
    """The code whose command line it is."""
    given = {argument.partition("=")[0] for argument in arguments}
    only_theirs = flg.parser()._option_string_actions.keys() - fdfa.parser()._option_string_actions.keys()
    return flg if given & only_theirs else fdfa


def translate(arguments: Sequence[str] | None = None) -> Train:
    """The configuration that a command line of either code means; what its user has to know is printed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = dialect(arguments).read(arguments)
    command.tell()
    return command.config


def run(arguments: Sequence[str]) -> None:
    """Train as a command line of either code means."""
    commands.run(dialect(arguments).read(arguments))


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(sys.argv[1:])))
