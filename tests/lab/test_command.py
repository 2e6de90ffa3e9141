from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

import onward
from onward.estimators.base import ALGORITHMS
from onward.estimators.forward_gradient.estimator import ENGINES
from onward.estimators.forward_gradient.rule import FEEDBACK, GUESSES, PASSES, SCALINGS, TARGETS
from onward.estimators.forward_gradient.spaces import SPACES
from onward.estimators.settings import settings_of
from onward.lab import cli as command
from onward.lab.data import DATASETS
from onward.lab.networks.models import MODELS
from onward.lab.recipes.recipe import RECIPES
from onward.lab.run.optimizers import SCHEDULERS
from onward.lab.settings import Heads, Schedule
from onward.lab.tasks import TASKS
from onward.network.heads import HEADS

ONWARD = [sys.executable, "-m", "onward"]
SMALL = ["--epochs", "1", "--network.width", "0.04", "--subset.train", "64", "--subset.test", "32", "--device", "cpu"]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(onward.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*ONWARD, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_train_writes_its_folder_and_says_so(tmp_path: Path) -> None:
    done = run("train", "--algorithm", "dkp", *SMALL, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, epoch, last = done.stdout.splitlines()
    assert first.startswith("dkp (feedback), mlp, digits: 64 training and 32 test images of 10 classes; cpu")
    assert epoch.startswith("epoch 1  train loss ")
    assert last == "written to runs/digits-mlp-dkp-s0"
    assert json.loads((tmp_path / "runs/digits-mlp-dkp-s0/config.json").read_text())["config"]["subset"]["train"] == 64


def test_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    done = run("train", "--data", "digit", *SMALL, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown data set 'digit': did you mean 'digits'?")
    assert done.stderr.count("\n") == 1


def test_interrupted_it_keeps_the_last_epoch(tmp_path: Path) -> None:
    arguments = [*ONWARD, "train", "--out", "run", *SMALL[2:], "--epochs", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(onward.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A test suite in the background of a shell ignores the signal, and so would the command that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert re.match(
        r"interrupted: SIGINT after step \d+ of epoch \d+, which run keeps: onward train --resume run goes on", said
    )
    assert said.count("\n") == 1
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["progress"]["epoch"] >= 1


@pytest.mark.parametrize("arguments", [["list"], ["train", "--help"], ["train", "--out", "run", *SMALL]])
def test_a_reader_that_has_gone_is_told_nothing(arguments: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(onward.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*ONWARD, *arguments], cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list"]) == 0
    printed = capsys.readouterr().out
    words = [line.split()[0] for line in printed.splitlines() if re.match(r"  \S", line)]
    of_fg = (TARGETS, GUESSES, SPACES, ENGINES, PASSES, FEEDBACK, SCALINGS)
    tables = (ALGORITHMS, MODELS, HEADS, *of_fg, TASKS, DATASETS, RECIPES)
    assert {name for table in tables for name in table} <= set(words)
    for name, algorithm in ALGORITHMS.items():
        for setting in settings_of(algorithm):
            assert re.search(rf"^ {{10,}}{setting}=", printed, re.MULTILINE), (name, setting)


@pytest.mark.parametrize(
    ("kind", "field", "known"),
    [(Heads, "kind", HEADS), (Schedule, "name", SCHEDULERS)],
)
def test_the_command_offers_what_there_is(kind: type, field: str, known: Iterable[str]) -> None:
    hint = get_type_hints(kind)[field]
    names = [name for part in (hint, *get_args(hint)) if get_origin(part) is Literal for name in get_args(part)]
    assert sorted(names) == sorted(known)


def test_compare_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["compare", "--algorithms", "bp", "dfa", "--seeds", "1", "--out", str(tmp_path / "both"), *SMALL]
    assert command.main(asked) == 0
    printed = capsys.readouterr().out
    assert "│ bp " in printed
    assert "│ dfa " in printed
    assert f"picture: {tmp_path}/both/curves.png" in printed


ENTRY = "fdfa:directions=2,low_memory=true"


def test_settings_nest_under_their_owner(tmp_path: Path) -> None:
    nested = {
        "--network.layers": "3",
        "--optimizer.name": "sgd",
        "--optimizer.momentum": "0.5",
        "--schedule.gamma": "0.9",
        "--feedback.optimizer": "sgd",
        "--feedback.lr": "0.25",
        "--transform.mean": "0.25",
        "--transform.augment": "crop-flip",
    }
    flags = [word for pair in nested.items() for word in pair]
    assert command.main(["train", "--out", str(tmp_path), *SMALL, "--algorithm", ENTRY, *flags]) == 0
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    assert config["algorithm"] == ENTRY
    for flag, value in nested.items():
        owner, name = flag.removeprefix("--").replace("-", "_").split(".")
        assert str(config[owner][name]) == value


def test_a_loss_that_is_not_finite_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["train", "--out", str(tmp_path), *SMALL, "--transform.mean", "nan"]) == 1
    assert capsys.readouterr().err.startswith("error: the training loss is nan at epoch 1, step 1 of 1 (the input is not fin")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--epochs", "0"], "--epochs 0: use at least 1"),
        (["train", "--algoritm", "bp"], "--algorithm"),
        (["trian"], "train"),
        (["train", "--optimizer.name", "adma"], "adam"),
    ],
)
def test_what_cannot_be_parsed_exits_with_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    assert said in capsys.readouterr().err


def test_too_little_memory_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["train", "--out", str(tmp_path / "run"), *SMALL, "--network.width", "1e4"]
    assert command.main(asked) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (")
    assert said.endswith("): use a smaller --batch-size, or a smaller network\n")
    assert not (tmp_path / "run").exists()


def test_without_the_lab_it_says_what_to_install(tmp_path: Path) -> None:
    program = "import sys; sys.modules['tyro'] = None; from onward.lab.cli import main; sys.exit(main(['list']))"
    environment = {**os.environ, "PYTHONPATH": str(Path(onward.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: tyro is not installed: pip install onward[lab]\n")
