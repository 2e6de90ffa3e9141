"""Networks as other libraries build them: every estimator against what plain reverse mode, hooks and loops make of them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from answers import Case, answers_to
from networks import CASES
from trials import NAMES, attempt, differs, wrong


def asked(case: Case) -> Case:
    """The case, or a reason to leave it out."""
    if case.needs and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"needs {case.needs} (pip install onward[compat])")
    return case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_estimator_gives_what_the_references_give(case: Case) -> None:
    asked(case)
    problems = {name: wrong(case, name, attempt(case, name)) for name in NAMES if name not in case.unasked}
    assert not any(problems.values()), "\n".join(["", *(f"{n}: {problem}" for n, problem in problems.items() if problem)])


# Where cuts are fit to be used, and no weight is used on both sides of one.
UNTIED = [case for case in CASES if "dfa" not in case.refused and not case.name.startswith(("gpt2", "t5"))]


@pytest.mark.parametrize("case", UNTIED, ids=lambda case: case.name)
def test_two_references_agree(case: Case) -> None:
    """Blocks run on constants, and the whole graph, whose parameters belong to the first cut that they move."""
    answers = answers_to(asked(case))
    assert all(g.any() for g in answers.true)  # or the case would show nothing
    by_blocks, by_graph = (way(answers.signals()) for way in (answers.delivered, answers.by_whole_graph))
    scale = max(g.norm().item() for g in by_blocks.values())
    us = answers.directions()
    along = sum((g * u).sum() for g, u in zip(answers.true, us.values(), strict=True))
    torch.testing.assert_close(answers.own_slopes(us).sum(), along, rtol=case.precision, atol=case.precision)
    for name in by_blocks.keys() | by_graph.keys():
        problem = differs(by_blocks.get(name), by_graph.get(name), case.precision, scale)
        assert not problem, f"{case.name}, {name}: {problem}"
