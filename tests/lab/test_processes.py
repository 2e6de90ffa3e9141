"""Runs of several processes: what one would train, one folder, and an end that can be resumed when a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_same, config_of, outcome
from together import Ended, start

import onward
from onward.lab import cli as command
from onward.lab.run.loop import resume, train
from onward.lab.settings import Heads, Network, Train

NETWORK = """
from torch import nn

def make():
    layers = [nn.Linear(64, 24), nn.Dropout(0.2), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)]
    return nn.Sequential(nn.Flatten(), *layers)
"""


@pytest.fixture
def config(tmp_path: Path) -> Train:
    (tmp_path / "network.py").write_text(NETWORK)
    settings: dict[str, Any] = {
        "model": f"{tmp_path / 'network.py'}:make",
        "checkpoint_every": "2",
        "batch_size": 300,
        "network": Network(),
    }
    return replace(config_of("fdfa", tmp_path / "run"), **settings)


def work(config: Train, interrupt: signal.Signals | None, victim: int, at_step: int, rank: int) -> None:
    """In each process: begin the run or go on with it; one of them sends itself a signal after so many steps."""
    steps = 0

    def count(_: str) -> None:
        nonlocal steps
        steps += 1
        if interrupt is not None and rank == victim and steps == at_step:
            os.kill(os.getpid(), interrupt)

    folder = Path(config.out or "")
    if (folder / "config.json").exists():
        resume(folder, advance=count)
    else:
        train(config, advance=count)


def run(
    processes: int, config: Train, interrupt: signal.Signals | None = None, victim: int = 0, at_step: int = 8
) -> list[Ended]:
    return start(processes, partial(work, config, interrupt, victim, at_step))


def test_two_processes_train_what_one_trains(config: Train, tmp_path: Path) -> None:
    source = (tmp_path / "network.py").read_text()
    (tmp_path / "network.py").write_text(source.replace("0.2", "0.0"))
    for algorithm, heads in (("fdfa", Heads()), ("local", Heads("mlp"))):
        if algorithm == "local":
            (tmp_path / "network.py").write_text(source.replace("nn.Dropout(0.2)", "nn.Identity()"))
        one, two = (replace(config, algorithm=algorithm, heads=heads, out=str(tmp_path / f"{algorithm}{n}")) for n in (1, 2))
        train(one, advance=lambda _: None)
        assert [ended.error for ended in run(2, two)] == [None, None]
        (alone, _), (together, _) = outcome(Path(one.out or "")), outcome(Path(two.out or ""))
        if algorithm == "local":  # batch norm in its heads sees half of the batch
            assert together[-1]["heads"].keys() == alone[-1]["heads"].keys()
            assert all(0 < head["accuracy"] <= 100 for head in together[-1]["heads"].values())
            assert together[0]["train_loss"] == pytest.approx(alone[0]["train_loss"], rel=0.1)
        else:
            for found, wanted in zip(together, alone, strict=True):
                assert found == pytest.approx(wanted, rel=1e-3)


def test_a_process_that_is_killed_ends_the_run_and_it_resumes_as_if_nothing_had_happened(config: Train, tmp_path: Path) -> None:
    whole = replace(config, out=str(tmp_path / "whole"))
    assert [ended.error for ended in run(4, whole)] == [None] * 4

    ended = run(4, config, signal.SIGKILL, victim=2)
    assert ended[2].exit_code == -signal.SIGKILL
    for rank in (0, 1, 3):
        said = str(ended[rank].error).splitlines()[-1]
        assert "TrainingFailed: process 2 of 4 failed or no longer answers; " in said
        assert f"checkpoint.pt keeps the state after step 1 of epoch 2: onward train --resume {config.out} goes on" in said

    assert [again.error for again in run(4, config)] == [None] * 4
    assert_same(outcome(Path(config.out or "")), outcome(Path(whole.out or "")))


def test_a_request_to_stop_one_process_stops_all_and_fewer_can_go_on(config: Train, tmp_path: Path) -> None:
    whole = replace(config, out=str(tmp_path / "whole"))
    run(2, whole)
    ended = run(2, config, signal.SIGTERM, victim=1, at_step=7)
    assert "KeyboardInterrupt: a request to another process after step 2 of epoch 2, which " in str(ended[0].error)
    assert "SystemExit: 130" in str(ended[1].error)

    first = Path(config.out or "") / "checkpoint.pt"
    kept = first.read_bytes()
    assert [again.error for again in run(2, config)] == [None] * 2
    assert_same(outcome(Path(config.out or "")), outcome(Path(whole.out or "")))

    first.write_bytes(kept)
    resume(Path(config.out or ""), advance=lambda _: None)
    (rows, _), (wanted, _) = outcome(Path(config.out or "")), outcome(Path(whole.out or ""))
    assert rows[0] == wanted[0]
    assert rows[-1]["test_accuracy"] == pytest.approx(wanted[-1]["test_accuracy"], abs=5)  # other masks from there on


def test_what_cannot_work_in_one_process_ends_all_and_the_first_says_why(config: Train) -> None:
    Path(str(config.out)).mkdir()
    (Path(str(config.out)) / "config.json").write_text("{}")
    ended = start(2, partial(_train_anew, replace(config, epochs=1)))
    assert "UsageError: " in str(ended[0].error)
    assert "already holds a run" in str(ended[0].error)
    assert "SystemExit: 2" in str(ended[1].error)

    ended = start(2, partial(_train_anew, replace(config, batch_size=1, out=f"{config.out}-other")))
    assert "--batch-size 1, divided among 2 processes: each needs at least 1 image" in str(ended[0].error)
    assert not list(Path(f"{config.out}-other").glob("*"))


def _train_anew(config: Train, rank: int) -> None:
    train(config, advance=lambda _: None)


def test_the_other_commands_are_for_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    assert command.main(["bench"]) == 2
    assert "onward bench is one process's work: start it without torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_starts_stops_and_resumes(config: Train, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(onward.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    arguments = ["--model", config.model, "--data", "digits", "--epochs", "2", "--lr", "1e-2", "--out", str(config.out)]
    done = subprocess.run(
        [*torchrun, "-m", "onward", "train", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count("epoch 2  train loss") == 1
    assert ", 2 processes, seed 0" in done.stdout
    again = subprocess.run(
        [*torchrun, "-m", "onward", "train", "--resume", str(config.out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert again.stdout == f"{config.out} is complete\n"
    assert torch.load(Path(str(config.out)) / "checkpoint.pt", weights_only=True)["estimator"]
