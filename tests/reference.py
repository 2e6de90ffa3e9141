"""Slow, explicit versions of what the library computes, sharing no code with it.

The network runs whole, by plain reverse mode, and everything else is a loop over samples, classes and features. Each
function works on a copy, so that running statistics of the network at hand stay put, and starts the global generator at
`MASKS`, so that dropout draws the masks the library draws after `torch.manual_seed(MASKS)`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import onward

MASKS = 1234
Loss = Callable[[Tensor, Tensor], Tensor]
Gradients = dict[str, Tensor]


def close(actual: Tensor | None, expected: Tensor | None, name: str = "", tolerance: float = 1e-9) -> None:
    """Equal to nine digits; no gradient and a gradient of zeros are the same."""
    if actual is None or expected is None:
        rest = expected if actual is None else actual
        assert rest is None or not rest.any(), f"{name}: {actual} against {expected}"
        return
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-3 * tolerance * scale, msg=lambda m: f"{name}: {m}")


def call(model: nn.Module, x: Any) -> Tensor:
    if isinstance(x, tuple):
        return model(*x)
    return model(**x) if isinstance(x, dict) else model(x)


@contextmanager
def rewritten(model: nn.Module, cuts: Sequence[str], rewrite: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Every cut's output replaced by `rewrite(position in cuts, output)`."""
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output, k=k: rewrite(k, output))
        for k, name in enumerate(cuts)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, x: Any, cuts: Sequence[str]) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """A copy of the network, its logits and every h_k, with the whole graph.

    What follows a cut gets a clone, as it may overwrite its input.
    """
    model, found = copy.deepcopy(model), {}

    def keep(k: int, output: Tensor) -> Tensor:
        found[k] = output
        return output.clone()

    with torch.random.fork_rng(devices=[]), rewritten(model, cuts, keep):
        torch.manual_seed(MASKS)
        z = call(model, x)
    return model, z, [found[k] for k in range(len(cuts))]


def output_error(z: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """e = dL/dz."""
    z = z.detach().requires_grad_()
    return torch.autograd.grad(loss(z, y), z)[0]


def backprop(model: nn.Module, x: Any, y: Tensor, loss: Loss) -> Gradients:
    """What `loss.backward()` leaves in `.grad`."""
    model, z, _ = run(model, x, ())
    model.zero_grad()
    loss(z, y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def true_errors(model: nn.Module, x: Any, y: Tensor, cuts: Sequence[str], loss: Loss) -> list[Tensor]:
    """g_k = dL/dh_k."""
    _, z, hidden = run(model, x, cuts)
    return list(torch.autograd.grad(loss(z, y), hidden))


def jacobians(model: nn.Module, x: Any, cuts: Sequence[str]) -> list[Tensor]:
    """dz_n/dh_{k,n}, of shape (N, C, d_k): each sample's own part."""
    _, z, hidden = run(model, x, cuts)
    result = [torch.zeros(*z.shape, h[0].numel(), dtype=z.dtype) for h in hidden]
    for n in range(z.shape[0]):
        for c in range(z.shape[1]):
            for jacobian, gradient in zip(result, torch.autograd.grad(z[n, c], hidden, retain_graph=True), strict=True):
                jacobian[n, c] = gradient[n].flatten()
    return result


def logits_tangent(model: nn.Module, x: Any, cuts: Sequence[str], directions: Sequence[Tensor]) -> Tensor:
    """The tangent of the logits when `directions[k]` is added to h_k, for all k at once: one row of the Jacobian at a time."""
    _, z, hidden = run(model, x, cuts)
    result = torch.zeros_like(z)
    for n in range(z.shape[0]):
        for c in range(z.shape[1]):
            rows = torch.autograd.grad(z[n, c], hidden, retain_graph=True)
            result[n, c] = sum((row * u).sum() for row, u in zip(rows, directions, strict=True))
    return result


def delivered(model: nn.Module, x: Any, y: Tensor, cuts: Sequence[str], loss: Loss, errors: Sequence[Tensor]) -> Gradients:
    """Each block differentiated alone: its input a constant, `errors[k]` the gradient at its output."""
    model, found = copy.deepcopy(model), {}

    def cut(k: int, output: Tensor) -> Tensor:
        found[k] = output
        return output.detach().clone()

    with torch.random.fork_rng(devices=[]), rewritten(model, cuts, cut):
        torch.manual_seed(MASKS)
        value = loss(call(model, x), y)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total: Gradients = {}
    for output, error in [*((found[k], errors[k].reshape(found[k].shape)) for k in range(len(cuts))), (value, None)]:
        if not output.requires_grad:
            continue
        gradients = torch.autograd.grad(output, list(named.values()), error, allow_unused=True, retain_graph=True)
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                total[name] = total[name] + gradient if name in total else gradient
    return total


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` for matrices, by loops over Python numbers."""
    rows, columns = a.tolist(), b.t().tolist()
    return torch.tensor([[sum(p * q for p, q in zip(r, c, strict=True)) for c in columns] for r in rows], dtype=a.dtype)


def outer_sum(a: Tensor, b: Tensor) -> Tensor:
    """sum_n a_n (x) b_n, of shape (C, d), one sample, class and feature at a time."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=a.dtype).tolist()
    for left, right in zip(a.tolist(), b.tolist(), strict=True):
        for c, p in enumerate(left):
            for i, q in enumerate(right):
                total[c][i] += p * q
    return torch.tensor(total, dtype=a.dtype)


def direct_feedback(
    model: nn.Module, x: Any, y: Tensor, cuts: Sequence[str], loss: Loss, feedback: Sequence[Tensor]
) -> tuple[Gradients, Tensor, list[Tensor]]:
    """Parameter gradients under delta_k = e B_k; also e and every h_k (N x d_k)."""
    _, z, hidden = run(model, x, cuts)
    e = output_error(z, y, loss)
    gradients = delivered(model, x, y, cuts, loss, [product(e, b.detach()) for b in feedback])
    return gradients, e, [h.detach().flatten(1) for h in hidden]


def target_projection(
    model: nn.Module, x: Any, y: Tensor, cuts: Sequence[str], loss: Loss, feedback: Sequence[Tensor]
) -> Gradients:
    """Parameter gradients under delta_{k,n} = -(1/N) y_n B_k, y_n one-hot or the numbers that the loss compares with."""
    z = run(model, x, cuts)[1].flatten(1)
    rows = [[float(c == int(label)) for c in range(z.shape[1])] if y.dim() == 1 else label.flatten().tolist() for label in y]
    targets = torch.tensor(rows, dtype=z.dtype)
    return delivered(model, x, y, cuts, loss, [-product(targets, b.detach()) / len(y) for b in feedback])


def _feedback_signal(*arguments: Any) -> Gradients:
    return direct_feedback(*arguments)[0]


SIGNALS: dict[str, Callable[..., Gradients]] = {
    **dict.fromkeys(("dfa", "dkp", "fdfa", "grape"), _feedback_signal),
    "drtp": target_projection,
}
"""Parameter gradients by rule, given what its matrices are: ``(model, x, y, cuts, loss, feedback)``."""


def block_directions(hidden: Sequence[Tensor], seed: int, step: int, direction: int, noise: str = "gaussian") -> list[Tensor]:
    """The directions the library promises to use at step `step`, one per cut."""
    return [
        onward.directions.draw(
            h.shape, seed=seed, step=step, block=k, direction=direction, noise=noise, dtype=h.dtype, device=h.device
        )
        for k, h in enumerate(hidden)
    ]


def fdfa_feedback(
    model: nn.Module, x: Any, cuts: Sequence[str], feedback: Sequence[Tensor], seed: int, step: int, count: int, noise: str
) -> list[Tensor]:
    """B_k - (1/N) sum_n ydot_n (x) u_{k,n}, mean over `count` directions."""
    _, _, hidden = run(model, x, cuts)
    total = [torch.zeros_like(b) for b in feedback]
    for direction in range(count):
        us = block_directions(hidden, seed, step, direction, noise)
        ydot = logits_tangent(model, x, cuts, us)
        for k, u in enumerate(us):
            total[k] += outer_sum(ydot, u.flatten(1)) / len(ydot) / count
    return [b.detach() - t for b, t in zip(feedback, total, strict=True)]


def turned(b: Tensor, measured: Tensor) -> Tensor:
    """The gradient of 1 - cos(b, measured) at b, by autograd."""
    b = b.detach().flatten().requires_grad_()
    (1 - torch.nn.functional.cosine_similarity(b, measured.flatten(), dim=0)).backward()
    return b.grad.view(measured.shape)


def full_jacobians(model: nn.Module, x: Any, cuts: Sequence[str]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """z, every h_k, and dz/dh_k between all pairs of numbers, of shape (*z.shape, *h_k.shape)."""
    _, z, hidden = run(model, x, cuts)
    rows = [torch.autograd.grad(one, hidden, retain_graph=True, allow_unused=True) for one in z.flatten()]
    found = [torch.stack([torch.zeros_like(h) if row[k] is None else row[k] for row in rows]) for k, h in enumerate(hidden)]
    return z.detach(), [h.detach() for h in hidden], [j.view(*z.shape, *h.shape) for j, h in zip(found, hidden, strict=True)]


def token_signal(e: Tensor, b: Tensor, real: Tensor) -> Tensor:
    """delta_{n,t} = e_{n,t} B at real tokens, one token at a time; e is N x T x V, or N x V: then each gets e_n B / T_n."""
    delta = torch.zeros(*real.shape, b.shape[1], dtype=b.dtype)
    for n, t in real.nonzero().tolist():
        row = e[n, t] if e.dim() == 3 else e[n] / int(real[n].sum())
        delta[n, t] = product(row.unsqueeze(0), b)[0]
    return delta


def token_products(a: Tensor, h: Tensor, real: Tensor, mean: bool) -> Tensor:
    """sum a_{n,t} (x) h_{n,t} over real tokens, or their mean; of a (N x V): sum_n a_n (x) sum_t h_{n,t}, or divided by N."""
    total = torch.zeros(a.shape[-1], h.shape[-1], dtype=a.dtype)
    for n, t in real.nonzero().tolist():
        total += outer_sum((a[n, t] if a.dim() == 3 else a[n]).unsqueeze(0), h[n, t].unsqueeze(0))
    return total / (1 if not mean else int(real.sum()) if a.dim() == 3 else len(a))


def activation_errors(
    model: nn.Module, x: Any, y: Tensor, cuts: Sequence[str], loss: Loss, seed: int, step: int, count: int, noise: str
) -> list[Tensor]:
    """delta_{k,n} = <e_n, ydot_n> u_{k,n}, mean over `count` directions, of the shape of h_k."""
    _, z, hidden = run(model, x, cuts)
    e = output_error(z, y, loss)
    total = [torch.zeros_like(h) for h in hidden]
    for direction in range(count):
        us = block_directions(hidden, seed, step, direction, noise)
        ydot = logits_tangent(model, x, cuts, us)
        for n in range(len(e)):
            scale = sum(p * q for p, q in zip(e[n].tolist(), ydot[n].tolist(), strict=True))
            for k, u in enumerate(us):
                total[k][n] += scale * u[n] / count
    return total


def parameter_directions(model: nn.Module, seed: int, step: int, direction: int, noise: str) -> Gradients:
    return {
        name: onward.directions.draw(p.shape, seed=seed, step=step, block=name, direction=direction, noise=noise, dtype=p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def weight_forward_gradient(
    model: nn.Module, x: Any, y: Tensor, loss: Loss, seed: int, step: int, count: int, noise: str
) -> Gradients:
    """dL(v) v, mean over `count` directions shared by the batch."""
    exact, total = backprop(model, x, y, loss), {}
    for direction in range(count):
        vs = parameter_directions(model, seed, step, direction, noise)
        slope = sum((exact[name] * v).sum() for name, v in vs.items() if name in exact)
        for name, v in vs.items():
            total[name] = total.get(name, 0) + slope * v / count
    return total


def own_part(model: nn.Module, x: Any, y: Tensor, cuts: Sequence[str], loss: Loss) -> list[Tensor]:
    """e_n^T dz_n/dh_{k,n}: the true error without what a sample does to the other samples' losses."""
    _, z, hidden = run(model, x, cuts)
    e = output_error(z, y, loss)
    parts = [torch.einsum("nc,ncd->nd", e, j) for j in jacobians(model, x, cuts)]
    return [part.reshape(h.shape) for part, h in zip(parts, hidden, strict=True)]


def assert_mean(draws: Tensor, expected: Tensor, power: float, sigmas: float = 4.0) -> None:
    """The average of `draws` (first dimension) is within its own standard error of `expected`, entry by entry and as a whole.

    `power`: the standard error must have come below this fraction of `expected`, or the test could see nothing.
    """
    draws, expected = draws.flatten(1), expected.flatten()
    count = len(draws)
    miss = draws.mean(0) - expected
    variance = draws.var(0) / count
    assert variance.sum().sqrt() < power * expected.norm(), (
        f"{count} draws are too few: {variance.sum().sqrt() / expected.norm():.2f}"
    )
    assert (miss.abs() <= (sigmas + 1) * variance.sqrt() + 1e-12).all()
    assert miss.norm() <= sigmas / 2 * variance.sum().sqrt()
    # Along the answer itself the error is much smaller than its norm: a wrong scale shows here.
    along = draws @ expected / expected.square().sum()
    assert abs(along.mean() - 1) <= sigmas * along.std() / count**0.5 + 1e-12


def floating(value: Any) -> list[Tensor]:
    """The floating-point tensors in any nest of results."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


class PeakBytes(TorchDispatchMode):
    """The largest number of bytes alive at once in tensors made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in floating(args)}
        for tensor in floating(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive and storage._cdata not in given:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result
