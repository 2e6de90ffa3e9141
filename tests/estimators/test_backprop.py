"""`Backprop` equals `loss.backward()`, checkpointed or not."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from cases import CASES, Case
from torch import nn

from onward import Backprop, UsageError


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_backward(case: Case, checkpoint: bool, train: bool) -> None:
    model, x, y, cuts, loss = case.build(seed=1)
    model.train(train)
    plain = copy.deepcopy(model)
    estimator = Backprop(model, cuts, loss=loss, checkpoint=checkpoint)
    torch.manual_seed(reference.MASKS)
    logits = reference.call(plain, x)
    value = loss(logits, y)
    value.backward()
    after = torch.get_rng_state()

    torch.manual_seed(reference.MASKS)
    if checkpoint and case.name == "in-place":
        with pytest.raises((UsageError, RuntimeError), match=r"in.?place"):  # what is overwritten cannot be run again
            estimator.estimate(x, y)
        return
    step = estimator.estimate(x, y)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(step.loss, value)
    assert torch.equal(step.output, logits)
    assert not step.loss.requires_grad
    assert not step.output.requires_grad
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-13)
    for (name, buffer), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_default_without_cuts() -> None:
    """Backprop needs none, whatever the network."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    Backprop(Net()).estimate(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))


def test_checkpointing_keeps_less() -> None:
    """Bytes saved for the backward pass, at the moment when it starts."""
    depth, width, samples = 12, 8, 64

    def kept(checkpoint: bool) -> int:
        blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
        model, total = nn.Sequential(*blocks, nn.Linear(width, 2)), []

        def loss(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            total.append(sum(storages.values()))
            return nn.functional.cross_entropy(z, y)

        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            estimator = Backprop(model, loss=loss, checkpoint=checkpoint)
            estimator.estimate(torch.randn(samples, width), torch.zeros(samples, dtype=torch.long))
        return total[0]

    assert kept(True) < 0.6 * kept(False)


def test_checkpoint_without_cuts_asks_for_them() -> None:
    class Net(nn.Linear):
        pass

    with pytest.raises(UsageError, match="nothing to cut"):
        Backprop(Net(3, 2), checkpoint=True)


def test_checkpointing_keeps_a_forward_of_ones_own() -> None:
    """Of a class, and of an object, before a step as after it."""

    class Scaled(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(10 * x)

    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    for model in (Scaled(nn.Linear(3, 3), nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))):
        model[0].forward = lambda x, layer=model[0]: type(layer).forward(layer, 3 * x)  # type: ignore[method-assign]
        plain = Backprop(model).estimate(x, y).output
        for _ in range(2):
            torch.testing.assert_close(Backprop(model, ["0"], checkpoint=True).estimate(x, y).output, plain)


class Cache(dict):
    """Keys by layer, as a language model keeps them while it writes."""


class Cached(nn.Module):
    """A block that appends to a cache, where it is given one."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, h: torch.Tensor, cache: Cache | None = None, mask: bool = False) -> torch.Tensor:
        keys = self.keys(h)
        if cache is not None:
            keys = cache[self] = torch.cat([cache[self], keys]) if self in cache else keys
        weights = h @ keys.T
        return (weights + torch.zeros(len(h), len(h)) if mask else weights.softmax(1) @ torch.ones_like(keys)) @ torch.ones(
            4 if mask else 3, 3
        ) + self.values(h)


class Writer(nn.Module):
    def __init__(self, mask: bool) -> None:
        super().__init__()
        self.first, self.second, self.head, self.mask = Cached(), Cached(), nn.Linear(3, 2), mask

    def forward(self, h: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
        cache = Cache() if use_cache else None
        return self.head(self.second(self.first(h, cache, self.mask), cache, self.mask))


@pytest.mark.parametrize("mask", [True, False], ids=["which fails inside", "whose tensors differ"])
def test_a_cache_that_a_second_run_appends_to(mask: bool) -> None:
    """And what the sentence advises works."""
    x, y, model = torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), Writer(mask)
    with pytest.raises(UsageError, match=r"did not run a second time as it ran the first .* \(use_cache=False") as raised:
        Backprop(model, ["first", "second"], checkpoint=True).estimate({"h": x}, y)
    assert "\n" not in str(raised.value)
    model.zero_grad()
    plain = copy.deepcopy(model)
    Backprop(plain).estimate({"h": x}, y)
    Backprop(model, ["first", "second"], checkpoint=True).estimate({"h": x, "use_cache": False}, y)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_failure_of_the_second_run_that_is_not_of_its_own() -> None:
    class Full(nn.Linear):
        runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            if self.runs == 2:
                raise torch.OutOfMemoryError
            return super().forward(x)

    model = nn.Sequential(Full(3, 3), nn.Linear(3, 2))
    with pytest.raises(torch.OutOfMemoryError):
        Backprop(model, ["0"], checkpoint=True).estimate(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
