"""The derivative along a direction, through what PyTorch's own forward mode refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import PeakBytes
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import onward
from onward import UsageError
from onward.derivatives import attention

close = torch.testing.assert_close


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Attention written out, one sample, head and query at a time."""
    rows = []
    for n in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = (a[n, h * a.shape[1] // q.shape[1]] for a in (k, v))
            for i in range(q.shape[2]):
                scores = torch.stack([scale * (q[n, h, i] * key).sum() for key in keys])
                if mask is not None:
                    scores = scores + mask.expand(*q.shape[:3], k.shape[2])[n, h, i]
                if causal:
                    scores = scores[: i + 1]
                rows.append((scores.softmax(0).unsqueeze(1) * values[: len(scores)]).sum(0))
    return torch.stack(rows).view(*q.shape[:3], -1)


@pytest.mark.parametrize("moves", ["qkv", "q", "kv", "v"])
@pytest.mark.parametrize(("form", "heads"), [("causal", 4), ("masked", 4), ("plain", 2)])
def test_attention_in_parts(form: str, heads: int, moves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula's own derivative by dual numbers and by central differences; with parts of every size."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 4, 3), (2, heads, 5, 3), (2, heads, 5, 3))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    directions = [torch.randn(a.shape, generator=generator, dtype=torch.float64) for a in (q, k, v)]
    directions = [u if name in moves else torch.zeros_like(u) for name, u in zip("qkv", directions, strict=True)]
    mask = torch.randn(2, 1, 4, 5, generator=generator, dtype=torch.float64) if form == "masked" else None
    causal, scale = form == "causal", 0.3

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=heads != 4)

    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask, causal, scale)

    expected, moved = torch.func.jvp(written, (q, k, v), tuple(directions))
    given = [u if name in moves else None for name, u in zip("qkv", directions, strict=True)]
    for numbers, least in ((1, 1), (20, 2), (50, 1), (1 << 20, 64)):
        monkeypatch.setattr(attention, "_NUMBERS", numbers)
        monkeypatch.setattr(attention, "_LEAST", least)
        y, found = onward.jvp(fused, (q, k, v), given)
        close(y, expected)
        close(found, moved, rtol=1e-9, atol=1e-12)
    h = 1e-6
    ahead, behind = (fused(*(a + s * h * u for a, u in zip((q, k, v), directions, strict=True))) for s in (1, -1))
    close(found, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_attention_of_longer_sequences(dtype: torch.dtype, tolerance: float) -> None:
    """Several parts, and an error as small as that of the kernel which computes the value."""
    torch.manual_seed(0)
    exact = [torch.randn(1, 2, 300, 32, dtype=torch.float64).to(dtype).double() for _ in range(6)]
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), tuple(exact[:3]), tuple(exact[3:])
        )
    given = [a.to(dtype) for a in exact]
    found = onward.jvp(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), given[:3], given[3:])
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() < tolerance * other.abs().max()


def test_memory_of_attention_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the number of tokens, once the scores of all would be more than what is held at once."""
    monkeypatch.setattr(attention, "_NUMBERS", 1 << 16)

    def peak(tokens: int) -> int:
        given = [torch.randn(1, 1, tokens, 4) for _ in range(6)]
        with torch.no_grad(), PeakBytes() as seen:
            onward.jvp(F.scaled_dot_product_attention, given[:3], given[3:])
        return seen.peak

    once, twice = peak(1024), peak(2048)
    assert once < 4 * 1024 * 1024 / 3
    assert twice < 2.2 * once


def test_batch_norm_in_train_mode_in_place_and_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    x, v = torch.randn(2, 8, 4, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}

    def run(scale: float) -> Tensor:
        moved = {name: p + scale * directions[name] for name, p in parameters.items()}
        return functional_call(copy.deepcopy(model), moved, (x + scale * v,))

    y, found = onward.jvp(lambda p, x: functional_call(model, p, (x,)), (parameters, x), (directions, v))
    close(y, run(0.0))
    close(found, (run(1e-6) - run(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)
    assert model[1].num_batches_tracked == 1
    _, along_x = onward.jvp(lambda p, x: functional_call(model, p, (x,)), (parameters, x), (None, v))
    _, along_p = onward.jvp(lambda p, x: functional_call(model, p, (x,)), (parameters, x), (directions, None))
    close(along_x + along_p, found)


def test_what_comes_back() -> None:
    x, v = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.ones(3, dtype=torch.float64)

    def function(x: Tensor, n: int, other: Tensor) -> dict[str, Any]:
        return {"y": x**n, "constant": other.clone(), "signs": x > 0, "words": "a", "twice": (x * other, other.sum())}

    y, found = onward.jvp(function, (x, 2, x), (v, None, 2 * v))  # one tensor in two places, each with its own tangent
    close(found["y"], 2 * x.detach())
    close(found["constant"], 2 * v)
    close(found["twice"][0], 3 * x.detach())
    assert (found["signs"], found["words"]) == (None, None)
    assert y["y"].requires_grad
    assert not found["y"].requires_grad
    close(torch.autograd.grad(y["y"].sum(), x)[0], 2 * x.detach())
    y, found = onward.jvp(function, (x, 2, x.detach().clone()), (v, None, None))
    close(found["constant"], torch.zeros_like(v))
    given = torch.ones(3)
    _, found = onward.jvp(lambda x: x, (torch.zeros(3),), (given,))
    found += 1
    close(given, torch.ones(3))  # what was given is not what came back


def test_through_a_gradient_taken_inside() -> None:
    """The Hessian times a vector."""

    def gradient(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad((x**3).sum(), x, create_graph=True)[0]

    x, v = torch.randn(2, 5, dtype=torch.float64)
    close(onward.jvp(gradient, (x,), (v,))[1], 6 * x.detach() * v)


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: onward.jvp(torch.sin, (torch.ones(2),), ()), "0 tangents for 1 primals"),
    (
        lambda: onward.jvp(torch.sin, (torch.ones(2),), (torch.ones(3),)),
        r"of shape \(3,\) for a tensor of shape \(2,\)",
    ),
    (lambda: onward.jvp(torch.sin, (torch.ones(2),), ((torch.ones(2),),)), "give them the same one"),
    (lambda: onward.jvp(torch.neg, (torch.tensor([1, 2]),), (torch.ones(2),)), "the tangent of a tensor of torch.int64"),
    (lambda: onward.jvp(lambda x, n: x * n, (torch.ones(2), 3), (None, torch.ones(2))), "the tangent of a int: give None"),
    (
        lambda: onward.jvp(lambda x: onward.jvp(torch.sin, (x,), (x,))[1], (torch.ones(2),), (torch.ones(2),)),
        "derivatives of derivatives are not followed",
    ),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_what_is_refused(wrong: Callable[[], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        wrong()


def test_dropout_in_attention_is_refused() -> None:
    q, kernel = torch.randn(1, 1, 4, 4), torch.ops.aten._scaled_dot_product_flash_attention.default
    with pytest.raises(UsageError, match="with dropout"):
        attention.attention(kernel, (q, q, q, 0.5), {}, (q,), [q, None, None, None])
