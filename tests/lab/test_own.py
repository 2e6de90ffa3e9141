from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onward.errors import UsageError
from onward.lab.system import own
from onward.lab.system.own import Own, OwnError

FAILS = "def {name}(inner=None):\n    if inner:\n        inner()\n    raise ValueError('of {name}')\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def file(name: str, text: str) -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return file


@pytest.mark.parametrize(
    ("flag", "asked", "missing", "unknown"),
    [
        ("--model", "function of the file makes the network, such as {}:make_model", "function", "function"),
        ("--algorithm", "class of the file is the algorithm, such as {}:MyRule", "class", "class"),
        ("--data", "function of the file returns the data, such as {}:make_data", "function", "function"),
    ],
)
def test_what_cannot_be_found(flag: str, asked: str, missing: str, unknown: str, write: Callable[..., Path]) -> None:
    assert own.named(flag, "a-name") is None
    with pytest.raises(UsageError, match=re.escape(f"{flag} no.py: say which " + asked.format("no.py"))):
        own.named(flag, "no.py")
    with pytest.raises(UsageError, match=f"{flag} no.py:it: there is no file no.py: give path/to/file.py:{missing}"):
        own.named(flag, "no.py:it")
    path = write("here.py", "import math\ndef there(): pass\nclass There: pass\nVALUE = 3\n")
    assert own.load(own.named(flag, f"{path}:There")).__name__ == "There"
    for name in ("their", "math", "VALUE"):
        with pytest.raises(UsageError, match=rf"unknown {unknown} of .*here.py '{name}'.*\(known: there, There\)"):
            own.load(own.named(flag, f"{path}:{name}"))


def test_of_several_files_the_one_that_fails_is_named(write: Callable[..., Path]) -> None:
    files = {name: write(f"{name}/{name}.py", FAILS.format(name=name)) for name in ("net", "rule")}
    model, algorithm = Own("--model", files["net"], "net"), Own("--algorithm", files["rule"], "rule")
    fail: dict[str, Any] = {"net": own.load(model), "rule": own.load(algorithm)}
    for order in ((model, algorithm), (algorithm, None, model)):
        with pytest.raises(OwnError, match=r"rule.py, line 4 in a step: ValueError: of rule"), own.errors(order, " in a step"):
            fail["net"](fail["rule"])  # as a rule that is called from inside the network's forward
        with pytest.raises(OwnError, match=r"net.py, line 4: ValueError: of net"), own.errors(order):
            fail["rule"](fail["net"])


def test_a_file_that_is_changed_within_a_second_is_read_anew(write: Callable[..., Path]) -> None:
    """Its size and the second of its change say nothing then."""
    for _ in range(20):
        for number in (1, 2):
            path = write("mine.py", f"def make(): return {number}\n")
            os.utime(path, (1_000_000_000, 1_000_000_000))
            found = own.load(Own("--model", path, "make"))
            assert found() == number


def test_errors_of_others_pass(write: Callable[..., Path]) -> None:
    theirs = Own("--data", write("data.py", "def load():\n    raise KeyError\n"), "load")
    for owns in (None, (None,), theirs):
        with pytest.raises(ZeroDivisionError), own.errors(owns):
            _ = 1 / 0
    with pytest.raises(OwnError, match=r"data.py: ZeroDivisionError: division by zero"), own.errors(theirs, elsewhere=True):
        _ = 1 / 0


def test_a_network_and_a_rule_have_each_their_own_helpers(write: Callable[..., Path]) -> None:
    late = "import helpers\ndef make():\n    import {}\n    return helpers.WHO, {}.WHO\n"
    for who in ("net", "rule"):
        write(f"{who}/helpers.py", f"WHO = '{who}'\n")
        write(f"{who}/only_{who}.py", f"WHO = '{who}'\n")
    before = list(sys.path)
    model = Own("--model", write("net/file.py", late.format("only_net", "only_net")), "make")
    algorithm = Own("--algorithm", write("rule/file.py", late.format("only_rule", "only_rule")), "make")
    for _ in range(2):
        makes = own.load(model), own.load(algorithm)
        assert [make() for make in makes] == [("net", "net"), ("rule", "rule")]
    assert own.load(Own("--model", algorithm.path, "make"))() == ("rule", "rule")
    assert str(model.path.parent) not in sys.path
    assert len(sys.path) <= len(before) + 1
    for name in ("helpers", "only_net", "only_rule"):
        sys.modules.pop(name, None)
