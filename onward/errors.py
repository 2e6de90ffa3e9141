"""What the library and the command raise when the caller's input cannot work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """What was asked cannot work; the message names the thing, its value and the remedy.

    >>> raise UsageError("batch size 0: use at least 1")
    Traceback (most recent call last):
    onward.errors.UsageError: batch size 0: use at least 1
    """


def unknown(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """The error for a name that is not among the known ones, with the nearest of them.

    >>> raise unknown("algorithm", "fdaf", ["bp", "dfa", "fdfa"])
    Traceback (most recent call last):
    onward.errors.UsageError: unknown algorithm 'fdaf': did you mean 'fdfa'? (known: bp, dfa, fdfa)
    >>> raise unknown("algorithm", "genetic", ["bp", "dfa", "fdfa"])
    Traceback (most recent call last):
    onward.errors.UsageError: unknown algorithm 'genetic' (known: bp, dfa, fdfa)
    """
    names = [str(entry) for entry in known]
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    shown = names if len(names) <= 16 else [*names[:16], f"and {len(names) - 16} more"]
    return UsageError(f"unknown {kind} {str(name)!r}{hint} (known: {', '.join(shown)})")
