"""Whatever is typed or found in a file, what comes back is an exit code and a sentence, never a traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from main import translate
from onward.errors import UsageError
from onward.estimators.base import ALGORITHMS
from onward.lab import cli as command
from onward.lab.data import Data, Split
from onward.lab.dialects import fdfa, flg
from onward.lab.networks.models import MODELS
from onward.lab.plain import from_dict
from onward.lab.report import page as report
from onward.lab.run import loop as training
from onward.lab.run import record
from onward.lab.run.loop import TrainingFailed, train
from onward.lab.settings import AUGMENTATIONS, Align, Bench, Compare, Report, Train, Transform
from onward.lab.studies import align, bench, compare

Draw = Callable[..., Any]
PARTS = {
    (training, "train"): Train,
    (training, "resume"): Path,
    (compare, "compare"): Compare,
    (align, "align"): Align,
    (bench, "bench"): Bench,
    (report, "report"): Report,
}
KINDS = {"train": Train, "compare": Compare, "align": Align, "bench": Bench, "report": Report}
WORDS = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12)  # no argument holds a zero byte
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([0.0, 0.5, 1e-3, -1.0, 1e30, 1e308, float("nan"), float("inf"), 2**31, 10**30, 10**400]),
)


def runs(property: Callable[[Draw], None], short: int, long: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """The property as two tests: of a few examples, and of many."""

    def of(examples: int) -> Callable[..., None]:
        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def test(data: st.DataObject) -> None:
            property(data.draw)

        return test

    return of(short), pytest.mark.slow(of(long))


def flags(kind: type, owner: str = "") -> Iterator[tuple[str, Any]]:
    """Every flag of a command, and what it takes."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from flags(hint, f"{owner}{name}.")
        else:
            yield f"{owner}{name}", hint


def values(hint: Any) -> st.SearchStrategy[Any]:
    """What fits, and numbers that fit but for their size."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.lists(values(get_args(hint)[0]), max_size=3).map(tuple)
    if get_args(hint):
        return st.one_of(*(values(part) for part in get_args(hint)))
    if hint in (int, float):
        return NUMBERS.filter(lambda number: isinstance(number, hint))
    return {bool: st.booleans(), type(None): st.none()}.get(hint, WORDS)


# ---- the command


def any_command_line(draw: Draw) -> None:
    """The command with its parts replaced: they are given a configuration, or an exit code is."""
    name = draw(st.one_of(st.sampled_from([*KINDS, "list"]), WORDS))
    known = dict(flags(KINDS.get(name, Train)))
    arguments = [name]
    for flag in draw(st.lists(st.sampled_from([*known, "nonsense", "help"]), max_size=4)):
        arguments.append(draw(st.one_of(st.just("--" + flag.replace("_", "-")), WORDS)))
        given_values = draw(st.lists(st.one_of(values(known.get(flag, str)), NUMBERS, WORDS), max_size=2))
        arguments += [str(value) for value in given_values]
    handed: list[Any] = []
    with contextlib.ExitStack() as stack:
        for (module, part), what in PARTS.items():
            stack.enter_context(mock.patch.object(module, part, lambda asked, what=what: handed.append((asked, what))))
        said = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            code = command.main(arguments)
        except SystemExit as exit:
            code = exit.code
    assert code in (0, 2), said.getvalue()
    assert "Traceback" not in said.getvalue()
    assert all(isinstance(asked, what) for asked, what in handed)
    if code == 2:
        assert said.getvalue()
        assert not handed


test_any_command_line, test_any_of_many_command_lines = runs(any_command_line, 5, 400)


# ---- the configuration

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=8,
)


def any_settings(draw: Draw) -> None:
    """A file that says something else in one or two places, or altogether."""
    found: Any = json.loads(json.dumps(dataclasses.asdict(Train())))
    for flag in draw(st.lists(st.sampled_from(list(dict(flags(Train)))), min_size=1, max_size=2)):
        *owners, name = flag.split(".")
        part = found
        for owner in owners:
            part = part[owner]
        part[name] = draw(JSON)
    content = draw(st.one_of(st.just({"config": found}), st.builds(dict, config=JSON), JSON))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(content))
        try:
            config = record.read(Path(folder)).config
        except UsageError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert str(Path(folder) / "config.json") in str(error)  # noqa: PT017
        else:
            assert from_dict(Train, json.loads(json.dumps(dataclasses.asdict(config)))) == config


test_any_settings, test_any_of_many_settings = runs(any_settings, 60, 2000)


def any_bytes(draw: Draw) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        content = bytearray(json.dumps({"config": dataclasses.asdict(Train())}).encode())
        where = draw(st.integers(0, len(content)))
        content[where : where + draw(st.integers(0, 5))] = draw(st.binary(max_size=5))
        path.write_bytes(draw(st.one_of(st.just(content), st.binary())))
        with contextlib.suppress(UsageError):
            record.read(Path(folder))


test_any_bytes_for_settings, test_any_of_many_bytes_for_settings = runs(any_bytes, 60, 2000)


def a_few_images() -> Data:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        pixels = torch.randint(0, 256, (count, 1, 12, 12), dtype=torch.uint8, generator=generator)
        return Split(pixels, torch.arange(count) % 3)

    return Data("a few", split(9), split(3), 3, ("a", "b", "c"))


SMALL = {"network.width": 0.02, "network.layers": 2, "epochs": 1, "batch_size": 4, "device": "cpu", "transform.size": 12}
NAMES = {
    "algorithm": st.sampled_from(list(ALGORITHMS)),
    "model": st.sampled_from([name for name in MODELS if name in ("mlp", "cnn", "chain", "small-net")]),
    "transform.augment": st.sampled_from(AUGMENTATIONS),
}
NOT_TRIED = (
    "out",
    "overwrite",
    "wandb",
    "resume",
    "data",
    "data_dir",
    "heads.width",
    "transform.size",
    "epochs",
    "network.layers",
)


def any_run(draw: Draw) -> None:
    """Settings that are accepted are those of a run that ends, or that fails because a number is not finite."""
    known = dict(flags(Train))
    asked = {**SMALL, "algorithm": draw(NAMES["algorithm"]), "model": draw(NAMES["model"])}
    for flag in draw(st.lists(st.sampled_from([name for name in known if name not in NOT_TRIED]), max_size=6, unique=True)):
        asked[flag] = draw(NAMES.get(flag, values(known[flag])))
    found: dict[str, Any] = {}
    for flag, value in asked.items():
        owner, _, name = flag.rpartition(".")
        (found.setdefault(owner, {}) if owner else found)[name] = value
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UsageError, TrainingFailed):
        config = from_dict(Train, {**found, "out": f"{folder}/run"})
        assert len(train(config, a_few_images(), lambda _: None)) == 1


test_any_run, test_any_of_many_runs = runs(any_run, 10, 1000)


def test_transforms_take_the_fields_that_are_drawn() -> None:
    assert dict(flags(Train)).keys() >= {*SMALL, *NAMES, *NOT_TRIED}
    assert {field.name for field in dataclasses.fields(Transform)} == {"mean", "std", "augment", "padding", "cutout", "size"}


# ---- the two papers' command lines


def any_dialect(draw: Draw) -> None:
    known = {**fdfa.parser()._option_string_actions, **flg.parser()._option_string_actions}
    arguments = []
    for flag in draw(st.lists(st.one_of(st.sampled_from(list(known)), WORDS), max_size=5)):
        choices = known[flag].choices if flag in known else None
        value = draw(st.one_of(NUMBERS.map(str), WORDS, *([st.sampled_from(list(choices))] if choices else [])))
        arguments += draw(st.sampled_from([[flag, value], [f"{flag}={value}"], [flag]]))
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            assert isinstance(translate(arguments), Train)
        except UsageError as error:
            assert "\n" not in str(error)  # noqa: PT017
        except SystemExit as exit:
            assert exit.code == 0 or (exit.code == 2 and "error: " in said.getvalue())  # noqa: PT017


test_any_dialect, test_any_of_many_dialects = runs(any_dialect, 50, 4000)
