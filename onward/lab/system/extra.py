"""Packages that the lab needs and the library does not: a sentence where one is missing, and a line of what they raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onward.errors import UsageError


@contextmanager
def lab_extra(name: str = "lab") -> Iterator[None]:
    """Turn a missing import in the body into a sentence that says what to install: the lab, or another extra.

    >>> with lab_extra():
    ...     import no_such_module
    Traceback (most recent call last):
    onward.errors.UsageError: no_such_module is not installed: pip install onward[lab]
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed: pip install onward[{name}]") from error


def reason_of(error: BaseException) -> str:
    """The first line of an error, without the stop at its end; or its kind if it says nothing.

    >>> reason_of(ValueError("It is late. Go home.\\nNow."))
    'It is late. Go home'
    """
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
