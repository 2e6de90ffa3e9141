"""Feedback alignment by explicit loops, and a second time by another way of writing a layer; no code of the library's.

`chain` walks a chain of modules backwards: linear layers and convolutions are loops over positions and products of Python
numbers, every other module is differentiated alone. `anywhere` runs any network forwards with each layer written as
`f(stop(x), W) + f(x, B) - stop(f(x, B))`, which has the layer's value, W's gradient, and the error carried by B.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import reference
import torch
import torch.nn.functional as F
from reference import Gradients, Loss
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode


def parts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a chain of chains, in order, with their names."""
    if not isinstance(module, nn.Sequential):
        yield path, module
        return
    for name, child in module.named_children():
        yield from parts(child, f"{path}.{name}" if path else name)


def chain(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, carriers: Mapping[str, Tensor]) -> Gradients:
    """Parameter gradients of a chain, given what carries the error back in the place of each weight."""
    model = copy.deepcopy(model)
    inputs: list[tuple[str, nn.Module, Tensor]] = []
    h = x
    for name, module in parts(model):
        inputs.append((name, module, h))
        h = module(h).detach()
    delta = reference.output_error(h, y, loss)
    found: Gradients = {}
    for name, module, before in reversed(inputs):
        if isinstance(module, nn.Linear):
            found[f"{name}.weight"] = reference.outer_sum(delta, before)
            back = reference.product(delta, carriers[f"{name}.weight"])
        elif isinstance(module, _ConvNd):
            found[f"{name}.weight"], back = convolution(module, before, delta, carriers[f"{name}.weight"])
        else:
            named = dict(module.named_parameters())
            leaf = before.clone().requires_grad_()
            back, *gradients = torch.autograd.grad(module(leaf.clone()), [leaf, *named.values()], delta)
            found |= {f"{name}.{own}": gradient for own, gradient in zip(named, gradients, strict=True)}
        if isinstance(module, (nn.Linear, _ConvNd)) and module.bias is not None:
            found[f"{name}.bias"] = delta.sum([d for d in range(delta.dim()) if d != 1])
        delta = back
    return found


def convolution(layer: _ConvNd, x: Tensor, delta: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The weight's gradient, and the error that b carries back, by a loop over positions, kernel positions and groups."""
    gradient, back = torch.zeros_like(b), torch.zeros_like(x)
    transposed = isinstance(layer, _ConvTransposeNd)
    small, large = (x, delta) if transposed else (delta, x)  # positions of the one are strides apart in the other
    rows = b.shape[0] // layer.groups
    for at in itertools.product(*(range(size) for size in small.shape[2:])):
        for k in itertools.product(*(range(size) for size in b.shape[2:])):
            there = [
                p * s + q * d - m for p, s, q, d, m in zip(at, layer.stride, k, layer.dilation, layer.padding, strict=True)
            ]
            if layer.padding_mode == "circular":
                there = [t % size for t, size in zip(there, large.shape[2:], strict=True)]
            if any(not 0 <= t < size for t, size in zip(there, large.shape[2:], strict=True)):
                continue
            for g in range(layer.groups):
                mine, other = slice(g * rows, (g + 1) * rows), slice(g * b.shape[1], (g + 1) * b.shape[1])
                a, c = (slice(None), mine, *at), (slice(None), other, *there)
                kernel = (mine, slice(None), *k)
                gradient[kernel] += reference.outer_sum(small[a], large[c])
                if transposed:
                    back[a] += reference.product(delta[c], b[kernel].T)
                else:
                    back[c] += reference.product(delta[a], b[kernel])
    return gradient, back


_LAYERS = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


class _Written(TorchFunctionMode):
    """Every layer whose weight is among the carriers' is written anew; attention and recurrences are opened."""

    def __init__(self, carriers: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.carriers = carriers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LAYERS:
            return self.layer(func, args, kwargs)
        opened = {F.multi_head_attention_forward: self.attention, torch.lstm: self.lstm, torch.gru: self.gru}
        if func in opened:
            with self:
                return opened[func](*args, **kwargs)
        return func(*args, **kwargs)

    def layer(self, func: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        x, w, *rest = args
        whole = w if w._base is None else w._base
        (b,) = (b.as_strided(w.shape, w.stride(), w.storage_offset()) for p, b in self.carriers if p is whole)
        exact = func(x.detach(), w, *rest, **kwargs)
        without_bias = {name: value for name, value in kwargs.items() if name != "bias"}
        other = func(x, b, *([None, *rest[1:]] if rest else []), **without_bias)
        return exact + other - other.detach()

    def attention(self, q: Tensor, k: Tensor, v: Tensor, width: int, heads: int, *rest: Any, **options: Any) -> Any:
        weight, bias, out, out_bias = rest[0], rest[1], rest[6], rest[7]
        assert options["attn_mask"] is None
        time, samples = q.shape[:2]
        rows = [slice(i * width, (i + 1) * width) for i in range(3)]
        split = [
            F.linear(t, weight[r], bias[r]).reshape(len(t), samples * heads, -1).transpose(0, 1)
            for t, r in zip((q, k, v), rows, strict=True)
        ]
        scores = (split[0] @ split[1].transpose(1, 2) / (width // heads) ** 0.5).softmax(-1)
        return F.linear((scores @ split[2]).transpose(0, 1).reshape(time, samples, width), out, out_bias), None

    def lstm(self, x: Tensor, start: Any, weights: Any, *options: Any) -> Any:
        (w, u, b, c), h, cell, out = weights, start[0][0], start[1][0], []
        for t in range(x.shape[1]):
            i, f, g, o = (F.linear(x[:, t], w, b) + F.linear(h, u, c)).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            h = o.sigmoid() * cell.tanh()
            out.append(h)
        return torch.stack(out, 1), h.unsqueeze(0), cell.unsqueeze(0)

    def gru(self, x: Tensor, start: Tensor, weights: Any, *options: Any) -> Any:
        sides = []
        for side, (w, u, b, c) in enumerate((weights[:4], weights[4:])):
            h, out = start[side], [x[:, 0]] * x.shape[1]
            for t in range(x.shape[1])[:: -1 if side else 1]:
                (r, z, n), (s, y, m) = F.linear(x[:, t], w, b).chunk(3, 1), F.linear(h, u, c).chunk(3, 1)
                z = (z + y).sigmoid()
                h = (1 - z) * (n + (r + s).sigmoid() * m).tanh() + z * h
                out[t] = h
            sides.append(torch.stack(out, 1))
        return torch.cat(sides, 2), start


def anywhere(model: nn.Module, x: Any, y: Tensor, loss: Loss, carriers: Mapping[str, Tensor]) -> Gradients:
    """Parameter gradients of any network, given what carries the error back in the place of each weight."""
    model = copy.deepcopy(model)
    named = dict(model.named_parameters())
    with torch.random.fork_rng(devices=[]), _Written([(named[name], b) for name, b in carriers.items()]):
        torch.manual_seed(reference.MASKS)
        z = reference.call(model, x)
    model.zero_grad()
    loss(z, y).backward()
    return {name: p.grad for name, p in named.items() if p.grad is not None}
