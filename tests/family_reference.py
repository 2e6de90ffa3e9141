"""Forward gradients of every target, guess and space, by plain reverse mode and loops over samples.

Nothing is shared with the library but `onward.directions`, whose keys say which directions a step draws. A `Family` is one
network with its batch and heads; it keeps what several estimates need (signals, gradients of samples), as they are slow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import reference
import torch
import torch.nn.functional as F
from cases import Built, Case
from reference import Gradients
from torch import Tensor, nn

from onward.derivatives.directions import draw, seed_of

TARGETS = ("global", "local", "above", "sum")
GUESSES = (*TARGETS, "random", "ntk", "fixed-ntk", "feedback")
SIGNAL_SPACES = ("activation", "span-activation", "f-activation")  # those that deliver an error signal to a block
WEIGHT_SPACES = ("weight", "span-weight", "sign-weight", "random-sign-weight", "f-weight")  # one gradient for each sample
SPACES = (*SIGNAL_SPACES, "activation-2", *WEIGHT_SPACES, "avg-weight")

# A sample's gradient is taken with respect to a copy of the parameters that only this sample uses.
ONE_SAMPLE: dict[type, Callable[..., Tensor]] = {
    nn.Linear: lambda _, x, *own: F.linear(x, *own),
    nn.Conv1d: lambda layer, x, w, b=None: layer._conv_forward(x, w, b),
    nn.Conv2d: lambda layer, x, w, b=None: layer._conv_forward(x, w, b),
    nn.Conv3d: lambda layer, x, w, b=None: layer._conv_forward(x, w, b),
    nn.LayerNorm: lambda layer, x, *own: F.layer_norm(x, layer.normalized_shape, *own, eps=layer.eps),
    nn.GroupNorm: lambda layer, x, *own: F.group_norm(x, layer.num_groups, *own, eps=layer.eps),
    nn.Embedding: lambda layer, x, w: F.embedding(x, w, layer.padding_idx),
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
UNDECIDED = 1e-14  # the sign of an inner product below this is that of a rounding error
DEPENDENT, INDEPENDENT = 1e-7, 1e-4  # singular values, relative to the largest, that do not and that do count for a span


def head_for(h: Tensor, k: int, classes: int = 3, batch_norm: bool = False) -> nn.Module:
    """A small head: linear at even cuts, with a hidden layer at odd ones."""
    if k % 2 == 0 and not batch_norm:
        layers = [nn.Linear(h[0].numel(), classes)]
    else:
        norm = [nn.BatchNorm1d(5)] if batch_norm else []
        layers = [nn.Linear(h[0].numel(), 5), *norm, nn.Tanh(), nn.Linear(5, classes)]
    return nn.Sequential(nn.Flatten(), *layers).to(h.dtype)


def heads_for(case: Case, seed: int = 1, batch_norm: bool = False, train: bool = True) -> dict[str, nn.Module]:
    """The same heads for the same seed, one for each cut of a case network."""
    model, x, _, cuts, _ = case.build(seed)
    _, _, hidden = reference.run(model, x, cuts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = {cut: head_for(h, k, batch_norm=batch_norm) for k, (cut, h) in enumerate(zip(cuts, hidden, strict=True))}
    return {cut: head.train(train) for cut, head in heads.items()}


def with_own_copies(layer: nn.Module, own: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The layer's forward in which sample n has the parameters `own[..][n]`."""

    def sample_by_sample(x: Tensor) -> Tensor:
        rule = ONE_SAMPLE[type(layer)]
        return torch.cat([rule(layer, x[n : n + 1], *(p[n] for p in own)) for n in range(len(x))])

    def batch_norm(x: Tensor) -> Tensor:
        statistics = layer.training or layer.running_mean is None
        normal = F.batch_norm(x, layer.running_mean, layer.running_var, training=statistics, eps=layer.eps)
        gamma, beta = (torch.stack([p[n].view(-1, *[1] * (x.dim() - 2)) for n in range(len(x))]) for p in own)
        return normal * gamma + beta

    return batch_norm if isinstance(layer, BATCH_NORMS) else sample_by_sample


# Rows: one for each sample, an error signal or a parameter's gradient, flattened.


def inner_products(t: Tensor, u: Tensor) -> Tensor:
    return torch.stack([(t[n] * u[n]).sum() for n in range(len(t))])


def projected(products: Tensor, u: Tensor, eps: float, scaling: str = "projection") -> Tensor:
    """Each row of u times its measured inner product with the target, over its own square."""
    rows = torch.zeros_like(u)
    for n in range(len(u)):
        rows[n] = products[n] * u[n] / (((u[n] * u[n]).sum() + eps) if scaling == "projection" else 1)
    return rows


def filtered(products: Tensor, u: Tensor) -> Tensor:
    kept = [n for n in range(len(u)) if products[n] > 0]
    rows = torch.zeros_like(u)
    for n in kept:
        rows[n] = u[n] * len(u) / len(kept)
    return decided(products, u, rows)


def signed(products: Tensor, u: Tensor) -> Tensor:
    rows = torch.stack([products[n].sign() * u[n] for n in range(len(u))])
    return decided(products, u, rows)


def decided(products: Tensor, u: Tensor, rows: Tensor) -> Tensor:
    """NaN where a rounding error decides about the sign of something that can be seen."""
    doubtful = (products != 0) & (products.abs() < UNDECIDED) & u.any(1)
    return rows * float("nan") if doubtful.any() and u.abs().max() > 1e-9 else rows


def on_span(t: Tensor, u: Tensor) -> Tensor:
    """The rows of t projected on the span of the rows of u, by an orthonormal basis of it; NaN where its rank is in doubt."""
    _, sizes, basis = torch.linalg.svd(u, full_matrices=False)
    kept = sizes > INDEPENDENT * sizes.max()
    if (sizes[~kept] > DEPENDENT * sizes.max()).any():
        return t * float("nan")
    return t @ basis[kept].T @ basis[kept]


def factors(
    products: Sequence[Tensor], t: Tensor, us: Sequence[Tensor], eps: float, scaling: str, orthogonal: bool
) -> list[Tensor]:
    """The number that each sample's guess is multiplied by, for each direction."""
    result = [torch.zeros(len(t), dtype=t.dtype) for _ in us]
    for n in range(len(t)):
        if orthogonal:
            together = t[n].flatten() @ torch.linalg.pinv(torch.stack([u[n].flatten() for u in us]), rtol=DEPENDENT)
        for i, u in enumerate(us):
            if orthogonal:
                result[i][n] = together[i]
            else:
                over = (u[n] * u[n]).sum() + eps if scaling == "projection" else 1
                result[i][n] = products[i][n] / over / len(us)
    return result


class Family:
    """One step of every estimator of the family on one network, from one seed.

    `drawn_heads` are the weights of the heads of an "ntk" guess, `feedback` the matrices of a feedback guess.
    """

    def __init__(
        self,
        built: Built,
        heads: Mapping[str, nn.Module],
        *,
        seed: int = 0,
        step: int = 0,
        drawn_heads: Mapping[str, nn.Module] | None = None,
        feedback: Sequence[Tensor] = (),
    ) -> None:
        self.model, self.x, self.y, self.cuts, self.loss = built
        self.heads, self.drawn_heads, self.feedback = heads, drawn_heads, feedback
        self.seed, self.step = seed, step
        self._kept: dict[Any, Any] = {}

    def estimate(
        self,
        target: str,
        guess: str,
        space: str,
        *,
        engine: str = "reverse",
        eps: float = 1e-16,
        noise: str = "gaussian",
        scaling: str = "unbiased",
        directions: int = 1,
        orthogonal: bool = False,
    ) -> Gradients:
        """What `.grad` of every parameter of the network is to be."""
        total = dict(self.last_block)
        if guess != "random":
            scaling = "projection"

        def combine(t: Tensor, us: Sequence[Tensor], products: Sequence[Tensor] | None = None, coins: Tensor | None = None):
            """The rule of the space, for the rows of a target and of each direction of the guess."""
            if products is None:
                products = [inner_products(t, u) for u in us]
            if orthogonal:
                return torch.stack([on_span(t[n : n + 1], torch.stack([u[n] for u in us]))[0] for n in range(len(t))])
            if space.startswith("f-"):
                rows = [filtered(p, u) for p, u in zip(products, us, strict=True)]
            elif space.startswith("span-"):
                rows = [on_span(t, u) for u in us]
            elif space == "sign-weight":
                rows = [signed(p, u) for p, u in zip(products, us, strict=True)]
            elif space == "random-sign-weight":
                rows = [coins * u for u in us]
            else:
                rows = [projected(p, u, eps, scaling) for p, u in zip(products, us, strict=True)]
            return torch.stack(rows).mean(0)

        for k in range(len(self.cuts)):
            t = self.signals(target)[k]
            us = self.guesses(guess, k, directions, noise)
            measured = engine == "forward" and space in (*SIGNAL_SPACES, "activation-2")
            products = [self.slopes(target, k, u) for u in us] if measured else None
            if space in SIGNAL_SPACES:
                delta = combine(t.flatten(1), [u.flatten(1) for u in us], products)
                found = self.batch(k, delta.view(t.shape))
            elif space == "activation-2":
                if products is None:
                    products = [inner_products(t, u) for u in us]
                found = {}
                for c, u in zip(factors(products, t, us, eps, scaling, orthogonal), us, strict=True):
                    for name, rows in self.samples(k, u).items():
                        part = sum(c[n] * rows[n] for n in range(len(rows)))
                        found[name] = found[name] + part if name in found else part
            elif space == "avg-weight":
                found = {}
                guessed = self.batch(k, us[0]) if guess != "random" else {}
                for name, g in self.batch(k, t).items():
                    vs = [guessed[name]] if name in guessed else self._directions(name, g.shape, name, directions, noise)
                    row = combine(g.view(1, -1), [v.reshape(1, -1) for v in vs])
                    found[name] = row.view(g.shape)
            else:
                found = {}
                guessed = self.samples(k, us[0]) if guess != "random" else {}
                for name, g in self.samples(k, t).items():
                    vs = [guessed[name]] if name in guessed else self._directions(name, g.shape, k, directions, noise)
                    key = {"seed": seed_of(self.seed, name), "step": self.step, "block": k, "direction": -1}
                    coins = draw((len(g), 1), **key, noise="rademacher", dtype=g.dtype)
                    rows = combine(g.flatten(1), [v.flatten(1) for v in vs], coins=coins)
                    found[name] = rows.sum(0).view(g.shape[1:])
            for name, gradient in found.items():
                total[name] = total[name] + gradient if name in total else gradient
        return total

    def _directions(self, name: str, shape: Sequence[int], block: int | str, count: int, noise: str) -> list[Tensor]:
        """Directions for a parameter: one for the batch (block: its own name), or one for each sample (block: an index)."""
        seed = self.seed if isinstance(block, str) else seed_of(self.seed, name)
        key = {"seed": seed, "step": self.step, "block": block, "noise": noise, "dtype": self.error.dtype}
        return [draw(shape, **key, direction=i) for i in range(count)]

    # Signals: one tensor of the shape of h_k for each block k.

    @cached_property
    def hidden(self) -> list[Tensor]:
        return [h.detach() for h in reference.run(self.model, self.x, self.cuts)[2]]

    @cached_property
    def error(self) -> Tensor:
        """e = dL/dz."""
        return reference.output_error(reference.run(self.model, self.x, ())[1], self.y, self.loss)

    def signals(self, name: str) -> list[Tensor]:
        if name not in self._kept:
            self._kept[name] = self._signals(name)
        return self._kept[name]

    def _signals(self, name: str) -> list[Tensor]:
        if name == "feedback":
            products = [reference.product(self.error, b) for b in self.feedback]
            return [p.view(h.shape) for p, h in zip(products, self.hidden, strict=True)]
        _, z, hidden = reference.run(self.model, self.x, self.cuts)
        heads = self.drawn_heads if name == "ntk" else self.heads
        assert heads is not None
        own = [self.loss(copy.deepcopy(heads[cut])(h), self.y) for cut, h in zip(self.cuts, hidden, strict=True)]
        losses = [*own, self.loss(z, self.y)]
        meant: Callable[[int], Tensor] = {
            "global": lambda k: losses[-1],
            "local": lambda k: losses[k],
            "ntk": lambda k: losses[k],
            "fixed-ntk": lambda k: losses[k],
            "above": lambda k: losses[k + 1],
            "sum": lambda k: torch.stack(losses[k:]).sum(),
        }[name]
        return [torch.autograd.grad(meant(k), h, retain_graph=True)[0] for k, h in enumerate(hidden)]

    def guesses(self, name: str, k: int, directions: int, noise: str) -> list[Tensor]:
        if name != "random":
            return [self.signals(name)[k]]
        drawn = [reference.block_directions(self.hidden, self.seed, self.step, i, noise)[k] for i in range(directions)]
        return [self._kept.setdefault(("random", i, noise, k), u) for i, u in enumerate(drawn)]

    def slopes(self, target: str, k: int, u: Tensor) -> Tensor:
        """The derivative of each sample's target loss when `u` is added to h_k, all samples at once: e_n . (J u)_n."""
        first, last = {"global": (-1, None), "local": (k, k + 1), "above": (k + 1, k + 2), "sum": (k, None)}[target]
        result = torch.zeros(len(self.y), dtype=u.dtype)
        for e, jacobian in self._outputs[first:last]:
            for n in range(len(e)):
                for c in range(e.shape[1]):
                    result[n] += e[n, c] * (jacobian[n][c][k] * u).sum()
        return result

    @cached_property
    def _outputs(self) -> list[tuple[Tensor, list[list[Sequence[Tensor]]]]]:
        """Of each head and of the network: dL/dz, and the gradient of z[n][c] with respect to every h_k."""
        _, z, hidden = reference.run(self.model, self.x, self.cuts)
        heads = [copy.deepcopy(self.heads[cut])(h) for cut, h in zip(self.cuts, hidden, strict=True)]
        options = {"retain_graph": True, "allow_unused": True}
        return [
            (
                reference.output_error(output, self.y, self.loss),
                [[torch.autograd.grad(one, hidden, **options) for one in row] for row in output],
            )
            for output in [*heads, z]
        ]

    # The gradients of one block's parameters under a signal at its output.

    @cached_property
    def last_block(self) -> Gradients:
        """The exact gradient of L inside the last block."""
        model, _, z = self._cut(copy.deepcopy(self.model))
        return self._gradients(self.loss(z, self.y), dict(model.named_parameters()), None)

    def batch(self, k: int, signal: Tensor) -> Gradients:
        """By plain reverse mode."""
        if "batch" not in self._kept:
            self._kept["batch"] = self._cut(copy.deepcopy(self.model))
        model, hidden, _ = self._kept["batch"]
        return self._gradients(hidden[k], dict(model.named_parameters()), signal)

    def samples(self, k: int, signal: Tensor) -> Gradients:
        """One gradient for each sample, (N, *shape).

        Of a layer that is listed above, what row n of the gradient at the layer's own output contributes, by a copy of its
        parameters for each sample; of any other parameter, what row n of the signal contributes.
        """
        key = ("samples", k, id(signal))  # the signals live as long as self
        if key not in self._kept:
            self._kept[key] = signal, self._samples(k, signal)
        return self._kept[key][1]

    def _samples(self, k: int, signal: Tensor) -> Gradients:
        if "samples" not in self._kept:
            self._kept["samples"] = self._cut_with_own_copies()
        model, hidden, own = self._kept["samples"]
        found = self._gradients(hidden[k], own, signal)
        rows = []
        for n in range(len(signal)):
            masked = torch.zeros_like(signal)
            masked[n] = signal[n]
            rows.append(self._gradients(hidden[k], dict(model.named_parameters()), masked))
        for name in rows[0]:
            gradients = torch.stack([row[name] for row in rows])
            found[name] = found[name] + gradients if name in found else gradients
        return found

    @staticmethod
    def _gradients(output: Tensor, named: Gradients, signal: Tensor | None) -> Gradients:
        if not output.requires_grad or not named:
            return {}
        found = torch.autograd.grad(output, list(named.values()), signal, allow_unused=True, retain_graph=True)
        return {name: g for name, g in zip(named, found, strict=True) if g is not None}

    def _cut(self, model: nn.Module) -> tuple[nn.Module, list[Tensor], Tensor]:
        """The network, its block outputs with the graph of their block alone, and its output."""
        found = {}

        def cut(k: int, output: Tensor) -> Tensor:
            found[k] = output
            return output.detach().clone()

        with torch.random.fork_rng(devices=[]), reference.rewritten(model, self.cuts, cut):
            torch.manual_seed(reference.MASKS)
            z = reference.call(model, self.x)
        return model, [found[k] for k in range(len(self.cuts))], z

    def _cut_with_own_copies(self) -> tuple[nn.Module, list[Tensor], Gradients]:
        model, own = copy.deepcopy(self.model), {}
        names = {id(p): name for name, p in model.named_parameters()}
        for layer in model.modules():
            parameters = [p for p in layer._parameters.values() if p is not None]
            if type(layer) in (*ONE_SAMPLE, *BATCH_NORMS) and parameters:
                for p in parameters:
                    copies = p.detach().unsqueeze(0).repeat(len(self.y), *[1] * p.dim())
                    own.setdefault(names[id(p)], copies.requires_grad_())
                layer.forward = with_own_copies(layer, [own[names[id(p)]] for p in parameters])
        return *self._cut(model)[:2], own

    # The heads' own learning.

    def head_steps(self) -> dict[str, tuple[Tensor, Tensor, Gradients]]:
        """For each cut the loss and the output of its head, and the gradients of the head's parameters."""
        result = {}
        for cut, h in zip(self.cuts, self.hidden, strict=True):
            head = copy.deepcopy(self.heads[cut])
            z = head(h)
            loss = self.loss(z, self.y)
            result[cut] = loss.detach(), z.detach(), self._gradients(loss, dict(head.named_parameters()), None)
        return result
