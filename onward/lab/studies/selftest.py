"""Every algorithm against its formula written out, on a network small enough that the formula is a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import onward
from onward.estimators.settings import parsed
from onward.lab.run.algorithms import find, read

TOLERANCE = 1e-10
"""Of the largest difference, relative to the largest number; everything is computed in float64."""


class Trial(NamedTuple):
    """A network that has run: ``h1 = tanh(x W1' + b1)``, ``h2 = tanh(h1 W2' + b2)``, ``z = h2 W3' + b3``."""

    estimator: Any
    weights: list[Tensor]
    """W1, b1, W2, b2, W3, b3."""
    x: Tensor
    h: list[Tensor]
    """h1 and h2."""
    y: Tensor
    targets: Tensor
    """The same as one-hot rows."""
    e: Tensor
    """dL/dz of the mean cross entropy."""

    def back(self, delta: Tensor) -> Tensor:
        """The true gradient at h1 from the error signal at h2."""
        return (delta * (1 - self.h[1] ** 2)) @ self.weights[2]

    @property
    def true(self) -> list[Tensor]:
        """The true gradients at h1 and h2."""
        at_h2 = self.e @ self.weights[4]
        return [self.back(at_h2), at_h2]

    def gradients(self, deltas: list[Tensor]) -> list[Tensor]:
        """The gradients of all parameters, from the error signals at h1 and h2."""
        found: list[Tensor] = []
        for below, h, delta in zip((self.x, self.h[0]), self.h, deltas, strict=True):
            inner = delta * (1 - h**2)
            found += [inner.T @ below, inner.sum(0)]
        return [*found, self.e.T @ self.h[1], self.e.sum(0)]

    def tangent(self, directions: list[Tensor]) -> Tensor:
        """The tangent of z where directions are added at h1 and h2."""
        at_h2 = (directions[0] @ self.weights[2].T) * (1 - self.h[1] ** 2) + directions[1]
        return at_h2 @ self.weights[4].T

    def local(self) -> list[Tensor]:
        """The gradients of the losses of linear heads at h1 and h2."""
        found = []
        for h, head in zip(self.h, self.estimator.heads.by_cut, strict=True):
            weight, bias = head.parameters()
            found.append((torch.softmax(h @ weight.T + bias, 1) - self.targets) / len(h) @ weight)
        return found


def _direct(trial: Trial) -> list[Tensor]:
    return trial.gradients([trial.e @ matrix for matrix in trial.estimator.feedback])


def _drtp(trial: Trial) -> list[Tensor]:
    return trial.gradients([-trial.targets @ matrix / len(trial.x) for matrix in trial.estimator.feedback])


def _dkp(trial: Trial) -> list[Tensor]:
    return _direct(trial) + [trial.e.T @ h for h in trial.h]


def _fdfa(trial: Trial) -> list[Tensor]:
    directions = [trial.estimator.direction(k, h, 0) for k, h in enumerate(trial.h)]
    z = trial.tangent(directions)
    learned = zip(trial.estimator.feedback, directions, strict=True)
    return _direct(trial) + [matrix - z.T @ u / len(u) for matrix, u in learned]


def _grape(trial: Trial) -> list[Tensor]:
    found = _fdfa(trial)
    for k, b in enumerate(trial.estimator.feedback, start=len(found) - len(trial.estimator.feedback)):
        measured, leaf = b.detach() - found[k].detach(), b.detach().clone().requires_grad_()
        with torch.enable_grad():
            angle = 1 - torch.cosine_similarity(leaf.flatten(), measured.flatten(), 0)
        (found[k],) = torch.autograd.grad(angle, leaf)
    return found


def _along(trial: Trial, guesses: list[Tensor], *, normalised: bool) -> list[Tensor]:
    """The true gradient at h1 and h2, of each sample projected on its guess."""
    found = []
    for true, u in zip(trial.true, guesses, strict=True):
        slope = (true * u).sum(1, keepdim=True)
        found.append(slope * u / (u * u).sum(1, keepdim=True) if normalised else slope * u)
    return trial.gradients(found)


def _guess_local(trial: Trial) -> list[Tensor]:
    return _along(trial, trial.local(), normalised=True)


def _weights_drawn(trial: Trial) -> list[Tensor]:
    named = trial.estimator.model.named_parameters()
    drawn = [trial.estimator.drawn_weights(name, p, 0) for name, p in named]
    true = trial.gradients(trial.true)
    slope = sum(float((g * v).sum()) for g, v in zip(true, drawn, strict=True))
    return [slope * v for v in drawn]


def _carried(trial: Trial, carriers: list[Tensor]) -> list[Tensor]:
    """The reverse sweep with other weights than W2 and W3 to carry the error back."""
    at_h2 = trial.e @ carriers[2]
    return trial.gradients([(at_h2 * (1 - trial.h[1] ** 2)) @ carriers[1], at_h2])


def _fa(trial: Trial) -> list[Tensor]:
    return _carried(trial, list(trial.estimator.feedback))


def _kp(trial: Trial) -> list[Tensor]:
    found = _fa(trial)
    return [*found, *found[::2]]


def _signs(trial: Trial, sizes: list[Tensor]) -> list[Tensor]:
    return _carried(trial, [size * w.sign() for size, w in zip(sizes, trial.weights[::2], strict=True)])


def _usf(trial: Trial) -> list[Tensor]:
    return _signs(trial, [w.square().mean().sqrt() for w in trial.weights[::2]])


def _brsf(trial: Trial) -> list[Tensor]:
    named = [(name, p) for name, p in trial.estimator.model.named_parameters() if p.dim() == 2]
    drawn = [trial.estimator.drawn(p.shape, f"feedback {name}", p).abs() for name, p in named]
    return _signs(trial, [r * p.square().mean().sqrt() for r, (_, p) in zip(drawn, named, strict=True)])


def _spsa(trial: Trial) -> list[Tensor]:
    estimator, losses = trial.estimator, []
    drawn = [estimator.drawn(p.shape, name, p, 0, noise="gaussian") for name, p in estimator.model.named_parameters()]
    for sign in (1, -1):
        moved = [w + sign * estimator.eps * v for w, v in zip(trial.weights, drawn, strict=True)]
        losses.append(-(torch.log_softmax(_outputs(moved, trial.x)[-1], 1) * trial.targets).sum() / len(trial.x))
    return [(losses[0] - losses[1]) / (2 * estimator.eps) * v for v in drawn]


def _node(trial: Trial) -> list[Tensor]:
    sigma, w = trial.estimator.sigma, trial.weights
    drawn = [trial.estimator.direction(k, h, 0) for k, h in enumerate(trial.h)]
    h2 = torch.tanh((trial.h[0] + sigma * drawn[0]) @ w[2].T + w[3]) + sigma * drawn[1]
    losses = [-(torch.log_softmax(h @ w[4].T + w[5], 1) * trial.targets).sum(1) for h in (h2, trial.h[1])]
    slopes = (losses[0] - losses[1]).unsqueeze(1) / (sigma * len(trial.x))
    return trial.gradients([slopes * u for u in drawn])


def _ff(trial: Trial) -> list[Tensor]:
    estimator, count = trial.estimator, len(trial.x)
    rows = torch.cat([trial.x, trial.x])
    wrong = estimator._wrong(trial.x, trial.y, 3)
    rows[:, :3] = torch.eye(3, dtype=rows.dtype, device=rows.device)[torch.cat([trial.y, wrong])]
    side = rows.new_tensor([-1.0] * count + [1.0] * count).unsqueeze(1)
    found = []
    for weight, bias in (trial.weights[:2], trial.weights[2:4]):
        h = torch.tanh(rows @ weight.T + bias)
        g = h.square().mean(1, keepdim=True)
        delta = torch.sigmoid(side * (g - estimator.threshold)) * side / (2 * count) * 2 * h / h.shape[1]
        inner = delta * (1 - h**2)
        found += [inner.T @ rows, inner.sum(0)]
        rows = h / g.sqrt()
    return [*found, *(torch.zeros_like(w) for w in trial.weights[4:])]


def _outputs(weights: list[Tensor], x: Tensor) -> list[Tensor]:
    """h1, h2 and z."""
    h1 = torch.tanh(x @ weights[0].T + weights[1])
    h2 = torch.tanh(h1 @ weights[2].T + weights[3])
    return [h1, h2, h2 @ weights[4].T + weights[5]]


REFERENCES: dict[str, Callable[[Trial], list[Tensor]]] = {
    "bp": lambda trial: trial.gradients(trial.true),
    "brsf": _brsf,
    "dfa": _direct,
    "dkp": _dkp,
    "drtp": _drtp,
    "fa": _fa,
    "fdfa": _fdfa,
    "ff": _ff,
    "fg:guess=local": _guess_local,
    "fg:space=avg-weight": _weights_drawn,
    "frsf": lambda trial: _signs(trial, list(trial.estimator.feedback)),
    "grape": _grape,
    "kp": _kp,
    "local": lambda trial: trial.gradients(trial.local()),
    "node": _node,
    "spsa": _spsa,
    "usf": _usf,
}
"""By entry, the gradients of the network's parameters, and of the feedback matrices where these learn."""


def deviation(entry: str, *, device: str = "cpu", seed: int = 0) -> float:
    """How far the estimate of one algorithm is from its reference: the largest difference, relative to the largest number.

    >>> deviation("dfa") < TOLERANCE
    True
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = ((5, 6), (6, 4), (4, 3))
    layers = [nn.Linear(*size, dtype=torch.float64) for size in sizes]
    with torch.no_grad():
        for p in (p for layer in layers for p in layer.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    model = nn.Sequential(nn.Sequential(layers[0], nn.Tanh()), nn.Sequential(layers[1], nn.Tanh()), layers[2]).to(device)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64).to(device)
    y = torch.randint(3, (7,), generator=generator).to(device)
    name, given = read(entry)
    algorithm = find(name)
    settings = parsed(algorithm, given)
    if algorithm.needs_heads(**settings):
        heads = {cut: nn.Linear(size[1], 3, dtype=x.dtype) for cut, size in zip("01", sizes, strict=False)}
        settings["heads"] = {cut: head.to(device) for cut, head in heads.items()}
    cuts = None if entry == "fg:space=avg-weight" else ("0", "1")
    estimator = algorithm(model, cuts, seed=seed, **settings)
    trial = run(estimator, x, y, generator)
    with torch.no_grad():
        expected = REFERENCES[entry](trial)
    estimator.estimate(x, y)
    learned = [p for p in getattr(estimator, "feedback", None) or () if p.requires_grad]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in (*model.parameters(), *learned)]
    scale = max(float(one.abs().max()) for one in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / scale


@torch.no_grad()
def run(estimator: Any, x: Tensor, y: Tensor, generator: torch.Generator) -> Trial:
    """Run the estimator's network once, by the formula; feedback matrices are given numbers, for they may start as zeros."""
    if isinstance(estimator, onward.DirectFeedback):
        estimator.initialize(x)
        for matrix in estimator.feedback:
            matrix.copy_(torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype))
    weights = [p.detach().clone() for p in estimator.model.parameters()]
    *hidden, z = _outputs(weights, x)
    targets = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)[y]
    return Trial(estimator, weights, x, hidden, y, targets, (torch.softmax(z, 1) - targets) / len(z))
