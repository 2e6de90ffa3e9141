from __future__ import annotations

import csv
import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from onward.errors import UsageError
from onward.lab.data import load
from onward.lab.run import checkpoint
from onward.lab.run import loop as training
from onward.lab.run.loop import load_data, train
from onward.lab.settings import Compare, Heads, Network, Subset, Train
from onward.lab.studies.compare import compare, show, summary
from onward.lab.tasks import CLASSIFICATION


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
    fg = f"fg:guess={guess},engine={'reverse' if guess == 'local' else 'forward'}"
    table = compare(replace(config, algorithms=("local", fg, "bp"), seeds=1, heads=Heads("linear")))
    assert [row["algorithm"] for row in table] == ["local", fg, "bp"]
    assert all(row["accuracy"] > 0 for row in table)


def test_variants_are_rows_of_their_own(config: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ("fdfa", "fdfa:directions=2,lr=0.001", "fg:guess=local,heads.kind=linear")
    table = compare(replace(config, algorithms=labels, seeds=1))
    printed = capsys.readouterr().out
    assert [(row["algorithm"], row["lr"]) for row in table] == list(zip(labels, (1e-2, 1e-3, 1e-2), strict=True))
    kept = json.loads((tmp_path / "fdfa-directions=2-lr=0.001-s0" / "config.json").read_text())["config"]
    assert (kept["algorithm"], kept["lr"]) == ("fdfa:directions=2", 1e-3)
    assert "3/3  fg:guess=local,heads.kind=linear, seed 0: test accuracy" in printed


def test_learning_rates_are_chosen_on_held_out_training_images(
    config: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, algorithms=("bp", "dfa:lr=0.005", "dfa"), seeds=1, lr_grid=(1e-6, 1e-2), lr_epochs=1)
    seen: dict[bool, set[int]] = {}

    def noted(run: Any) -> dict[str, float]:
        seen.setdefault(run.config.subset.held_out, set()).update(
            hash(image.numpy().tobytes()) for image in run.data.test.images
        )
        return evaluate(run)

    evaluate = training.evaluate
    monkeypatch.setattr(training, "evaluate", noted)
    table = compare(config)
    assert len(seen[True]) > 10
    assert len(seen[True] & seen[False]) < 5  # two images of digits may be the same
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


def test_a_rate_that_is_no_longer_the_best_is_trained_again(
    config: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, algorithms=("bp", "dfa"), seeds=1, epochs=1, lr_grid=(1e-6, 1e-5), subset=Subset(512, 50))
    before = {row["algorithm"]: row["lr"] for row in compare(config)}
    assert before["bp"] == 1e-5
    kept = tmp_path / "dfa-s0"
    path = tmp_path / "rates" / f"dfa-lr{before['dfa']:g}" / "metrics.jsonl"
    path.write_text(json.dumps({**json.loads(path.read_text()), "test_accuracy": 100.0}) + "\n")  # so that it stays the best
    at = (kept / "checkpoint.pt").stat().st_mtime_ns
    capsys.readouterr()
    wider = replace(config, lr_grid=(1e-6, 1e-5, 3e-2))
    after = {row["algorithm"]: row["lr"] for row in compare(wider)}
    assert after == {"bp": 3e-2, "dfa": before["dfa"]}
    assert f"{tmp_path / 'bp-s0'}: the best rate is 0.03, no longer 1e-05, so it is trained again" in capsys.readouterr().out
    assert json.loads((tmp_path / "bp-s0" / "config.json").read_text())["config"]["lr"] == 3e-2
    assert (kept / "checkpoint.pt").stat().st_mtime_ns == at

    widest = replace(wider, lr_grid=(*wider.lr_grid, 1e-1))
    with pytest.raises(UsageError, match="bp-s0 holds a run with epochs 1, not 2"):
        compare(replace(widest, epochs=2, lr_epochs=1))  # more than the rate differs
    assert not (tmp_path / "rates" / "bp-lr0.1").exists()  # said before the trials
    (tmp_path / "rates.json").unlink()
    with pytest.raises(UsageError, match=r"bp-s0 holds a run with lr 0.03, not 1e-06"):  # nobody knows who chose it
        compare(replace(config, lr_grid=(1e-6,)))
    assert (tmp_path / "bp-s0" / "metrics.jsonl").exists()


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
    again = capsys.readouterr().out
    assert "2 of 2 runs are there already" not in again  # nothing was missing, so nothing is said
    assert "\nbp:lr=1e38, seed 0 failed: the training loss is nan" in again


def test_rates_that_fail_are_never_taken(config: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = compare(replace(config, algorithms=("bp",), seeds=1, lr_grid=(1e-2, 1e38)))
    assert (row["lr"], row["runs"]) == (1e-2, 1)
    assert json.loads((tmp_path / "rates.json").read_text())["bp"]["accuracy"]["1e+38"] is None
    (row,) = compare(replace(config, algorithms=("bp",), seeds=1, lr_grid=(1e38,), out=str(tmp_path / "none")))
    assert (row["lr"], row["runs"], row["accuracy"]) == (None, 0, None)
    printed = capsys.readouterr().out
    assert "all rates" in printed
    assert printed.count("\nbp, lr 1e+38 failed: the training loss is nan") == 2  # in either comparison


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
@pytest.mark.parametrize(
    ("when", "message"),
    [("before", r"SIG\w+ after step 1 of epoch 1, which .*bp-s0 keeps: .*"), ("after", r"SIG\w+ after run 1 of 2")],
)
def test_a_request_to_stop_between_two_runs_is_heeded(
    config: Compare,
    tmp_path: Path,
    number: signal.Signals,
    when: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    before = signal.signal(number, signal.default_int_handler)  # a shell may have started us with the signal ignored
    request.addfinalizer(lambda: signal.signal(number, before))

    def train_as_it_arrives(*given: Any) -> Any:
        if when == "before":
            signal.raise_signal(number)
        outcome = train(*given)
        signal.raise_signal(number)
        return outcome

    config = replace(config, algorithms=("bp",), epochs=1)
    monkeypatch.setattr("onward.lab.studies.runs.train", train_as_it_arrives)
    with pytest.raises(KeyboardInterrupt, match=f"^{message}; the same command goes on with the runs that are missing$"):
        compare(config)
    assert not (tmp_path / "bp-s1").exists()
    monkeypatch.undo()
    assert compare(config)[0]["runs"] == 2


def test_several_runs_at_once_are_the_same_runs(config: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = compare(replace(config, epochs=1, seeds=1))
    beside = compare(replace(config, epochs=1, seeds=1, jobs=2, out=str(tmp_path / "beside")))
    assert [row["accuracy"] for row in alone] == [row["accuracy"] for row in beside]
    assert "\n2/2  " in capsys.readouterr().out


@pytest.mark.slow
def test_runs_at_once_are_all_saved_when_asked_to_stop(tmp_path: Path) -> None:
    """And a run that failed in its process stops none of the others."""
    size = ["--model", "mlp", "--data", "digits", "--epochs", "500", "--seeds", "1", "--device", "cpu"]
    command = ["compare", "--algorithms", "bp", "dfa", "bp:lr=1e38", *size, "--out", str(tmp_path), "--jobs", "3"]
    with subprocess.Popen(
        [sys.executable, "-m", "onward", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as asked:
        for name in ("bp", "dfa"):
            wait_for(tmp_path / f"{name}-s0" / "checkpoint.pt", asked)
        asked.send_signal(signal.SIGTERM)
        said, _ = asked.communicate(timeout=120)
    assert asked.returncode == 130
    assert "bp:lr=1e38, seed 0: the training loss is" in said
    assert said.strip().endswith("SIGTERM; the same command goes on with the runs that are missing")
    for name in ("bp", "dfa"):
        state = checkpoint.load(tmp_path / f"{name}-s0" / "checkpoint.pt")
        assert state is not None
        assert state["progress"]["step"] or state["progress"]["epoch"] > 1


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a file is there that a process writes."""
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_single_run_has_no_deviation(config: Compare) -> None:
    (row,) = compare(replace(config, algorithms=("dfa",), seeds=1))
    assert row["accuracy_std"] is None


def test_a_table_of_ordinary_width_breaks_no_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    runs = [[{"test_accuracy": value, "seconds": 12.34, "peak_memory_bytes": 1.2e9}] for value in (50.0, 60.0)]
    rows = [
        {"algorithm": "bp", "lr": 5e-5, **summary(runs, CLASSIFICATION), "failed": 1},
        {"algorithm": "fdfa", "lr": None, **summary([], CLASSIFICATION), "failed": 0},
    ]
    show(rows, "mlp", CLASSIFICATION.main)
    printed = capsys.readouterr().out
    for word in ("algorithm", "55.00 ± 7.07", "s/epoch", "12.34", "1200", "1 of 3", "all rates", "failed", "5e-05"):
        assert word in printed


def test_a_path_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show(
        [{"algorithm": "bp", "engine": None, "lr": 1e-3, **summary([], CLASSIFICATION), "failed": 1}],
        "mlp, q[/x]/:x:, 1 epoch",
        CLASSIFICATION.main,
    )
    assert "mlp, q[/x]/:x:, 1 epoch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithms": ("bp", "dfaa")}, "unknown algorithm 'dfaa': did you mean 'dfa'"),
        ({"model": "mpl"}, "unknown model 'mpl'"),
        ({"algorithms": ()}, "0 algorithms with 2 seeds: compare at least one of each"),
        ({"data": "digit"}, "unknown data set 'digit'"),
        ({"seeds": 0}, "2 algorithms with 0 seeds: compare at least one of each"),
        ({"algorithms": ("fg:guess=locl",)}, "algorithm 'fg:guess=locl': unknown guess 'locl': did you mean 'local'"),
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


OWN = """
from torch import nn

class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.around, self.last = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        h = self.first(x.flatten(1)).relu()
        return self.last(h + self.around(h).relu())
"""


@pytest.mark.parametrize(
    ("label", "changes", "message"),
    [
        ("fg:space=weight", {}, "fg:space=weight: space='weight' compares gradients"),
        ("fg:space=weight,lr=1", {"lr_grid": (1e-2,)}, "fg:space=weight,lr=1: space='weight' compares gradients"),
        ("fdfa", {"model": "{}:Skip"}, "fdfa: .*cuts"),
        ("fdfa", {"model": "{}:Skip", "cuts": ("around",)}, "fdfa: .*around"),  # only a batch shows this
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    config: Compare, tmp_path: Path, label: str, changes: dict[str, str], message: str
) -> None:
    (tmp_path / "net.py").write_text(OWN)
    if "model" in changes:
        changes = {**changes, "model": changes["model"].format(tmp_path / "net.py"), "network": Network()}
    with pytest.raises(UsageError, match=message):
        compare(replace(config, algorithms=("bp", label), out=str(tmp_path / "new"), **changes))
    assert not (tmp_path / "new").exists()
