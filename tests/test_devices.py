"""A step on a device that this machine does not have: tensors and generators have to be made where the batch is.

PyTorch's `meta` device stands in for a GPU. Tensors there have shapes and a device, but no numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import by_name
from test_capture import KINDS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

AWAY = "meta"


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of several devices, as a GPU does; a single number may be elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        found = {tensor.device.type for tensor in tensors}
        if len(found) > 1 and func is not torch.ops.aten._to_copy.default:
            raise RuntimeError(f"{func} of tensors on {sorted(found)}")
        return func(*args, **(kwargs or {}))


class Pretended(torch.Generator):
    """Generators for the device that is not there; ``made`` are the devices that were asked for."""

    made: list[str] = []  # noqa: RUF012

    def __new__(cls, device: Any = "cpu") -> Pretended:
        cls.made.append(torch.device(device).type)
        return super().__new__(cls)


@pytest.fixture(autouse=True)
def _pretending(monkeypatch: pytest.MonkeyPatch) -> None:
    autocast = torch.autocast
    monkeypatch.setattr(torch, "Generator", Pretended)
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: autocast("cpu" if kind == AWAY else kind, **options))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)
    monkeypatch.setattr("onward.derivatives.graph.get_proxy_mode", lambda: True)  # there are no numbers to be looked at


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_made_where_the_batch_is(kind: str) -> None:
    model, x, y, cuts, loss = by_name("mlp-batch-norm").build(seed=3)
    estimator = KINDS[kind](model, cuts, loss=loss)
    estimator.check = False
    estimator.estimate(x, y)  # gives feedback its size
    estimator.zero_grad()
    estimator.to(AWAY)
    Pretended.made.clear()
    for _ in range(2):
        with OneDevice():
            step = estimator.estimate(x.to(AWAY), y.to(AWAY))
    gradients = [p.grad for p in estimator.parameters() if p.grad is not None]
    assert gradients
    assert {t.device.type for t in (step.loss, step.output, *gradients, *estimator.buffers())} == {AWAY}
    assert set(Pretended.made) <= {AWAY}


def test_a_tensor_on_the_wrong_device_is_seen() -> None:
    with OneDevice(), pytest.raises(RuntimeError, match="tensors on"):
        torch.zeros(2, device=AWAY) + torch.zeros(2)
