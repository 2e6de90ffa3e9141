"""`onward doctor` and `onward --version`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import onward
from onward.estimators.base import ALGORITHMS
from onward.lab.cli import main
from onward.lab.studies import doctor, selftest


def test_every_algorithm_has_a_formula() -> None:
    assert {entry.partition(":")[0] for entry in selftest.REFERENCES} == set(ALGORITHMS)


def test_all_are_right_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"onward {onward.__version__}, torch " in said
    assert said.count("self-test  right: ") == len(selftest.REFERENCES)
    assert "WRONG" not in said


def test_a_wrong_number_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(selftest, "REFERENCES", {"bp": lambda trial: trial.gradients([1.001 * true for true in trial.true])})
    assert main(["doctor"]) == 2
    said = capsys.readouterr()
    assert "self-test  WRONG: bp on cpu" in said.out
    assert said.err.startswith("error: wrong numbers by bp on cpu: ")


def test_facts_name_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    found = doctor.facts()
    assert "OMP_NUM_THREADS=3" in found["threads"]
    assert found["memory"] == "MALLOC_ARENA_MAX=2"


def test_the_version_needs_no_extra() -> None:
    blocked = (
        "import sys; sys.modules['tyro'] = None; sys.argv = ['onward', '--version']; from onward.lab.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith(f"onward {onward.__version__} (torch ")


def test_the_command_alone_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert not ended.value.code
    assert "doctor" in capsys.readouterr().out
