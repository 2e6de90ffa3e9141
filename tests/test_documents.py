"""What the README and the examples show runs."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from onward.lab import cli as command
from onward.lab.studies import (
    align,  # noqa: F401 (before their functions are replaced)
)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readmes_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    loss, engine = re.fullmatch(r"loss (.*)\n(.*)\n", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    assert float(loss) < 0.3
    assert engine == "forward, a tangent per block"


def test_the_readmes_commands_can_be_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^onward .*$", README, re.MULTILINE)]
    asked = []
    for name in (
        "run.loop.train",
        "studies.compare.compare",
        "studies.bench.bench",
        "studies.align.align",
        "report.page.report",
    ):
        monkeypatch.setattr(f"onward.lab.{name}", asked.append)
    monkeypatch.setattr("onward.lab.run.loop.resume", lambda folder, changes: asked.append(folder))
    assert [command.main(line[1:]) for line in lines] == [0] * len(lines)
    assert [type(one).__name__ for one in asked] == [
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


def test_the_example_learns() -> None:
    main = runpy.run_path(str(ROOT / "examples" / "own_network.py"))["main"]
    assert main() > 0.8
