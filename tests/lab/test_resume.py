"""Runs that are killed, stopped or damaged go on as if nothing had happened."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import pickle
import random
import signal
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onward.errors import UsageError
from onward.lab.run import checkpoint
from onward.lab.run.loop import resume, train
from onward.lab.settings import Feedback, Heads, Network, Optimizer, Schedule, Train

FAMILIES: dict[str, dict[str, Any]] = {
    "bp": {"algorithm": "bp", "optimizer": Optimizer("sgd", momentum=0.9), "schedule": Schedule("onecycle")},
    "local": {"algorithm": "local", "heads": Heads("linear")},
    "dfa": {"algorithm": "dfa"},
    "dkp": {"algorithm": "dkp:low_memory=true"},
    "fdfa": {"algorithm": "fdfa", "feedback": Feedback(lr=1e-2, optimizer="sgd")},
    "fg-random": {"algorithm": "fg", "schedule": Schedule("plateau", patience=0)},
    "fg-weights": {"algorithm": "fg:space=avg-weight,noise=rademacher"},
    "spsa-lean": {"algorithm": "spsa", "optimizer": Optimizer("lean"), "lr": 1e-4, "schedule": Schedule("onecycle")},
    "fg-ntk": {"algorithm": "fg:guess=ntk", "heads": Heads("linear")},
    "fg-feedback": {"algorithm": "fg:guess=feedback,space=weight,engine=reverse"},
}
MEASURED = ("seconds", "peak_memory_bytes")  # by the clock, so they may differ


def config_of(family: str, folder: Path, **changes: Any) -> Train:
    settings = {
        "epochs": 3,
        "batch_size": 256,
        "lr": 1e-2,
        "device": "cpu",
        "checkpoint_every": "1",
        **FAMILIES[family],
        **changes,
    }
    return Train(data="digits", network=Network(width=0.05), out=str(folder), **settings)


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The metrics that do not depend on the clock, and the final state."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    for row in (*rows, *state["rows"]):
        for name in MEASURED:
            del row[name]
    state.pop("progress")
    return rows, state


def assert_same(found: Any, wanted: Any, where: str = "state") -> None:
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), where
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert found == wanted, where


def work(config: Train) -> None:
    """In a process of its own: begin the run, or go on with it."""
    torch.set_num_threads(1)
    folder = Path(config.out or "")
    if (folder / "config.json").exists():
        resume(folder)
    else:
        train(config)


@pytest.fixture(scope="module")
def start() -> Callable[..., multiprocessing.process.BaseProcess]:
    """Start `work` in a fresh process; all of them share the cost of importing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume"])

    def begin(config: Train) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=work, args=(config,))
        process.start()
        return process

    return begin


def kill_and_resume(start: Callable[..., Any], family: str, tmp_path: Path, kills: int, seed: int) -> None:
    whole, broken = config_of(family, tmp_path / "whole"), config_of(family, tmp_path / "broken")
    process = start(whole)
    began = time.monotonic()
    process.join(120)
    duration = time.monotonic() - began
    assert process.exitcode == 0
    moments = random.Random(seed)
    for _ in range(kills):
        process = start(broken)
        process.join(duration * moments.random())
        process.kill()
        process.join()
    process = start(broken)
    process.join(120)
    assert process.exitcode == 0
    assert_same(outcome(tmp_path / "broken"), outcome(tmp_path / "whole"))


@pytest.mark.parametrize("family", ["fdfa", pytest.param("local", marks=pytest.mark.slow)])
def test_killed_runs_end_as_if_they_had_not_been(start: Callable[..., Any], family: str, tmp_path: Path) -> None:
    kill_and_resume(start, family, tmp_path, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_killed_at_many_moments(start: Callable[..., Any], family: str, tmp_path: Path) -> None:
    """54 kills in all; a checkpoint after every step, so that many of them fall into its writing."""
    kill_and_resume(start, family, tmp_path, kills=6, seed=list(FAMILIES).index(family))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_is_heeded_after_the_step(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    before = signal.signal(number, signal.default_int_handler)  # a shell may have started us with the signal ignored
    request.addfinalizer(lambda: signal.signal(number, before))
    whole = config_of("bp", tmp_path / "whole", checkpoint_every="1000")
    train(whole)
    broken = replace(whole, out=str(tmp_path / "broken"))
    from onward.lab.run import loop as training

    done = 0
    step = training.Run.step

    def stop_at_the_third(run: Any, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == 3:
            signal.raise_signal(number)
        return step(run, *arguments)

    monkeypatch.setattr(training.Run, "step", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt, match=f"onward train --resume {tmp_path / 'broken'} goes on"):
        train(broken)
    assert done == 3
    resume(tmp_path / "broken")
    assert_same(outcome(tmp_path / "broken"), outcome(tmp_path / "whole"))


def test_a_complete_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of("bp", tmp_path / "run", epochs=1)
    rows = train(config)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert resume(tmp_path / "run") == rows
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        resume(tmp_path / "nowhere")


def damage(draw: Callable[..., Any]) -> None:
    """Flipped bits and cut-off ends: never a wrong state, and the checkpoint before takes over."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        checkpoint.save(path, {"epoch": 1, "weights": torch.arange(8.0)})
        checkpoint.save(path, {"epoch": 2, "weights": torch.arange(9.0)})
        content = bytearray(path.read_bytes())
        where = draw(st.integers(0, len(content) - 1))
        if draw(st.booleans()):
            content[where] ^= 1 << draw(st.integers(0, 7))
        else:
            del content[where:]
        path.write_bytes(content)
        assert_same(checkpoint.load(path), {"epoch": 1, "weights": torch.arange(8.0)})
        checkpoint.previous(path).write_bytes(content)
        with pytest.raises(UsageError, match="damaged"):
            checkpoint.load(path)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damage_is_noticed(data: st.DataObject) -> None:
    damage(data.draw)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_noticed_in_200_places(data: st.DataObject) -> None:
    damage(data.draw)


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "pwned"))


@pytest.mark.parametrize("sealed", [False, True])
def test_a_malicious_checkpoint_is_refused(sealed: bool, tmp_path: Path) -> None:
    path, target = tmp_path / "checkpoint.pt", tmp_path / "written"
    if sealed:
        checkpoint.save(path, {"state": Malice(target)})
    else:
        path.write_bytes(pickle.dumps({"state": Malice(target)}))
    with pytest.raises(UsageError, match="not opened" if sealed else "not written by onward"):
        checkpoint.load(path)
    assert not target.exists()


def _without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda state: state["progress"].pop(name)


@pytest.mark.parametrize(
    "forge",
    [
        lambda state: state.update(rows=1),
        lambda state: state.update(rows=[1, 2, 3]),
        lambda state: state.update(rows=state["rows"] * 3),
        lambda state: state.pop("progress"),
        lambda state: state.update(progress=[]),
        lambda state: state["progress"].update(step="first"),
        lambda state: state["progress"].update(other=1),
        _without("epoch"),
        lambda state: state["optimizers"]["network"].update(state=[]),
        lambda state: state["optimizers"].clear(),
        lambda state: state.update(generators=[1]),
        lambda state: state.update(estimator=[]),
    ],
)
def test_a_checkpoint_of_somebody_elses_making_is_refused(forge: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    """The digest is no secret."""
    config = Train(algorithm="bp", epochs=1, device="cpu", network=Network(width=0.02), out=str(tmp_path))
    train(config)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"epochs": 1', '"epochs": 3'))
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    forge(state)
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    with pytest.raises(UsageError, match=r"the checkpoint (does not|is in epoch)"):
        resume(tmp_path)


def test_a_file_that_only_has_the_seal_is_refused(tmp_path: Path) -> None:
    path, held = tmp_path / "checkpoint.pt", io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("a/b", "c")
    path.write_bytes(held.getvalue() + checkpoint.SEAL + hashlib.sha256(held.getvalue()).hexdigest().encode())
    with pytest.raises(UsageError, match=r"checkpoint.pt is no checkpoint \(\w+\)"):
        checkpoint.load(path)
