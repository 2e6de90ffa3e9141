"""How well an estimator's error signals and parameter gradients agree with the true gradient, block by block."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onward.derivatives.directions import draw, seed_of
from onward.derivatives.graph import parameters_behind
from onward.errors import UsageError
from onward.estimators.backprop import Backprop
from onward.estimators.base import Estimator
from onward.estimators.feedback import Feedback
from onward.estimators.feedback_alignment import FeedbackAlignment
from onward.estimators.signals import known_at
from onward.network.cuts import cut_graph
from onward.network.hidden import hidden_state
from onward.network.labels import divided
from onward.network.replay import Replay
from onward.network.run import Loss, as_rows, call, compute_loss, leaves, output_error
from onward.network.suggest import default_cuts


class Agreement(NamedTuple):
    """How estimates g_1, g_2, ... agree with the true gradient g. Lengths are relative to the length of g.

    What takes several estimates is None where there is one; everything but the cosines is None where g is zero.
    """

    cosine: float
    """Mean over samples (of error signals; else there is one) and estimates."""
    squared_cosine: float
    """Mean of the squares."""
    norm_ratio: float | None
    """Mean ``|g_i| / |g|``."""
    bias: float | None
    """``|E g_i - g| / |g|``, less what the noise of a mean over finitely many estimates adds to it; 0 where that is all."""
    bias_noise: float | None
    """The size of that noise: a smaller bias cannot be seen. It falls as the square root of the number of estimates grows."""
    variance: float | None
    """``E|g_i - E g_i|^2 / |g|^2``"""
    snr: float | None
    """Signal to noise, ``|E g_i|^2 / E|g_i - E g_i|^2``; None without noise."""


class Block(NamedTuple):
    """One block of a network, as :func:`measure` found it."""

    signal: Agreement | None
    """Agreement of the error signal at its output with dL/dh_k; None where none is delivered, and for the last block."""
    parameters: Agreement | None
    """Agreement of the gradient of all its parameters; None where it has none to train."""
    feedback: Agreement | None
    """Agreement of the feedback matrix with the mean Jacobian from here to the output; None where there is no matrix."""
    cosines: Tensor | None
    """The cosines behind ``signal.cosine``, one for each estimate and sample."""


STEPS = (1e-2, 1e-3, 1e-4, 1e-5)
"""The lengths of a step that ``descent`` may be measured with, relative to that of all trained parameters together."""


class Alignment(dict[str, Block]):
    """The blocks of a network by their names, and how far estimates bring its loss down."""

    descent: float | None
    """``(L(theta) - L(theta - s g_i / |g_i|)) / (L(theta) - L(theta - s g / |g|))``, the mean over estimates g_i: what a step
    along the estimate brings, as a part of what one along the true gradient g brings. Cosines say where an estimate points,
    descent what that is worth. It is 1 for the true gradient; None where no step along that lowers the loss."""
    step: float | None
    """``s / |theta|``, with theta all trained parameters of the network: 0.01, or a tenth, hundredth or thousandth of it where
    the gradient's own step would go too far, and bring less than half of what its slope ``s |g|`` promises."""

    def __init__(self, blocks: dict[str, Block], descent: float | None, step: float | None) -> None:
        super().__init__(blocks)
        self.descent, self.step = descent, step


def measure(estimator: Estimator, x: Any, y: Any = None, *, estimates: int = 1, cuts: Sequence[str] | None = None) -> Alignment:
    """How so many estimates on one batch agree with the true gradient of the network's loss, for each block of the network.

    Blocks have the names of the cuts at their ends, the last is ``output``. ``cuts`` are those to look at where the estimator
    has none of its own. The error signal is what block k differentiates itself with: delta_k, or, in spaces of parameters, the
    guess u_k. Estimates differ by their random directions; dropout draws the same masks in all of them, and in the truth.

    What a small step along the estimates is worth for the loss is in ``descent`` of the result: an :class:`Alignment`.

    Everything is done on copies: the estimator, its gradients, its running statistics and the generators stay as they are.

    Raises :class:`onward.UsageError` for fewer than 1 estimate, and where ``estimate`` or the cuts would.

    >>> import onward
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = measure(onward.Backprop(model), torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> {name: f"{block.parameters.cosine:.3f}" for name, block in found.items()}
    {'1': '1.000', 'output': '1.000'}
    >>> f"{found.descent:.3f}"
    '1.000'
    """
    if estimates < 1:
        raise UsageError(f"estimates={estimates}: compare at least 1 with the true gradient")
    x, y = divided(estimator.model, x, y)
    cuts = tuple(estimator.cuts or (default_cuts(estimator.model) if cuts is None else cuts))
    learner = copy.deepcopy(estimator)
    learner.kept = None  # gradients are compared
    again = Replay(estimator.model)
    try:
        with again:
            truth = _true_gradients(estimator.model, cuts, estimator.loss, x, y)
        signals = [_Comparison(signal.flatten(1)) for signal in truth.signals]
        parameters = [_Comparison(_row(truth.parameters, names)) for names in truth.blocks]
        with again:
            descent = _Descent(estimator.model, estimator.loss, x, y, truth.parameters)
        for _ in range(estimates):
            learner.zero_grad()
            with again, _observing(learner, cuts) as observed:
                learner.estimate(x, y)
            for k, signal in observed.items():
                signals[k].add(signal.flatten(1))
            gradients = {name: p.grad for name, p in learner.model.named_parameters()}
            descent.add({name: _or_zero(gradients[name], g) for name, g in truth.parameters.items()})
            for block, names in zip(parameters, truth.blocks, strict=True):
                block.add(_row({name: _or_zero(gradients[name], truth.parameters[name]) for name in names}, names))
        feedback: list[Agreement | None] = [None] * len(cuts)
        if isinstance(matrices := getattr(learner, "feedback", None), Feedback):
            with again:
                jacobians = _mean_jacobians(estimator, matrices, cuts, x, y)
            feedback = [_compare(b.detach().view(1, -1), j.view(1, -1)) for b, j in zip(matrices, jacobians, strict=True)]
    finally:
        with again:
            pass  # the generators are as before the measurement
    last = "output" if "output" not in cuts else "last block"
    blocks = {
        name: Block(
            signal.result() if signal else None,
            block.result() if names else None,
            matrix,
            torch.stack(signal.cosines) if signal and signal.cosines else None,
        )
        for name, signal, block, names, matrix in zip(
            [*cuts, last], [*signals, None], parameters, truth.blocks, [*feedback, None], strict=True
        )
    }
    return Alignment(blocks, descent.mean(), descent.step)


def cosines(estimator: Estimator, x: Any, y: Any = None) -> dict[str, Tensor]:
    """At each cut, each sample's cosine between its error signal and the true gradient dL/dh_k, of shape (N,).

    Raises :class:`onward.UsageError` for an estimator that delivers no error signals.

    >>> import onward
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = cosines(onward.DFA(model), torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> found["1"].shape
    torch.Size([3])
    """
    if not estimator.cuts:
        raise UsageError(f"{type(estimator).__name__} has no cuts here, so it delivers no error signals to compare")
    blocks = list(measure(estimator, x, y).values())[:-1]
    found = {name: block.cosines[0] for name, block in zip(estimator.cuts, blocks, strict=True) if block.cosines is not None}
    if len(found) < len(blocks):
        raise UsageError(
            f"{type(estimator).__name__} delivers no error signal to {len(blocks) - len(found)} of its "
            f"{len(blocks)} cuts: there is nothing to compare with the true gradient"
        )
    return found


class _Descent:
    """How much the loss falls in one step along estimates, beside a step along the gradient; on a copy of the network."""

    def __init__(self, model: nn.Module, loss: Loss, x: Any, y: Any, gradients: dict[str, Tensor]) -> None:
        self.model = copy.deepcopy(model)
        self.again = Replay(self.model)
        if any(is_lazy(p) for p in self.model.parameters()):
            call(self.model, x)  # gives them their sizes
        self.fall: list[float] = []
        parameters = dict(self.model.named_parameters())
        self.parameters = {name: parameters[name] for name in gradients}
        self.loss = lambda: compute_loss(loss, call(self.model, x), y).double().item()
        with self.again.frozen(), torch.enable_grad():  # which a network may ask for in its forward
            self.before = self.loss()
        whole, slope = _length({name: p.detach() for name, p in self.parameters.items()}), _length(gradients)
        self.step: float | None = None
        for step in STEPS:
            self.length = step * whole
            self.most = self._fall(gradients)
            if self.most > 0 and self.most >= 0.5 * self.length * slope:
                self.step = step
                break

    def add(self, gradients: dict[str, Tensor]) -> None:
        if self.step is not None:
            self.fall.append(self._fall(gradients))

    def mean(self) -> float | None:
        if self.step is None:
            return None
        found = sum(self.fall) / len(self.fall) / self.most
        return found if math.isfinite(found) else None

    def _fall(self, gradients: dict[str, Tensor]) -> float:
        """L(theta) - L(theta - s g / |g|); 0 where g is."""
        length = _length(gradients)
        if length == 0:
            return 0.0
        held = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = held[name] - (self.length / length) * gradients[name].to(p.dtype)
            torch.clear_autocast_cache()  # it knows a parameter by its object, and not by what that holds
            with self.again.frozen(), torch.enable_grad():
                return self.before - self.loss()
        finally:
            for name, p in self.parameters.items():
                p.data = held[name]
            torch.clear_autocast_cache()


def _length(tensors: dict[str, Tensor]) -> float:
    """Of all of them together."""
    return sum(tensor.double().square().sum().item() for tensor in tensors.values()) ** 0.5


class _Comparison:
    """Estimates with the truth, one row for each sample; a running mean and a sum of squares around it."""

    def __init__(self, truth: Tensor) -> None:
        self.truth = truth
        self.mean = torch.zeros_like(truth)
        self.squares = 0.0
        self.cosines: list[Tensor] = []
        self.lengths: list[float] = []

    def add(self, estimate: Tensor) -> None:
        self.cosines.append(torch.nn.functional.cosine_similarity(estimate, self.truth))
        self.lengths.append(estimate.norm().item())
        before = estimate - self.mean
        self.mean += before / len(self.cosines)
        self.squares += (before * (estimate - self.mean)).sum().item()

    def result(self) -> Agreement | None:
        m, length = len(self.cosines), self.truth.norm().item()
        if m == 0:
            return None
        found = torch.stack(self.cosines)
        agreement = Agreement(found.mean().item(), found.square().mean().item(), None, None, None, None, None)
        if length == 0:
            return agreement
        agreement = agreement._replace(norm_ratio=sum(self.lengths) / m / length)
        if m == 1:
            return agreement
        variance = self.squares / (m - 1)
        bias = (self.mean - self.truth).square().sum().item() - variance / m
        signal = self.mean.square().sum().item() - variance / m
        return agreement._replace(
            bias=max(0.0, bias) ** 0.5 / length,
            bias_noise=(variance / m) ** 0.5 / length,
            variance=variance / length**2,
            snr=max(0.0, signal) / variance if variance > 0 else None,
        )


def _compare(estimate: Tensor, truth: Tensor) -> Agreement | None:
    comparison = _Comparison(truth)
    comparison.add(estimate)
    return comparison.result()


class _Truth(NamedTuple):
    signals: list[Tensor]
    parameters: dict[str, Tensor]
    blocks: list[list[str]]
    """The names of the parameters of each block."""


def _true_gradients(model: nn.Module, cuts: Sequence[str], loss: Loss, x: Any, y: Any) -> _Truth:
    """Backpropagation through a copy of the network."""
    model = copy.deepcopy(model)
    outputs, logits = _run(model, cuts, x)
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    blocks: list[list[str]] = []
    placed: set[nn.Parameter] = set()
    for ends in [*([h] for h in outputs), leaves(logits)]:
        fresh = [p for p in parameters_behind(*ends) if p not in placed]
        blocks.append([names[p] for p in fresh])
        placed.update(fresh)
    with torch.enable_grad():
        found = torch.autograd.grad(compute_loss(loss, logits, y), [*outputs, *names], allow_unused=True)
    signals = [_or_zero(g, h) for h, g in zip(outputs, found[: len(outputs)], strict=True)]
    parameters = {name: _or_zero(g, p) for (p, name), g in zip(names.items(), found[len(outputs) :], strict=True)}
    return _Truth(signals, parameters, blocks)


def _mean_jacobians(estimator: Estimator, feedback: Feedback, cuts: Sequence[str], x: Any, y: Any) -> list[Tensor]:
    """What each matrix stands for, at each cut: the mean over samples of dz_n/dh_{k,n} (C x d_k), or of one position's.

    One backward pass for each output. Random signs tell each sample's own derivative, and each token's, from what it does to
    others through batch statistics and attention; of that, some noise is left, a part in their number of the whole.
    """
    outputs, output = _run(copy.deepcopy(estimator.model), cuts, x)
    found = output_error(estimator.loss, output, y)
    known, z = known_at(estimator, x, y, found), as_rows(found.at)
    layouts = [feedback.layout(k, h, known) for k, h in enumerate(outputs)]
    jacobians = [z.new_zeros(layout.size) for layout in layouts]
    for tokens in {layout.tokens for layout in layouts}:
        here = [k for k, layout in enumerate(layouts) if layout.tokens is tokens]
        with torch.enable_grad():
            rows = layouts[here[0]].rows(z)
        weights = known.weights if tokens else z.new_full((len(z), 1), 1 / len(z))
        shape, seed = (len(rows), 1), seed_of(estimator.seed, "jacobian")
        signs = draw(shape, seed=seed, step=0, block=0, noise="rademacher", dtype=z.dtype, device=z.device)
        for c in range(rows.shape[1]):
            with torch.enable_grad():
                signed = (rows[:, c] * signs[:, 0]).sum()
            gradients = torch.autograd.grad(signed, [outputs[k] for k in here], retain_graph=True, allow_unused=True)
            for k, g in zip(here, gradients, strict=True):
                columns = layouts[k].columns(_or_zero(g, outputs[k])).to(z.dtype)
                jacobians[k][c] = (columns * signs * weights).sum(0)
    return jacobians


def _run(model: nn.Module, cuts: Sequence[str], x: Any) -> tuple[list[Tensor], Any]:
    """The network's outputs at the cuts and at its end, with the whole graph."""
    outputs: list[Tensor] = []

    def keep(k: int, h: Tensor) -> Tensor:
        outputs.append(h if h.requires_grad else h.detach().requires_grad_())
        return outputs[k].clone()  # what follows may overwrite it

    with torch.enable_grad(), cut_graph(model, cuts, keep):
        logits = call(model, x)
    return outputs, logits


@contextmanager
def _observing(learner: Estimator, cuts: Sequence[str]) -> Iterator[dict[int, Tensor]]:
    """The error signals that arrive at the outputs of the blocks; those of a sweep over all blocks are what it brings there."""
    signals: dict[int, Tensor] = {}

    def note(k: int, delta: Tensor) -> None:
        signals[k] = delta.detach().clone()

    def watch(k: int, output: Any) -> None:
        h, _ = hidden_state(output)
        if h is not None and h.requires_grad:
            h.register_hook(lambda delta: note(k, delta))

    hooks = []
    if isinstance(learner, (Backprop, FeedbackAlignment)):
        for k, name in enumerate(cuts):
            module = learner.model.get_submodule(name)
            hooks.append(module.register_forward_hook(lambda module, args, h, k=k: watch(k, h)))
    learner.observe = note
    try:
        yield signals
    finally:
        learner.observe = None
        for hook in hooks:
            hook.remove()


def _row(gradients: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """The gradients of those parameters as one row."""
    return torch.cat([gradients[name].reshape(1, -1) for name in names], 1) if names else torch.zeros(1, 0)


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.detach().to_dense()
