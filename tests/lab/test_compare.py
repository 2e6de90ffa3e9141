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
from onward.lab.config import Compare, ForwardGradient, Heads, Network, Subset


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
    (tmp_path / "bp-s1" / "metrics.jsonl").write_text("")  # as if it had been interrupted
    kept, redone = ((tmp_path / f"bp-s{seed}" / "checkpoint.pt").stat().st_mtime_ns for seed in (0, 1))
    again = compare(replace(config, seeds=3))
    assert (tmp_path / "bp-s0" / "checkpoint.pt").stat().st_mtime_ns == kept
    assert (tmp_path / "bp-s1" / "checkpoint.pt").stat().st_mtime_ns > redone
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
    ],
)
def test_refusals_leave_nothing_behind(config: Compare, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare(replace(config, out=str(tmp_path / "new"), **changes))
    assert not (tmp_path / "new").exists()
