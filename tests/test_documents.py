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
from onward.estimators.base import ALGORITHMS
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
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
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
        "studies.results.results",
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
        "Train",
        "PosixPath",
        "Compare",
        "Compare",
        "Bench",
        "Align",
        "Report",
        "Results",
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
        if not {"--help", "--version", "--tyro-print-completion", "list", "doctor"} & {*arguments}:
            kept = [argument for argument in arguments if argument != "..."]
            assert command.main(kept) == 0, kept
    for one in asked:
        for entry in (*getattr(one, "algorithms", ()), *([one.algorithm] if isinstance(one, Train) else [])):
            algorithms.variant(entry, Train())
        if (model := getattr(one, "model", None)) and model != MINE:
            models.check(model)
        data = getattr(one, "data", "digits")
        assert data in (*DATASETS, "owner/name") or ".py:" in data or Path(data).suffix in (".txt", ".csv")


@pytest.mark.parametrize("name", TEXTS)
def test_what_the_documents_name_is_there(name: str) -> None:
    """Files of the repository, what links lead to, public names, and the settings that an algorithm is shown with."""
    text = TEXTS[name]
    for path in re.findall(r"(?<![\w/.-])(?:onward|tests|benchmarks|examples|docs)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / name).parent / link).exists(), link
    for public in re.findall(r"\bonward\.([A-Za-z]\w+)", text):
        assert public in onward.__all__, public
    for entry in re.findall(rf"`((?:{'|'.join(ALGORITHMS)}):[^`\s]+)`", text):
        algorithms.variant(entry, Train())


STANDALONE = ("docs/index.md", "docs/own-network.md", "docs/hugging-face.md")
"""Documents whose blocks of Python make one script."""
MINE = "mine.py:network"
"""The network that the first page has its reader write."""


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("name", STANDALONE)
def test_the_documents_python_runs(name: str) -> None:
    if name == "docs/hugging-face.md":
        pytest.importorskip("peft", reason="needs transformers and peft (pip install onward[compat])")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXTS[name], re.DOTALL):
        exec(compile(block, name, "exec"), names)


@pytest.mark.slow
def test_the_first_page_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its commands, as a reader would type it, with the file that it shows."""
    monkeypatch.chdir(tmp_path)
    page = TEXTS["docs/index.md"]
    Path("mine.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0])
    for line in re.findall(r"^onward .*$", page, re.MULTILINE):
        assert command.main(shlex.split(line)[1:]) == 0, line
    assert Path("mine.html").exists()


def test_every_algorithm_has_its_page_and_picture() -> None:
    fill = runpy.run_path(str(ROOT / "docs" / "fill.py"))
    pictures = runpy.run_path(str(ROOT / "docs" / "pictures" / "draw.py"))
    assert set(pictures["PICTURES"]) == set(ALGORITHMS)
    for name in ALGORITHMS:
        page = ROOT / "docs" / "algorithms" / f"{name}.md"
        assert page.exists(), f"write {page.relative_to(ROOT)}"
        assert (ROOT / "docs" / "pictures" / f"{name}.svg").read_text() == pictures["picture"](name), (
            "python docs/pictures/draw.py"
        )
    for page in (ROOT / "docs" / "algorithms").glob("*.md"):
        assert page.read_text() == fill["filled"](page), "python docs/fill.py"
        assert all(len(block.splitlines()) <= 10 for block in re.findall(r"```text\n(.*?)```", page.read_text(), re.DOTALL))


def test_the_reference_has_what_is_public() -> None:
    assert set(re.findall(r"^::: onward\.(\w+)", TEXTS["docs/reference.md"], re.MULTILINE)) == set(onward.__all__)


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
