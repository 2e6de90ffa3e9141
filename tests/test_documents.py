"""What the README, the documents and the examples show runs."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import onward
from onward.lab import cli as command
from onward.lab.data.sets import DATASETS
from onward.lab.networks import models
from onward.lab.run import algorithms
from onward.lab.settings import Train
from onward.lab.studies import (
    align,  # noqa: F401 (before their functions are replaced)
)

ROOT = Path(__file__).parents[1]
TEXTS = {
    path.name: path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = TEXTS["README.md"]


def test_the_readmes_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    loss, engine = re.fullmatch(r"loss (.*)\n(.*)\n", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    assert float(loss) < 0.3
    assert engine == "forward, a tangent per block"
    names["Signs"](names["model"]).estimate(names["x"], names["y"])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the commands are asked for, in place of doing it."""
    found: list[Any] = []
    for name in (
        "run.loop.train",
        "studies.compare.compare",
        "studies.bench.bench",
        "studies.align.align",
        "report.page.report",
    ):
        monkeypatch.setattr(f"onward.lab.{name}", found.append)
    monkeypatch.setattr("onward.lab.run.loop.resume", lambda folder, changes: found.append(folder))
    monkeypatch.chdir(ROOT)
    return found


def test_the_readmes_commands_can_be_parsed(asked: list[Any]) -> None:
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^onward .*$", README, re.MULTILINE)]
    assert [command.main(line[1:]) for line in lines] == [0] * len(lines)
    assert [type(one).__name__ for one in asked] == [
        "Train",
        "Train",
        "Train",
        "Train",
        "Train",
        "PosixPath",
        "Compare",
        "Compare",
        "Bench",
        "Align",
        "Report",
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each `onward` command in a document, in blocks of code and within sentences, but for a last `...`."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()] + re.findall(r"^    (.*)", rest, re.MULTILINE)
    for line in lines + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]:
        if found := re.search(r"(?:^|[ =]\w+ |-m )onward ((?:train|compare|bench|align|report)\b.*)|^onward (.*)", line):
            yield shlex.split((found[1] or found[2]).replace("--algorithms ...", ""), comments=True)


@pytest.mark.parametrize("name", TEXTS)
def test_the_documents_commands_can_be_parsed(name: str, asked: list[Any]) -> None:
    for arguments in commands(TEXTS[name]):
        if "--help" not in arguments and arguments[0] != "list":
            kept = [argument for argument in arguments if argument != "..."]
            assert command.main(kept) == 0, kept
    for one in asked:
        for entry in (*getattr(one, "algorithms", ()), *([one.algorithm] if isinstance(one, Train) else [])):
            algorithms.variant(entry, Train())
        if model := getattr(one, "model", None):
            models.check(model)
        assert (data := getattr(one, "data", "digits")) in DATASETS or ".py:" in data


@pytest.mark.parametrize("name", TEXTS)
def test_what_the_documents_name_is_there(name: str) -> None:
    """Files of the repository, what links lead to, public names, and the settings that an algorithm is shown with."""
    text = TEXTS[name]
    for path in re.findall(r"(?<![\w/.-])(?:onward|tests|benchmarks|examples|docs)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT if name.isupper() else ROOT / "docs") / link).exists() or (ROOT / link).exists(), link
    for public in re.findall(r"\bonward\.([A-Za-z]\w+)", text):
        assert public in onward.__all__, public
    for entry in re.findall(rf"`((?:{'|'.join(ALGORITHMS)}):[^`\s]+)`", text):
        algorithms.variant(entry, Train())


def test_the_network_of_ones_own_learns() -> None:
    main = runpy.run_path(str(ROOT / "examples" / "own_network.py"))["main"]
    assert main() > 0.8


def test_the_data_of_ones_own_can_be_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["--model", "mlp", "--algorithm", "fdfa", "--lr", "1e-3", "--epochs", "3", "--device", "cpu"]
    assert command.main(["train", "--data", "examples/own_data.py:make", *arguments, "--out", str(tmp_path)]) == 0
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test_r2"] > 0.8
    assert last["test_rmse"] == pytest.approx(last["test_loss"] ** 0.5)
