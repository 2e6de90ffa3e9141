"""Labels inside a batch, and the default loss of networks that return more than a tensor."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward import UsageError
from onward.network.labels import divided


class Named(nn.Module):
    """Returns a dict, as many networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        h = self.act(self.first(features))
        return {"hidden": h.detach(), "logits": self.last(h)}


class Conditioned(nn.Module):
    """Cannot run without labels, which it is conditioned on."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.act, self.last = nn.Embedding(3, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, labels: Tensor) -> Tensor:
        return self.last(self.act(self.table(labels)))


def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"features": torch.randn(6, 4), "labels": torch.randint(3, (6,))}


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_labels_leave_the_batch_and_logits_are_found_by_name(kind: Any) -> None:
    model, x = Named(), batch()
    step = onward.DFA(model, ["act"]).estimate(kind(x))
    assert step.loss == F.cross_entropy(model(x["features"])["logits"], x["labels"])
    found = model.last.weight.grad.clone()
    model.zero_grad()
    F.cross_entropy(model(x["features"])["logits"], x["labels"]).backward()
    torch.testing.assert_close(found, model.last.weight.grad)
    assert set(onward.alignment.measure(onward.Backprop(model), kind(x), cuts=["act"])) == {"act", "output"}


def test_labels_that_a_network_needs_stay() -> None:
    labels = torch.tensor([0, 1, 2])
    assert divided(Conditioned(), {"labels": labels}) == ({"labels": labels}, None)
    step = onward.DFA(Conditioned(), ["act"], loss=lambda z, y: z.square().mean()).estimate({"labels": labels})
    assert step.output.shape == (3, 3)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(UsageError, match="no targets: give estimate"):
        onward.DFA(Named(), ["act"]).estimate({"features": torch.randn(6, 4)})
    words = nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 9))
    ids = torch.randint(9, (2, 5))
    with pytest.raises(UsageError, match=r"logits have shape \(2, 5, 9\), with classes last"):
        onward.Backprop(words).estimate(ids, ids)
