"""The FDFA paper's command line. Every command of its README, word for word."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from main import translate
from onward.lab.batches import Transform
from onward.lab.config import Feedback, ForwardGradient, Network, Optimizer, Schedule, Subset, Train

ROOT = Path(__file__).parents[2]
DEFAULTS = Train(algorithm="fdfa", model="mlp", data="mnist", epochs=100, batch_size=64, lr=1e-4)
ALEXNET = replace(
    DEFAULTS, model="alexnet", data="cifar100", batch_size=128, transform=Transform(augment="resized-crop-flip", size=224)
)
README = {
    "python3 main.py --dataset=MNIST --train-mode=FDFA --n-layers=2": DEFAULTS,
    "python3 main.py --dataset=MNIST --train-mode=FDFA --conv": replace(DEFAULTS, model="cnn"),
    "python3 main.py --dataset=CIFAR100 --train-mode=FDFA": ALEXNET,
    "python3 main.py --dataset=MNIST --train-mode=BP --n-layers=2": replace(DEFAULTS, algorithm="bp"),
    "python3 main.py --dataset=MNIST --train-mode=DFA --n-layers=2": replace(DEFAULTS, algorithm="dfa"),
    "python3 main.py --dataset=MNIST --train-mode=DKP --n-layers=2": replace(DEFAULTS, algorithm="dkp"),
}
OTHERS = {
    "python main.py": DEFAULTS,
    "python main.py --train-mode FwdGrad": replace(
        DEFAULTS,
        algorithm="fg",
        lr=1e-3,
        network=Network(layers=1),
        forward_gradient=ForwardGradient(space="avg-weight"),
    ),
    "python main.py --dataset FashionMNIST --n-layers 3 --no-cuda": replace(
        DEFAULTS, data="fashion-mnist", network=Network(layers=3), device="cpu"
    ),
    "python main.py --conv --dataset=CIFAR10 --dry-run": replace(
        DEFAULTS, model="cnn", data="cifar10", epochs=1, subset=Subset(train=64)
    ),
    "python main.py --dataset=CIFAR100 --batch-size=32 --dry-run": replace(
        ALEXNET, batch_size=32, epochs=1, subset=Subset(train=32)
    ),
    "python main.py --batch-size 32 --test-batch-size 500 --epochs 3 --lr 0.01 --b-lr 0.02 --gamma 0.9 --weight-decay 1e-5 "
    "--feedback-decay 1e-6 --log-interval 10": replace(
        DEFAULTS,
        batch_size=32,
        test_batch_size=500,
        epochs=3,
        lr=0.01,
        schedule=Schedule(gamma=0.9),
        optimizer=Optimizer(weight_decay=1e-5),
        feedback=Feedback(lr=0.02, decay=1e-6),
        log_interval=10,
    ),
}


@pytest.mark.parametrize(("line", "meant"), [*README.items(), *OTHERS.items()])
def test_a_command_means_this_configuration(line: str, meant: Train) -> None:
    config = translate([*shlex.split(line)[2:], "--seed", "5"])
    assert replace(config, out=None) == replace(meant, seed=5)


def test_runs_are_kept_apart_by_mode_and_time() -> None:
    out = Path(translate(["--train-mode", "DFA", "--log-dir", "elsewhere"]).out or "")
    assert out.parts[:2] == ("elsewhere", "DFA")
    assert len(out.name) == len("240131_235959")


def test_no_seed_draws_one() -> None:
    seeds = {translate([]).seed for _ in range(5)}
    assert len(seeds) > 1
    assert min(seeds) >= 0


def test_a_choice_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        translate(["--train-mode", "BPP"])
    assert exit.value.code == 2
    assert "'BP', 'DFA', 'DKP', 'FDFA', 'FwdGrad'" in capsys.readouterr().err


def test_a_command_runs_in_full(tmp_path: Path) -> None:
    for split, number in (("train", 6), ("test", 3)):
        for digit in range(4):
            folder = tmp_path / "images" / split / str(digit)
            folder.mkdir(parents=True)
            for index in range(number):
                image = Image.new("L", (28, 28), color=20 * index)
                image.paste(255, (7 * digit, 0, 7 * digit + 7, 28))
                image.save(folder / f"{index}.png")
    line = next(iter(README))
    small = "--data-dir images --epochs 5 --batch-size 8 --lr 1e-3 --seed 1"
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", *shlex.split(f"{line} {small}")[2:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = (tmp_path / "results" / "FDFA").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 2
    assert rows[-1]["test_accuracy"] == 100
