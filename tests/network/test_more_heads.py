"""Heads of copied later blocks, and heads whose loss is taken piece by piece."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward import ForwardGradient, LocalLoss, UsageError, make_heads
from onward.network.pieces import Pieces


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def blocks() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Six blocks: 4, 4, 6, 6 and 6 channels, the third half the size; the last is flat."""
    torch.manual_seed(0)
    sizes = ((2, 4, 1), (4, 4, 1), (4, 6, 2), (6, 6, 1), (6, 6, 1))
    parts = [nn.Sequential(nn.Conv2d(a, b, 3, stride, padding=1), nn.GroupNorm(1, b), nn.Tanh()) for a, b, stride in sizes]
    output = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return nn.Sequential(*parts, output).double(), torch.randn(4, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 2, 1, 2])


def test_auglocal_copies_evenly_chosen_later_blocks() -> None:
    model, x, y = blocks()
    heads = make_heads(model, x, "auglocal", depth=3)
    # ceil-free arithmetic by hand: 5 hidden blocks, depths floor((1 - k / 8) 3 + 1 / 2) = 3, 3, 2, 2, 1 of 5 - k at most
    chosen = {"0": [2, 3, 5], "1": [2, 4, 5], "2": [4, 5], "3": [4, 5], "4": [5]}
    for cut, numbers in chosen.items():
        copied = [part for part in heads[cut] if isinstance(part, nn.Sequential)]
        assert len(copied) == len(numbers)
        for block, number in zip(copied, numbers, strict=True):
            for p, q in zip(block.parameters(), model[number].parameters(), strict=True):
                assert p is not q
                assert torch.equal(p, q)
    # Where a block is passed over that changes the shape, an average pool and a 1x1 convolution do it.
    assert [type(part).__name__ for part in heads["1"]] == ["Sequential", "Sequential", "Sequential"]
    skipped = make_heads(model, x, "auglocal", depth=1)["0"]
    assert [type(part).__name__ for part in skipped] == ["AdaptiveAvgPool2d", "Conv2d", "Sequential"]
    step = LocalLoss(model, heads=heads).estimate(x, y)
    for cut, (value, z) in step.heads.items():
        h = model[: int(cut) + 1](x)
        close(z, heads[cut](h).detach())
        close(value, F.cross_entropy(heads[cut](h), y).detach())


def test_auglocal_of_a_flat_network_and_of_one_that_is_no_chain() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    heads = make_heads(model, torch.randn(4, 6), "auglocal", depth=1)
    assert [type(part).__name__ for part in heads["1"]] == ["Linear", "Sequential"]
    assert heads["3"](torch.randn(2, 4)).shape == (2, 3)
    nested = nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, 3))
    with pytest.raises(UsageError, match=r"auglocal head at cut '0\.1': cut '0\.1' lies inside a child"):
        make_heads(nested, torch.randn(4, 6), "auglocal", cuts=["0.1"])


SHAPES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "features": ((6,), 3, 1),
    "sequence": ((4, 6), 2, 2),
    "map": ((6, 4, 2), 3, 2),
    "whole": ((6, 4, 2), 1, 1),
}


def pieces_by_hand(h: Tensor, groups: int, patches: int) -> list[tuple[Any, ...]]:
    """The index of every piece in a sample's output, group by group, patch by patch."""

    def split(size: int, parts: int) -> list[slice]:
        return [slice(i * size // parts, (i + 1) * size // parts) for i in range(parts)]

    if h.dim() == 2:
        return [(c,) for c in split(h.shape[1], groups)]
    if h.dim() == 3:
        return [(t, c) for c in split(h.shape[2], groups) for t in split(h.shape[1], patches)]
    rows, columns = split(h.shape[2], patches), split(h.shape[3], patches)
    return [(c, a, b) for c in split(h.shape[1], groups) for a in rows for b in columns]


def built(name: str) -> tuple[nn.Sequential, dict[str, nn.Module], Tensor, Tensor, Tensor]:
    shape, groups, patches = SHAPES[name]
    torch.manual_seed(0)
    size = torch.Size(shape).numel()
    model = nn.Sequential(nn.Linear(5, size), nn.Unflatten(1, shape), nn.Sequential(nn.Flatten(), nn.Linear(size, 3))).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 2])
    heads = make_heads(model, x, "pieces", cuts=["1"], groups=groups, patches=patches)
    return model, heads, x, y, model[:2](x).detach()


@pytest.mark.parametrize("name", SHAPES)
def test_pieces_are_a_linear_head_in_parts(name: str) -> None:
    """The mean over positions, and a linear layer; each part depends on its own piece alone."""
    _, groups, patches = SHAPES[name]
    _, heads, _, _, h = built(name)
    head = heads["1"]
    assert isinstance(head, Pieces)
    channels_last = h if h.dim() < 4 else h.movedim(1, -1)
    mean = channels_last.reshape(len(h), -1, channels_last.shape[-1]).mean(1)
    close(head(h), F.linear(mean, head.classify.weight, head.classify.bias))
    close(head.whole(head.rows(h), h), h)
    parts = head.parts(h)
    for m, where in enumerate(pieces_by_hand(h, groups, patches)):
        close(head.rows(h).view(len(h), len(parts[0]), -1)[0, m].sort().values, h[0][where].flatten().sort().values)
        other = h.clone()
        other[(slice(None), *where)] += 1.0
        changed = (head.parts(other) - parts).abs().amax((0, 2)) > 1e-12
        assert changed.nonzero().flatten().tolist() == [m]


@pytest.mark.parametrize("engine", ["forward", "reverse"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_random_guess_is_measured_piece_by_piece(name: str, engine: str) -> None:
    """delta = <t, u> u in every piece of every sample, t the gradient of the head's loss."""
    _, groups, patches = SHAPES[name]
    model, heads, x, y, h = built(name)
    leaf = h.clone().requires_grad_()
    (t,) = torch.autograd.grad(F.cross_entropy(copy.deepcopy(heads["1"])(leaf), y), leaf)
    wanted = torch.zeros_like(h)
    for i in range(2):
        u = onward.directions.draw(h.shape, seed=5, step=0, block=0, direction=i, dtype=h.dtype)
        for n in range(len(h)):
            for where in pieces_by_hand(h, groups, patches):
                wanted[n][where] += (t[n][where] * u[n][where]).sum() * u[n][where] / 2
    estimator = ForwardGradient(model, ["1"], heads=heads, target="local", directions=2, engine=engine, seed=5)
    seen: list[Tensor] = []
    estimator.observe = lambda k, delta: seen.append(delta.clone())
    estimator.estimate(x, y)
    close(seen[0], wanted)


@pytest.mark.slow
def test_pieces_take_their_part_of_the_variance_away() -> None:
    """By M: with independent pieces, the variance of <t, u> u is (d / M + 1) |t|^2 instead of (d + 1) |t|^2."""

    def spread(name: str, groups: int, patches: int) -> float:
        model, heads, x, y, h = built(name)
        heads = make_heads(model, x, "pieces", cuts=["1"], groups=groups, patches=patches)
        nn.init.ones_(heads["1"].classify.weight[:1])
        leaf = h.clone().requires_grad_()
        (t,) = torch.autograd.grad(F.cross_entropy(heads["1"](leaf), y), leaf)
        estimator = ForwardGradient(model, ["1"], heads=heads, target="local", check=False)
        squares: list[float] = []
        estimator.observe = lambda k, delta: squares.append((delta - t).square().sum().item())
        for _ in range(300):
            estimator.estimate(x, y)
        return sum(squares) / len(squares) / t.square().sum().item()

    assert spread("map", 1, 1) == pytest.approx(48 + 1, rel=0.15)
    assert spread("map", 3, 2) == pytest.approx(4 + 1, rel=0.15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, x: make_heads(m, x, "pieces", groups=4), r"pieces head at cut '1': 6 channels cannot be divided into 4"),
        (lambda m, x: make_heads(m, x, "pieces", patches=2), "has no positions to divide into 2 patches"),
        (lambda m, x: make_heads(m, x, "linear", groups=2), "heads of groups 2: linear heads have none"),
        (lambda m, x: make_heads(m, x, "pieces", depth=2), "it is for kind='auglocal'"),
        (lambda m, x: make_heads(m, x, "auglocal", depth=0), "heads of depth 0: use at least 1"),
    ],
)
def test_sizes_that_do_not_fit(make: Callable[[nn.Module, Tensor], object], message: str) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(UsageError, match=message):
        make(model, torch.randn(4, 5))
