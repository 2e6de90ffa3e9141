"""bfloat16, images kept pixel by pixel, and the optimizers of each role."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parameter import is_lazy

from onward.errors import UsageError
from onward.lab.data import Data, pixels
from onward.lab.run import algorithms, checkpoint, precision
from onward.lab.run.loop import resume, train
from onward.lab.run.optimizers import OPTIMIZERS, make_optimizers
from onward.lab.run.training import evaluate, prepare
from onward.lab.settings import Feedback, Heads, Network, Optimizer, Schedule, Train, Transform

SMALL = Train(network=Network(width=0.1), batch_size=16, epochs=1, device="cpu", model="chain", lr=1e-2)


@pytest.mark.parametrize("algorithm", ["bp", "fdfa", "local", "fg:guess=local", "fdfa:compile=replay"])
def test_bf16_points_the_same_way(algorithm: str, images: Callable[..., Data], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients and losses stay in float32, and the gradients are near those without."""
    monkeypatch.setattr(precision, "check", lambda config, device: None)  # right everywhere, if not fast
    found = []
    for kind in ("float32", "bf16"):
        run = prepare(algorithms.variant(algorithm, replace(SMALL, precision=kind)), images())
        x, y = next(run.training_batches(1))
        for _ in range(2):
            step = run.estimate(x, y, "here")
        assert step.loss.dtype == torch.float32
        assert step.output.dtype == (torch.bfloat16 if kind == "bf16" else torch.float32)
        assert all(p.grad.dtype == torch.float32 for p in run.estimator.parameters() if p.grad is not None)
        found.append(torch.cat([p.grad.flatten() for p in run.estimator.model.parameters()]))
        assert evaluate(run)["test_loss"] > 0
    assert F.cosine_similarity(*found, dim=0) > 0.95
    assert not torch.equal(*found)


def test_bf16_is_refused_where_it_would_be_emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precision, "_processor_computes_in_bf16", lambda: False)
    with pytest.raises(UsageError, match=r"--precision bf16: cpu has no instructions for bfloat16 .*: leave it out"):
        train(replace(SMALL, precision="bf16", model="mlp", out=str(tmp_path / "run")), advance=lambda _: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ["dkp", "local", "fg:guess=local"])
def test_channels_last_changes_the_order_and_nothing_else(algorithm: str, images: Callable[..., Data]) -> None:
    found = []
    for last in (False, True):
        run = prepare(replace(SMALL, algorithm=algorithm, channels_last=last), images(channels=3))
        run.estimator.double()
        convolutions = [p for p in run.estimator.parameters() if not is_lazy(p) and p.dim() == 4 and min(p.shape) > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last) == last for p in convolutions)
        x, y = next(run.training_batches(1))
        assert x.is_contiguous(memory_format=torch.channels_last) == last
        run.estimate(x.double(), y, "here")
        found.append([p.grad for p in run.estimator.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_channels_last_is_for_images(tmp_path: Path) -> None:
    asked = Train(data="diabetes", channels_last=True, out=str(tmp_path / "run"), device="cpu")
    with pytest.raises(UsageError, match=r"--channels-last: inputs of shape \(2, 10\) are no images \(N, C, H, W\)"):
        train(asked, advance=lambda _: None)


def test_each_role_has_its_own_rate_and_decay(images: Callable[..., Data]) -> None:
    sgd = Optimizer("sgd", momentum=0.9, nesterov=True, weight_decay=5e-4)
    config = replace(SMALL, algorithm="fg:guess=local", optimizer=sgd, heads=Heads(lr=0.3, decay=0.0))
    (optimizer,) = make_optimizers(config, prepare(config, images()).estimator).values()
    assert {g["role"]: (g["lr"], g["weight_decay"], g["nesterov"]) for g in optimizer.param_groups} == {
        "network": (1e-2, 5e-4, True),
        "heads": (0.3, 0.0, True),
    }
    config = replace(config, algorithm="dkp", feedback=Feedback(lr=1e-4, decay=1e-6))
    optimizers = make_optimizers(config, prepare(config, images()).estimator)
    assert {role: (o.param_groups[0]["lr"], o.param_groups[0]["weight_decay"]) for role, o in optimizers.items()} == {
        "network": (1e-2, 5e-4),
        "feedback": (1e-4, 1e-6),
    }
    with pytest.raises(UsageError, match=r"--optimizer.nesterov looks ahead along a momentum, and there is none"):
        replace(config, optimizer=Optimizer("sgd", nesterov=True))


def test_nesterov_by_hand() -> None:
    """v <- m v + g; w <- w - lr (g + m v), with g = w."""
    w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = OPTIMIZERS["sgd"]([w], lr=0.1, momentum=0.9, nesterov=True)
    by_hand, v = 1.0, 0.0
    for _ in range(4):
        w.grad = w.detach().clone()
        optimizer.step()
        v = 0.9 * v + by_hand
        by_hand -= 0.1 * (by_hand + 0.9 * v)
    assert w.item() == pytest.approx(by_hand)


def test_the_rate_changes_at_milestones_in_a_resumed_run_too(images: Callable[..., Data], tmp_path: Path) -> None:
    config = replace(SMALL, epochs=3, model="mlp", algorithm="bp", out=str(tmp_path))
    config = replace(config, schedule=Schedule("milestones", gamma=0.5, milestones=(1, 2)))
    data = images()
    train(config, data, lambda _: None)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["optimizers"]["network"]["param_groups"][0]["lr"] == pytest.approx(1e-2 / 4)
    assert len(resume(tmp_path, data, lambda _: None)) == 3
    assert json.loads((tmp_path / "config.json").read_text())["config"]["schedule"]["milestones"] == [1, 2]


def test_cutout_is_a_square_of_the_mean() -> None:
    torch.manual_seed(0)
    images = torch.full((200, 3, 9, 7), 255, dtype=torch.uint8)
    read = pixels.reader(images, Transform(mean=0.2, cutout=4), "cpu", train=True)
    x = read(torch.arange(200), 1)
    holes = x == 0
    assert torch.equal(holes[:, 0], holes[:, 1])
    rows, columns = holes[:, 0].any(2).sum(1), holes[:, 0].any(1).sum(1)
    assert torch.equal(rows * columns, holes[:, 0].sum((1, 2)))
    assert (rows.max(), columns.max()) == (4, 4)
    assert rows.min() == columns.min() == 2  # its middle is on the image
    assert torch.equal(x, read(torch.arange(200), 1))
    assert not (pixels.reader(images, Transform(mean=0.2, cutout=4), "cpu", train=False)(torch.arange(200), 1) == 0).any()
