"""`validate` names what forward mode cannot differentiate and what mixes samples, with a remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CASES, Case
from torch import nn

import onward
from onward import validate


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_names_the_modules_that_mix_samples(case: Case) -> None:
    model = case.build().model
    problems = validate(model)
    assert bool(problems) == case.mixes_samples
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert {problem.module for problem in problems} == norms
    assert not validate(model.eval())


class Parametrized(nn.Module):
    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.layer = wrap(nn.Linear(3, 3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.EmbeddingBag(4, 3)), "1"),
        (lambda: nn.Sequential(nn.Linear(3, 3), torch.compile(nn.Linear(3, 3), backend="eager")), "1"),
        (lambda: nn.Sequential(nn.BatchNorm1d(3)), "0"),
        (lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval(), "0"),
        (lambda: nn.Sequential(nn.Sequential(nn.SyncBatchNorm(3))), "0.0"),
    ],
)
def test_problem_with_a_remedy(make: Callable[[], nn.Module], name: str) -> None:
    problems = validate(make())
    assert [problem.module for problem in problems] == [name]
    (problem,) = problems
    assert problem.problem
    assert problem.remedy
    assert all(part in str(problem) for part in problem)


@pytest.mark.filterwarnings("ignore")
def test_whole_network_compiled() -> None:
    problems = validate(torch.compile(nn.Linear(3, 3), backend="eager"))
    assert problems
    assert "compile" in str(problems[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", [onward.FDFA, onward.ForwardGradient])
def test_what_is_named_is_refused_and_never_silently_wrong(estimator: type) -> None:
    """Training a network with a compiled part either works or says so."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(3)]
    plain = nn.Sequential(*blocks, nn.Linear(3, 3))
    compiled = nn.Sequential(blocks[0], torch.compile(blocks[1], backend="eager"), blocks[2], plain[3])
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    expected = estimator(plain)
    expected.estimate(x, y)
    gradients = [p.grad.clone() for p in expected.parameters()]
    try:
        attempt = estimator(compiled, ["0", "1", "2"])
        attempt.zero_grad()
        attempt.estimate(x, y)
    except onward.UsageError as error:
        assert "compiled" in str(error)  # noqa: PT017 - either outcome is right
        return
    for p, gradient in zip(attempt.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore")
def test_parametrised_weights_are_named_or_work(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Sequential(wrap(nn.Linear(3, 3)), nn.Tanh()), nn.Linear(3, 3)
    )
    named = [problem for problem in validate(model) if problem.module.startswith("1")]
    if named:
        return
    model.double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    onward.FDFA(model).estimate(x, y)
    onward.ForwardGradient(model, space="avg-weight").estimate(x, y)
