"""Run folders of every format are read; those of a newer version are refused by a sentence that says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from onward.errors import UsageError
from onward.lab import cli as command
from onward.lab.run import checkpoint, formats
from onward.lab.run.record import read
from onward.lab.settings import Feedback, Heads, Train

SMALL = ["--epochs", "1", "--network.width", "0.04", "--subset.train", "64", "--subset.test", "32", "--device", "cpu"]
OLD = {
    "low_memory": False,
    "backprop": {"checkpoint": False},
    "forward_gradient": {"target": "global", "guess": "random", "space": "activation", "engine": "forward", "passes": None,
                         "noise": "gaussian", "scaling": "unbiased", "directions": 1, "orthogonal": False, "eps": 1e-16,
                         "feedback": "fdfa"},
}  # fmt: skip
"""What every run of format 1 said, whatever its algorithm."""


def old(**changes: Any) -> dict[str, Any]:
    """Settings as format 1 had them."""
    now = dataclasses.asdict(Train(out="run"))
    now["feedback"]["directions"] = 1
    del now["task"]
    for name, value in changes.items():
        now[name] = {**OLD.get(name, now.get(name)), **value} if isinstance(value, dict) else value
    return {**OLD, **now}


@pytest.mark.parametrize(
    ("changes", "algorithm"),
    [
        ({"algorithm": "fdfa"}, "fdfa"),
        ({"algorithm": "fdfa", "feedback": {"directions": 4, "lr": 0.5}}, "fdfa:directions=4"),
        ({"algorithm": "dkp", "low_memory": True}, "dkp:low_memory=true"),
        ({"algorithm": "bp", "backprop": {"checkpoint": True}}, "bp:checkpoint=true"),
        ({"algorithm": "local", "heads": {"kind": "mlp", "width": 8}}, "local"),
        (
            {"algorithm": "fg", "forward_gradient": {"guess": "local", "space": "weight", "engine": "reverse", "eps": 1e-14}},
            "fg:guess=local,space=weight,engine=reverse,eps=1e-14",
        ),
        ({"algorithm": "dfa", "forward_gradient": {"guess": "local"}}, "dfa"),  # it was of no effect
    ],
)
def test_settings_of_format_1_are_read(changes: dict[str, Any], algorithm: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"config": old(**changes), "environment": {"engine": "feedback"}}))
    found = read(tmp_path)
    assert found.config.algorithm == algorithm
    assert found.config.heads == Heads(**changes.get("heads", {}))
    assert found.config.feedback == Feedback(lr=changes.get("feedback", {}).get("lr", Feedback.lr))
    assert not found.unknown


def test_a_run_of_format_1_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["train", "--algorithm", "fdfa:directions=2,low_memory=true", "--out", "run", "--save-weights", "1", *SMALL]
    asked[asked.index("--epochs") + 1] = "2"
    assert command.main(asked) == 0
    whole = torch.load("run/weights-2.pt", weights_only=True)

    assert command.main([*asked, "--overwrite"]) == 0
    state = torch.load("run/checkpoint-previous.pt", weights_only=True)  # after the first epoch
    assert state.pop("format") == formats.FORMAT
    saved = json.loads(Path("run/config.json").read_text())
    assert saved.pop("format") == formats.FORMAT
    saved["config"] |= {**OLD, "algorithm": "fdfa", "low_memory": True}
    saved["config"]["feedback"]["directions"] = 2
    Path("run/config.json").write_text(json.dumps(saved))
    for name in ("metrics.jsonl", "weights-2.pt", "checkpoint.pt", "checkpoint-previous.pt"):
        Path("run", name).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(formats, "FORMAT", 1)
        checkpoint.save(Path("run/checkpoint.pt"), state)

    assert command.main(["train", "--resume", "run"]) == 0
    again = torch.load("run/weights-2.pt", weights_only=True)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    ("number", "said"), [(3, "it has format 3, and this version"), ("new", "its format is 'new', which is")]
)
def test_another_format_is_refused(number: object, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"format": number, "config": dataclasses.asdict(Train())}))
    with pytest.raises(UsageError, match=f"config.json: {said}"):
        read(tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(formats, "FORMAT", number)
        checkpoint.save(tmp_path / "checkpoint.pt", {"epoch": 1})
    with pytest.raises(UsageError, match=f"checkpoint.pt cannot be read: {said}"):
        checkpoint.load(tmp_path / "checkpoint.pt")
