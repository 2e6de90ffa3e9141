from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from onward.errors import UsageError
from onward.lab import cli as command
from onward.lab.settings import Bench, Network
from onward.lab.studies import bench, step
from onward.lab.studies.bench import BASELINES
from onward.lab.studies.step import PHASES, Clock, Learner, Turn
from onward.lab.system import disk
from onward.phases import timed

CPU = torch.device("cpu")
VARIANTS = (
    "local:heads.kind=linear",
    "dfa",
    "dkp",
    "fdfa",
    "fdfa:low_memory=true",
    "fg",
    "fg:space=avg-weight",
    "fg:guess=local,space=weight,engine=reverse,heads.kind=linear",
)


@pytest.fixture
def config() -> Bench:
    return Bench(
        algorithms=("fdfa",),
        input="1,4,4",
        classes=3,
        batch_size=4,
        network=Network(width=0.01),
        turns=2,
        steps=1,
        device="cpu",
    )


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process takes seconds."""
    monkeypatch.setattr(step, "in_a_fresh_process", lambda function, *arguments: function(*arguments))


def learner(config: Bench, name: str) -> Learner:
    run = bench.candidates(replace(config, algorithms=(name,)))[name]
    return Learner.of(run, bench.shape_of(config), config.classes, CPU)


@pytest.mark.parametrize(("task", "shape"), [("next-token", (4, 6, 5)), ("regression", (4, 5)), ("classification", (4, 5))])
def test_a_step_of_any_task(config: Bench, task: str, shape: tuple[int, ...]) -> None:
    """Of a network for tokens what it is for, unless another task is named."""
    model = "mlp" if task == "regression" else "gpt"
    asked = {"model": model, "input": "6", "classes": 5, "task": "auto" if task == "next-token" else task}
    made = learner(replace(config, **asked, network=Network(width=4 if model == "gpt" else 0.01)), "fdfa")
    made.step()
    assert step.task_of(made.config).name == task
    assert made.x.is_floating_point() == (model == "mlp")
    assert tuple(made.estimator(made.x).shape) == shape
    with pytest.raises(UsageError, match="unknown task 'chess'"):
        learner(replace(config, task="chess"), "bp")


@pytest.mark.usefixtures("in_this_process")
def test_every_algorithm_has_its_row(config: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("local:heads.kind=linear", "fdfa:low_memory=true", "fg:space=avg-weight")
    rows = bench.bench(replace(config, algorithms=asked, json=str(tmp_path / "bench.json")))
    report = json.loads((tmp_path / "bench.json").read_text())
    printed = capsys.readouterr().out
    assert report["rows"] == rows
    assert report["config"]["batch_size"] == 4
    assert report["environment"]["torch"] == torch.__version__
    assert [row["algorithm"] for row in rows] == [*BASELINES, *asked]
    for row in rows:
        assert row["error"] is None
        assert row["algorithm"][:10] in printed
        assert row["seconds_range"][0] <= row["seconds"] <= row["seconds_range"][1]
        assert sum(share or 0 for share in row["parts"].values()) == pytest.approx(1)
        assert row["flops"] > 0
        for base in BASELINES:
            low, high = row[f"time / {base} range"]
            assert low <= row[f"time / {base}"] <= high
            assert f"memory / {base}" in row
    assert [row[f"time / {base}"] for row, base in zip(rows, BASELINES, strict=False)] == [1, 1]


def test_ratios_are_taken_within_a_turn() -> None:
    def turns(*seconds: float) -> list[Turn]:
        return [Turn(3, s, {"primal": s / 4, "other": 3 * s / 4}, 7 if i == 0 else None, "x") for i, s in enumerate(seconds)]

    row = bench.summary(turns(3, 8, 5), {"bp": turns(1, 4, 2)})
    assert (row["seconds"], row["seconds_range"]) == (5, [3, 8])
    assert (row["time / bp"], row["time / bp range"]) == (2.5, [2, 3])
    assert (row["flops"], row["engine"], row["steps"]) == (7, "x", 3)
    assert row["parts"] == {"primal": 0.25, "tangent": None, "backward": None, "optimizer": None, "other": 0.75}


def test_the_baselines_stay_what_they_are(config: Bench) -> None:
    runs = bench.candidates(replace(config, algorithms=("dfa", "bp")))
    assert list(runs) == [*BASELINES, "dfa"]
    assert [run.algorithm for run in runs.values()] == ["bp", "bp:checkpoint=true", "dfa"]


def test_flops_are_those_of_the_matrix_products(config: Bench) -> None:
    n, d, h, c = 4, 16, 8, 3
    forward = 2 * n * (d * h + h * h + h * c)
    weights, inputs = forward, 2 * n * (h * h + h * c)
    assert step.flops(learner(config, "bp")) == forward + weights + inputs
    again = 2 * n * (d * h + h * h)  # the hidden blocks
    assert step.flops(learner(config, "bp:checkpoint=true")) == forward + weights + inputs + again
    # a forward gradient without cuts: each product, its tangent in both arguments, and nothing else
    assert step.flops(learner(config, "fg:space=avg-weight")) == 3 * forward - 2 * n * d * h


@pytest.mark.parametrize("name", [*BASELINES, *VARIANTS])
def test_the_clock_tells_the_parts_of_a_step(config: Bench, name: str) -> None:
    made = learner(config, name)
    made.step()
    clock, start = Clock(CPU), time.perf_counter()
    with timed(clock), clock("other"):
        made.step()
    assert sum(clock.seconds.values()) <= time.perf_counter() - start
    tangents = name.startswith("fdfa") or (name.startswith("fg") and "engine=reverse" not in name)
    backward = name != "fg:space=avg-weight"  # which differentiates only the loss
    assert clock.seconds.keys() - {"backward"} == set(PHASES) - {"backward"} - (set() if tangents else {"tangent"})
    assert "backward" in clock.seconds or not backward


def test_the_clock_counts_each_part_without_the_others_in_it(config: Bench) -> None:
    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return x

    made = learner(config, "fdfa:low_memory=true")  # runs the network twice, and the hidden blocks backward inside it
    made.estimator.model.block1.append(Slow())
    made.estimator.observe = lambda k, delta: time.sleep(0.03)  # while a signal is delivered, twice
    made.step()
    clock = Clock(CPU)
    with timed(clock):
        made.step()
    assert clock.seconds["primal"] >= 0.04
    assert clock.seconds["other"] >= 0.06


def test_memory_is_that_of_a_process_of_its_own(config: Bench) -> None:
    # Many layers of one size: the holes that a heap may have, of a block or two, are little beside them.
    config = replace(config, input="1,4,4", network=Network(layers=8))
    run = bench.candidates(config)["bp"]
    grew, state = step.in_a_fresh_process(step.peak, run, bench.shape_of(config), config.classes, CPU, 1)
    numbers = 16 * 800 + 7 * 800 * 800 + 800 * 3 + 3 + 8 * (1 + 2) * 800  # weights, biases, batch norm
    assert state == pytest.approx(4 * 4 * numbers, rel=0.01)  # each with its gradient and Adam's two averages
    assert 0.97 * state < grew < 1.35 * state  # and what a step needs


def test_a_process_that_is_killed_is_a_row() -> None:
    row = {"error": None}
    with bench._failure_into(row):
        step.in_a_fresh_process(os._exit, 1)
    assert row["error"] == "its process was killed: out of memory?"


def test_ctrl_c_ends_a_fresh_process_without_a_traceback() -> None:
    heard = signal.getsignal(signal.SIGINT)
    quiet = signal.SIG_IGN if heard is signal.SIG_IGN else signal.SIG_DFL
    assert step.in_a_fresh_process(signal.getsignal, signal.SIGINT) is quiet
    assert signal.getsignal(signal.SIGINT) is heard


OWN = """\
import torch
from torch import nn

class OutOfMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("no room\\nat all")

class Fails(nn.Module):
    def forward(self, x):
        return OutOfMemory.apply(x)

def make_model(layers=1):
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)], Fails(), nn.ReLU(), nn.Linear(4, 3))

def fixed():
    return make_model()
"""


@pytest.mark.usefixtures("in_this_process")
def test_what_fails_is_a_row_that_says_so(config: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(OWN)
    asked = ("fg:space=avg-weight", "local:heads.kind=cnn")
    rows = bench.bench(replace(config, model=f"{tmp_path}/own.py:make_model", network=Network(), input="4", algorithms=asked))
    errors = [row["error"] for row in rows]
    assert errors[:3] == ["out of memory: no room", "out of memory: no room", None]
    assert errors[3].startswith("a cnn head at cut '3': the output has shape (2, 4), not (N, C, H, W)")
    assert "time / bp" not in rows[2]
    assert rows[2]["seconds"] > 0
    printed = capsys.readouterr().out
    assert "bp:checkpoint=true: out of memory: no room\n" in printed
    assert "local:heads.kind=cnn: a cnn head at cut" in printed


RULE = """\
import onward

class Rule(onward.DFA):
    def __init__(self, model, cuts=None, *, fails: bool = False, **options):
        super().__init__(model, cuts, **options)
        self.fails = fails

    def signal(self, k, h, known):
        if self.fails and len(h) > 2:
            raise ValueError("no signal")
        return super().signal(k, h, known)
"""


@pytest.mark.usefixtures("in_this_process")
def test_a_rule_of_ones_own(config: Bench, tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text(RULE)
    rule = f"{tmp_path}/rule.py:Rule"
    *_, works, fails = bench.bench(replace(config, algorithms=(rule, f"{rule}:fails=true")))
    assert works["error"] is None
    assert works["time / bp"] > 0
    assert fails["error"] == f"{tmp_path}/rule.py, line 10 in a step: ValueError: no signal"


def test_an_error_of_ones_own_rule_keeps_its_line_in_a_fresh_process(config: Bench, tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text(RULE)
    name = f"{tmp_path}/rule.py:Rule:fails=true"
    run = bench.candidates(replace(config, algorithms=(name,)))[name]
    with pytest.raises(UsageError, match=r"rule.py, line 10 in a step: ValueError: no signal"):
        step.in_a_fresh_process(step.peak, run, bench.shape_of(config), config.classes, CPU, 1)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("sweep", [None, ("batch", "4", "5")])
def test_a_path_is_printed_as_it_is(
    config: Bench, sweep: tuple[str, ...] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "q[" / "x]" / "own.py"
    path.parent.mkdir(parents=True)
    path.write_text(OWN)
    own = replace(config, model=f"{path}:make_model", network=Network(), input="4", algorithms=("fg:space=avg-weight",))
    bench.bench(replace(own, sweep=sweep, plot=str(tmp_path / "batch.png")))
    assert capsys.readouterr().out.startswith(f"{path}:make_model")


@pytest.mark.usefixtures("in_this_process")
def test_figures_outlive_a_disk_that_is_full_and_a_reader_that_has_gone(
    config: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("No space left")

    config = replace(config, json=str(tmp_path / "bench.json"))
    with monkeypatch.context() as full:
        full.setattr(disk, "write_text", refuse)
        with pytest.raises(OSError, match="No space left"):
            bench.bench(config)
    assert "fdfa" in capsys.readouterr().out
    monkeypatch.setattr(bench, "measure", lambda *_: [])
    monkeypatch.setattr(bench, "show", refuse)
    with pytest.raises(OSError, match="No space left"):
        bench.bench(config)
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == []


@pytest.mark.usefixtures("in_this_process")
def test_a_sweep_ends_in_slopes_and_a_picture(config: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--sweep", "depth", "1", "3", "--plot", f"{tmp_path}/depth.png", "--json", f"{tmp_path}/depth.json"]
    small = ["--model", "chain", "--network.width", "0.2", "--input", "1,4,4", "--batch-size", "2", "--turns", "1"]
    assert command.main(["bench", "--algorithms", "dfa", "--steps", "1", "--device", "cpu", *small, *asked]) == 0
    report = json.loads((tmp_path / "depth.json").read_text())
    assert [(row["algorithm"], row["value"]) for row in report["rows"]] == [
        (name, depth) for depth in (1, 3) for name in (*BASELINES, "dfa")
    ]
    flops = [row["flops"] for row in report["rows"] if row["algorithm"] == "dfa"]
    assert flops[1] > 2 * flops[0]
    assert [fit["algorithm"] for fit in report["slopes"]] == [*BASELINES, "dfa"]
    assert f"picture: {tmp_path}/depth.png" in capsys.readouterr().out
    with Image.open(tmp_path / "depth.png") as picture:
        assert picture.size == (1800, 675)


def test_slopes_are_least_squares() -> None:
    def row(name: str, value: int, size: float) -> dict[str, object]:
        return {
            "algorithm": name,
            "value": value,
            "error": None,
            "seconds": size / 1e3,
            "peak_bytes": 2e6 * size,
            "state_bytes": 1e6 * size,
        }

    rows = [row("bp", v, 2 * v + 1) for v in (1, 2, 4)] + [row("dfa", v, v) for v in (1, 2, 4)]
    rows += [row("fg", 1, 5), {**row("fg", 2, 0), "error": "out of memory"}]
    bp, dfa, fg = bench.slopes(rows)
    assert bp["ms"] == pytest.approx({"slope": 2, "intercept": 1, "/ bp": 1})
    assert dfa["MB"] == pytest.approx({"slope": 2, "intercept": 0, "/ bp": 0.5}, abs=1e-9)
    assert dfa["MB above state"] == pytest.approx({"slope": 1, "intercept": 0, "/ bp": 0.5}, abs=1e-9)
    assert fg == {"algorithm": "fg"}  # one value has no slope


@pytest.mark.parametrize(
    ("sweep", "batch_size", "width", "layers"),
    [(("batch", "2", "5"), 5, 0.01, 2), (("width", "0.1", "0.5"), 4, 0.5, 2), (("depth", "2", "3"), 4, 0.01, 3)],
)
def test_what_a_sweep_changes(config: Bench, sweep: tuple[str, ...], batch_size: int, width: float, layers: int) -> None:
    first, last = bench._points(replace(config, sweep=sweep))
    assert (last.batch_size, last.network.width, last.network.layers) == (batch_size, width, layers)
    assert [bench.swept(point, sweep[0]) for point in (first, last)] == [float(value) for value in sweep[1:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithms": ("fdaf",)}, "unknown algorithm 'fdaf': did you mean 'fdfa'"),
        ({"model": "mpl"}, "unknown model 'mpl': did you mean 'mlp'"),
        ({"model": "here.py:make_model", "input": None}, "--model here.py:make_model: there is no file here.py"),
        ({"model": "cnn", "sweep": ("depth", "2", "4")}, "--sweep depth: cnn has no --network.layers, sweep something else"),
        ({"sweep": ("dept", "2", "3")}, "unknown sweep 'dept': did you mean 'depth'"),
        ({"sweep": ("depth", "2")}, "--sweep depth 2: a slope takes at least two values, such as depth 8 16 32 64"),
        ({"sweep": ("depth", "2", "02")}, "--sweep depth 2 02: a slope takes at least two values, such as depth 8 16 32 64"),
        ({"sweep": ("depth", "2", "x")}, "--sweep depth x: this is no whole number"),
        ({"sweep": ("batch", "0", "2")}, "--batch-size 0: use at least 1"),
        ({"sweep": ("width", "-1", "2")}, "--network.width -1.0: use a positive number"),
        ({"model": "cnn", "input": "1,4"}, r"cnn for inputs of shape \(1, 4\): it is for images, three sizes such as 3,32,32"),
        ({"json": "no/such/folder/bench.json"}, "--json no/such/folder/bench.json: there is no folder no/such/folder"),
        ({"sweep": ("depth", "2", "3"), "plot": "d.jpog"}, "--plot d.jpog: a picture has a name that ends in one of .*.png"),
        ({"sweep": ("depth", "2", "3"), "plot": "d.pgf"}, "--plot d.pgf: a picture has a name that ends in one of"),
        ({"json": "/"}, "--json /: this is a folder, name a file in it"),
        ({"device": "gpu"}, "--device gpu cannot be used"),
    ],
)
def test_what_cannot_be_measured(config: Bench, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench.bench(replace(config, **changes))


@pytest.mark.parametrize(("function", "counts"), [("make_model", [5, 7]), ("fixed", None)])
def test_a_sweep_over_a_network_of_ones_own(config: Bench, function: str, counts: list[int] | None, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    asked = replace(config, model=f"{tmp_path}/own.py:{function}", input="4", sweep=("depth", "2", "4"), network=Network())
    if counts is None:
        with pytest.raises(UsageError, match=r"--sweep depth: .*own.py:fixed has no --network.layers, sweep something else"):
            bench.bench(asked)
    else:
        made = [bench.candidates(point)["bp"] for point in bench._points(asked)]
        assert [len(Learner.of(run, (4,), 3, CPU).estimator.model) for run in made] == counts


def test_a_network_of_ones_own_says_what_its_inputs_are(config: Bench, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(UsageError, match=r"own.py:make_model: say what its inputs look like, such as --input 3,32,32"):
        bench.bench(replace(config, model=f"{tmp_path}/own.py:make_model", input=None))
