"""Batch norm over all shards of a batch: its mean and variance are those of every process's samples together."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, library, nn

from onward.derivatives.rules import RULES
from onward.network.shard import Shard

_shards: WeakValueDictionary[int, Shard] = WeakValueDictionary()


def synchronise(module: nn.Module, shard: Shard) -> None:
    """Let every batch norm in a network normalise by the statistics of all shards while it trains.

    With n samples and positions in all, ``mean = (1/n) sum x`` and ``var = (1/n) sum (x - mean)^2`` are two exchanges of one
    number per channel; gradients and tangents go through them as through any sum.
    """
    _shards[id(shard)] = shard
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.forward = partial(_normalise, layer, shard)  # type: ignore[method-assign]


def _normalise(layer: nn.modules.batchnorm._BatchNorm, shard: Shard, x: Tensor) -> Tensor:
    if not layer.training or id(shard) not in _shards:  # in a copy, which works by itself
        return type(layer).forward(layer, x)
    layer._check_input_dim(x)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    count = x.numel() / x.shape[1] / shard.share
    mean = sum_over_shards(wide.sum(dims), id(shard)) / count
    centred = wide - mean.view(shape)
    variance = sum_over_shards(centred.square().sum(dims), id(shard)) / count
    out = centred * torch.rsqrt(variance + layer.eps).view(shape)
    if layer.weight is not None:
        out = out * layer.weight.view(shape) + layer.bias.view(shape)
    if layer.running_mean is not None and layer.running_var is not None and layer.num_batches_tracked is not None:
        with torch.no_grad():
            layer.num_batches_tracked.add_(1)
            rate = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            unbiased = variance.detach() * (count / (count - 1))
            layer.running_mean.lerp_(mean.detach().to(layer.running_mean.dtype), rate)
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), rate)
    return out.to(x.dtype)


@library.custom_op("onward::sum_over_shards", mutates_args=())
def sum_over_shards(x: Tensor, shard: int) -> Tensor:
    """The sum of what every process has here."""
    return _shards[shard].sum(x.clone())


@sum_over_shards.register_fake
def _(x: Tensor, shard: int) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.shard = inputs[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    # Each process differentiates the mean loss over its own samples, which is 1/share as long as its part of the whole.
    share = _shards[ctx.shard].share
    return sum_over_shards(gradient * share, ctx.shard) / share, None


sum_over_shards.register_autograd(_backward, setup_context=_remember)


def _tangent(func: Any, args: Any, kwargs: Any, out: Tensor, t: list[Any]) -> Tensor:
    return func(t[0], args[1])


RULES[torch.ops.onward.sum_over_shards] = _tangent
