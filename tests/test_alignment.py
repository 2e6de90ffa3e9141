from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward.alignment import cosines, measure
from onward.errors import UsageError

D, CLASSES, SAMPLES = 8, 3, 64


def linear(batch_norm: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    """Two linear layers, whose Jacobian from the cut at "0" to the output is the second one's weight, and a batch."""
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(D)] if batch_norm else []
    model = nn.Sequential(nn.Linear(5, D), *norm, nn.Linear(D, CLASSES)).double()
    return model, torch.randn(SAMPLES, 5, dtype=torch.float64), torch.randint(CLASSES, (SAMPLES,))


def deep() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(n, D), nn.BatchNorm1d(D), nn.ReLU(inplace=True), nn.Dropout(0.2)) for n in (5, D)
    ]  # fmt: skip
    return nn.Sequential(*blocks, nn.Linear(D, CLASSES)), torch.randn(16, 5), torch.randint(CLASSES, (16,))


# ---- known values


@pytest.mark.parametrize("engine", ["forward", "reverse"])
@pytest.mark.parametrize("directions", [1, 2, 5])
def test_the_squared_cosine_of_m_directions_in_d_dimensions_is_m_over_d(engine: str, directions: int) -> None:
    """Within 4 standard errors: it is Beta(m/2, (d-m)/2) distributed, of mean m/d and variance 2m(d-m) / (d^2 (d+2))."""
    model, x, y = linear()
    estimator = onward.ForwardGradient(model, ["0"], engine=engine, directions=directions, orthogonal=directions > 1)
    block = measure(estimator, x, y, estimates=50)["0"]
    assert block.signal is not None
    assert block.cosines is not None
    assert block.cosines.shape == (50, SAMPLES)
    error = math.sqrt(2 * directions * (D - directions) / (D**2 * (D + 2)) / block.cosines.numel())
    assert block.signal.squared_cosine == pytest.approx(directions / D, abs=4 * error)
    assert block.signal.cosine == pytest.approx(block.cosines.mean().item())


def test_the_relative_variance_of_one_gaussian_direction_is_d_plus_1() -> None:
    """Within 5 %, from 25,600 samples' estimates; without bias; the same for the gradient of a block's parameters."""
    model, x, y = linear()
    found = measure(onward.ForwardGradient(model, ["0"]), x, y, estimates=400)
    signal, parameters = found["0"].signal, found["0"].parameters
    assert signal is not None
    assert signal.variance == pytest.approx(D + 1, rel=0.05)
    assert signal.snr == pytest.approx(1 / (D + 1), rel=0.1)
    assert signal.bias_noise == pytest.approx(math.sqrt((D + 1) / 400), rel=0.05)
    assert signal.bias is not None
    assert signal.bias < signal.bias_noise
    assert parameters is not None
    assert parameters.bias is not None
    assert parameters.bias < parameters.bias_noise
    exact = found["output"].parameters  # the last block gets its true gradient
    assert exact is not None
    assert (exact.cosine, exact.norm_ratio, exact.bias, exact.variance) == pytest.approx((1, 1, 0, 0), abs=1e-6)
    assert exact.snr is None


def test_an_average_over_directions_has_its_variance_divided() -> None:
    """Within 10 %."""
    model, x, y = linear()
    found = measure(onward.ForwardGradient(model, ["0"], directions=4), x, y, estimates=100)["0"].signal
    assert found is not None
    assert found.variance == pytest.approx((D + 1) / 4, rel=0.1)


def test_one_sample_has_the_same_variance_in_its_parameters() -> None:
    """Its parameter gradient is its error signal times its input: within 20 %, from 600 estimates."""
    model, x, y = linear()
    found = measure(onward.ForwardGradient(model, ["0"]), x[:1], y[:1], estimates=600)["0"]
    assert found.parameters is not None
    assert found.parameters.variance == pytest.approx(D + 1, rel=0.2)
    assert found.parameters.squared_cosine == pytest.approx(1 / D, rel=0.2)


def test_a_projection_is_biased_by_what_theory_says() -> None:
    """E <g,u>u/|u|^2 = g/d: a bias of 1 - 1/d and a length of sqrt(1/d) of the batch's; within 5 %."""
    model, x, y = linear()
    found = measure(onward.ForwardGradient(model, ["0"], scaling="projection"), x, y, estimates=200)["0"].signal
    assert found is not None
    assert found.bias == pytest.approx(1 - 1 / D, rel=0.05)
    assert found.norm_ratio == pytest.approx(math.sqrt(1 / D), rel=0.05)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_bp_has_cosine_1(checkpoint: bool) -> None:
    model, x, y = deep()
    found = measure(onward.Backprop(model, checkpoint=checkpoint), x, y, estimates=3)
    assert list(found) == ["0", "1", "output"]
    for name, block in found.items():
        for agreement in (block.parameters, *([block.signal] if name != "output" else [])):
            assert agreement is not None
            assert (agreement.cosine, agreement.norm_ratio) == pytest.approx((1, 1), abs=1e-5)
            assert (agreement.bias, agreement.variance) == pytest.approx((0, 0), abs=1e-5)
            assert agreement.snr is None


def test_the_true_gradient_as_a_guess_has_cosine_1() -> None:
    model, x, y = deep()
    estimator = onward.ForwardGradient(model, target="global", guess="global", engine="reverse")
    for name, found in cosines(estimator, x, y).items():
        torch.testing.assert_close(found, torch.ones(16), msg=name)
    for block in measure(estimator, x, y).values():
        assert block.parameters is not None
        assert block.parameters.cosine == pytest.approx(1, abs=1e-5)


def test_the_cosine_of_fdfa_rises_as_its_feedback_learns() -> None:
    """On a fixed linear network: 0 while B is 0; above 0.99 after 500 steps of a moving average over 100."""
    model, x, y = linear()
    estimator = onward.FDFA(model, ["0"])
    optimizer = None
    seen, feedback = [], []
    for steps in (0, 1, 20, 500):
        while estimator.step < steps:
            estimator.zero_grad()
            estimator.estimate(x, y)
            optimizer = optimizer or torch.optim.SGD(estimator.feedback.parameters(), lr=0.01)
            optimizer.step()
        block = measure(estimator, x, y)["0"]
        assert block.signal is not None
        assert block.feedback is not None
        seen.append(block.signal.cosine)
        feedback.append(block.feedback.cosine)
    assert seen[0] == feedback[0] == 0
    assert seen == sorted(seen)
    assert feedback == sorted(feedback)
    assert seen[-1] > 0.99
    assert feedback[-1] > 0.99


# ---- against slow references


def test_direct_feedback_against_an_explicit_loop() -> None:
    model, x, y = linear()
    estimator = onward.DFA(model, ["0"])
    block = measure(estimator, x, y)["0"]
    estimator.initialize(x)
    matrix = estimator.feedback[0].detach()
    second = model[1]
    found, squares = [], [0.0, 0.0]
    for n in range(SAMPLES):
        error = (F.softmax(model(x[n]), 0) - F.one_hot(y[n], CLASSES)).detach() / SAMPLES
        delta, true = error @ matrix, error @ second.weight.detach()
        found.append((delta @ true / (delta.norm() * true.norm())).item())
        squares = [squares[0] + (delta @ delta).item(), squares[1] + (true @ true).item()]
    assert block.signal is not None
    assert block.cosines is not None
    torch.testing.assert_close(block.cosines[0], torch.tensor(found, dtype=torch.float64))
    assert block.signal.norm_ratio == pytest.approx(math.sqrt(squares[0] / squares[1]))
    jacobian = second.weight.detach()
    assert block.feedback is not None
    assert block.feedback.cosine == pytest.approx((matrix * jacobian).sum().item() / (matrix.norm() * jacobian.norm()).item())
    assert block.feedback.norm_ratio == pytest.approx((matrix.norm() / jacobian.norm()).item())


def test_parameters_are_compared_as_one_vector_per_block() -> None:
    model, x, y = linear()
    estimator = onward.DFA(model, ["0"])
    block = measure(estimator, x, y)["0"]
    true = torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x), y), list(model[0].parameters()))])
    estimator.estimate(x, y)
    found = torch.cat([p.grad.flatten() for p in model[0].parameters() if p.grad is not None])
    assert block.parameters is not None
    assert block.parameters.cosine == pytest.approx((found @ true / (found.norm() * true.norm())).item())
    assert block.parameters.norm_ratio == pytest.approx((found.norm() / true.norm()).item())
    assert block.parameters.variance is None


def test_the_jacobian_behind_batch_norm_is_each_samples_own() -> None:
    """Random signs leave a noise of about 1/N: a cosine above 0.99 with the exact mean over samples of dz_n/dh_n."""
    model, x, y = linear(batch_norm=True)
    exact = torch.zeros(CLASSES, D, dtype=torch.float64)
    h = model[0](x).detach()
    jacobian = torch.autograd.functional.jacobian(lambda h: model[2](model[1](h)), h)
    for n in range(SAMPLES):
        exact += jacobian[n, :, n] / SAMPLES
    estimator = onward.DFA(model, ["0"])
    estimator.initialize(x)
    with torch.no_grad():
        estimator.feedback[0].copy_(exact)
    found = measure(estimator, x, y)["0"].feedback
    assert found is not None
    assert found.cosine > 0.99
    assert found.norm_ratio == pytest.approx(1, abs=0.05)


# ---- what it leaves alone, and refuses


@pytest.mark.parametrize("make", [onward.Backprop, onward.DKP, onward.FDFA, onward.ForwardGradient])
def test_looking_changes_nothing(make: Any) -> None:
    model, x, y = deep()
    estimator = make(model)
    estimator.estimate(x, y)
    before = copy.deepcopy(estimator.state_dict())
    gradients = {name: p.grad.clone() for name, p in estimator.named_parameters() if p.grad is not None}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    measure(estimator, x, y, estimates=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert estimator.observe is None
    assert before.keys() == estimator.state_dict().keys()
    for name, value in estimator.state_dict().items():
        assert value == before[name] if isinstance(value, dict) else torch.equal(value, before[name])
    for name, p in estimator.named_parameters():
        assert name not in gradients or torch.equal(p.grad, gradients[name])
    assert not any(module._forward_hooks for module in estimator.modules())


def test_local_losses_are_compared_with_the_networks_loss() -> None:
    model, x, y = deep()
    model.eval()
    estimator = onward.LocalLoss(model, heads=onward.make_heads(model, x, "linear"))
    found = measure(estimator, x, y)
    assert found["0"].signal is not None
    assert -1 <= found["0"].signal.cosine < 0.99
    assert found["output"].parameters is not None
    assert found["output"].parameters.cosine == pytest.approx(1, abs=1e-5)


def test_frozen_blocks_have_nothing_to_compare() -> None:
    model, x, y = deep()
    for p in model[0].parameters():
        p.requires_grad_(False)
    found = measure(onward.DFA(model, ["0", "1"]), x, y)
    assert found["0"].parameters is None
    assert found["0"].signal is None
    assert found["1"].parameters is not None


@pytest.mark.parametrize("make", [onward.Backprop, onward.DFA, onward.ForwardGradient])
def test_sparse_gradients(make: Any) -> None:
    """As those of a dense embedding, and those that are missing are zero."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        first = nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Tanh())
        model = nn.Sequential(first, nn.Linear(12, D), nn.Tanh(), nn.Linear(D, CLASSES)).double()
        block = measure(make(model, ["0", "2"]), torch.randint(7, (5, 3)), torch.randint(CLASSES, (5,)), estimates=2)["0"]
        found.append(block.parameters)
    assert found[1] == pytest.approx(found[0])


def test_estimators_without_error_signals() -> None:
    model, x, y = deep()
    with pytest.raises(UsageError, match="Backprop has no cuts here, so it delivers no error signals to compare"):
        cosines(onward.Backprop(model), x, y)
    estimator = onward.ForwardGradient(model.eval(), space="avg-weight")
    with pytest.raises(UsageError, match="ForwardGradient has no cuts here"):
        cosines(estimator, x, y)
    found = measure(estimator, x, y, estimates=2)
    assert found["0"].signal is None
    assert found["0"].parameters is not None
    with pytest.raises(UsageError, match="delivers no error signal to 2 of its 2 cuts"):
        cosines(onward.ForwardGradient(model, ["0", "1"], space="weight", engine="reverse"), x, y)


def test_at_least_one_estimate() -> None:
    model, x, y = deep()
    with pytest.raises(UsageError, match="estimates=0: compare at least 1"):
        measure(onward.DFA(model), x, y, estimates=0)


# ---- descent


def quadratic() -> tuple[nn.Module, Tensor, Tensor, Any]:
    """Two linear layers in a chain, and a squared loss: every number of a step can be computed by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    return model, torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64), F.mse_loss


def test_descent_by_hand() -> None:
    """(L(theta) - L(theta - s g_i / |g_i|)) / (L(theta) - L(theta - s g / |g|)), s = 0.01 |theta|, in plain matrices."""
    model, x, y, loss = quadratic()
    estimator = onward.DFA(model, ["0"], loss=loss)
    aligned, step = measure(estimator, x, y), 0.01
    found = aligned.descent
    assert aligned.step == step
    estimator.initialize(x)
    w, v, b = model[0].weight.detach(), model[1].weight.detach(), estimator.feedback[0].detach()
    e = 2 * (x @ w.T @ v.T - y) / len(x)
    last = e.T @ (x @ w.T)  # of the second layer, in both
    true, estimate = ((e @ v).T @ x, last), ((e @ b).T @ x, last)

    def after(g: tuple[Tensor, Tensor]) -> float:
        s = step * math.sqrt(w.square().sum() + v.square().sum()) / math.sqrt(g[0].square().sum() + g[1].square().sum())
        return ((x @ (w - s * g[0]).T @ (v - s * g[1]).T - y) ** 2).mean().item()

    before = ((x @ w.T @ v.T - y) ** 2).mean().item()
    assert found == pytest.approx((before - after(estimate)) / (before - after(true)), rel=1e-9)
    assert measure(onward.Backprop(model, loss=loss), x, y, cuts=["0"]).descent == pytest.approx(1, rel=1e-9)


def test_descent_of_a_small_step_is_the_cosine_of_all_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onward.alignment.STEPS", (1e-6,))
    model, x, y, loss = quadratic()
    estimator = onward.DFA(model, ["0"], loss=loss)
    found = measure(estimator, x, y).descent
    true = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(x), y), list(model.parameters()))])
    estimator.estimate(x, y)
    estimate = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert found == pytest.approx(F.cosine_similarity(estimate, true, dim=0).item(), rel=1e-4)


def test_a_step_is_shorter_where_the_gradient_would_go_too_far() -> None:
    """At L = w^2 with w = (1, a): the slope promises 2 a s along the second, and curvature takes s^2 from it."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Identity(), nn.Linear(1, 1, bias=False)).double()
    model[0].weight.requires_grad_(False).fill_(1.0)
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for distance, step in ((1e-1, 1e-2), (1.2e-2, 1e-2), (4e-3, 1e-3), (4e-4, 1e-4)):
        with torch.no_grad():
            model[2].weight.fill_(1 + distance)
        found = measure(onward.Backprop(model, loss=F.mse_loss), x, y, cuts=["0"])
        assert (found.descent, found.step) == (pytest.approx(1), step), distance
    with torch.no_grad():
        model[2].weight.fill_(1.0)  # the least loss there is
    found = measure(onward.Backprop(model, loss=F.mse_loss), x, y, cuts=["0"])
    assert (found.descent, found.step) == (None, None)


def test_descent_of_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
    found = measure(onward.Backprop(model), torch.randn(6, 4), torch.tensor([0, 1, 2, 1, 0, 1]), cuts=["0"])
    assert found.descent == pytest.approx(1, abs=1e-4)


def test_descent_is_a_mean_over_estimates_with_the_same_masks() -> None:
    """Dropout and batch statistics are those of the step; an estimate of nothing brings nothing; nothing is moved."""
    model, x, y = deep()
    before = copy.deepcopy(model.state_dict())
    assert measure(onward.Backprop(model), x, y, estimates=3).descent == pytest.approx(1, rel=1e-3)
    random = measure(onward.ForwardGradient(model), x, y, estimates=20).descent
    assert random is not None
    assert -0.5 < random < 0.9
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):  # whose casts of weights must be those of the step
        assert measure(onward.Backprop(model), x, y).descent == pytest.approx(1, rel=0.05)
    for p in model.parameters():
        p.requires_grad_(False)
    model[-1].weight.requires_grad_(True)
    with torch.no_grad():
        model[-1].weight.zero_()  # a step of a hundredth of nothing
    assert measure(onward.DFA(model, ["1"]), x, y).descent is None
