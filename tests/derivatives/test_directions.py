"""Random directions: their distribution, and what they are and are not a function of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onward.derivatives.directions import draw
from onward.errors import UsageError

NOISES = ["gaussian", "rademacher"]
KEY: dict[str, Any] = {"seed": 3, "step": 5, "block": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("block", [2, "layers.0.weight"])
def test_moments(noise: str, block: int | str, dtype: torch.dtype) -> None:
    u = draw((500, 400), seed=0, step=0, block=block, noise=noise, dtype=dtype).double()
    n = u.numel()
    fourth = 3 if noise == "gaussian" else 1
    assert abs(u.mean()) < 4 / math.sqrt(n)
    assert abs(u.square().mean() - 1) < 4 * math.sqrt((fourth - 1) / n) + 1e-12
    assert abs(u.pow(3).mean()) < 4 * math.sqrt((15 if noise == "gaussian" else 1) / n)
    assert abs(u.pow(4).mean() - fourth) < 4 * math.sqrt(96 / n)


def test_gaussian_distribution_function() -> None:
    u = draw((300, 333), seed=9, step=1, block=0, dtype=torch.float64).flatten().sort().values
    exact = 0.5 * (1 + torch.erf(u / math.sqrt(2)))
    empirical = torch.arange(1, len(u) + 1, dtype=torch.float64) / len(u)
    assert (exact - empirical).abs().max() < 1.6 / math.sqrt(len(u))  # Kolmogorov-Smirnov, p about 0.01


def test_rademacher_is_plus_or_minus_one() -> None:
    for shape in [(7,), (3, 5), (1, 1), (17, 2, 3)]:
        u = draw(shape, **KEY, noise="rademacher", dtype=torch.float64)
        assert u.shape == shape
        assert torch.equal(u.abs(), torch.ones(shape, dtype=torch.float64))


def test_no_two_entries_are_correlated() -> None:
    """Rows are samples, columns features: neither neighbours nor the rows of one group repeat one another."""
    for noise in NOISES:
        u = draw((40, 5000), **KEY, noise=noise, dtype=torch.float64)
        between = u @ u.t() / u.shape[1] - torch.eye(40)
        assert between.abs().max() < 5 * math.sqrt(2 / u.shape[1])
        for shift in range(1, 66):
            assert abs((u[:, shift:] * u[:, :-shift]).mean()) < 5 / math.sqrt(u.numel())


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4}, {"step": 6}, {"block": 2}, {"direction": 1}, {"offset": 4000}, {"block": "1"}, {"block": "weight"},
        {"seed": 5, "step": 3}, {"step": 1, "block": 5}, {"seed": -3}, {"seed": 3 + 2**32}, {"step": 5 + 2**32},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("noise", NOISES)
def test_every_part_of_the_key_matters(other: dict[str, Any], noise: str) -> None:
    shape = (2000, 10)
    u, v = draw(shape, **KEY, noise=noise), draw(shape, **(KEY | other), noise=noise)
    assert abs((u * v).mean()) < 5 / math.sqrt(u.numel())


@given(
    first=st.integers(0, 40),
    second=st.integers(0, 40),
    offset=st.integers(0, 200),
    rest=st.lists(st.integers(1, 5), max_size=3),
    noise=st.sampled_from(NOISES),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_a_row_depends_on_its_own_position_only(
    first: int, second: int, offset: int, rest: list[int], noise: str, dtype: torch.dtype
) -> None:
    options = {**KEY, "noise": noise, "dtype": dtype}
    whole = draw((first + second, *rest), offset=offset, **options)
    parts = [draw((first, *rest), offset=offset, **options), draw((second, *rest), offset=offset + first, **options)]
    assert whole.dtype == dtype
    assert torch.equal(whole, torch.cat(parts))


def test_global_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    u = draw((5, 3), **KEY)
    r = draw((5, 3), **KEY, noise="rademacher")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(u, draw((5, 3), **KEY))
    assert torch.equal(r, draw((5, 3), **KEY, noise="rademacher"))


def test_scalar_parameter() -> None:
    assert draw((), seed=0, step=0, block="temperature").shape == ()


def test_draws_are_the_callers_own() -> None:
    u = draw((4, 3), **KEY)
    u.zero_()
    assert draw((4, 3), **KEY).abs().sum() > 0


def test_unknown_noise() -> None:
    with pytest.raises(UsageError, match=r"gaussain.*did you mean 'gaussian'"):
        draw((2, 2), **KEY, noise="gaussain")
