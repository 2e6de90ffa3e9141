"""Every estimator on a case, in one process or in several: right, refused, or wrong, and how."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from answers import SEED, Answers, Case, Gradients, add, answers_to, dense, generators, heads_for, part
from torch import Tensor

import onward


class Kind(NamedTuple):
    """An estimator in one of its forms, its answer, and what it learns beside the network."""

    make: Callable[..., onward.Estimator]
    answer: Callable[[Answers], Gradients]
    has_heads: bool = False
    has_feedback: bool = False


fg = onward.ForwardGradient
by_feedback = partial(fg, guess="feedback", feedback="dfa")

ESTIMATORS: dict[str, Kind] = {
    "bp": Kind(lambda model, cuts, **o: onward.Backprop(model, **o), lambda a: a.backprop),
    "bp checkpoint": Kind(partial(onward.Backprop, checkpoint=True), lambda a: a.backprop),
    "local": Kind(onward.LocalLoss, Answers.local, has_heads=True),
    "dfa": Kind(onward.DFA, Answers.dfa, has_feedback=True),
    "dkp": Kind(onward.DKP, Answers.dkp, has_feedback=True),
    "fdfa": Kind(onward.FDFA, Answers.fdfa, has_feedback=True),
    "dfa low memory": Kind(partial(onward.DFA, low_memory=True), Answers.dfa, has_feedback=True),
    "dkp low memory": Kind(partial(onward.DKP, low_memory=True), Answers.dkp, has_feedback=True),
    "fdfa low memory": Kind(partial(onward.FDFA, low_memory=True), Answers.fdfa, has_feedback=True),
    "fg forward random": Kind(fg, lambda a: a.forward_random(at_once=True)),
    "fg forward random block": Kind(partial(fg, passes="block"), lambda a: a.forward_random(at_once=False)),
    "fg forward feedback": Kind(by_feedback, Answers.forward_feedback, has_feedback=True),
    "fg forward samples": Kind(
        partial(by_feedback, space="activation-2"), lambda a: a.samples(per_weight=False), has_feedback=True
    ),
    "fg forward weights": Kind(lambda model, cuts, **o: fg(model, space="avg-weight", **o), Answers.weights_uncut),
    "fg forward weights cut": Kind(partial(fg, space="avg-weight", passes="block"), Answers.weights_cut),
    "fg reverse random": Kind(partial(fg, engine="reverse"), Answers.reverse_random),
    "fg reverse weights": Kind(partial(fg, space="avg-weight", engine="reverse"), Answers.weights_cut),
    "fg reverse samples": Kind(
        partial(by_feedback, space="weight", engine="reverse"), lambda a: a.samples(per_weight=True), has_feedback=True
    ),
}
NAMES = tuple(ESTIMATORS)
CUT = tuple(name for name in NAMES if name not in ("bp", "bp checkpoint", "fg forward weights"))
"""Those that need the graph cut."""
MEASURING = tuple(name for name in NAMES if name.startswith(("fdfa", "fg forward")))
"""Those that carry tangents."""
AGAIN = tuple(name for name in NAMES if name.endswith(("checkpoint", "low memory")) or name.startswith("fg forward"))
"""Those that run the network, or a block, a second time."""
REVERSE = tuple(name for name in NAMES if name.startswith("fg reverse"))
OWN_SLOPES = ("fg forward random", "fg forward random block", "fg forward feedback", "fg forward samples")
"""Those that measure each sample's derivative of its own loss, and leave out what it does to others'."""
SAMPLES = ("fg forward samples", "fg reverse samples")
"""Those that compare or weigh each sample's gradients of the weights."""


class Outcome(NamedTuple):
    """`refused`, with the sentence; or the loss, gradients and buffers that an estimate left; or `crashed`, with the traceback.

    `told`: what the library warned of, in the step or in `validate`.
    """

    state: str
    said: str = ""
    loss: float = 0.0
    found: Mapping[str, Tensor | None] = {}
    buffers: Mapping[str, Tensor] = {}
    told: tuple[str, ...] = ()


def attempt(case: Case, name: str, rows: slice = slice(None), distributed: bool = False) -> Outcome:
    """One step of an estimator."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return _step(case, name, rows, distributed, caught)
        except onward.UsageError as error:
            return Outcome("refused", str(error))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return Outcome("crashed", f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})")


def _step(case: Case, name: str, rows: slice, distributed: bool, caught: list[warnings.WarningMessage]) -> Outcome:
    kind = ESTIMATORS[name]
    model, x, y = case.build()
    answers = answers_to(case)
    heads = heads_for(case, answers.ordinary.output) if kind.has_heads else {}
    more: dict[str, Any] = {"heads": heads} if heads else {}
    if case.unchecked and not name.startswith("bp"):
        more["check"] = False
    estimator = kind.make(model, case.cuts, loss=case.loss, seed=SEED, **more)
    if kind.has_feedback and case.wanted(name) != "refused":
        matrices = {f"feedback.{k}": b for k, b in enumerate(answers.feedback())}
        estimator.load_state_dict(matrices, strict=False)
    if distributed:
        onward.distribute(estimator)
    with generators(SEED):
        step = estimator.estimate(part(x, rows), part(y, rows))
    found: dict[str, Tensor | None] = {n: p.grad for n, p in model.named_parameters()}
    found |= {f"head {cut} {n}": p.grad for cut, head in heads.items() for n, p in head.named_parameters()}
    if kind.has_feedback:
        found |= {f"feedback {k}": b.grad for k, b in enumerate(estimator.feedback)}
    told = [str(w.message) for w in caught if "onward" in w.filename] + [str(problem) for problem in onward.validate(model)]
    return Outcome("found", "", float(step.loss), found, dict(model.named_buffers()), tuple(told))


def wrong(case: Case, name: str, outcome: Outcome, shards: tuple[slice, ...] = (slice(None),)) -> str:
    """What is the matter with an outcome, or nothing."""
    wanted = case.wanted(name)
    if outcome.state == "crashed":
        return f"crashed: {outcome.said}"
    if outcome.state == "refused":
        return f"refused, though it should work: {outcome.said}" if wanted == "right" else ""
    if wanted == "refused":
        return "not refused"
    batch = sum(s.stop - s.start for s in shards) if len(shards) > 1 else 1
    expected: Gradients = {}
    loss = 0.0
    for rows in shards:
        answers = answers_to(case, rows)
        share = (rows.stop - rows.start) / batch if len(shards) > 1 else 1.0
        add(expected, ESTIMATORS[name].answer(answers), share)
        loss += share * float(answers.ordinary.value.detach())
    problems = []
    # Against the largest of them: some are zero but for rounding, such as those of a bias before a norm.
    scale = max((dense(g).norm().item() for g in expected.values()), default=0.0)
    if abs(outcome.loss - loss) > case.precision * max(1, abs(loss)):
        problems.append(f"the loss is {outcome.loss:.6g}, not {loss:.6g}")
    for parameter, found in outcome.found.items():
        if problem := differs(found, expected.get(parameter), case.precision, scale):
            problems.append(f"{parameter}: {problem}")
    if len(shards) == 1:
        after = dict(answers.ordinary.model.named_buffers())
        problems += [
            f"buffer {n}: after one step {b.flatten()[:3].tolist()}, not {after[n].flatten()[:3].tolist()}"
            for n, b in outcome.buffers.items()
            if n in after and not torch.allclose(b.double(), after[n].double(), rtol=1e-6, atol=1e-9, equal_nan=True)
        ]
    if name in case.told and not outcome.told:
        problems.append("leaves out what samples do to one another, and nobody says so")
    return "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")


def differs(found: Tensor | None, expected: Tensor | None, precision: float, scale: float) -> str:
    """How a gradient differs from what was expected; one of nothing but zeros is none."""
    if expected is None or not dense(expected).any():
        size = 0.0 if found is None else dense(found).norm().item()
        return f"a gradient of norm {size:.3g} where there is none" if size > precision * scale else ""
    size = dense(expected).norm().item()
    if found is None:
        return "no gradient" if size > precision * scale else ""
    if expected.is_sparse and not found.is_sparse:
        return "a dense gradient of a sparse table"
    off = (dense(found) - dense(expected)).norm().item()
    return "" if off <= precision * (size + scale) else f"off by {off / size:.2g} of its norm"
