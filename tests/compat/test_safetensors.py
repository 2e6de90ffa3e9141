"""An estimator's state in a format that holds tensors and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from onward import DFA, FDFA

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors (pip install onward[compat])")


@pytest.mark.parametrize("kind", [DFA, FDFA])
def test_saved_and_loaded(kind: type, tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    estimator, fresh = kind(network(), seed=7), kind(network())
    for step in range(2):  # before the feedback has a size, and with it
        safetensors.save_model(estimator, str(tmp_path / f"{step}.safetensors"))
        safetensors.load_model(fresh, str(tmp_path / f"{step}.safetensors"))
        assert (fresh.step, fresh.seed) == (step, 7)
        assert torch.equal(fresh.model[0].weight, estimator.model[0].weight)
        estimator.estimate(x, y)
    fresh.estimate(x, y)
