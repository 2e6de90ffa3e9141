"""Greedy learning from local losses: against explicit signals, and against a loop that trains block after block."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import CASES, Case, by_name
from family_reference import Family, heads_for
from reference import close
from torch import Tensor, nn

from onward import ForwardGradient, LocalLoss, UsageError, make_heads


@pytest.mark.parametrize("batch_norm", [False, True], ids=["", "heads-with-batch-norm"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(case: Case, train: bool, batch_norm: bool) -> None:
    built = case.build(seed=1)
    model, x, y, cuts, loss = built
    model.train(train)
    twin, heads = copy.deepcopy(model), heads_for(case, batch_norm=batch_norm, train=train)
    family = Family(built._replace(model=twin), copy.deepcopy(heads))
    expected = reference.delivered(twin, x, y, cuts, loss, family.signals("local"))
    own = family.head_steps()
    torch.manual_seed(reference.MASKS)
    logits = reference.call(twin, x).detach()  # moves the twin's statistics once
    after = torch.get_rng_state()
    torch.manual_seed(reference.MASKS)
    step = LocalLoss(model, cuts, heads=heads, loss=loss).estimate(x, y)

    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(step.output, logits)
    torch.testing.assert_close(step.loss, loss(logits, y))
    assert tuple(step.heads) == cuts
    for name, p in model.named_parameters():
        close(p.grad, expected.get(name), name)
    for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)
    for (cut, (value, z, gradients)), h in zip(own.items(), family.hidden, strict=True):
        torch.testing.assert_close(step.heads[cut], (value, z))
        assert not any(t.requires_grad for t in step.heads[cut])
        for name, p in heads[cut].named_parameters():
            close(p.grad, gradients[name], f"head of {cut}: {name}")
        family.heads[cut](h)  # moves its statistics once
        for one, other in zip(heads[cut].buffers(), family.heads[cut].buffers(), strict=True):
            torch.testing.assert_close(one, other)


def explicit_step(blocks: nn.Sequential, heads: dict[str, nn.Module], x: Tensor, y: Tensor) -> list[Tensor]:
    """Each block on the detached output of the one before it, learning from its own head; returns all losses."""
    losses = []
    for k, block in enumerate(blocks):
        h = block(x.detach())
        z = heads[str(k)](h) if k < len(blocks) - 1 else h
        losses.append(F.cross_entropy(z, y))
        losses[-1].backward()
        x = h
    return [loss.detach() for loss in losses]


@pytest.mark.parametrize("kind", ["own", "linear", "mlp"])
def test_equals_greedy_training_step_by_step(kind: str) -> None:
    """Ten steps of SGD with momentum and weight decay, in float64."""
    case = by_name("cnn-batch-norm")
    model, x, y, cuts, _ = case.build(seed=1)
    if kind == "own":
        heads = heads_for(case, batch_norm=True)
    else:
        torch.manual_seed(0)
        heads = make_heads(model, x, kind, cuts=cuts, width=6)
    twin, twin_heads = copy.deepcopy(model), copy.deepcopy(heads)
    estimator = LocalLoss(model, cuts, heads=heads)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
    optimizer = torch.optim.SGD(estimator.parameters(), **options)
    other = torch.optim.SGD([*twin.parameters(), *(p for head in twin_heads.values() for p in head.parameters())], **options)
    for _ in range(10):
        optimizer.zero_grad()
        step = estimator.estimate(x, y)
        optimizer.step()
        other.zero_grad()
        losses = explicit_step(twin, twin_heads, x, y)
        other.step()
        torch.testing.assert_close(torch.stack([*(value for value, _ in step.heads.values()), step.loss]), torch.stack(losses))
    for (name, p), q in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10, msg=name)
    for cut, head in heads.items():
        for (name, p), q in zip(head.state_dict().items(), twin_heads[cut].state_dict().values(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10, msg=f"{cut} {name}")


def test_a_block_learns_from_its_own_head_alone() -> None:
    """Whatever the other heads and the blocks behind it are."""
    case = by_name("residual")
    grads = []
    for seed in (0, 1):
        model, x, y, cuts, loss = case.build(seed=1)
        heads = heads_for(case)
        if seed:
            with torch.no_grad():
                for part in (model.blocks[1:], model.head, heads["blocks.1"], heads["blocks.2"]):
                    for p in part.parameters():
                        p.normal_(generator=torch.Generator().manual_seed(p.numel()))
        LocalLoss(model, cuts, heads=heads, loss=loss).estimate(x, y)
        names = [name for name, _ in model.named_parameters() if name.startswith(("stem", "blocks.0"))]
        grads.append([*(model.get_parameter(name).grad for name in names), *(p.grad for p in heads["blocks.0"].parameters())])
        assert model.blocks[1].conv1.weight.grad.any()
    assert all(g.any() for g in grads[0])
    assert all(torch.equal(g, h) for g, h in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", ["linear", "mlp", "predsim"])
def test_learns(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    x = torch.randn(128, 10)
    y = (x[:, :3] ** 2).argmax(1)
    estimator = LocalLoss(model, heads=make_heads(model, x, kind, width=32))
    optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        step = estimator.estimate(x, y)
        optimizer.step()
    assert step.loss < 0.9  # log 3 = 1.1 at first


def test_heads_are_required_and_must_fit() -> None:
    case = by_name("mlp")
    model, _, _, cuts, _ = case.build()
    heads = heads_for(case)
    with pytest.raises(TypeError, match="heads"):
        LocalLoss(model, cuts)
    with pytest.raises(UsageError, match=r"'1'.*no head.*make_heads"):
        LocalLoss(model, cuts, heads={"0": heads["0"]})
    with pytest.raises(UsageError, match=r"head.*'O'"):
        LocalLoss(model, cuts, heads={**heads, "O": heads["0"]})


def test_names_with_dots() -> None:
    """Cut names are paths; the estimator's state can be saved all the same."""
    case = by_name("residual")
    model, x, y, cuts, loss = case.build()
    estimator = LocalLoss(model, cuts, heads=heads_for(case), loss=loss)
    assert tuple(estimator.estimate(x, y).heads) == cuts
    fresh = LocalLoss(case.build(seed=2).model, cuts, heads=heads_for(case, seed=2), loss=loss)
    fresh.load_state_dict(estimator.state_dict())
    for p, q in zip(estimator.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_default_cuts() -> None:
    model, x, y, cuts, _ = by_name("mlp").build()
    estimator = LocalLoss(model, heads=make_heads(model, x, "linear"))
    assert estimator.cuts == cuts
    estimator.estimate(x, y)


class Looked(nn.Module):
    """A head whose embedding has sparse gradients."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(4, 3, sparse=sparse), nn.Linear(3, 3)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h) + self.embedding(torch.arange(len(h)) % 4)


def test_heads_with_sparse_gradients() -> None:
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    model, found = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), []
    for sparse in (True, False):
        torch.manual_seed(0)
        head = Looked(sparse)
        for estimator in (LocalLoss, partial(ForwardGradient, guess="local", engine="reverse")):
            head.zero_grad()
            estimator(model, heads={"1": head}).estimate(x, y)
            assert head.embedding.weight.grad is not None
            found.append(head.embedding.weight.grad.to_dense())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
