"""Where what carries errors back is the weights themselves, feedback alignment is backpropagation, on any network."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from answers import Case
from networks import CASES
from torch import Tensor

import onward


class Same(onward.FeedbackAlignment):
    """Notes which weights carry an error."""

    def carrier(self, name: str, weight: Tensor, kept: Tensor) -> Tensor:
        self.seen = {*getattr(self, "seen", ()), name}
        return weight


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, as a network is built
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_with_the_weights_themselves_it_is_backpropagation(case: Case) -> None:
    if case.needs and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"needs {case.needs} (pip install onward[compat])")
    found = []
    for rule in (onward.Backprop, Same):
        model, x, y = case.build()
        estimator = rule(model, loss=case.loss, check=False)
        torch.manual_seed(1)
        if rule is Same and case.name.endswith(("checkpoint", "reentrant")):
            with pytest.raises(onward.UsageError, match="by activation checkpointing"):
                estimator.estimate(x, y)
            return
        estimator.estimate(x, y)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    exact, carried = found
    assert exact.keys() == carried.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(carried[name], gradient, rtol=1e-8, atol=1e-10)
    assert isinstance(estimator, Same)
    linear = [n for n, p in model.named_parameters() if p.requires_grad and p.dim() == 2 and n in estimator.carriers.names]
    assert len(linear) < 2 or estimator.seen
