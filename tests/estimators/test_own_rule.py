"""The rules of examples/own_rule.py against explicit loops, in every form that a rule of the library has."""

from __future__ import annotations

import copy
import json
import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from cases import by_name
from together import together
from torch import Tensor, nn

import onward
from onward.lab import cli as command

PATH = Path(__file__).parents[2] / "examples" / "own_rule.py"
CUTS = ["1", "3"]


def own(name: str) -> Any:
    return runpy.run_path(str(PATH))[name]


def expected(
    name: str, model: nn.Module, x: Any, y: Tensor, cuts: Any, loss: Any, feedback: Any, options: dict[str, Any]
) -> Any:
    if name == "Perturbed":
        errors = reference.activation_errors(model, x, y, cuts, loss, 5, 0, options.get("directions", 1), "gaussian")
        return reference.delivered(model, x, y, cuts, loss, errors)
    _, z, _ = reference.run(model, x, cuts)
    bits = reference.output_error(z, y, loss)
    for row in bits:
        size, largest = sum(map(abs, row.tolist())) / len(row), max(map(abs, row.tolist()))
        for c, number in enumerate(row.tolist()):
            sent = abs(number) >= options.get("quiet", 0.0) * largest
            row[c] = size * ((number > 0) - (number < 0)) * sent
    return reference.delivered(model, x, y, cuts, loss, [reference.product(bits, b.detach()) for b in feedback])


@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low-memory"])
@pytest.mark.parametrize("case", ["mlp-batch-norm", "cnn-batch-norm", "transformer"])
@pytest.mark.parametrize(
    ("name", "options"), [("OneBit", {}), ("OneBit", {"quiet": 0.5}), ("Perturbed", {}), ("Perturbed", {"directions": 3})]
)
def test_it_is_what_it_says(name: str, options: dict[str, Any], case: str, low_memory: bool) -> None:
    model, x, y, cuts, loss = by_name(case).build(seed=1)
    estimator = own(name)(model, cuts, loss=loss, seed=5, low_memory=low_memory, **options)
    if name == "OneBit":
        estimator.initialize(x)
    twin = copy.deepcopy(model)
    found = expected(name, twin, x, y, cuts, loss, list(getattr(estimator, "feedback", ())), options)
    estimator.estimate(x, y)
    for parameter, p in model.named_parameters():
        torch.testing.assert_close(p.grad, found[parameter], msg=parameter)


class Targets(onward.SignalEstimator):
    """The signal is made of everything that a rule can be given."""

    directions = 1

    def signal(self, k: int, h: Tensor, known: onward.Known) -> Tensor:
        (ydot,), (u,) = known.tangents, known.directions(k, h)
        sizes = (known.one_hot * ydot).sum(1, keepdim=True) + known.targets.unsqueeze(1)
        return (known.share / len(h)) * sizes * u + known.e.sum() * 0 + known.loss * 0


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])


def gradients(rank: int, form: str) -> dict[str, Tensor]:
    estimator = Targets(network(), CUTS, seed=3)
    x, y = batch()
    if form == "shards":
        mine = slice(0, 4) if rank == 0 else slice(4, 6)
        onward.distribute(estimator).estimate(x[mine], y[mine])
    else:
        stage = onward.Stage(estimator, microbatches=3 if form == "microbatches" else 1)
        stage.estimate(x, y)
        stage.flush()
    return {name: p.grad for name, p in estimator.model.named_parameters()}


@pytest.mark.parametrize("form", ["shards", "stages", "microbatches"])
def test_several_processes_make_the_same_estimate(form: str) -> None:
    alone = Targets(network(), CUTS, seed=3)
    alone.estimate(*batch())
    found = together(2, partial(gradients, form=form))
    for name, p in alone.model.named_parameters():
        everywhere = [one[name] for one in found if name in one]
        assert everywhere
        for gradient in everywhere:
            torch.testing.assert_close(gradient, p.grad, msg=f"{form}, {name}")


def stale(rank: int) -> list[dict[str, Tensor] | None]:
    """Gradients of three batches, each from the signal of the batch before it."""
    estimator = Targets(network(), CUTS, seed=3)
    stage, found = onward.Stage(estimator, staleness=1), []
    for number in range(3):
        x, y = batch()
        stage.estimate(x + number, (y + number) % 3)
        found.append({name: p.grad.clone() for name, p in estimator.model.named_parameters() if p.grad is not None})
        estimator.zero_grad()
    while stage.flush():
        found.append({name: p.grad.clone() for name, p in estimator.model.named_parameters() if p.grad is not None})
        estimator.zero_grad()
    return found


def test_a_stale_signal_is_made_of_the_targets_of_its_own_batch() -> None:
    first, _ = together(2, stale)
    alone = Targets(network(), CUTS, seed=3)
    for number in range(3):
        x, y = batch()
        alone.zero_grad()
        alone.estimate(x + number, (y + number) % 3)
        for name, gradient in first[number + 1].items():
            torch.testing.assert_close(gradient, dict(alone.model.named_parameters())[name].grad)


def test_a_process_without_targets_is_told() -> None:
    with pytest.raises(onward.UsageError, match="this rule reads the targets, and y is None here: give y to estimate in every"):
        onward.Known(torch.zeros(2, 3), [], lambda k, h: [], y=None, loss=torch.zeros(())).one_hot  # noqa: B018


@pytest.mark.parametrize("y", [torch.zeros(2, 2), torch.tensor([0, 3]), "labels", torch.tensor([[0], [1]])])
def test_targets_that_are_no_rows_are_refused(y: Any) -> None:
    known = onward.Known(torch.zeros(2, 3), [], lambda k, h: [], y=y, loss=torch.zeros(()))
    with pytest.raises(onward.UsageError, match="this rule takes the targets for error signals"):
        known.one_hot  # noqa: B018


def test_the_page_shows_the_file() -> None:
    page = (PATH.parents[1] / "docs" / "write-an-algorithm.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert block in PATH.read_text()


SMALL = ["--epochs", "1", "--network.width", "0.04", "--subset.train", "64", "--subset.test", "32", "--device", "cpu"]


def test_every_command_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    rule = f"{PATH}:OneBit:quiet=0.25"
    for asked in (
        ["train", "--algorithm", rule, "--out", "run", *SMALL],
        ["compare", "--algorithms", "bp", rule, "--seeds", "1", "--out", "table", *SMALL],
        ["align", "run", "--align-estimates", "2"],
        ["bench", "--algorithms", rule, "--network.width", "0.04", "--turns", "1", "--steps", "1", "--json", "bench.json"],
        ["report", "run", "table"],
    ):
        assert command.main(asked) == 0, capsys.readouterr().err
    assert json.loads(Path("run/config.json").read_text())["config"]["algorithm"] == rule
    assert [row["algorithm"] for row in json.loads(Path("table/table.json").read_text())] == ["bp", rule]
    assert [row["error"] for row in json.loads(Path("bench.json").read_text())["rows"]] == [None] * 3
    assert "OneBit" in Path("report.html").read_text()


def test_an_error_in_it_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = PATH.read_text()
    Path("rule.py").write_text(text.replace("        size = known.e.abs()\n", "        size = known.error.abs()\n"))
    line = text[: text.index("        size = known.e.abs()")].count("\n") + 1
    assert command.main(["train", "--algorithm", "rule.py:OneBit", *SMALL]) == 2
    assert capsys.readouterr().err.startswith(f"error: rule.py, line {line} in a step of training: AttributeError: 'Known'")
    assert not Path("runs").exists()


WRONG: dict[str, tuple[str, str]] = {
    "nothing": ("return None", "for block 0, which ends at cut '1', returned a NoneType: return one of .* shape"),
    "shape": ("return h[:, :1]", r"returned a tensor of shape \(6, 1\): return one of the block's output's shape \(6, 8\)"),
    "in place": (
        "return self.feedback.carry(k, h, known.e.sign_(), known)",
        "has changed known.e in place, which every other block",
    ),
}


@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low-memory"])
@pytest.mark.parametrize("name", WRONG)
def test_a_signal_that_is_none_is_refused(name: str, low_memory: bool) -> None:
    body, said = WRONG[name]
    names: dict[str, Any] = {}
    exec(f"import onward\nclass Rule(onward.DFA):\n    def signal(self, k, h, known):\n        {body}\n", names)
    with pytest.raises(onward.UsageError, match=f"Rule.signal .*{said}"):
        names["Rule"](network(), CUTS, low_memory=low_memory).estimate(*batch())


def test_numbers_that_are_targets_of_one_output_stay_numbers() -> None:
    for y in ([0, 0, 0], [0, 1, 1]):
        known = onward.Known(torch.zeros(3, 1), [], lambda k, h: [], y=torch.tensor(y), loss=torch.zeros(()))
        assert known.one_hot.flatten().tolist() == y


def test_a_rule_without_a_rule_is_told() -> None:
    with pytest.raises(onward.UsageError, match=r"SignalEstimator has no rule: write its method signal\(k, h, known\)"):
        onward.SignalEstimator(network(), CUTS).estimate(*batch())
    with pytest.raises(onward.UsageError, match=r"Estimator has no rule: write its method _estimate\(x, y\)"):
        onward.Estimator(network(), CUTS).estimate(*batch())
