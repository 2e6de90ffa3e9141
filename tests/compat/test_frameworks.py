"""Other people's training loops: the examples run, and accumulated, clipped and half-precision steps are right."""

from __future__ import annotations

import copy
import importlib.util
import runpy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers import IGNORED, built, gradients, words
from together import together
from torch import Tensor, nn

import onward

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def accelerator() -> Iterator[None]:
    """Accelerate keeps its state for the process, and takes no other settings afterwards."""
    state = pytest.importorskip("accelerate", reason="needs accelerate (pip install onward[compat])").state
    state.AcceleratorState._reset_state(True)
    yield
    state.AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("name", [pytest.param("hf_trainer", marks=pytest.mark.slow), "accelerate_loop"])
def test_the_examples_learn(name: str) -> None:
    assert runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]() > 0.9


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs lightning, which no extra installs")
@pytest.mark.filterwarnings("ignore")  # of Lightning's own
def test_the_example_of_lightning_learns() -> None:
    assert runpy.run_path(str(EXAMPLES / "lightning_module.py"))["main"]() > 0.9


def part(x: Any, rows: slice) -> Any:
    return {name: value[rows] for name, value in x.items()}


ACCUMULATED: dict[str, Callable[..., onward.Estimator]] = {
    "bp": lambda model, cuts: onward.Backprop(model),
    "dfa": onward.DFA,
    "dkp": onward.DKP,
    "dfa low memory": partial(onward.DFA, low_memory=True),
}


@pytest.mark.parametrize("name", ["gpt2", pytest.param("bert", marks=pytest.mark.slow), "t5"])
def test_accumulated_batches_are_one_large_batch(name: str) -> None:
    """Where labels are counted over all of them, as the Trainer does; the shorter sentences have fewer labels."""
    model, batch, cuts = built(name)
    labels = batch["labels"][:, 1:] if name == "gpt2" else batch["labels"]
    items = (labels != IGNORED).sum()
    for kind, make in ACCUMULATED.items():
        one, several = (make(copy.deepcopy(model), cuts) for _ in range(2))
        whole = one.estimate(batch).loss
        parts = [
            several.estimate({**part(batch, rows), "num_items_in_batch": items}).loss for rows in (slice(0, 1), slice(1, 3))
        ]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients(several), gradients(one), rtol=1e-5, atol=1e-6, msg=f"{kind} {{}}".format)


def test_half_precision_is_that_of_autograd() -> None:
    """Under autocast, and what is clipped has the length that it is clipped to."""
    model, batch, cuts = built("bert")
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
        loss.backward()
        truth = gradients(model)
        model.zero_grad()
        step = onward.Backprop(model).estimate(batch)
        assert step.loss == loss
        torch.testing.assert_close(gradients(model), truth)
        for make in (onward.DFA, onward.FDFA, onward.ForwardGradient, partial(onward.FDFA, low_memory=True)):
            model.zero_grad()
            step = make(model, cuts).estimate(batch)
            torch.testing.assert_close(step.loss, loss.detach(), rtol=1e-2, atol=0)
            found = gradients(model)
            assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
            # The last block's is exact, whatever the estimator.
            torch.testing.assert_close(found["classifier.weight"], truth["classifier.weight"], rtol=0.05, atol=0.02)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert torch.stack([g.norm() for g in gradients(model).values()]).norm() <= 1.001e-3


def shard(rank: int, name: str, kind: str, shards: tuple[slice, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    model, batch, cuts = built(name)
    estimator = onward.distribute(DIVIDED[kind](model, cuts))
    return estimator.estimate(part(batch, shards[rank])).loss, gradients(estimator)


DIVIDED = {**ACCUMULATED, "fdfa": onward.FDFA, "fg": onward.ForwardGradient}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bp", "dfa low memory", "fdfa", "fg"])
def test_processes_share_a_loss_by_their_labels(kind: str) -> None:
    """Of sentences of different lengths, divided: the mean is over labels, and so are its parts."""
    model, batch, cuts = built("gpt2")
    estimator = DIVIDED[kind](model, cuts)
    whole = estimator.estimate(batch).loss
    for loss, found in together(2, shard, "gpt2", kind, (slice(0, 1), slice(1, 3))):
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
        torch.testing.assert_close(found, gradients(estimator), rtol=1e-5, atol=1e-6)


def test_what_is_in_the_batch_twice_or_too_much_is_said() -> None:
    model, batch, _ = built("gpt2")
    estimator = onward.Backprop(model)
    with pytest.raises(onward.UsageError, match="'labels' are in the batch and y is given too"):
        estimator.estimate(batch, batch["labels"])
    with pytest.raises(onward.UsageError, match="the batch has use_cache=True: keys and values are kept for generating"):
        estimator.estimate({**batch, "use_cache": True})
    bare = {name: value for name, value in words().items() if name != "labels"}
    with pytest.raises(onward.UsageError, match="GPT2LMHeadModel has no labels to compute its loss from: give 'labels'"):
        estimator.estimate(bare)
    model.loss_function = lambda logits, labels, **more: logits.square().mean()
    estimator = onward.Backprop(model)
    step = estimator.estimate(batch)
    assert step.loss == step.output.logits.square().mean()


def test_a_factor_on_the_loss_reaches_all_but_the_matrices_that_follow_a_jacobian() -> None:
    """As FDFA's docstring says; DKP's learn from the error."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    for kind, factor in ((onward.FDFA, 1), (onward.DKP, 1 / 4)):
        found = []
        for k in (1, 4):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
            estimator = kind(model, loss=lambda z, y, k=k: nn.functional.cross_entropy(z, y) / k)
            estimator.estimate(x, y)
            found.append((estimator.feedback[0].grad, model[2].weight.grad))
        torch.testing.assert_close(found[1][0], found[0][0] * factor)
        torch.testing.assert_close(found[1][1], found[0][1] / 4)
