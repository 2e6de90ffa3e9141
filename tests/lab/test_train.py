from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import onward
from onward.errors import UsageError
from onward.lab.data import Data
from onward.lab.data.batches import batches
from onward.lab.networks import models
from onward.lab.plain import from_dict
from onward.lab.run import folder as run_folder
from onward.lab.run import loop as training
from onward.lab.run import record
from onward.lab.run.loop import TrainingFailed, prepare, resume, train
from onward.lab.settings import (
    Feedback,
    Heads,
    Network,
    Optimizer,
    Recipe,
    Schedule,
    Train,
    Transform,
)
from onward.lab.system import memory

Make = Callable[..., Data]


@pytest.fixture
def config(tmp_path: Path) -> Train:
    return Train(
        algorithm="bp",
        epochs=2,
        batch_size=16,
        lr=1e-2,
        device="cpu",
        out=str(tmp_path / "run"),
        network=Network(width=0.04),
    )


def checkpoint(config: Train) -> dict[str, Any]:
    return torch.load(Path(config.out or "") / "checkpoint.pt", weights_only=True)


def metrics(config: Train) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.out or "") / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "bp"},
        {"algorithm": "bp:checkpoint=true"},
        {"algorithm": "bp", "optimizer": Optimizer("sgd", momentum=0.9, weight_decay=1e-4)},
        {"algorithm": "dfa"},
        {"algorithm": "dkp", "feedback": Feedback(decay=1e-6)},
        {"algorithm": "fdfa"},
        {"algorithm": "fdfa:directions=2"},
        {"algorithm": "fdfa", "feedback": Feedback(optimizer="sgd", lr=0.1)},
        {"algorithm": "fdfa:low_memory=true"},
        {"algorithm": "fg:noise=rademacher,directions=4"},
        {"algorithm": "fg:space=avg-weight,directions=8", "epochs": 30},
        {"algorithm": "local"},
        {"algorithm": "local", "heads": Heads("linear"), "optimizer": Optimizer("sgd", momentum=0.9, weight_decay=1e-4)},
        {"algorithm": "local", "heads": Heads("predsim")},
        {"algorithm": "fg:guess=local"},
        {"algorithm": "fg:guess=local,space=avg-weight,passes=one"},
        {"algorithm": "fg:guess=local,space=weight,engine=reverse"},
        {"algorithm": "fg:target=local,guess=random,directions=4"},
        {"algorithm": "fg:target=sum,guess=global,engine=reverse"},
        {"algorithm": "fg:guess=fixed-ntk"},
        {"algorithm": "fg:guess=feedback,feedback=dkp"},
        {"algorithm": "local", "model": "small-net", "transform": Transform(size=4), "lr": 1e-2},
        {"algorithm": "fdfa", "model": "cnn", "network": Network(width=0.2), "transform": Transform(size=12)},
    ],
    ids=str,
)
def test_every_algorithm_learns(config: Train, images: Make, changes: dict[str, Any]) -> None:
    rows = train(replace(config, **{"epochs": 8, **changes}), images())
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert rows[-1]["test_accuracy"] > 60  # chance: 25


def test_bp_is_the_plain_pytorch_loop(config: Train, images: Make) -> None:
    data = images(train=90)  # the last batch is not full
    config = replace(config, optimizer=Optimizer(weight_decay=0.1), schedule=Schedule(gamma=0.5), seed=3)
    rows = train(config, data)

    torch.manual_seed(3)
    model = models.build("mlp", (1, 8, 8), 4, config.network)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1)
    for epoch in (1, 2):
        losses = []
        for x, y in batches(data.train, 16, transform=Transform(), train=True, seed=3, epoch=epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses += len(y) * [loss.item()]
        optimizer.param_groups[0]["lr"] *= 0.5
    model.eval()
    with torch.no_grad():
        logits = model((data.test.images / 255 - 0.5) / 0.5)
    assert rows[-1]["train_loss"] == pytest.approx(sum(losses) / len(losses))
    assert rows[-1]["test_loss"] == pytest.approx(F.cross_entropy(logits, data.test.labels).item(), rel=1e-5)
    assert rows[-1]["test_accuracy"] == pytest.approx(100 * (logits.argmax(1) == data.test.labels).float().mean().item())
    saved = checkpoint(config)["estimator"]
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(saved[f"model.{name}"], parameter)


def test_a_network_may_have_as_many_parameters_as_its_feedback(config: Train, images: Make, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def make(classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, 16, bias=False), nn.ReLU(),"
        " nn.Linear(16, classes, bias=False))"
    )
    config = replace(config, algorithm="fdfa", model=f"{tmp_path}/own.py:make", cuts=("1", "2"), network=Network(), epochs=1)
    train(config, images())
    assert [len(checkpoint(config)["optimizers"][role]["state"]) for role in ("network", "feedback")] == [2, 2]


def test_images_are_tested_in_batches_of_the_size_asked_for(
    config: Train, images: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(replace(config, test_batch_size=7), images())
    sizes: list[int] = []
    run.estimator.model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    training.evaluate(run)
    assert set(sizes[:-1]) == {7}


def test_memory_is_that_of_training_alone(config: Train, images: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {"training": 5, "testing": 9}
    most = [0]
    monkeypatch.setattr(memory, "reset_peak", lambda device: most.__setitem__(0, 0))
    monkeypatch.setattr(memory, "peak", lambda device: most[0])
    estimate, evaluate = onward.Backprop.estimate, training.evaluate

    def count(what: str) -> None:
        most[0] = max(most[0], needed[what])

    monkeypatch.setattr(onward.Backprop, "estimate", lambda *given: (count("training"), estimate(*given))[1])
    monkeypatch.setattr(training, "evaluate", lambda run: (count("testing"), evaluate(run))[1])
    assert [row["peak_memory_bytes"] for row in train(config, images())] == [5, 5]


@pytest.mark.parametrize("again", [train, lambda config, data: resume(Path(config.out), data)])
def test_one_process_at_a_time_writes_a_run(config: Train, images: Make, again: Any) -> None:
    train(replace(config, epochs=1), images())
    with run_folder.held(Path(config.out or "")), pytest.raises(UsageError, match=r"another process is training into .*run"):
        again(replace(config, overwrite=True), images())
    assert len(metrics(config)) == 1
    again(replace(config, epochs=1, overwrite=True), images())


def test_a_failure_that_was_overcome_is_forgotten(config: Train, images: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = training.evaluate
    outcomes = iter([evaluate, None, evaluate])

    def fail_once(run: Any) -> dict[str, float]:
        if outcome := next(outcomes):
            return outcome(run)
        raise TrainingFailed("the test loss is nan")

    monkeypatch.setattr(training, "evaluate", fail_once)
    with pytest.raises(TrainingFailed):
        train(config, images())
    folder = Path(config.out or "")
    assert record.finished(folder, config) == "the test loss is nan"
    assert len(resume(folder, images())) == 2
    assert len(record.finished(folder, config) or "") == 2


@pytest.mark.parametrize("guess", ["ntk", "fixed-ntk"])
def test_heads_that_do_not_learn_start_as_the_papers_do(config: Train, images: Make, guess: str) -> None:
    options = {"model": "resnet18-8b", "network": Network(width=0.125)}
    run = prepare(replace(config, algorithm=f"fg:guess={guess}", **options), images(train=16, channels=3, size=32))
    run.estimator.estimate(*next(run.training_batches(1)))
    layers = [layer for layer in run.estimator.frozen_heads.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    assert layers
    for layer in layers:
        bound = (6 / layer.weight[0].numel()) ** 0.5
        assert 0.8 * bound < layer.weight.abs().max() <= bound
        assert layer.bias is None or (layer.bias == 0.01).all()


def test_the_learning_rate_falls_for_the_network_only(config: Train, images: Make) -> None:
    config = replace(config, algorithm="fdfa", schedule=Schedule(gamma=0.5), feedback=Feedback(lr=0.25, decay=0.125))
    train(config, images())
    optimizers = checkpoint(config)["optimizers"]
    assert optimizers["network"]["param_groups"][0]["lr"] == config.lr * 0.25
    assert optimizers["feedback"]["param_groups"][0]["lr"] == 0.25
    assert optimizers["feedback"]["param_groups"][0]["weight_decay"] == 0.125


def test_feedback_under_sgd_is_a_moving_average(config: Train, images: Make) -> None:
    """At rate 1 the matrix is the last step's measurement, so it does not depend on those before."""
    data = images(train=16)
    config = replace(config, algorithm="fdfa", lr=0.0, feedback=Feedback(optimizer="sgd", lr=1.0), epochs=1)
    train(config, data)
    (matrix, _) = (checkpoint(config)["estimator"][f"feedback.{k}"] for k in range(2))
    run = prepare(config, data)
    run.estimator.estimate(*next(run.training_batches(1)))
    torch.testing.assert_close(matrix, -run.estimator.feedback[0].grad)  # B starts at 0, so its gradient is minus that


def test_what_a_run_folder_holds(config: Train, images: Make) -> None:
    config = replace(config, algorithm="fdfa")
    train(config, images())
    folder = Path(config.out or "")
    kept = json.loads((folder / "config.json").read_text())
    assert from_dict(Train, kept["config"]) == config
    assert kept["environment"].keys() == {"engine", "parameters", "device", "processes", "onward", "torch", "python"}
    assert kept["environment"]["torch"] == torch.__version__
    assert kept["environment"]["parameters"] == 64 * 32 + 32 + 64 + 32 * 32 + 32 + 64 + 32 * 4 + 4
    rows = metrics(config)
    assert [row["epoch"] for row in rows] == [1, 2]
    names = {"epoch", "train_loss", "test_loss", "test_accuracy", "seconds", "peak_memory_bytes"}
    assert all(row.keys() == names for row in rows)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert not list(folder.glob("*.partial"))


def test_a_checkpoint_restores_the_network_that_was_measured(config: Train, images: Make) -> None:
    config = replace(config, algorithm="fdfa")
    rows = train(config, images())
    saved = checkpoint(config)
    run = prepare(replace(config, seed=99), images())
    run.estimator.load_state_dict(saved["estimator"])
    for role, optimizer in run.optimizers.items():
        optimizer.load_state_dict(saved["optimizers"][role])
    assert training.evaluate(run)["test_loss"] == pytest.approx(rows[-1]["test_loss"])
    assert run.estimator.step == 2 * run.steps
    assert saved["progress"]["epoch"] == 3


def test_tensorboard_has_every_epoch_and_some_steps(config: Train, images: Make) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, log_interval=2)
    rows = train(config, images(train=80))
    events = EventAccumulator(config.out)
    events.Reload()
    assert [event.step for event in events.Scalars("step/train_loss")] == [2, 4, 7, 9]
    shown = [event.value for event in events.Scalars("test_accuracy")]
    assert shown == pytest.approx([row["test_accuracy"] for row in rows])


def test_the_seed_decides_everything(config: Train, images: Make, tmp_path: Path) -> None:
    first, again, other = (
        train(replace(config, algorithm="fdfa", seed=seed, out=str(tmp_path / name)), images())
        for seed, name in ((0, "first"), (0, "again"), (1, "other"))
    )
    assert [row["test_loss"] for row in first] == [row["test_loss"] for row in again]
    assert first[-1]["test_loss"] != other[-1]["test_loss"]


def test_an_earlier_run_is_kept_unless_overwritten(config: Train, images: Make) -> None:
    train(config, images())
    before = metrics(config)
    with pytest.raises(UsageError, match=r"already holds a run: .*choose another folder with --out, or replace it with --over"):
        train(config, images())
    with pytest.raises(UsageError, match="no such option"):  # a mistake must not cost the run it was to replace
        train(replace(config, overwrite=True, network=Network(pool_first=True)), images())
    assert metrics(config) == before
    note = Path(config.out or "") / "note.txt"
    note.write_text("mine")
    train(replace(config, overwrite=True, epochs=1), images())
    assert len(metrics(config)) == 1
    assert len(list(note.parent.glob("events.out.tfevents.*"))) == 1
    assert note.read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({"algorithm": "fdaf"}, {}, "unknown algorithm 'fdaf': did you mean 'fdfa'"),
        ({"model": "cnm"}, {}, "unknown model 'cnm': did you mean 'cnn'"),
        ({"device": "tpu"}, {}, "--device tpu cannot be used"),
        ({"device": "cuda:99"}, {}, "--device cuda:99 cannot be used"),
        ({"batch_size": 1}, {}, "--batch-size 1: this network has batch norm, which needs at least 2 images in a batch"),
        ({}, {"train": 1}, "training images: 1: this network has batch norm"),
        ({"algorithm": "bp:low_memory=true"}, {}, "unknown setting 'low_memory'"),
        ({"algorithm": "local:low_memory=true"}, {}, "setting 'low_memory': there are none"),
        ({"algorithm": "fg:low_memory=true"}, {}, "unknown setting 'low_memory'"),
        ({"algorithm": "local", "heads": Heads("cnn")}, {}, "a cnn head at cut 'block1': the output has shape"),
        ({"algorithm": "local", "heads": Heads("mlp", 0)}, {}, "--heads.width 0: use at least 1"),
        ({"transform": Transform(mean=(0.1, 0.2))}, {}, "for images of 1 channel"),
    ],
)
def test_refusals_leave_nothing_behind(config: Train, images: Make, changes: Any, data: Any, message: str) -> None:
    out = Path(config.out or "") / "deeper"
    with pytest.raises(UsageError, match=message):
        train(replace(config, out=str(out), **changes), images(**data))
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs 0: use at least 1"),
        ({"save_weights": -1}, "--save-weights -1: use at least 0"),
        ({"align_every": -1}, "--align-every -1: use at least 0"),
        ({"align_estimates": 0}, "--align-estimates 0: use at least 1"),
        ({"batch_size": -1}, "--batch-size -1: use at least 1"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"feedback": Feedback(lr=-1)}, "--feedback.lr -1"),
        ({"optimizer": Optimizer("adam", momentum=0.9)}, "--optimizer.momentum 0.9 is for --optimizer.name sgd"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**changes)


def test_a_folder_that_cannot_be_written_is_found_before_training(config: Train, images: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/run cannot be written to \(Not a directory\): choose another folder"):
        train(replace(config, out=str(tmp_path / "file" / "run")), images())


def test_a_last_batch_of_one_image_is_left_out(config: Train, images: Make) -> None:
    config = replace(config, epochs=1)
    train(config, images(train=33))
    assert checkpoint(config)["estimator"]["_extra_state"][0] == 2


def test_other_short_batches_are_used(config: Train, images: Make) -> None:
    config = replace(config, epochs=1)
    train(config, images(train=34))
    assert checkpoint(config)["estimator"]["_extra_state"][0] == 3


def test_training_stops_when_the_loss_is_not_finite(config: Train, images: Make) -> None:
    config = replace(config, epochs=5, schedule=Schedule(gamma=1e38))
    with pytest.raises(TrainingFailed) as failed:
        train(config, images())
    assert "the training loss is nan at epoch 2, step 2 of 6 (the output of block2.0 is not finite)" in str(failed.value)
    assert str(failed.value).endswith("run/checkpoint.pt keeps the state after epoch 1")
    assert len(checkpoint(config)["rows"]) == len(metrics(config)) == 1
    assert (Path(config.out or "") / "failed.txt").read_text().startswith("the training loss is nan at epoch 2, step 2 of 6")
    train(replace(config, epochs=1, overwrite=True), images())
    assert not (Path(config.out or "") / "failed.txt").exists()


def test_a_run_that_fails_at_once_says_that_nothing_was_kept(config: Train, images: Make) -> None:
    data = images()
    with pytest.raises(TrainingFailed, match=r"epoch 1, step 1 .*the input is not finite.*; nothing was written"):
        train(replace(config, transform=Transform(mean=float("nan"))), data)
    assert not Path(config.out or "").exists()


def test_an_interruption_says_what_is_kept(config: Train, images: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(run: Any) -> dict[str, float]:
        if run.estimator.step > run.steps:
            raise KeyboardInterrupt
        return {"test_loss": 1.0, "test_accuracy": 10.0}

    monkeypatch.setattr(training, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt, match=r"checkpoint.pt keeps the state after epoch 1"):
        train(config, images())
    assert len(checkpoint(config)["rows"]) == 1


def test_alexnet_has_its_images_resized(images: Make) -> None:
    config = Train(model="alexnet", network=Network(width=0.02), batch_size=4, device="cpu")
    run = prepare(config, images(train=8, channels=3, size=32))
    x, _ = next(run.training_batches(1))
    assert x.shape == (4, 3, 224, 224)
    assert run.estimator(x).shape == (4, 4)


def test_weights_and_biases_by_flag(config: Train, images: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, float], int]] = []

    class Session:
        def __enter__(self) -> Session:
            return self

        def __exit__(self, *_: object) -> None: ...

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((values, step))

    started: list[dict[str, Any]] = []
    fake = types.SimpleNamespace(init=lambda **options: started.append(options) or Session())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    rows = train(replace(config, wandb=True), images())
    assert [(values["test_accuracy"], step) for values, step in logged] == [
        (row["test_accuracy"], 6 * row["epoch"]) for row in rows
    ]
    assert started[0]["config"] == asdict(replace(config, wandb=True))


def test_weights_and_biases_may_be_missing(config: Train, images: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"--wandb: wandb is not installed: pip install onward\[wandb\]"):
        train(replace(config, wandb=True), images())
    assert not Path(config.out or "").exists()


@pytest.mark.skipif(not memory.RESET.exists(), reason="the peak can be reset on Linux only")
def test_the_peak_is_that_of_the_run() -> None:
    cpu = torch.device("cpu")
    memory.reset_peak(cpu)
    start = memory.peak(cpu)
    torch.zeros(200_000_000, dtype=torch.uint8)
    assert memory.peak(cpu) > start + 150_000_000
    memory.reset_peak(cpu)
    assert memory.peak(cpu) < start + 50_000_000


@pytest.mark.gpu
def test_a_run_on_the_gpu(config: Train, images: Make) -> None:
    rows = train(replace(config, algorithm="fdfa", device="cuda", epochs=8), images())
    assert rows[-1]["test_accuracy"] > 60
    assert 0 < rows[-1]["peak_memory_bytes"] < 1e9


# ---- heads

LOCAL_GUESS = {"algorithm": "fg:guess=local,engine=reverse"}


def images_of(model: str) -> dict[str, int]:
    return {"channels": 3, "size": 32 if "resnet" in model else 8}


@pytest.mark.parametrize(
    ("model", "asked", "features"),
    [
        ("resnet18-8b", Heads(), 32 / 8),
        ("resnet18-8b", Heads("cnn", 64), 64 / 8),
        ("resnet18-16b", Heads(), 16 / 8),
        ("resnet18-8b", Heads("mlp"), 1024 / 8),
        ("resnet18-16b", Heads("mlp"), 512 / 8),
        ("mlp", Heads("mlp"), 1024 / 8),
        ("cnn", Heads("mlp"), 1024 / 8),
    ],
)
def test_heads_are_as_wide_as_the_network(images: Make, model: str, asked: Heads, features: float) -> None:
    config = Train(algorithm="local", model=model, network=Network(width=1 / 8), heads=asked, device="cpu")
    estimator = prepare(config, images(train=8, channels=3, size=32)).estimator
    heads = {name.rpartition(".")[0]: m for name, m in estimator.named_modules() if isinstance(m, torch.nn.Linear)}
    last = [m for name, m in heads.items() if not name.startswith("model") and m.out_features == 4]
    assert len(last) == len(estimator.cuts)
    wanted = features * (4 if (asked.kind or "cnn") == "cnn" else 1)
    assert {layer.in_features for layer in last} == {wanted}


@pytest.mark.parametrize("changes", [{"algorithm": "local"}, LOCAL_GUESS], ids=str)
def test_metrics_have_every_head(config: Train, images: Make, changes: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, **{"epochs": 4, **changes})
    data = images()
    rows = train(config, data)
    assert metrics(config) == rows
    assert [list(row["heads"]) for row in rows] == [["block1", "block2"]] * 4
    first, last = rows[0]["heads"]["block2"], rows[-1]["heads"]["block2"]
    assert last["loss"] < 0.8 * first["loss"]
    assert 100 >= last["accuracy"] > max(first["accuracy"], 50)
    events = EventAccumulator(config.out)
    events.Reload()
    shown = [event.value for event in events.Scalars("heads/block2/loss")]
    assert shown == pytest.approx([row["heads"]["block2"]["loss"] for row in rows])


def test_a_heads_loss_is_the_mean_over_the_epoch(config: Train, images: Make) -> None:
    config = replace(config, algorithm="local", lr=0.0, epochs=1, batch_size=40)  # the last batch is shorter
    (row,) = train(config, images(train=96))
    run = prepare(config, images(train=96))
    steps = [(run.estimator.estimate(x, y), y) for x, y in run.training_batches(1)]
    loss = sum(step.heads["block1"][0] * len(y) for step, y in steps) / 96
    hits = sum((step.heads["block1"][1].argmax(1) == y).sum() for step, y in steps)
    assert row["heads"]["block1"] == pytest.approx({"loss": loss.item(), "accuracy": 100 * hits.item() / 96})


@pytest.mark.parametrize("algorithm", ["bp", "fdfa"])
def test_without_heads_there_are_no_metrics_of_them(config: Train, images: Make, algorithm: str) -> None:
    assert "heads" not in train(replace(config, algorithm=algorithm), images())[0]


def test_heads_follow_the_networks_optimizer_and_schedule(config: Train, images: Make) -> None:
    optimizer = Optimizer("sgd", momentum=0.5, weight_decay=0.25)
    config = replace(config, algorithm="local", optimizer=optimizer, schedule=Schedule("linear", end=0.5))
    train(config, images())
    (saved,) = checkpoint(config)["optimizers"].values()
    assert [group["role"] for group in saved["param_groups"]] == ["network", "heads"]
    for group in saved["param_groups"]:
        assert group["lr"] == pytest.approx(config.lr / 2)
        assert (group["momentum"], group["weight_decay"]) == (0.5, 0.25)


def test_heads_depend_on_the_seed_alone(config: Train, images: Make) -> None:
    def state(**changes: Any) -> dict[str, Any]:
        torch.rand(3)
        return prepare(replace(config, algorithm="local", **changes), images()).estimator.state_dict()

    first, again, other, wider = state(), state(), state(seed=1), state(heads=Heads("mlp", 2048))
    assert all(torch.equal(first[name], again[name]) for name in first if name != "_extra_state")
    assert not torch.equal(first["model.block1.1.weight"], other["model.block1.1.weight"])
    bp = prepare(config, images()).estimator.state_dict()
    for name in bp.keys() - {"_extra_state"}:
        assert torch.equal(first[name], bp[name])  # the network is that of every algorithm
        assert torch.equal(wider[name], bp[name])


def test_the_head_of_resnet18_2b_starts_with_the_second_block(images: Make) -> None:
    data = images(train=8, channels=3, size=16)
    config = Train(model="resnet18-2b", network=Network(width=0.1), device="cpu", batch_size=4, **LOCAL_GUESS)
    for kind in ("cnn", "mlp", "linear", "predsim"):
        run = prepare(replace(config, heads=Heads(kind)), data)
        head = run.estimator.heads[0]
        block = run.estimator.model.output.block2
        x, y = next(run.training_batches(1))
        for mine, theirs in zip(head[0].parameters(), block.parameters(), strict=True):
            assert mine is not theirs
            assert torch.equal(mine, theirs)
        loss, logits = run.estimator.estimate(x, y).heads["block1"]
        assert logits.shape == (4, 4)
        assert torch.equal(loss, F.cross_entropy(logits, y)) == (kind != "predsim")
        assert all(parameter.grad is not None for parameter in head[0].parameters())
        assert any(bool(parameter.grad.any()) for parameter in head[0].parameters())


@pytest.mark.parametrize("model", ["resnet18-8b", "resnet18-16b", "resnet18-2b", "small-net"])
def test_heads_of_the_papers_networks_start_as_these_do(images: Make, model: str) -> None:
    config = Train(algorithm="local", model=model, network=Network(width=0.1), device="cpu")
    estimator = prepare(config, images(train=8, channels=3, size=8)).estimator
    for name, layer in estimator.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and not name.startswith("model"):
            assert layer.bias is None or (layer.bias == 0.01).all()
            bound = (6 / layer.weight[0].numel()) ** 0.5
            assert 0.7 * bound < layer.weight.abs().max() <= bound


def test_a_head_behind_a_copy_suits_the_forward_engine(config: Train, images: Make) -> None:
    algorithm = "fg:target=local,guess=random"
    config = replace(config, algorithm=algorithm, model="resnet18-2b", network=Network(width=0.1))
    assert len(train(replace(config, epochs=1), images(train=16, channels=3, size=8))) == 1


# ---- weights, alignment


@pytest.mark.parametrize(("every", "kept"), [(0, []), (1, [1, 2, 3]), (2, [2, 3]), (5, [3])])
def test_weights_are_kept_for_the_bare_network(config: Train, images: Make, every: int, kept: list[int]) -> None:
    config = replace(config, algorithm="local", epochs=3, save_weights=every)
    rows = train(config, images())
    folder = Path(config.out or "")
    assert sorted(path.name for path in folder.glob("weights-*")) == [f"weights-{epoch}.pt" for epoch in kept]
    if kept:
        model = models.build("mlp", (1, 8, 8), 4, config.network)
        model.load_state_dict(torch.load(folder / f"weights-{kept[-1]}.pt", weights_only=True))
        model.eval()
        test = images().test
        loss = F.cross_entropy(model((test.images / 255 - 0.5) / 0.5), test.labels)
        assert rows[-1]["test_loss"] == pytest.approx(loss.item(), rel=1e-5)
    train(replace(config, overwrite=True, epochs=1, save_weights=0), images())
    assert not list(folder.glob("weights-*"))


@pytest.mark.parametrize("algorithm", ["bp", "local", "fdfa", "fg"])
def test_the_alignment_is_kept(config: Train, images: Make, tmp_path: Path, algorithm: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, algorithm=algorithm, epochs=3, align_every=2, align_estimates=3)
    rows = train(config, images())
    lines = [json.loads(line) for line in (Path(config.out or "") / "alignment.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 2, 3]
    for line in lines:
        assert (line["estimates"], line["from"], line["to"]) == (3, -1, 1)
        assert list(line["blocks"]) == ["block1", "block2", "output"]
        for name, block in line["blocks"].items():
            assert ("signal" in block) == ("counts" in block) == ("mean" in block) == (name != "output")
            assert ("feedback" in block) == (algorithm == "fdfa" and name != "output")
            assert block["parameters"]["variance"] is not None
            assert -1 <= block["parameters"]["cosine"] <= 1.0001
            if name != "output":
                assert len(block["counts"]) == 40
                assert sum(block["counts"]) == 3 * 16  # estimates of one batch
                assert block["mean"] == block["signal"]["cosine"]
                assert block["mean"] == pytest.approx(1) if algorithm == "bp" else -1 <= block["mean"] < 1
    events = EventAccumulator(config.out, size_guidance={"histograms": 0})
    events.Reload()
    assert [event.step for event in events.Histograms("alignment/block1")] == [0, 12, 18]
    assert events.Histograms("alignment/block1")[0].histogram_value.num == 3 * 16
    without = train(replace(config, align_every=0, out=str(tmp_path / "without")), images())
    for row, other in zip(rows, without, strict=True):  # looking changes nothing
        assert row["test_loss"] == other["test_loss"]
        assert row["train_loss"] == other["train_loss"]
    one, two = (checkpoint(replace(config, out=str(tmp_path / name)))["estimator"] for name in ("run", "without"))
    assert all(torch.equal(one[name], two[name]) for name in one if name != "_extra_state")


def test_images_of_several_sizes_are_trained_on(config: Train, images: Make, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        (tmp_path / "images" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        size = tuple(torch.randint(8, 14, (2,), generator=generator).tolist())
        image = Image.new("L", size, color=100 * (number % 2))
        image.save(tmp_path / "images" / str(number % 2) / f"{number}.png")
    config = replace(config, data_dir=str(tmp_path / "images"), batch_size=8)
    with pytest.raises(UsageError, match=r"the images differ in size .*: give the size .*--transform.size 224"):
        train(config)
    assert not Path(config.out or "").exists()
    rows = train(replace(config, transform=Transform(size=8), epochs=3))
    assert rows[-1]["test_accuracy"] == 100
