"""Data of one's own: what a function may return, what is trained on it, and what is said of what cannot be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from together import start

from onward.errors import UsageError
from onward.lab.data import held_out, load
from onward.lab.data.batches import batches
from onward.lab.run.loop import resume, train
from onward.lab.run.training import load_data, prepare
from onward.lab.settings import Compare, Network, Recipe, Schedule, Subset, TaskSettings, Train, Transform
from onward.lab.studies.compare import compare

DATA = '''
import random
import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

generator = torch.Generator().manual_seed(0)
# Eighths, whose products and sums are exact: a matrix product may round otherwise from one run to the next.
X = torch.randn(60, 6, generator=generator, dtype=torch.float64).mul(8).round().div(8)
W = torch.randn(6, 3, generator=generator, dtype=torch.float64).mul(8).round().div(8)

def parts(x, y):
    return (x[:40], y[:40]), (x[40:], y[40:])

def numbers(): return parts(X, (X @ W)[:, 0])
def rows(): return parts(X.numpy(), (X @ W).numpy())
def classes(): return parts(X, (X @ W).argmax(1))
def labels(): return parts(X, X @ W > 0)
def tokens(): return parts(torch.arange(240).view(60, 4) % 5, torch.arange(60) % 5)

def two_inputs():
    y = (X @ W).argmax(1)
    return [({"left": X[a:b, :2], "right": X[a:b, 2:]}, y[a:b]) for a, b in ((0, 40), (40, 60))]

class Items(Dataset):
    """Pairs (dict of inputs, class), the inputs drawn anew each time if there is noise."""

    def __init__(self, first, last, noise=0.0):
        self.first, self.last, self.noise = first, last, noise

    def __len__(self):
        return self.last - self.first

    def __getitem__(self, i):
        x = X[self.first + i].float()
        drawn = torch.randn(()).item() + random.random() + np.random.rand()
        return {"left": x[:2] + self.noise * drawn, "right": x[2:]}, int((X[self.first + i] @ W).argmax())

def items(): return Items(0, 40), Items(40, 60)
def noisy(): return Items(0, 40, noise=0.1), Items(40, 60)
def wrapped(): return TensorDataset(X[:40], (X @ W)[:40]), TensorDataset(X[40:], (X @ W)[40:])

def drawn(seed):
    x = torch.randn(60, 6)
    return parts(x + seed, x[:, :1])
'''

NETWORKS = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(shape["left"][0] + shape["right"][0], 16), nn.ReLU())
        self.out = nn.Linear(16, classes)

    def forward(self, left, right):
        return self.out(self.body(torch.cat([left, right], 1)))

def words(classes):
    first = nn.Sequential(nn.Embedding(5, 8), nn.Flatten())
    return nn.Sequential(first, nn.Sequential(nn.Linear(32, 16), nn.ReLU()), nn.Linear(16, classes))

def line(shape): return nn.Sequential(nn.Linear(shape[0], 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))
"""


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Train]:
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "nets.py").write_text(NETWORKS)

    def make(function: str, model: str = "mlp", kind: Any = Train, **changes: Any) -> Any:
        own = {"model": f"{tmp_path}/nets.py:{model}"} if model != "mlp" else {"network": Network(width=0.04)}
        cuts = ("body",) if model == "Two" else ("1",) if model == "line" else None
        settings = {"epochs": 2, "batch_size": 16, "lr": 1e-2, "device": "cpu", "out": str(tmp_path / "run"), "cuts": cuts}
        return kind(data=f"{tmp_path}/data.py:{function}", **{**settings, **own, **changes})

    return make


Make = Callable[..., Any]


# ---- what is trained


@pytest.mark.parametrize(
    ("algorithm", "function", "model", "task", "outputs", "chance"),
    [
        ("bp", "numbers", "mlp", "regression", 1, {"r2": 0}),
        ("fdfa", "numbers", "line", "regression", 1, {"r2": 0}),
        ("fdfa", "rows", "mlp", "regression", 3, {"r2": 0}),
        ("bp", "classes", "mlp", "classification", 3, {"accuracy": 40}),
        ("fdfa", "labels", "mlp", "multi-label", 3, {"f1": 60, "exact": 15}),
        ("fdfa", "two_inputs", "Two", "classification", 3, {"accuracy": 40}),
        ("fdfa", "items", "Two", "classification", 3, {"accuracy": 40}),
        ("bp", "wrapped", "mlp", "regression", 3, {"r2": 0}),
        ("fdfa", "tokens", "words", "classification", 5, {"accuracy": 40}),
    ],
)
def test_it_is_learnt_and_said_in_the_metrics_of_its_task(
    config: Make,
    capsys: Any,
    algorithm: str,
    function: str,
    model: str,
    task: str,
    outputs: int,
    chance: dict[str, float],
) -> None:
    asked = config(function, model, algorithm=algorithm, epochs=25, lr=2e-2, schedule=Schedule("constant"))
    rows = train(asked)
    for name, least in chance.items():
        assert rows[-1][f"test_{name}"] > least
    assert rows[-1]["train_loss"] < 0.7 * rows[0]["train_loss"]
    folder = Path(asked.out)
    kept = json.loads((folder / "config.json").read_text())
    assert (kept["data"]["task"], len(kept["data"]["class_names"])) == (task, outputs)
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == rows
    printed = capsys.readouterr().out
    assert f"data.py:{function}: 40 training and 20 test samples of {outputs} " in printed
    assert ("accuracy" in printed) == (task == "classification")


@pytest.mark.parametrize("algorithm", ["local", "dfa", "dkp", "drtp", "fg", "fg:guess=local", "fdfa:low_memory=true"])
@pytest.mark.parametrize("function", ["rows", "labels"])
def test_every_rule_trains_on_numbers_and_labels(config: Make, function: str, algorithm: str) -> None:
    rows = train(config(function, algorithm=algorithm, epochs=10, align_every=10))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    if "local" in algorithm:
        assert rows[-1]["heads"]["block1"].keys() == {"loss", "r2" if function == "rows" else "f1"}


def test_the_embedded_regression_is_learnt(tmp_path: Path) -> None:
    data = load("diabetes")
    assert (data.task, data.outputs, len(data.train), len(data.test)) == ("regression", 1, 354, 88)
    for values in (data.train.inputs, data.train.targets):
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(values.std(0), torch.ones(values.shape[1]))
    asked = Train(data="diabetes", algorithm="bp", epochs=5, lr=1e-3, network=Network(width=0.1), out=str(tmp_path / "run"))
    assert train(asked)[-1]["test_r2"] > 0.3


def test_a_task_that_is_named_wins(config: Make) -> None:
    rows = train(config("classes", task=TaskSettings("regression")))
    assert "test_r2" in rows[-1]
    rows = train(config("classes", task=TaskSettings(class_weights=(1.0, 2.0, 3.0), label_smoothing=0.1), overwrite=True))
    assert "test_accuracy" in rows[-1]


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64"])
def test_labels_may_be_unsigned(tmp_path: Path, kind: str) -> None:
    y = f"torch.tensor([0, 2, 1]).to(torch.{kind})"
    source = "import torch\nclass Items(torch.utils.data.Dataset):\n    def __len__(self): return 3\n"
    source += f"    def __getitem__(self, i): return torch.zeros(2), {y}[i]\n"
    source += f"def whole(): return [(torch.zeros(3, 2), {y})] * 2\ndef items(): return Items(), Items()\n"
    (tmp_path / "unsigned.py").write_text(source)
    for function in ("whole", "items"):
        found = load(f"{tmp_path}/unsigned.py:{function}")
        assert (found.task, found.outputs, found.train.targets.tolist()) == ("classification", 3, [0, 2, 1])


def test_real_numbers_are_labels_where_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "real.py").write_text("import torch\ndef f(): return [(torch.zeros(3, 2), torch.eye(3))] * 2\n")
    assert load(f"{tmp_path}/real.py:f").task == "regression"
    found = load(f"{tmp_path}/real.py:f", task="multi-label")
    assert (found.task, found.outputs, found.train.targets.tolist()) == ("multi-label", 3, torch.eye(3).tolist())


def test_a_comparison_shows_the_tasks_metric(config: Make, capsys: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "compared")
    asked = config("numbers", kind=Compare, algorithms=("bp", "fdfa:lr=1e-3"), seeds=2, lr_grid=(1e-9, 1e-2), out=out)
    table = compare(asked)
    found = ["r2", "r2_std", "best_r2", "best_r2_std", "rmse", "rmse_std", "best_rmse", "best_rmse_std"]
    assert list(table[0]) == ["algorithm", "engine", "lr", "runs", *found, "seconds_per_epoch", "peak_memory_bytes", "failed"]
    assert table[0]["lr"] == 1e-2
    assert table[0]["best_rmse"] <= table[0]["rmse"]
    assert json.loads((tmp_path / "compared" / "rates.json").read_text())["bp"].keys() == {"lr", "r2"}
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "test R² after the last and the best epoch" in printed
    assert "R² on held-out training samples" in printed
    assert f"{table[0]['r2']:.4f} ± {table[0]['r2_std']:.4f}" in printed
    assert "accuracy" not in printed
    assert compare(asked) == table  # all runs are there, and say their task


@pytest.mark.parametrize("rates", [(), pytest.param((1e-3, 1e-2), marks=pytest.mark.slow)])
def test_a_finished_comparison_on_data_that_have_changed_is_refused(config: Make, tmp_path: Path, rates: Any) -> None:
    asked = config("numbers", kind=Compare, algorithms=("bp", "dfa"), seeds=2, epochs=1, lr_grid=rates)
    table = compare(asked)
    assert compare(asked) == table
    (tmp_path / "data.py").write_text(DATA.replace("manual_seed(0)", "manual_seed(1)"))
    with pytest.raises(UsageError, match=r"is a run on other data \(as many samples, but not the same, or not in the same"):
        compare(asked)


def test_data_that_depend_on_the_seed_are_drawn_for_each(config: Make, tmp_path: Path) -> None:
    asked = config("drawn", kind=Compare, algorithms=("bp",), seeds=2, out=str(tmp_path / "compared"))
    compare(asked)
    digests = [json.loads((tmp_path / f"compared/bp-s{seed}/config.json").read_text())["data"]["digest"] for seed in (0, 1)]
    assert digests[0] != digests[1]
    metrics = tmp_path / "compared/bp-s1/metrics.jsonl"
    before = metrics.read_text()
    metrics.write_text("")
    (metrics.parent / "checkpoint-previous.pt").replace(metrics.parent / "checkpoint.pt")
    compare(asked)  # goes on with the data of that seed
    assert [json.loads(line)["test_r2"] for line in before.splitlines()] == [
        json.loads(line)["test_r2"] for line in metrics.read_text().splitlines()
    ]


def test_generators_start_the_same_for_a_function_that_draws(config: Make) -> None:
    torch.rand(3)
    first = load_data(config("drawn", seed=3))
    torch.rand(3)
    assert load_data(config("drawn", seed=3)).digest == first.digest
    assert load_data(config("drawn", seed=4)).digest != first.digest


# ---- batches


def test_inputs_go_in_as_they_are(config: Make) -> None:
    data = load_data(config("numbers"))
    (x, y), *_ = batches(data.test, 20, transform=Transform(), train=False)
    assert torch.equal(x, data.test.inputs)
    assert (x.dtype, y.dtype, y.shape) == (torch.float32, torch.float32, (20, 1))
    data = load_data(config("two_inputs"))
    x, y = next(batches(data.train, 8, transform=Transform(), train=True))
    assert {name: part.shape for name, part in x.items()} == {"left": (8, 2), "right": (8, 4)}


def test_items_are_drawn_anew_by_the_epoch_and_the_batch_alone(config: Make) -> None:
    data = load_data(config("noisy"))

    def epoch(number: int, skip: int = 0) -> list[torch.Tensor]:
        torch.rand(3)
        asked = {"transform": Transform(), "train": True, "epoch": number, "skip": skip}
        return [x["left"] for x, _ in batches(data.train, 16, **asked)]

    assert all(map(torch.equal, epoch(1), epoch(1)))
    assert torch.equal(epoch(1, skip=2)[0], epoch(1)[2])
    assert sorted(torch.cat(epoch(1)).flatten().tolist()) != sorted(torch.cat(epoch(2)).flatten().tolist())
    before = torch.get_rng_state()
    epoch(1)
    assert not torch.equal(before, torch.get_rng_state())  # our own draw
    torch.set_rng_state(before)
    next(batches(data.train, 16, transform=Transform(), train=True))
    assert torch.equal(before, torch.get_rng_state())


def test_parts_of_it(config: Make) -> None:
    for function in ("numbers", "two_inputs", "items", "labels"):
        data = load_data(config(function, kind=Recipe, subset=Subset(train=20, test=5)))
        assert (len(data.train), len(data.test)) == (20, 5)
        held = held_out(data)
        assert len(held.train) + len(held.test) == 20
        assert 2 <= len(held.test) <= 4
    with pytest.raises(
        UsageError, match=r"--subset.train 41: data set .*data.py:numbers has 40 train samples, ask for 1 to 40"
    ):
        load_data(config("numbers", kind=Recipe, subset=Subset(train=41)))


# ---- resuming


@pytest.mark.parametrize(("function", "model"), [("rows", "mlp"), ("noisy", "Two")])
def test_a_run_goes_on_as_if_it_had_not_stopped(config: Make, tmp_path: Path, function: str, model: str) -> None:
    asked = config(function, model, algorithm="fdfa", checkpoint_every="1")
    whole = train(replace(asked, out=str(tmp_path / "whole")))
    steps = 0

    def stop(_: str) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(asked, advance=stop)
    resumed = resume(tmp_path / "run")
    for row, other in zip(resumed, whole, strict=True):
        assert {name: row[name] for name in row if name not in ("seconds", "peak_memory_bytes")} == {
            name: other[name] for name in other if name not in ("seconds", "peak_memory_bytes")
        }


def test_other_data_are_noticed(config: Make, tmp_path: Path) -> None:
    for function, model in (("numbers", "mlp"), ("items", "Two")):
        asked = config(function, model, epochs=1, overwrite=True, save_weights=0)
        train(asked)
        saved = tmp_path / "run" / "config.json"
        kept = json.loads(saved.read_text())
        kept["config"]["epochs"] = 2
        saved.write_text(json.dumps(kept))
        source = (tmp_path / "data.py").read_text()
        (tmp_path / "data.py").write_text(source.replace("manual_seed(0)", "manual_seed(1)"))
        with pytest.raises(
            UsageError, match=r"is a run on other data \(as many samples.*, but not the same, or not in the same"
        ):
            resume(tmp_path / "run")
        (tmp_path / "data.py").write_text(source.replace("X @ W).argmax(1)", "X @ W)").replace("(X @ W)[:, 0]", "X @ W"))
        if function == "numbers":
            with pytest.raises(UsageError, match=r"\(1 targets, now 3\)"):
                resume(tmp_path / "run")
        (tmp_path / "data.py").write_text(source)
        assert len(resume(tmp_path / "run")) == 2


def test_an_item_that_fails_in_an_epoch_stops_the_run_which_goes_on_when_it_is_mended(config: Make, tmp_path: Path) -> None:
    failing = "if len(calls) == 185: raise ValueError('no such file')"
    source = DATA.replace(
        "        x = X[self.first + i]", f"        calls.append(i)\n        {failing}\n        x = X[self.first + i]"
    )
    (tmp_path / "data.py").write_text(source + "\ncalls = []\n")
    line = 1 + source.splitlines().index(f"        {failing}")
    said = rf"data.py, line {line} at item \d+: ValueError: no such file: mend it, then go on by onward train --resume"
    with pytest.raises(OSError, match=said):
        train(config("noisy", "Two", epochs=4))
    (tmp_path / "data.py").write_text(DATA)
    assert len(resume(tmp_path / "run")) == 4


# ---- several processes


def _train(config: Train, rank: int) -> None:
    train(config, advance=lambda _: None)


def test_two_processes_train_what_one_trains(config: Make, tmp_path: Path) -> None:
    asked = config("numbers", "line", algorithm="fdfa", test_batch_size=1, subset=Subset(test=1 + 2))
    alone = train(replace(asked, out=str(tmp_path / "one")), advance=lambda _: None)
    assert [ended.error for ended in start(2, partial(_train, replace(asked, out=str(tmp_path / "two"))))] == [None, None]
    together = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    for row, other in zip(together, alone, strict=True):
        for name in ("train_loss", "test_loss", "test_r2", "test_rmse"):
            assert row[name] == pytest.approx(other[name], rel=1e-3)


# ---- what cannot be


BROKEN = {
    "nothing": ("return None", r"--data .*bad.py:nothing returned nothing: return \(train, test\), each a pair of tensors"),
    "three": ("return 1, 2, 3", r"returned a tuple of 3 \(int, int, int\): return \(train, test\)"),
    "no_pair": ("return torch.zeros(3), torch.zeros(3)", r": train is a Tensor: return \(train, test\)"),
    "lengths": (
        "return (torch.zeros(3, 2), torch.zeros(4)), (torch.zeros(3, 2), torch.zeros(3))",
        r"train has targets of shape \(4,\), and the tensor has shape \(3, 2\): give both a row for each sample",
    ),
    "one_target": (
        "return (torch.zeros(3, 2), torch.tensor(1)), (torch.zeros(3, 2), torch.zeros(3))",
        r"train has targets of shape \(\), and the tensor has shape \(3, 2\): give both a row for each sample",
    ),
    "keys": (
        "return ({0: torch.zeros(3, 2)}, torch.zeros(3)), ({0: torch.zeros(3, 2)}, torch.zeros(3))",
        "train's inputs have the key 0, a int: let the keys be strings, the names of the network's arguments",
    ),
    "empty": ("return (torch.zeros(0, 2), torch.zeros(0)), (torch.zeros(3, 2), torch.zeros(3))", "train has no samples: give"),
    "nan": (
        "x = torch.zeros(3, 2); x[1, 0] = float('nan'); return (x, torch.zeros(3)), (x, torch.zeros(3))",
        r"train: the input of sample 1 is not finite \(NaN or infinite\): drop the sample, or fill it in",
    ),
    "infinite": (
        "return (torch.zeros(3, 2), torch.zeros(3)), (torch.zeros(2, 2), torch.tensor([0.0, float('inf')]))",
        "test: the target of sample 1 is not finite",
    ),
    "shapes": (
        "return (torch.zeros(3, 2), torch.zeros(3)), (torch.zeros(3, 4), torch.zeros(3))",
        r"a training input is float32 \(2,\), a test input float32 \(4,\): make both alike",
    ),
    "words": (
        "return (['a', 'b'], torch.zeros(2)), (['c'], torch.zeros(1))",
        "train's inputs is a list, not a tensor .*: return",
    ),
    "raises": ("raise KeyError('age')", r"bad.py, line \d+: KeyError: 'age'"),
    "takes": ("return x", r"bad.py: TypeError: takes\(\) missing 1 required positional argument: 'x'"),
    "gaps": (
        "return (torch.zeros(3, 2), torch.tensor([0, 1, 9])), (torch.zeros(1, 2), torch.tensor([0]))",
        "a training label is 9, among 3 samples: number the classes from 0",
    ),
    "one_class": (
        "return (torch.zeros(3, 2), torch.zeros(3).long()), (torch.zeros(1, 2), torch.tensor([0]))",
        "all training labels are 0, a single class: give samples of at least two",
    ),
    "unknown_class": (
        "return (torch.zeros(3, 2), torch.tensor([0, 1, 1])), (torch.zeros(1, 2), torch.tensor([2]))",
        "a test label is 2, and training labels go up to 1: drop it, or add such samples",
    ),
    "columns": (
        "return (torch.zeros(3, 2), torch.zeros(3, 2)), (torch.zeros(1, 2), torch.zeros(1, 3))",
        "a training sample has 2 targets, a test sample 3: give both as many",
    ),
    "cube": (
        "return (torch.zeros(3, 2), torch.zeros(3, 2, 2)), (torch.zeros(1, 2), torch.zeros(1, 2, 2))",
        r"bad.py:cube: targets of shape \(3, 2, 2\) and type float32 look like no task's .*: say which it is with --task",
    ),
    "endless": ("return Endless(), Endless()", "train is a Endless without a length or without items by number: give it both"),
    "unpaired": ("return Unpaired(), Unpaired()", r"item 0 of its Dataset is a Tensor: return \(input, target\)"),
    "growing": (
        "return Growing(), Growing()",
        r"item 0 has other shapes \(input \(1,\), target \(\)\) than item 1 \(input \(2,\), target \(\)\)",
    ),
    "late": ("return Late(), Late()", r"item 0 has other shapes \(input \(2,\), target \(1,\)\) than item 256"),
    "failing": ("return Failing(), Failing()", r"bad.py, line \d+ at item 2: ValueError: damaged"),
}

CLASSES = """
import torch
from torch.utils.data import Dataset, IterableDataset

class Endless(IterableDataset):
    def __iter__(self): return iter(())

class Unpaired(Dataset):
    def __len__(self): return 3
    def __getitem__(self, i): return torch.zeros(2)

class Growing(Unpaired):
    def __getitem__(self, i): return torch.zeros(i + 1), 0

class Late(Unpaired):
    def __len__(self): return 300
    def __getitem__(self, i): return torch.zeros(2), torch.zeros(1 + i // 256)

class Failing(Unpaired):
    def __getitem__(self, i):
        if i == 2: raise ValueError("damaged")
        return torch.zeros(2), 0
"""


@pytest.mark.parametrize("function", BROKEN)
def test_what_a_function_returns_in_vain_is_told_in_one_sentence(tmp_path: Path, function: str) -> None:
    body, message = BROKEN[function]
    (tmp_path / "bad.py").write_text(CLASSES + f"\ndef {function}({'x' if function == 'takes' else ''}):\n    {body}\n")
    with pytest.raises(UsageError, match=message) as caught:
        load(f"{tmp_path}/bad.py:{function}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"transform": Transform(size=8)},
            r"--transform.size 8: .*data.py:numbers holds no images, its inputs are taken as they",
        ),
        ({"data_dir": "."}, r"--data-dir \. beside --data .*data.py:numbers: the one is a folder of images"),
        ({"task": TaskSettings("classification")}, r"targets of shape \(40,\) and type float32 name no classes"),
        ({"task": TaskSettings("chess")}, "unknown task 'chess'"),
        (
            {"task": TaskSettings(label_smoothing=0.1)},
            "--task.label-smoothing is for classification, and these data are for regr",
        ),
        ({"model": "cnn"}, r"cnn for inputs of shape \(6,\): it is for images"),
        ({"batch_size": 1}, "--batch-size 1: this network has batch norm, which needs at least 2 samples in a batch"),
    ],
)
def test_settings_that_do_not_fit(config: Make, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(replace(config("numbers"), network=Network(), **changes))
    assert not (tmp_path / "run").exists()


def test_whole_numbers_are_not_for_a_network_of_real_ones(config: Make) -> None:
    with pytest.raises(
        UsageError, match="mlp takes real numbers, and the inputs are int64: give --model gpt for tokens of text, return"
    ):
        prepare(config("tokens"), load_data(config("tokens")))


def test_images_are_for_classification(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--task regression: data set digits is for classification, leave it out"):
        load_data(Train(task=TaskSettings("regression")))
    with pytest.raises(UsageError, match=r"--data .*/none.py:f: there is no file"):
        load_data(Train(data=f"{tmp_path}/none.py:f"))
