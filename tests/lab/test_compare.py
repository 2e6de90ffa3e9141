from __future__ import annotations

import csv
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from onward.errors import UsageError
from onward.lab.compare import compare
from onward.lab.config import Compare, ForwardGradient, Heads, Network, Subset, Train
from onward.lab.data import load
from onward.lab.train import load_data


@pytest.fixture
def config(tmp_path: Path) -> Compare:
    return Compare(
        algorithms=("bp", "fdfa"),
        seeds=2,
        epochs=2,
        lr=1e-2,
        network=Network(width=0.04),
        subset=Subset(train=128, test=50),
        device="cpu",
        out=str(tmp_path),
    )


def test_the_table_is_that_of_the_runs(config: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = compare(config)
    printed = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "bp-s0",
        "bp-s1",
        "fdfa-s0",
        "fdfa-s1",
        "table.json",
        "table.csv",
        "curves.png",
    }
    assert [row["algorithm"] for row in table] == ["bp", "fdfa"]
    for row in table:
        files = [tmp_path / f"{row['algorithm']}-s{seed}" / "metrics.jsonl" for seed in (0, 1)]
        runs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        last = [run[-1]["test_accuracy"] for run in runs]
        best = [max(epoch["test_accuracy"] for epoch in run) for run in runs]
        assert row["runs"] == 2
        assert row["accuracy"] == pytest.approx(sum(last) / 2)
        assert row["accuracy_std"] == pytest.approx(abs(last[0] - last[1]) / 2**0.5)
        assert row["best_accuracy"] == pytest.approx(sum(best) / 2)
        assert row["best_accuracy_std"] == pytest.approx(abs(best[0] - best[1]) / 2**0.5)
        assert row["seconds_per_epoch"] == pytest.approx(statistics.fmean(e["seconds"] for run in runs for e in run))
        assert row["peak_memory_bytes"] == max(epoch["peak_memory_bytes"] for run in runs for epoch in run)
        assert f"{row['accuracy']:.2f} ± {row['accuracy_std']:.2f}" in printed
    assert json.loads((tmp_path / "table.json").read_text()) == table
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [row["accuracy"] for row in table]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1500, 600)


def test_runs_that_are_complete_are_not_repeated(config: Compare, tmp_path: Path) -> None:
    config = replace(config, algorithms=("bp",))
    first = compare(config)
    broken = tmp_path / "bp-s1"
    (broken / "metrics.jsonl").write_text("")  # as if it had been interrupted in its last epoch
    (broken / "checkpoint-previous.pt").replace(broken / "checkpoint.pt")
    kept, redone = ((tmp_path / f"bp-s{seed}" / "checkpoint.pt").stat().st_mtime_ns for seed in (0, 1))
    again = compare(replace(config, seeds=3))
    assert (tmp_path / "bp-s0" / "checkpoint.pt").stat().st_mtime_ns == kept
    assert (broken / "checkpoint.pt").stat().st_mtime_ns > redone
    assert (first[0]["runs"], again[0]["runs"]) == (2, 3)


def test_runs_with_other_settings_are_kept(config: Compare, tmp_path: Path) -> None:
    config = replace(config, algorithms=("bp",), seeds=1)
    compare(config)
    before = (tmp_path / "bp-s0" / "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match=r"bp-s0 holds a run with lr 0.01, not 0.1: .*--out, or replace it with --overwrite"):
        compare(replace(config, algorithms=("fdfa", "bp"), lr=0.1))
    assert (tmp_path / "bp-s0" / "metrics.jsonl").read_text() == before
    assert not (tmp_path / "fdfa-s0").exists()
    compare(replace(config, lr=0.1, overwrite=True))
    assert (tmp_path / "bp-s0" / "metrics.jsonl").read_text() != before


@pytest.mark.parametrize("guess", ["random", "local"])
def test_algorithms_with_heads_are_compared_too(config: Compare, guess: str) -> None:
    asked = ForwardGradient(guess=guess, engine="reverse" if guess == "local" else "forward")
    table = compare(replace(config, algorithms=("local", "fg", "bp"), seeds=1, heads=Heads("linear"), forward_gradient=asked))
    assert [row["algorithm"] for row in table] == ["local", "fg", "bp"]
    assert all(row["accuracy"] > 0 for row in table)


def test_variants_are_rows_of_their_own(config: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ("fdfa", "fdfa:directions=2,lr=0.001", "fg:guess=local,heads.kind=linear")
    table = compare(replace(config, algorithms=labels, seeds=1))
    printed = capsys.readouterr().out
    assert [(row["algorithm"], row["lr"]) for row in table] == list(zip(labels, (1e-2, 1e-3, 1e-2), strict=True))
    kept = json.loads((tmp_path / "fdfa-directions=2-lr=0.001-s0" / "config.json").read_text())["config"]
    assert (kept["algorithm"], kept["feedback"]["directions"], kept["lr"]) == ("fdfa", 2, 1e-3)
    assert "3/3  fg:guess=local,heads.kind=linear, seed 0: test accuracy" in printed


def test_learning_rates_are_chosen_on_held_out_training_images(
    config: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, algorithms=("bp", "dfa:lr=0.005", "dfa"), seeds=1, lr_grid=(1e-6, 1e-2), lr_epochs=1)
    table = compare(config)
    printed = capsys.readouterr().out
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert set(rates) == {"bp", "dfa"}  # the other says its own
    for label, found in rates.items():
        trials = {rate: tmp_path / "rates" / f"{label}-lr{rate:g}" for rate in config.lr_grid}
        last = {}
        for rate, folder in trials.items():
            kept = json.loads((folder / "config.json").read_text())["config"]
            assert (kept["lr"], kept["epochs"], kept["subset"]["held_out"], kept["seed"]) == (rate, 1, True, 0)
            (last[f"{rate:g}"],) = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
        assert found["accuracy"] == {rate: row["test_accuracy"] for rate, row in last.items()}
        best = max(last, key=lambda rate: (last[rate]["test_accuracy"], -last[rate]["test_loss"]))
        assert found["lr"] == float(best)
        assert f"{label}: the best rate, {best}, is at the end of the grid" in printed
    assert [row["lr"] for row in table] == [rates["bp"]["lr"], 0.005, rates["dfa"]["lr"]]
    for name in ("bp-s0", "dfa-s0"):
        kept = json.loads((tmp_path / name / "config.json").read_text())["config"]
        assert (kept["lr"], kept["epochs"]) == (rates[name.partition("-")[0]]["lr"], 2)
        assert not kept["subset"]["held_out"]

    files = [*tmp_path.glob("*/checkpoint.pt"), *tmp_path.glob("rates/*/checkpoint.pt")]
    assert len(files) == 3 + 4
    before = [file.stat().st_mtime_ns for file in files]
    assert compare(config) == table  # nothing is done again
    assert [file.stat().st_mtime_ns for file in files] == before


def test_held_out_images_are_training_images() -> None:
    whole, part = load("digits"), load_data(Train(subset=Subset(held_out=True)))
    images = {image.numpy().tobytes() for image in whole.train.images}
    assert len(part.train) + len(part.test) == len(whole.train)
    assert {image.numpy().tobytes() for split in (part.train, part.test) for image in split.images} == images
    again = load_data(Train(subset=Subset(held_out=True)))
    assert again.test.labels.tolist() == part.test.labels.tolist()
    assert part.test.labels.bincount().min() > 20  # a fifth of each class


def test_a_run_that_fails_does_not_stop_the_others(config: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(config, algorithms=("bp:lr=1e38", "dfa"), seeds=1)
    failed, fine = compare(config)
    printed = capsys.readouterr().out
    assert (failed["runs"], failed["failed"], failed["accuracy"]) == (0, 1, None)
    assert (fine["runs"], fine["failed"]) == (1, 0)
    assert "bp:lr=1e38, seed 0: the training loss is nan" in printed
    assert "1 of 1" in printed
    assert (tmp_path / "bp-lr=1e38-s0" / "failed.txt").exists()
    compare(config)
    assert "2 of 2 runs are there already" not in capsys.readouterr().out  # nothing was missing, so nothing is said


def test_rates_that_fail_are_never_taken(config: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = compare(replace(config, algorithms=("bp",), seeds=1, lr_grid=(1e-2, 1e38)))
    assert (row["lr"], row["runs"]) == (1e-2, 1)
    assert json.loads((tmp_path / "rates.json").read_text())["bp"]["accuracy"]["1e+38"] is None
    (row,) = compare(replace(config, algorithms=("bp",), seeds=1, lr_grid=(1e38,), out=str(tmp_path / "none")))
    assert (row["lr"], row["runs"], row["accuracy"]) == (None, 0, None)
    assert "every rate" in capsys.readouterr().out


def test_a_single_run_has_no_deviation(config: Compare) -> None:
    (row,) = compare(replace(config, algorithms=("dfa",), seeds=1))
    assert row["accuracy_std"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithms": ("bp", "dfaa")}, "unknown algorithm 'dfaa': did you mean 'dfa'"),
        ({"model": "mpl"}, "unknown model 'mpl'"),
        ({"algorithms": ()}, "0 algorithms with 2 seeds: compare at least one of each"),
        ({"data": "digit"}, "unknown data set 'digit'"),
        ({"seeds": 0}, "2 algorithms with 0 seeds: compare at least one of each"),
        ({"algorithms": ("fg:guess=locl",)}, "unknown fg:guess 'locl': did you mean 'local'"),
        ({"lr_grid": (0.1,), "subset": Subset(held_out=True)}, "--lr-grid with --subset.held-out: the same images"),
    ],
)
def test_refusals_leave_nothing_behind(config: Compare, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare(replace(config, out=str(tmp_path / "new"), **changes))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_grid": (0.1, 0.0)}, "--lr-grid 0.0: use a positive number"),
        ({"lr_epochs": 0}, "--lr-epochs 0: use at least 1"),
    ],
)
def test_settings_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Compare(**changes)
