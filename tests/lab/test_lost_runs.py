"""No run is lost: what cannot work is refused before anything is written or erased, and what stops on the way can go on."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_resume import assert_same, outcome

from onward.errors import UsageError
from onward.lab import cli as command
from onward.lab.data import Data, load
from onward.lab.networks import models
from onward.lab.run import checkpoint, record
from onward.lab.run import folder as run_folder
from onward.lab.run.loop import resume, train
from onward.lab.run.training import TrainingFailed
from onward.lab.settings import Align, Bench, Compare, Network, Subset, Train
from onward.lab.studies.align import align
from onward.lab.studies.bench import bench
from onward.lab.studies.compare import compare
from onward.lab.system import generators, own

NETWORKS = """
import random
import sys
import numpy as np
import torch
from torch import nn

class Stops(nn.Module):
    def __init__(self, when):
        super().__init__()
        self.when = when

    def forward(self, x):
        if self.when(self, x):
            raise ValueError("not with me")
        return x

class Lambda(nn.Module):
    def get_extra_state(self):
        return lambda: 3

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        return x

class Noise(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * torch.from_numpy(np.random.rand(*x.shape) > 0.5).to(x) + random.random()

def network(*more):
    return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), *more), nn.Linear(16, 10))

def good():
    return network()

def other():
    return network(nn.Linear(16, 16))

def frozen():
    model = network()
    model[1].requires_grad_(False)
    return model

def fails_in_a_test():
    return network(Stops(lambda self, x: not self.training))

def fails_in_training():
    return network(Stops(lambda self, x: self.training and len(x) > 2))

def cannot_be_saved():
    return network(Lambda())

def noisy():
    return network(Noise())

def ends_the_program():
    sys.exit(0)
"""
REFUSED = {
    "frozen": "no parameters to train|unfreeze its output layer",
    "fails_in_a_test": r"net.py, line \d+ in a test: ValueError: not with me",
    "fails_in_training": r"net.py, line \d+ in a step of training: ValueError: not with me",
    "cannot_be_saved": "no checkpoint can hold this network's state",
    "ends_the_program": r"net.py, line \d+: SystemExit: 0",
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORKS)
    return Train(
        algorithm="dfa", model="net.py:good", epochs=2, lr=1e-2, device="cpu", out="run", subset=Subset(train=128, test=64)
    )


def content(folder: Path | str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def unfinished(folder: str, epochs: int = 3) -> None:
    """Make a complete run one that was stopped before its last epoch."""
    path = Path(folder) / "config.json"
    found = json.loads(path.read_text())
    found["config"]["epochs"] = epochs
    path.write_text(json.dumps(found))


# ---- refusals


@pytest.mark.parametrize("network", REFUSED)
def test_a_network_that_cannot_be_trained_costs_no_earlier_run(config: Train, network: str) -> None:
    train(config)
    before = content("run")
    for changes in ({"overwrite": True}, {"out": "new"}):
        with pytest.raises(UsageError, match=REFUSED[network]):
            train(replace(config, model=f"net.py:{network}", **changes))
    assert content("run") == before
    assert not Path("new").exists()
    assert len(train(replace(config, out="new", epochs=1))) == 1  # the corrected command


def test_files_and_folders_of_others_stay(config: Train) -> None:
    Path("run").mkdir()
    others = [Path("run/big.zip.partial"), Path("run/weights-old.pt"), Path("run/checkpoint-mine.pt")]
    for path in others:
        path.write_text("mine")
    train(config)
    for path in ("run/weights-7.pt", "run/x.partial", "run/weights-best.pt"):
        Path(path).mkdir()
    train(replace(config, overwrite=True))
    assert [path.read_text() for path in others] == ["mine"] * 3
    Path("run/failed.txt").mkdir()
    before = content("run")
    with pytest.raises(UsageError, match=r"run/failed.txt is a folder, and a run has a file of that name: choose another"):
        train(replace(config, overwrite=True))
    assert content("run") == before


def test_numbers_that_are_not_finite_at_once_cost_no_earlier_run(config: Train) -> None:
    train(config)
    before = content("run")
    bad = replace(config, overwrite=True, transform=replace(config.transform, mean=float("nan")))
    with pytest.raises(TrainingFailed, match=r"the training loss is nan at epoch 1, step 1 of 2 .*; nothing was written"):
        train(bad)
    assert content("run") == before


@pytest.mark.parametrize("network", ["frozen", "fails_in_a_test", "other"])
def test_a_refused_run_is_left_as_it_is_to_be_resumed(config: Train, network: str) -> None:
    train(config)
    unfinished("run")
    before = content("run")
    source = Path("net.py").read_text()
    Path("net.py").write_text(source.replace("def good", "def bad").replace(f"def {network}", "def good"))
    with pytest.raises(UsageError, match=REFUSED.get(network, "the checkpoint does not fit the run's configuration")):
        resume(Path("run"))
    assert content("run") == before
    Path("net.py").write_text(source)
    assert len(resume(Path("run"))) == 3


def test_a_run_goes_on_elsewhere(images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(images.parent)
    train(of_images(images))
    unfinished("run")
    kept = Path("run/config.json")
    kept.write_text(kept.read_text().replace('"device": "cpu"', '"device": "cuda:99"', 1))
    images.rename("elsewhere")
    asked = ["train", "--resume", "run"]
    assert command.main([*asked, "--data-dir", "elsewhere"]) == 2
    assert "--device cuda:99 cannot be used" in capsys.readouterr().err
    assert command.main([*asked, "--device", "cpu"]) == 2
    assert f"{images} does not exist" in capsys.readouterr().err
    assert command.main([*asked, "--device", "cpu", "--lr", "1", "--network.layers", "3"]) == 2
    said = "error: --resume run keeps what decides the result of the run: leave out --lr --network.layers\n"
    assert capsys.readouterr().err == said
    assert command.main([*asked, "--device", "cpu", "--data-dir", "elsewhere", "--data-timeout", "9"]) == 0
    assert len(run_folder.read_config(Path("run"))["data"]["class_names"]) == 2
    assert record.read(Path("run")).config.data_dir == str(images)


def test_averages_of_other_parameters_are_refused(config: Train) -> None:
    train(config)
    unfinished("run")
    path = Path("run/checkpoint.pt")
    state = checkpoint.load(path)
    assert state is not None
    state["optimizers"]["network"]["state"][0]["exp_avg"] = torch.zeros(3)
    checkpoint.save(path, state)
    with pytest.raises(UsageError, match=r"does not fit .*exp_avg of shape \(3,\) for a parameter of shape \(16, 64\)"):
        resume(Path("run"))


@pytest.mark.parametrize("what", ["compare", "align"])
def test_runs_that_are_compared_are_not_erased_by_others_that_cannot_be(config: Train, what: str) -> None:
    shared: dict[str, Any] = {
        "algorithms": ("bp", "dfa"),
        "model": "net.py:good",
        "epochs": 1,
        "lr": 1e-2,
        "device": "cpu",
        "out": "both",
        "subset": config.subset,
    }
    do: Callable[[Any], Any] = compare if what == "compare" else align
    asked = Compare(**shared, seeds=1) if what == "compare" else Align(**shared)
    do(asked)
    before = content("both")
    for network in ("frozen", "fails_in_a_test"):
        with pytest.raises(UsageError, match=REFUSED[network]):
            do(replace(asked, model=f"net.py:{network}", overwrite=True))
    bad = replace(asked, overwrite=True, transform=replace(config.transform, mean=float("nan")))
    with pytest.raises(TrainingFailed, match=r"bp: the training loss is nan .*; dfa: .*; nothing was written"):
        do(bad)
    assert content("both") == before


def test_one_of_several_that_fails_at_once_is_told_in_the_table(config: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from onward.lab.run import training as run

    trained = run.Run.estimate

    def estimate(self: Any, *given: Any) -> Any:
        if self.config.algorithm == "dfa":
            raise TrainingFailed("the training loss is nan")
        return trained(self, *given)

    monkeypatch.setattr(run.Run, "estimate", estimate)
    asked = Compare(algorithms=("bp", "dfa"), seeds=1, model="net.py:good", epochs=1, out="both", subset=config.subset)
    fine, failed = compare(asked)
    assert (fine["runs"], failed["runs"], failed["failed"], failed["engine"]) == (1, 0, 1, None)
    assert not Path("both/dfa-s0").exists()


def test_what_is_asked_of_weights_and_biases_is_refused_first(
    config: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**settings: Any) -> Any:
        (Path(settings["dir"]) / "wandb" / "run").mkdir(parents=True)
        raise RuntimeError("No API key configured. Use `wandb login` to log in.\nMore.")

    train(config)
    unfinished("run")
    before = content("run")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    asked = ["train", "--model", "net.py:good", "--algorithm", "dfa", "--subset.train", "128", "--wandb", "--epochs", "1"]
    for out in (["--out", "run", "--overwrite"], ["--out", "new"]):
        assert command.main([*asked, *out]) == 2
        assert capsys.readouterr().err == (
            "error: --wandb: Weights & Biases refuses (No API key configured. Use `wandb login` to log in): mend that, set "
            "WANDB_MODE=offline, or leave it out\n"
        )
    assert content("run") == before
    assert not Path("run/wandb").exists()
    assert not Path("new").exists()


def test_what_weights_and_biases_no_longer_takes_is_told_once(
    config: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Session:
        def __enter__(self) -> Session:
            return self

        def __exit__(self, *_: object) -> None:
            raise OSError("the network is down")

        def log(self, values: dict[str, float], step: int) -> None:
            raise OSError("the network is down")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: Session()))
    assert len(train(replace(config, wandb=True))) == 2
    assert capsys.readouterr().err == (
        "warning: Weights & Biases takes no more (the network is down); the run goes on without it\n"
    )


@pytest.mark.parametrize("answer", ["nothing", "exit"])
def test_weights_and_biases_may_answer_in_any_way(
    answer: str, config: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**_: Any) -> None:
        if answer == "exit":
            sys.exit(0)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    assert command.guarded(lambda: train(replace(config, wandb=True))) == 2
    assert "--wandb: Weights & Biases refuses (" in capsys.readouterr().err
    assert not Path("run").exists()


def test_weights_and_biases_cannot_end_a_run(
    config: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Session:
        def __enter__(self) -> Session:
            return self

        def __exit__(self, *_: object) -> None:
            sys.exit(3)

        def log(self, values: dict[str, float], step: int) -> None:
            sys.exit(3)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: Session()))
    assert command.guarded(lambda: train(replace(config, wandb=True))) == 0
    assert capsys.readouterr().err == "warning: Weights & Biases takes no more (3); the run goes on without it\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "raise TypeError('Descriptors cannot be created directly.')",
            "cannot be imported (Descriptors cannot be created directly)",
        ),
        ("import no_such_module_as_this", "wandb is not installed: pip install onward[wandb]"),
    ],
)
def test_a_logger_that_cannot_be_imported_is_told_at_once(
    content: str, said: str, config: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("wandb.py").write_text(content)
    monkeypatch.syspath_prepend(".")
    with pytest.raises(UsageError, match=f"--wandb: .*{re.escape(said)}"):
        train(replace(config, wandb=True))
    assert not Path("run").exists()


def test_a_folder_that_tensorboard_cannot_name_is_refused_first(config: Train) -> None:
    folder = os.fsdecode(b"caf\xe9")
    Path(folder).mkdir()
    Path(folder, "config.json").write_text("an earlier run")
    with pytest.raises(UsageError, match=r"TensorBoard cannot write to .*: choose another folder with --out"):
        train(replace(config, out=folder, overwrite=True))
    assert list(content(folder)) == [f"{folder}/config.json"]


def test_where_figures_cannot_be_written_nothing_is_measured(tmp_path: Path) -> None:
    for flag in ({"json": "/proc/bench.json"}, {"plot": "/proc/bench.png", "sweep": ("batch", "2", "4")}):
        with pytest.raises(UsageError, match=r"/proc/bench.* cannot be written \(.*\): name a file elsewhere"):
            bench(Bench(input="1,4,4", **flag))  # type: ignore[arg-type]


def test_an_earlier_run_is_there_until_the_new_one_is(config: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config)
    before = content("run")

    def full(path: Path) -> None:
        raise OSError("no space")

    monkeypatch.setattr("onward.lab.system.disk.os.fsync", full)
    with pytest.raises(OSError, match=r"run/config.json cannot be written"):
        train(replace(config, overwrite=True))
    assert content("run") == before


def test_a_file_that_registers_something_is_run_twice(config: Train) -> None:
    Path("net.py").write_text(
        f'{NETWORKS}\nfrom torch import library as operators\nheld = operators.Library("onward_tests", "DEF")\n'
        'held.define("twice() -> int")\n'
    )
    assert len(train(replace(config, epochs=1))) == 1


FOR_ALL = {
    "folder": "os.chdir(os.path.dirname(__file__) + '/elsewhere')",
    "no-stream": "sys.stdout = sys.stderr = None",
    "closed-stream": "sys.stdout.close(); sys.stderr.close()",
    "type": "torch.set_default_dtype(torch.float64)",
    "device": "torch.set_default_device('meta')",
}
PLACES = {
    "file": "\nimport os\n{}\n",
    "function": "\nimport os\ndef good():\n    {}\n    return network()\n",
    "forward": (
        "\nimport os\nclass Changes(nn.Module):\n    def forward(self, x):\n        {}\n        return x\n"
        "def good():\n    return network(Changes())\n"
    ),
}
REFUSED_THERE = {("type", "function"), ("device", "function")}


@pytest.mark.parametrize(("change", "place"), [pair for pair in product(FOR_ALL, PLACES) if pair != ("device", "forward")])
def test_what_a_network_changes_for_the_whole_program_is_changed_back(
    change: str, place: str, config: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("elsewhere/run").mkdir(parents=True)
    Path("elsewhere/run/config.json").write_text("of others")
    here = Path.cwd()
    for name, number in (("stdout", 1), ("stderr", 2)):
        monkeypatch.setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
    Path("net.py").write_text(NETWORKS + PLACES[place].format(FOR_ALL[change]))
    assert command.guarded(lambda: train(config)) == (2 if (change, place) in REFUSED_THERE else 0)
    assert Path("run/metrics.jsonl").exists() == ((change, place) not in REFUSED_THERE)
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device().type == "cpu"
    assert Path.cwd() == here
    assert content("elsewhere") == {"elsewhere/run/config.json": b"of others"}


def test_files_that_import_namesakes_have_their_own(config: Train) -> None:
    for folder, width in (("a", 3), ("b", 5)):
        Path(folder).mkdir()
        Path(folder, "layers.py").write_text(f"WIDTH = {width}")
        Path(folder, "net.py").write_text(
            "from torch import nn\nimport layers\ndef make():\n    import layers as late\n"
            "    assert late is layers\n    width = layers.WIDTH\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.Linear(width, 2))"
        )
    before = list(sys.path)
    widths = [
        models.build(f"{folder}/net.py:make", (1, 2, 2), 2, Network())[1].out_features  # type: ignore[index,union-attr]
        for folder in ("a", "b", "a", "b")
    ]
    assert widths == [3, 5, 3, 5]
    assert len(sys.path) <= len(before) + 1
    sys.modules.pop("layers")


# ---- networks of one's own


def test_a_run_goes_on_only_with_its_network(config: Train) -> None:
    train(config)
    unfinished("run")
    before = content("run")
    assert before["run/config.json"].count(b'"code"') == 1
    Path("net.py").write_text(NETWORKS.replace("nn.ReLU()", "nn.Tanh()"))
    said = r"run is a run of another network: net.py has changed since; bring that back, choose another folder with --out"
    with pytest.raises(UsageError, match=said):
        resume(Path("run"))
    with pytest.raises(UsageError, match=said):
        align(Align(runs=("run",), out="looked"))
    assert content("run") == before
    Path("net.py").write_text(NETWORKS)
    assert len(resume(Path("run"))) == 3


def test_a_run_from_before_its_network_was_kept_goes_on(config: Train) -> None:
    train(config)
    unfinished("run")
    found = run_folder.read_config(Path("run"))
    del found["environment"]["code"]
    Path("run/config.json").write_text(json.dumps(found))
    state = checkpoint.load(Path("run/checkpoint.pt"))
    assert state is not None
    del state["code"]
    checkpoint.save(Path("run/checkpoint.pt"), state)
    Path("net.py").write_text(NETWORKS + "\n")
    assert len(resume(Path("run"))) == 3
    assert run_folder.read_config(Path("run"))["environment"]["code"] == own.digest(own.named("--model", "net.py:good"))


def test_compared_runs_are_of_one_network(config: Train) -> None:
    asked = Compare(algorithms=("bp", "dfa"), seeds=1, model="net.py:good", epochs=1, out="both", subset=config.subset)
    compare(asked)
    Path("net.py").write_text(NETWORKS.replace("nn.ReLU()", "nn.Tanh()"))
    with pytest.raises(UsageError, match=r"both/bp-s0 is a run of another network: net.py has changed since"):
        compare(asked)


@pytest.mark.parametrize("statement", ["raise KeyError('small')", "sys.exit(0)"])
@pytest.mark.parametrize(
    ("when", "place"), [("len(x) == 28", "epoch 1, step 2 of 2"), ("not self.training and len(x) == 4", "")]
)
def test_a_network_that_fails_on_the_way_keeps_what_was_trained(
    statement: str, when: str, place: str, config: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, batch_size=100, test_batch_size=60)
    fails = (
        f"class Fails(nn.Module):\n    def forward(self, x):\n        if {when}:\n            {statement}\n        return x\n"
    )
    source = f"{NETWORKS}\n{fails}def good():\n    return network(Fails())\n"
    Path("net.py").write_text(source)
    assert command.guarded(lambda: train(config)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    kind = "KeyError: 'small'" if "KeyError" in statement else "SystemExit: 0"
    assert re.match(rf"error: net.py, line \d+ {'at ' + place if place else 'in a test'}: {kind}: mend it, then go on by", said)
    kept = 1 if place else 2
    assert said.endswith(f"onward train --resume run; run/checkpoint.pt keeps the state after step {kept} of epoch 1")
    Path("net.py").write_text(source.replace(statement, "pass"))
    assert len(resume(Path("run"))) == 2
    assert run_folder.read_config(Path("run"))["environment"]["code"] == own.digest(own.named("--model", "net.py:good"))


RULE = """
import torch
from torch import nn
import onward

class Rule(onward.DFA):
    def signal(self, k, h, known):
        if self.step == FAILS:
            raise ValueError("in the middle")
        return super().signal(k, h, known)

class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        if not self.training and len(x) == 24 and FAILS == "in a test":
            raise ValueError("in a test")
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x - self.mean + torch.rand(())

def make():
    first = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), Mean())
    return nn.Sequential(first, nn.Linear(16, 10))
"""


@pytest.mark.parametrize(("fails", "kept"), [("6", "step 2 of epoch 2"), ("'in a test'", "step 4 of epoch 1")])
def test_what_fails_in_the_middle_of_a_step_leaves_the_state_before_it(
    fails: str, kept: str, config: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, model="rule.py:make", algorithm="rule.py:Rule", batch_size=32, test_batch_size=40)
    Path("rule.py").write_text(RULE + "FAILS = None\n")
    train(replace(config, out="whole"))
    Path("rule.py").write_text(RULE + f"FAILS = {fails}\n")
    assert command.guarded(lambda: train(config)) == 1
    assert capsys.readouterr().err.strip().endswith(f"keeps the state after {kept}")
    Path("rule.py").write_text(RULE + "FAILS = None\n")
    torch.manual_seed(99)
    resume(Path("run"))
    assert_same(outcome(Path("run")), outcome(Path("whole")))


def test_without_a_checkpoint_nothing_is_trained_in_silence(config: Train, capsys: pytest.CaptureFixture[str]) -> None:
    rows = train(config)
    for path in Path("run").glob("checkpoint*.pt"):
        path.unlink()
    before = content("run")
    assert resume(Path("run")) == rows
    assert "run is complete" in capsys.readouterr().out
    assert content("run") == before
    unfinished("run")
    kept = Path("run/config.json").read_text()
    Path("run/config.json").write_text(kept.replace('"digest": "', '"digest": "0'))
    with pytest.raises(UsageError, match="run is a run on other data"):
        resume(Path("run"))
    Path("run/config.json").write_text(kept)
    assert len(resume(Path("run"))) == 3
    assert "run has no checkpoint: it is trained from its beginning" in capsys.readouterr().out


# ---- generators


def test_pythons_and_numpys_generators_belong_to_seed_and_checkpoint(config: Train) -> None:
    config = replace(config, model="net.py:noisy", checkpoint_every="1", align_every=1, align_estimates=2)
    for name in ("whole", "again", "broken"):
        random.seed(name)
        train(replace(config, out=name))
    assert_same(outcome(Path("again")), outcome(Path("whole")))
    unlike = train(replace(config, out="unlike", seed=1))
    assert unlike[0]["train_loss"] != outcome(Path("whole"))[0][0]["train_loss"]
    Path("broken/checkpoint-previous.pt").replace("broken/checkpoint.pt")  # as if it had been killed in its last epoch
    random.seed("resumed")
    np.random.seed(99)  # noqa: NPY002
    resume(Path("broken"))
    assert_same(outcome(Path("broken")), outcome(Path("whole")))
    without = train(replace(config, out="without", align_every=0))
    assert [row["train_loss"] for row in without] == [row["train_loss"] for row in outcome(Path("whole"))[0]]


def test_a_checkpoint_from_before_they_were_kept_goes_on(config: Train) -> None:
    train(config)
    unfinished("run")
    path = Path("run/checkpoint.pt")
    state = checkpoint.load(path)
    assert state is not None
    del state["data"], state["generators"][0]["python"], state["generators"][0]["numpy"]
    checkpoint.save(path, state)
    (path.parent / "config.json").write_text(json.dumps({**run_folder.read_config(path.parent), "data": None}))
    assert len(resume(Path("run"))) == 3
    assert run_folder.read_config(Path("run"))["data"] == run_folder.described(
        load("digits", train_samples=128, test_samples=64)
    )


def test_states_are_restored_whole() -> None:
    cpu = torch.device("cpu")
    generators.seed(5)
    random.gauss(0, 1)
    np.random.randn()  # noqa: NPY002 (leaves a second one for later)
    before = generators.states(cpu)
    first = random.gauss(0, 1), np.random.randn(), torch.rand(()).item()  # noqa: NPY002
    generators.restore(before, cpu)
    assert (random.gauss(0, 1), np.random.randn(), torch.rand(()).item()) == first  # noqa: NPY002


# ---- data


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Class folders of images, of several sizes so that they are decoded batch by batch."""
    return write_images(tmp_path / "images", sizes=5)


def write_images(folder: Path, sizes: int) -> Path:
    generator = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 6)):
        for number, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                size = (8, 8 + i % sizes)
                pixels = generator.integers(100 * number, 100 * number + 100, size, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i:02}.png")
    return folder


def of_images(folder: Path, **changes: Any) -> Train:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 8, "device": "cpu", "lr": 1e-2, "out": "run", **changes}
    config = Train(algorithm="dfa", data_dir=str(folder), network=Network(width=0.02), **settings)
    return replace(config, transform=replace(config.transform, size=8))


def rename_a_class(folder: Path) -> None:
    for part in ("train", "test"):
        (folder / part / "cat").rename(folder / part / "zebra")


def add_images(folder: Path) -> None:
    for i in range(10):
        (folder / "train" / "cat" / f"more{i}.png").write_bytes((folder / "train" / "cat" / "00.png").read_bytes())


def change_an_image(folder: Path) -> None:
    Image.new("L", (8, 8), 50).save(folder / "train" / "cat" / "03.png")


CHANGES = {
    rename_a_class: "class 0 was cat, is dog",
    add_images: "48 training images, now 58",
    change_an_image: "as many images of the same classes, but not the same, or not in the same order",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("sizes", [1, 5])
def test_a_run_does_not_go_on_with_other_data(
    change: Callable[[Path], None], sizes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_images(tmp_path / "images", sizes)
    config = of_images(folder)
    train(config)
    unfinished("run")
    before = content("run")
    assert run_folder.read_config(Path("run"))["data"]["class_names"] == ["cat", "dog"]
    change(folder)
    for again in (lambda: resume(Path("run")), lambda: align(Align(runs=("run",), device="cpu"))):
        with pytest.raises(UsageError, match=rf"run is a run on other data \({CHANGES[change]}\): bring those back"):
            again()
    assert content("run") == before


def test_compared_runs_do_not_go_on_with_other_data(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shared = {"epochs": 1, "batch_size": 8, "device": "cpu", "data_dir": str(images), "transform": of_images(images).transform}
    asked = Compare(algorithms=("bp",), seeds=1, out="both", **shared)  # type: ignore[arg-type]
    compare(asked)
    add_images(images)
    with pytest.raises(UsageError, match=r"bp-s0 is a run on other data \(48 training images, now 58\)"):
        compare(replace(asked, algorithms=("dfa", "bp")))
    assert not Path("both/dfa-s0").exists()
    assert [row["runs"] for row in compare(replace(asked, algorithms=("dfa", "bp"), overwrite=True))] == [1, 1]


def test_a_digest_of_pixels_and_one_of_files_are_not_held_against_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(of_images(write_images(tmp_path / "images", sizes=1)))
    unfinished("run")
    monkeypatch.setattr("onward.lab.system.memory.physical", lambda: 100)  # now too little to keep the images
    assert len(resume(Path("run"))) == 3


def broken(data: Data, part: str, index: int) -> Path:
    """Break an image of the part, which is the `index`th that is read in the first epoch."""
    samples = getattr(data, part).images.samples
    if part == "train":
        from onward.lab.data.batches import _key

        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(_key(0, 1)))
        index = int(order[index])
    path = Path(samples[index].file)
    path.write_bytes(path.read_bytes()[:60])
    return path


@pytest.mark.parametrize(("part", "index", "kept"), [("train", 20, "step 2 of epoch 1"), ("test", 7, "step 6 of epoch 1")])
def test_a_broken_image_on_the_way_keeps_what_was_trained(
    part: str,
    index: int,
    kept: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = of_images(images, test_batch_size=4)
    train(replace(config, out="whole"))
    source = {path: path.read_bytes() for path in images.rglob("*.png")}
    path = broken(load("digits", images), part, index)
    assert command.guarded(lambda: train(config)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {path} does not decode as an image (")
    assert said.endswith(
        f"): replace it, then go on by onward train --resume run; run/checkpoint.pt keeps the state after {kept}"
    )
    assert command.guarded(lambda: resume(Path("run"))) == (2 if part == "train" else 1)  # it is still broken
    capsys.readouterr()
    path.write_bytes(source[path] + b" ")  # mended, and not the same bytes
    resume(Path("run"))
    (rows, state), (wanted_rows, wanted) = outcome(Path("run")), outcome(Path("whole"))
    assert rows == wanted_rows
    assert state.pop("data")["digest"] != wanted.pop("data")["digest"]
    assert_same(state, wanted)
    assert run_folder.read_config(Path("run"))["data"] == run_folder.described(load("digits", images))


def test_a_run_among_class_folders_is_refused_before_it_is_made(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [path for path in images.iterdir() if path.name == "train"]
    monkeypatch.chdir(parts[0] if parts else images)
    before = content(".")
    for asked in (["train"], ["compare", "--algorithms", "bp"], ["align", "--algorithms", "bp"]):
        assert command.main([*asked, "--data-dir", ".", "--epochs", "1"]) == 2
        said = capsys.readouterr().err
        assert "is among the class folders of --data-dir ., where it would be a class: choose a folder elsewhere" in said
        assert said.startswith("error: runs/")
    assert content(".") == before
    assert not Path("runs").exists()


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_that_is_broken_in_the_first_batch_is_refused(
    part: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(of_images(images))
    before = content("run")
    broken(load("digits", images), part, 2)
    for changes in ({"overwrite": True}, {"out": "new"}):
        with pytest.raises(UsageError, match="does not decode as an image"):
            train(of_images(images, **changes))
    assert content("run") == before
    assert not Path("new").exists()
