"""Algorithms as commands name them: `fdfa`, `fdfa:directions=4`, `path/to/file.py:MyRule:rate=0.1`.

Such an entry holds settings of the algorithm, which are the arguments of its constructor, and settings of the run that may
differ from one algorithm to another: `lr`, `compile`, and those of its optimizers and heads, `feedback.lr` or `heads.kind`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor, nn

import onward
from onward.errors import UsageError, unknown
from onward.estimators.base import ALGORITHMS
from onward.estimators.settings import parsed, setting_of, settings_of, written
from onward.lab.networks import models
from onward.lab.run import precision
from onward.lab.run.heads import end_in_head, make_heads
from onward.lab.settings import Train
from onward.lab.system import own

OF_RUNS = ("optimizer", "feedback", "heads")
"""Owners of settings of a run that an entry may have."""


OF_EVERY_RUN = ("lr", "compile")
"""Settings of a run that an entry may have, without an owner."""


class Entry(NamedTuple):
    """What an entry says: the algorithm's name, and its settings as text."""

    name: str
    settings: dict[str, str]


def read(text: str) -> Entry:
    """Take an entry apart.

    Raises:
        UsageError: something in it is no setting=value.

    >>> read("fg:guess=local,lr=0.01")
    Entry(name='fg', settings={'guess': 'local', 'lr': '0.01'})
    >>> read("rules/mine.py:MyRule:rate=0.1").name
    'rules/mine.py:MyRule'
    """
    found = re.fullmatch(r"(.*?\.py:\w+|[^:]*)(?::(.*))?", text)
    if found is None:
        raise UsageError(f"algorithm {text!r}: write it as in fg:guess=local,space=weight, or path/to/file.py:MyRule")
    name, settings = found.groups()
    given: dict[str, str] = {}
    for part in () if settings is None else settings.split(","):
        key, equals, value = part.partition("=")
        key = key.replace("-", "_")
        if not equals:
            raise UsageError(f"algorithm {text!r}: {part!r} is no setting=value, write it as in fg:guess=local,space=weight")
        if key in given:
            raise UsageError(f"algorithm {text!r} sets {key} twice: leave one out")
        given[key] = value
    return Entry(name, given)


def find(name: str) -> type[onward.Estimator]:
    """The class of that name, or the one in a file of the user's own. Raises a UsageError if it is missing or no estimator."""
    if (mine := own.named("--algorithm", name)) is None:
        if name not in ALGORITHMS:
            raise unknown("algorithm", name, [*ALGORITHMS, "path/to/file.py:MyRule"])
        return ALGORITHMS[name]
    found = own.load(mine)
    if not (isinstance(found, type) and issubclass(found, onward.Estimator)):
        raise UsageError(f"{mine} is no class of estimators: derive it from onward.SignalEstimator, or onward.Estimator")
    if taken := [name for name in settings_of(found) if name in OF_EVERY_RUN]:
        raise UsageError(f"{mine} has a setting {taken[0]!r}, which is the run's: give it another name")
    return found


def variant(text: str, config: Train) -> Train:
    """The configuration with the algorithm, and the settings of the run, that an entry names.

    Raises:
        UsageError: an unknown algorithm, or a setting or value that it does not have.

    >>> config = variant("fg:space=weight,guess=local,heads.kind=linear,lr=0.01", Train())
    >>> config.algorithm, config.heads.kind, config.lr
    ('fg:guess=local,space=weight', 'linear', 0.01)
    """
    name, given = read(text)
    algorithm = find(name)
    mine = {key: value for key, value in given.items() if key not in OF_EVERY_RUN and "." not in key}
    try:
        settings = parsed(algorithm, mine)
        changes = _of_run(algorithm, settings, {key: value for key, value in given.items() if key not in mine})
    except UsageError as error:
        raise UsageError(f"algorithm {text!r}: {error}") from error
    nested = {
        owner: dataclasses.replace(getattr(config, owner), **values) if owner in OF_RUNS else values
        for owner, values in changes.items()
    }
    return dataclasses.replace(config, algorithm=spelled(name, algorithm, settings), **nested)


def spelled(name: str, algorithm: type[onward.Estimator], settings: Mapping[str, Any]) -> str:
    """An algorithm with the settings that are not the default, as commands name it.

    >>> spelled("fdfa", onward.FDFA, {"directions": 4})
    'fdfa:directions=4'
    """
    said = written(algorithm, settings)
    return f"{name}:{said}" if said else name


def _of_run(algorithm: type[onward.Estimator], settings: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """The settings of the run in an entry, by their owner."""
    has_feedback, has_heads = algorithm.learns_feedback(**settings), algorithm.needs_heads(**settings)
    hints = get_type_hints(Train)
    known = {name: setting_of(name, hints[name], None) for name in OF_EVERY_RUN}
    for owner in ("optimizer", *["feedback"] * has_feedback, *["heads"] * has_heads):
        for field in dataclasses.fields(hints[owner]):
            key = f"{owner}.{field.name}"
            known[key] = setting_of(key, get_type_hints(hints[owner])[field.name], field.default)
    changes: dict[str, Any] = {}
    for key, text in given.items():
        if (setting := known.get(key)) is None:
            raise unknown("setting", key, [*settings_of(algorithm), *known])
        owner, _, field_name = key.rpartition(".")
        if owner:
            changes.setdefault(owner, {})[field_name] = setting.parsed(text)
        else:
            changes[field_name] = setting.parsed(text)
    return changes


def with_cuts(config: Train, model: nn.Module, x: Any) -> Train:
    """The configuration with the cuts that a trial run proposes, where a network of Hugging Face's has to have some."""
    name, given = read(config.algorithm)
    algorithm = find(name)
    if config.cuts or not config.model.startswith(models.HUGGING_FACE) or algorithm.measures_whole(**parsed(algorithm, given)):
        return config
    return dataclasses.replace(config, cuts=onward.suggest_cuts(model, x) or None)


def build(model: nn.Module, config: Train, x: Any, loss: Any = nn.functional.cross_entropy) -> onward.Estimator:
    """The estimator that `config.algorithm` names, of `model`, whose inputs look like the batch `x`.

    Heads are drawn from the global generator. A network that ends in the chosen kind of head is given it.

    Raises:
        UsageError: an unknown algorithm, or a setting that it does not have; inputs that are not those of `config.input`.
    """
    name, given = read(config.algorithm)
    algorithm = find(name)
    settings = parsed(algorithm, given)
    if config.input and isinstance(x, Tensor) and models.parse_shape(config.input) != (shape := tuple(x.shape[1:])):
        raise UsageError(f"--input {config.input}: the inputs are {','.join(map(str, shape))}, leave it out")
    x = precision.inputs(config, x)
    if config.heads.kind and models.facts(config.model).ends_in_head:
        end_in_head(model, config, x)
    if algorithm.needs_heads(**settings):
        settings["heads"] = make_heads(model, config, x)
    mine = own.named("--algorithm", name)
    with own.errors(mine, " as the algorithm is made"):
        try:
            estimator = algorithm(model, config.cuts, loss=loss, seed=config.seed, **settings)
        except TypeError as error:
            if mine is None:
                raise
            why = f"{mine} cannot be made with (model, cuts, loss=, seed=, settings) ({error})"
            raise UsageError(f"{why}: give arguments of your own a default, and pass **options on to the parent") from error
    precision.laid_out(config, estimator)
    return estimator if config.compile == "off" else onward.capture(estimator, backend=config.compile)


def files(config: Train) -> tuple[own.Own | None, ...]:
    """The user's own files that take part in every step: of the network, of the algorithm."""
    return own.named("--model", config.model), own.named("--algorithm", read(config.algorithm).name)


def digest(config: Train) -> str | None:
    """A hexadecimal number of the user's own files, which changes when one of them does; None without any."""
    return "".join(filter(None, map(own.digest, files(config)))) or None


def folder_name(text: str) -> str:
    """What an entry, or a model, is called in the name of a folder.

    >>> folder_name("fg:guess=local,heads.kind=cnn"), folder_name("../nets/small.py:make_model")
    ('fg-guess=local-heads.kind=cnn', 'small.py-make_model')
    """
    return re.sub(r"[^\w.=+-]+", "-", text.replace("\\", "/").rpartition("/")[2])
