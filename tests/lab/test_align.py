from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from onward.errors import UsageError
from onward.lab.cli import main
from onward.lab.report.alignment import maps
from onward.lab.report.page import read
from onward.lab.run import checkpoint
from onward.lab.run.loop import TrainingFailed, train
from onward.lab.settings import Align, Network, Subset, Train
from onward.lab.studies import align as module
from onward.lab.studies.align import align

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
    assert [line["label"] for line in read(run).alignment if "label" in line] == ["run"] * 3
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


def test_runs_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tmp_path / name / "bp[/x]-s0" for name in ("a", "b")]  # brackets are no markup
    for run in runs:
        train(Train(**{**SMALL, "epochs": 1}, algorithm="bp", out=str(run)))
    asked = Align(runs=(*map(str, runs), f"{runs[0]}/."), align_estimates=1, device="cpu", out=str(runs[0]))
    assert [entry["label"] for entry in align(asked)] == ["a/bp[/x]-s0", "b/bp[/x]-s0"]
    printed = capsys.readouterr().out
    assert "a/bp[/x]-s0, epoch 1" in printed
    assert "b/bp[/x]-s0, epoch 1" in printed
    (kept,) = read(runs[0]).alignment  # a report knows its own
    assert kept["label"] == "a/bp[/x]-s0"


def test_a_run_beside_what_was_found_of_others(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_text("of others")
    asked = Train(**{**SMALL, "epochs": 1}, algorithm="bp", out=str(tmp_path))
    train(asked)
    assert all((tmp_path / name).read_text() == "of others" for name in FILES)
    with pytest.raises(UsageError, match="already holds a run"):
        train(asked)
    train(replace(asked, overwrite=True))
    assert not any((tmp_path / name).exists() for name in FILES)  # they might be this one's


def test_options_without_effect_on_runs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        train(Train(**{**SMALL, "epochs": 1}, algorithm="bp", out=name))
    with pytest.raises(UsageError, match=r"--batch-size 7 --lr 3 --algorithms nonsense: a run that is looked at keeps its own"):
        align(Align(runs=("a", "b"), algorithms=("nonsense",), lr=3.0, batch_size=7))
    align(Align(runs=("a", "b"), align_estimates=1, device="cpu"))
    assert Path("runs/digits-mlp-align/alignment.json").exists()
    path = Path("a/config.json")
    path.write_text(path.read_text().replace('"model": "mlp"', '"model": "cnn"'))
    assert module._default_folder([Path("a"), Path("b")]) == Path("runs/align")  # neither one's


def test_trainings_that_fail_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = Align(**{**SMALL, "epochs": 1}, algorithms=("bp:lr=1e38",), align_estimates=1, out=str(tmp_path))
    for _ in range(2):  # the second time, the run is there already
        with pytest.raises(
            TrainingFailed, match="no training came to the end of an epoch: bp:lr=1e38, seed 0 failed: the training loss"
        ):
            align(asked)
        assert not (tmp_path / "alignment.json").exists()
    capsys.readouterr()
    found = align(replace(asked, algorithms=("bp:lr=1e38", "dfa")))
    assert {entry["label"] for entry in found} == {"dfa"}
    assert "\nbp:lr=1e38, seed 0 failed: the training loss is nan" in capsys.readouterr().out


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


def test_descent_is_printed_and_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"label": "dfa", "epoch": 2, "estimates": 1, "descent": 0.625, "step": 0.01, "blocks": {}}
    module.show(entry)
    assert "a small step brings 0.625 of what" in " ".join(capsys.readouterr().out.split())
    module.show({**entry, "descent": None})  # or of an older version
    assert "small step" not in capsys.readouterr().out
    (found,) = maps({"dfa": [[entry, {**entry, "epoch": 3, "descent": 0.5}]]})
    assert (found.title, found.fold) == ("Descent of a small step over the gradient's own", False)
    assert found.figures[0][1]["data"][0]["z"] == [[0.625, 0.5]]
