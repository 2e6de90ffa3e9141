"""The settings of an algorithm are the arguments of its constructor: their names, types, defaults, choices and ranges.

A signature says the type of each, and by ``Annotated`` what else holds::

    def __init__(self, model, cuts=None, *, directions: Annotated[int, AtLeast(1)] = 1, **options): ...

What goes on to a parent's constructor as ``**options`` counts as well. The docstring of the class says in a section
``Settings:`` what each setting is for. Nothing else has to be told about them: the command line, run folders and lists read
them here.
"""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from onward.errors import UsageError, unknown

NO_SETTINGS = ("loss", "seed", "check", "uncut")
"""Arguments of constructors that are decided elsewhere: by the run, or by a child class."""
_MOST = 2**31 - 1
"""The largest whole number, as for all settings of a run."""
_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a word"}


@dataclass(frozen=True, eq=False)
class AtLeast:
    """In ``Annotated``: the least value of a number.

    >>> settings_of(_Example)["directions"].check(0)
    Traceback (most recent call last):
    onward.errors.UsageError: directions=0: use at least 1
    """

    value: float


@dataclass(frozen=True, eq=False)
class OneOf:
    """In ``Annotated``: the values that a word can have.

    >>> settings_of(_Example)["noise"].check("white")
    Traceback (most recent call last):
    onward.errors.UsageError: unknown noise 'white' (known: gaussian, rademacher)
    """

    names: Collection[str]


class Setting(NamedTuple):
    """One setting of an algorithm."""

    name: str
    kind: type
    """bool, int, float or str."""
    default: Any
    optional: bool
    """Whether it may be None."""
    least: float | None
    choices: Collection[str]
    line: str
    """What it is for, from the docstring of its class."""

    def check(self, value: Any) -> None:
        """Raise a :class:`onward.UsageError` for a value that it cannot have."""
        if value is None and self.optional:
            return
        if self.choices and not (isinstance(value, self.kind) and value in self.choices):
            raise unknown(self.name, value, self.choices)
        if not _is(self.kind, value):
            raise UsageError(f"{self.name}={value!r}: use {_KINDS[self.kind]}")
        if self.kind is int and value > _MOST:
            raise UsageError(f"{self.name}={value!r}: use at most {_MOST}")
        if self.least is not None and value < self.least:
            raise UsageError(f"{self.name}={value!r}: use at least {self.least:g}")

    @staticmethod
    def written(value: Any) -> str:
        """A value as text, as :meth:`parsed` reads it."""
        return {True: "true", False: "false", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)

    def parsed(self, text: str) -> Any:
        """The value that is written as ``text``.

        >>> settings_of(_Example)["directions"].parsed("4")
        4
        """
        if self.optional and text == "none":
            return None
        if self.kind is str:
            value: Any = text
        elif self.kind is bool:
            if text not in ("true", "false"):
                raise UsageError(f"{self.name}={text}: use true or false")
            value = text == "true"
        else:
            try:
                value = self.kind(text)
            except ValueError:
                raise UsageError(f"{self.name}={text}: this is no {'whole number' if self.kind is int else 'number'}") from None
        self.check(value)
        return value


def settings_of(algorithm: type) -> dict[str, Setting]:
    """The settings of a class, by name.

    >>> settings_of(_Example)["directions"]._asdict()  # doctest: +NORMALIZE_WHITESPACE
    {'name': 'directions', 'kind': <class 'int'>, 'default': 1, 'optional': False, 'least': 1, 'choices': (),
     'line': 'how many are averaged.'}
    """
    lines = _lines(algorithm)
    found: dict[str, Setting] = {}
    for owner in algorithm.__mro__:
        if (start := vars(owner).get("__init__")) is None:
            continue
        parameters = inspect.signature(start).parameters.values()
        try:
            hints = get_type_hints(start, include_extras=True)
        except Exception:  # a name that is imported for type checkers alone: the types of the defaults will do
            hints = {}
        for parameter in parameters:
            if parameter.default is not parameter.empty and parameter.name not in (*NO_SETTINGS, *found):
                setting = setting_of(parameter.name, hints.get(parameter.name), parameter.default)
                if setting is not None:
                    found[parameter.name] = setting._replace(line=lines.get(parameter.name, ""))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def written(algorithm: type, given: Mapping[str, Any]) -> str:
    """The settings that are not the default as text, always in the same order.

    >>> written(_Example, {"noise": "rademacher", "directions": 1})
    'noise=rademacher'
    """
    return ",".join(
        f"{name}={setting.written(value)}"
        for name, setting in settings_of(algorithm).items()
        if name in given and (value := given[name]) != setting.default
    )


def check_settings(algorithm: type, given: Mapping[str, Any]) -> None:
    """Raise a :class:`onward.UsageError` for a setting with a value that it cannot have."""
    if given:
        known = settings_of(algorithm)
        for name, value in given.items():
            if name in known:
                known[name].check(value)


def parsed(algorithm: type, given: Mapping[str, str]) -> dict[str, Any]:
    """The values of settings that are written as text.

    Raises :class:`onward.UsageError` for one that the algorithm does not have, or a value that it cannot have.

    >>> parsed(_Example, {"directions": "4", "noise": "rademacher"})
    {'directions': 4, 'noise': 'rademacher'}
    >>> parsed(_Example, {"direction": "4"})
    Traceback (most recent call last):
    onward.errors.UsageError: unknown setting 'direction': did you mean 'directions'? (known: directions, noise)
    """
    known = settings_of(algorithm)
    for name in given:
        if name not in known:
            raise unknown("setting", name, known) if known else UsageError(f"setting {name!r}: there are none, leave it out")
    return {name: known[name].parsed(text) for name, text in given.items()}


def setting_of(name: str, hint: Any, default: Any) -> Setting | None:
    """The setting that an argument of that type is; None for an argument that no text can give.

    >>> setting_of("rate", float | None, None).parsed("0.5")
    0.5
    """
    least: float | None = None
    choices: Collection[str] = ()
    optional = False
    while get_origin(hint) in (Annotated, Union, types.UnionType):
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
            for mark in marks:
                least = mark.value if isinstance(mark, AtLeast) else least
                choices = mark.names if isinstance(mark, OneOf) else choices
        else:
            others = [kind for kind in get_args(hint) if kind is not type(None)]
            if len(others) != 1:
                return None
            hint, optional = others[0], len(others) < len(get_args(hint))
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        hint = type(choices[0])
    if hint is None and default is not None:
        hint = type(default)  # an argument without a type
    return Setting(name, hint, default, optional, least, choices, "") if hint in _KINDS else None


def _is(kind: type, value: Any) -> bool:
    if kind is bool or isinstance(value, bool):  # which is a whole number to Python
        return kind is bool and isinstance(value, bool)
    if kind is str:
        return isinstance(value, str)
    if kind is int:
        return isinstance(value, Integral)
    return isinstance(value, Real) and math.isfinite(value)


def _lines(algorithm: type) -> dict[str, str]:
    """What docstrings say of each setting: of the class, and of those that it goes on to."""
    lines: dict[str, str] = {}
    for owner in algorithm.__mro__:
        _, _, section = (inspect.getdoc(owner) or "").partition("\nSettings:\n")
        section = section.partition("\n\n")[0]
        for name, line in re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", section, re.MULTILINE):
            lines.setdefault(name, " ".join(line.split()))
    return lines


class _Example:
    """An algorithm in the examples above.

    Settings:
        directions: how many are averaged.
    """

    def __init__(
        self,
        model: object,
        *,
        directions: Annotated[int, AtLeast(1)] = 1,
        noise: Annotated[str, OneOf(("gaussian", "rademacher"))] = "gaussian",
        seed: int = 0,
    ) -> None:
        pass
