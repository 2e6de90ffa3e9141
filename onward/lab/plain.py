"""Configurations as plain dicts: every setting by its name on the command line, and what JSON keeps of a configuration."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, TypeVar

from onward.errors import UsageError

T = TypeVar("T")


def flat(config: Any, between: str = ".") -> dict[str, Any]:
    """Every setting of a configuration, or of the dict that one became, by its name on the command line with underscores.

    >>> from onward.lab.settings import Train
    >>> flat(Train())["network.layers"]
    2
    """
    values = config if isinstance(config, dict) else asdict(config)
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = flat(value, between) if isinstance(value, dict) else {}
        found |= {f"{name}{between}{key}": part for key, part in inner.items()} if isinstance(value, dict) else {name: value}
    return found


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """The configuration that `dataclasses.asdict` turned into `values`, also after a trip through JSON.

    Raises:
        UsageError: a setting that does not exist, or a value of another type than its own; the message names it.

    >>> import json
    >>> from onward.lab.settings import Train
    >>> from_dict(Train, json.loads(json.dumps(asdict(Train(lr=0.1))))) == Train(lr=0.1)
    True
    >>> from_dict(Train, {"network": {"width": "wide\\n"}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    onward.errors.UsageError: configuration: wrong value type for field "network.width" - ... of value "wide\\n" of type "str"
    """
    import dacite

    try:
        kinds = (int, float, tuple[str, ...], tuple[int, ...], tuple[float, ...])
        hooks: dict[Any, Any] = dict.fromkeys(kinds, _taken_literally)
        return dacite.from_dict(kind, _as_given(values), dacite.Config(strict=True, cast=[], type_hooks=hooks))
    except UsageError:
        raise
    except (dacite.DaciteError, TypeError, ValueError) as error:
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))  # dacite shows values as they are
        raise UsageError(f"configuration: {shown}") from None


def _as_given(value: Any) -> Any:
    """JSON has no tuples."""
    if isinstance(value, dict):
        return {name: _as_given(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _taken_literally(value: Any) -> Any:
    """To Python true is a number, and a mapping a sequence of its keys; in a file both are mistakes."""
    return str(value) if isinstance(value, (bool, dict)) else value
