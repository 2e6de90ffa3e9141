from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from onward.errors import UsageError
from onward.lab import checkpoint
from onward.lab.align import align
from onward.lab.command import main
from onward.lab.config import Align, Network, Subset, Train
from onward.lab.train import train

SMALL: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 32,
    "lr": 1e-2,
    "network": Network(width=0.04),
    "subset": Subset(train=64, test=20),
    "device": "cpu",
}
FILES = ("alignment.json", "alignment.png", "alignment-histograms.png")


def test_algorithms_are_looked_at_while_they_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = Align(**SMALL, algorithms=("bp", "fdfa", "fg:space=avg-weight,directions=2"), align_estimates=3, out=str(tmp_path))
    found = align(asked)
    printed = capsys.readouterr().out
    assert [(entry["label"], entry["epoch"]) for entry in found] == [
        (label, epoch) for label in asked.algorithms for epoch in (0, 1, 2)
    ]
    assert json.loads((tmp_path / "alignment.json").read_text()) == found
    for name in FILES[1:]:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
            colours = picture.convert("RGB").getcolors(1 << 24)
            assert colours is not None
            assert max(colours)[0] < 0.97 * picture.size[0] * picture.size[1]  # something is drawn
    bp, fdfa, fg = found[0], found[5], found[8]
    assert bp["blocks"]["block1"]["signal"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert fdfa["blocks"]["block2"]["feedback"]["cosine"] > found[3]["blocks"]["block2"]["feedback"]["cosine"] == 0
    assert "signal" not in fg["blocks"]["block1"]
    assert fg["blocks"]["block1"]["parameters"]["variance"] > 1
    assert "fdfa, epoch 2" in printed
    assert "feedback matrix" in printed
    assert "3 estimates on one batch" in " ".join(printed.split())

    before = (tmp_path / "bp-s0" / "checkpoint.pt").stat().st_mtime_ns
    assert align(asked) == found  # the runs are there already
    assert (tmp_path / "bp-s0" / "checkpoint.pt").stat().st_mtime_ns == before


def test_a_checkpoint_is_looked_at(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(Train(**SMALL, algorithm="fdfa", align_every=1, align_estimates=2, out=str(run)))
    recorded = [json.loads(line) for line in (run / "alignment.jsonl").read_text().splitlines()]
    found = align(Align(runs=(str(run),), align_estimates=2, device="cpu"))
    assert all((run / name).exists() for name in FILES)
    assert [{key: value for key, value in entry.items() if key != "label"} for entry in found[:2]] == recorded[:2]
    assert found[2]["label"] == "run"
    for name, block in recorded[2]["blocks"].items():  # the checkpoint is the network that was looked at
        for what in ("signal", "parameters", "feedback"):
            for key, value in block.get(what, {}).items():
                assert found[2]["blocks"][name][what][key] == (value and pytest.approx(value, rel=1e-4, abs=1e-6))


def test_a_run_from_before_there_were_alignments(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    train(Train(**SMALL, algorithm="dfa", out=str(run)))
    path = run / "config.json"
    kept = json.loads(path.read_text())
    for name in ("align_every", "align_estimates"):
        del kept["config"][name]
    kept["config"]["histogram"] = True
    path.write_text(json.dumps(kept))
    (entry,) = align(Align(runs=(str(run), str(run)), align_estimates=1, device="cpu", out=str(out)))
    assert entry["epoch"] == 2
    assert entry["blocks"]["block1"]["signal"]["variance"] is None
    assert {path.name for path in out.iterdir()} == set(FILES)
    assert not (run / "alignment.json").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "config.json").unlink(), r"run holds no run: give a folder that `onward train` has written"),
        (
            lambda run: (run / "config.json").write_text("{"),
            r"config.json cannot be read \(JSONDecodeError: .*\): train it again",
        ),
        (
            lambda run: [path.unlink() for path in run.glob("checkpoint*.pt")],
            "run has no checkpoint.pt yet: go on with the run by onward train --resume",
        ),
        (lambda run: (run / "checkpoint.pt").write_bytes(b"PK"), r"no usable checkpoint in .*run: checkpoint.pt is damaged"),
        (
            lambda run: checkpoint.save(run / "checkpoint.pt", {"progress": {"epoch": 1}, "estimator": {}}),
            r"the checkpoint of .*run does not fit its settings \(.*\): train it again",
        ),
    ],
)
def test_a_broken_run_is_told(tmp_path: Path, break_it: Any, message: str) -> None:
    run = tmp_path / "run"
    train(Train(**{**SMALL, "epochs": 1}, algorithm="bp", out=str(run)))
    break_it(run)
    with pytest.raises(UsageError, match=message):
        align(Align(runs=(str(run),), device="cpu"))


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    asked = Align(**SMALL, out=str(tmp_path / "new"))
    for changes, message in (
        ({"algorithms": ("dfaa",)}, "unknown algorithm 'dfaa': did you mean 'dfa'"),
        ({"algorithms": ()}, "--algorithms: name at least one, or a run folder"),
        ({"model": "mpl"}, "unknown model 'mpl'"),
    ):
        with pytest.raises(UsageError, match=message):
            align(replace(asked, **changes))
        assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match="--align-every 0: use at least 1"):
        replace(asked, align_every=0)


def test_the_command_takes_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.endswith("none holds no run: give a folder that `onward train` has written\n")
