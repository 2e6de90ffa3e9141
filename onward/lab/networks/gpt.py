"""A small transformer for tokens: characters, bytes, or those of a tokenizer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from onward.errors import UsageError
from onward.lab.networks.blocks import Shape, chain, network

FEATURES = 128
"""Of a token, where the width says nothing."""


@network("gpt", inputs=(64,), images=False, tokens=True, task="next-token")
def gpt(
    shape: Shape,
    outputs: int,
    *,
    width: float = 1.0,
    layers: int = 2,
    heads: int = 4,
    vocabulary: int | None = None,
    positions: Sequence[int] = (),
) -> nn.Sequential:
    """A causal transformer of tokens, pre-norm, with learned positions, 128 features by default; cut after each layer.

    The width is the number of features, if it is not 1. Where targets have a number for each position (next-token
    prediction), so has the output; else it is that of the mean over positions. Weights start as GPT-2's: N(0, 0.02), in the
    last layers of residual branches divided by the root of their number.

    Source: Radford et al. 2019, at any size.

    >>> import torch
    >>> model = gpt((64,), 50, layers=4, vocabulary=50, positions=(64,))
    >>> list(dict(model.named_children())), model(torch.zeros(2, 64, dtype=torch.int64)).shape
    (['block1', 'block2', 'block3', 'block4', 'output'], torch.Size([2, 64, 50]))
    """
    features = FEATURES if width == 1 else round(width)
    if vocabulary is None or len(shape) != 1:
        raise UsageError(f"gpt for inputs of shape {tuple(shape)}: it is for rows of tokens, such as text that --data names")
    if layers < 1 or heads < 1 or features < 1 or features % heads:
        size = f"{layers} layers, {features} features and {heads} heads"
        raise UsageError(f"gpt of {size}: use at least 1 of each, and features (--network.width) that the heads divide")
    if features > 1e5:
        raise UsageError(f"--network.width {width}: in gpt this is the number of features, use at most 100000")
    blocks: list[nn.Module] = [Layer(features, heads, layers) for _ in range(layers)]
    blocks[0] = nn.Sequential(OrderedDict(embed=Embed(vocabulary, shape[0], features), layer=blocks[0]))
    output = nn.Sequential(nn.LayerNorm(features), _linear(features, outputs))
    return Transformer(chain(blocks, output)._modules, pools=not positions)


class Transformer(nn.Sequential):
    """Blocks, and an output that reads every position or, with `pools`, the mean over those that are no padding."""

    def __init__(self, parts: Mapping[str, nn.Module | None], *, pools: bool) -> None:
        super().__init__(OrderedDict((name, part) for name, part in parts.items() if part is not None))
        self.pools = pools

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        *blocks, output = self
        h = input_ids
        for block in blocks:
            h = block(h)
        if not self.pools:
            return output(h)
        if attention_mask is None:
            return output(h.mean(1))
        real = attention_mask.unsqueeze(2).to(h.dtype)
        return output((h * real).sum(1) / real.sum(1))


class Embed(nn.Module):
    """A vector for each token plus one for its position."""

    def __init__(self, vocabulary: int, length: int, features: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, features)
        self.positions = nn.Embedding(length, features)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x) + self.positions.weight[: x.shape[1]]


class Layer(nn.Module):
    """Causal attention, then a perceptron of four times the width; each reads the normalised stream and adds to it."""

    def __init__(self, features: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.attend = _linear(features, 3 * features)
        self.mix = _linear(features, features, 0.02 / (2 * layers) ** 0.5)
        self.widen = _linear(features, 4 * features)
        self.narrow = _linear(4 * features, features, 0.02 / (2 * layers) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attend(self.norm1(x)).chunk(3, -1))
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


def _linear(inputs: int, outputs: int, std: float = 0.02) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer
