"""Kind by estimator by engine by form: right, or refused in a sentence; never wrong in silence."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from answers import Case
from kinds import KINDS, alone, divided
from together import start, together
from trials import NAMES, Outcome, attempt, wrong

# PyTorch's own, when torch.func.jvp first runs.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

HERE = [case for case in KINDS if not case.alone]
APART = [case for case in KINDS if case.alone]
DIVIDED = [case for case in KINDS if case.divided]
SHARDS = slice(0, 3), slice(3, 5)
GROUPS = NAMES[:9], NAMES[9:15], NAMES[15:]  # of estimators that share two processes


def report(problems: dict[str, str]) -> str:
    """What is wrong, a line for each cell."""
    return "\n".join(["", *(f"{cell}: {problem}" for cell, problem in problems.items() if problem)])


@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_right_or_refused(case: Case) -> None:
    problems = {name: wrong(case, name, attempt(case, name)) for name in NAMES if name not in case.unasked}
    assert not any(problems.values()), report(problems)


def outcomes_apart(name: str) -> dict[str, Outcome]:
    """Of every estimator on a kind, in another process; where that dies, a new one goes on with what is left."""
    found: dict[str, Outcome] = {}
    with TemporaryDirectory() as folder:
        while left := tuple(estimator for estimator in NAMES if estimator not in found):
            (ended,) = start(1, alone, name, left, folder)
            written = {e: Path(folder) / f"{e}.pt" for e in left}
            found |= {e: torch.load(path, weights_only=False) for e, path in written.items() if path.exists()}
            if ended.exit_code != 0:
                found[next(e for e in left if e not in found)] = Outcome("crashed", f"the process ended with {ended.exit_code}")
    return found


@pytest.mark.parametrize("case", APART, ids=lambda case: case.name)
def test_right_or_refused_where_a_process_can_die(case: Case) -> None:
    outcomes = outcomes_apart(case.name)
    problems = {name: wrong(case, name, outcomes[name]) for name in NAMES if name not in case.unasked}
    assert not any(problems.values()), report(problems)


@pytest.mark.parametrize(
    "names",
    [GROUPS[0], *(pytest.param(names, marks=pytest.mark.slow) for names in GROUPS[1:])],
    ids=["exact and direct", "measured", "swept"],
)
def test_right_or_refused_on_two_processes(names: tuple[str, ...]) -> None:
    problems = {}
    for name, *everyone in zip(names, *together(len(SHARDS), divided, names, SHARDS), strict=True):
        for case, *outcomes in zip(DIVIDED, *everyone, strict=True):
            if name not in case.unasked:
                told = tuple(line for outcome in outcomes for line in outcome.told)  # by any of them
                found = [wrong(case, name, outcome._replace(told=told), SHARDS) for outcome in outcomes]
                problems[f"{case.name}, {name}"] = " | ".join(dict.fromkeys(filter(None, found)))
    assert not any(problems.values()), report(problems)
