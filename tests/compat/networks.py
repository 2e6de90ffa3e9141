"""Small random networks as other libraries build them: float64 where they let it be, dropout 0 or drawn from seeds.

Nothing is downloaded. Those of `transformers` and `peft` need the extra `compat`; the others are written out here in the manner
of timm, diffusers, recurrent taggers and graph libraries.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from answers import Case
from torch import Tensor, nn
from trials import CUT, MEASURING, OWN_SLOPES
from trials import SAMPLES as PER_WEIGHT

CLASSES, WORDS, SAMPLES = 3, 7, 4


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def labels(*shape: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, shape)


def of_words(logits: Tensor, y: Tensor) -> Tensor:
    """The mean over samples and positions, of logits (N, T, C)."""
    return F.cross_entropy(logits.transpose(1, 2), y)


def squares(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().flatten(1).sum(1).mean()


class Logits(nn.Module):
    """A network of `transformers` that returns its logits alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **x: Any) -> Tensor:
        return self.net(**x).logits


def text(samples: int = 3, words: int = 4) -> dict[str, Tensor]:
    mask = torch.ones(samples, words, dtype=torch.long)
    mask[-1, words - 1 :] = 0
    return {"input_ids": torch.randint(1, WORDS, (samples, words)), "attention_mask": mask}


def gpt2(**more: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": WORDS, "n_positions": 6, "n_embd": 8, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **ends, **no_dropout, **more})).double().train()


def gpt2_masked() -> tuple[nn.Module, Any, Any]:
    return Logits(gpt2(use_cache=False)), text(), labels(3, 4, classes=WORDS)


def gpt2_checkpointed(reentrant: bool) -> tuple[nn.Module, Any, Any]:
    net = gpt2(use_cache=False)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return Logits(net), text(), labels(3, 4, classes=WORDS)


def gpt2_with_dropout_and_cache() -> tuple[nn.Module, Any, Any]:
    return Logits(gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)), text(), labels(3, 4, classes=WORDS)


def llama() -> tuple[nn.Module, Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": WORDS, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "initializer_range": 0.3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 6}
    config = LlamaConfig(**sizes, **heads, pad_token_id=None, bos_token_id=0, eos_token_id=0)
    return Logits(LlamaForCausalLM(config).double().train()), text(), labels(3, 4, classes=WORDS)


def small_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, **no_dropout, max_position_embeddings=6, initializer_range=0.3, num_labels=CLASSES)
    return BertForSequenceClassification(config).double().train()


def bert() -> tuple[nn.Module, Any, Any]:
    return Logits(small_bert()), text(SAMPLES), labels(SAMPLES)


def lora() -> tuple[nn.Module, Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's own, about what it was not told
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], lora_dropout=0.0)
        net = get_peft_model(small_bert(), config)
    for name, p in net.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide everything
            nn.init.normal_(p)
    return Logits(net.double()), text(SAMPLES), labels(SAMPLES)


def vit() -> tuple[nn.Module, Any, Any]:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 6,
        "initializer_range": 0.3,
    }
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ViTConfig(**sizes, **no_dropout, image_size=8, patch_size=4, num_labels=CLASSES)
    net = ViTForImageClassification(config).double().train()
    return Logits(net), {"pixel_values": normal(SAMPLES, 3, 8, 8)}, labels(SAMPLES)


def t5(attention: str = "sdpa") -> tuple[nn.Module, Any, Any]:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": WORDS, "d_model": 8, "d_kv": 4, "d_ff": 6, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    config = T5Config(**sizes, **ends, dropout_rate=0.0, use_cache=False, attn_implementation=attention)
    net = T5ForConditionalGeneration(config).double().train()
    words = {**text(), "decoder_input_ids": torch.randint(1, WORDS, (3, 3))}
    return Logits(net), words, labels(3, 3, classes=WORDS)


class LayerNorm2d(nn.LayerNorm):
    """Of the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Stochastic depth: leaves out a branch for some samples."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.bernoulli(torch.full((len(x), *[1] * (x.dim() - 1)), 1 - self.rate, dtype=x.dtype))
        return x * kept / (1 - self.rate)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale, self.drop = nn.Parameter(torch.randn(width)), DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.scale * self.narrow(F.gelu(self.widen(h)))
        return x + self.drop(h.permute(0, 3, 1, 2))


def convnext() -> tuple[nn.Module, Any, Any]:
    stem = nn.Sequential(nn.Conv2d(2, 4, 2, stride=2), LayerNorm2d(4))
    down = nn.Sequential(LayerNorm2d(4), nn.Conv2d(4, 6, 2, stride=2))
    stages = nn.Sequential(ConvNeXtBlock(4, 0.3), nn.Sequential(down, ConvNeXtBlock(6, 0.3)))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), LayerNorm2d(6), nn.Flatten(), nn.Linear(6, CLASSES))
    return nn.Sequential(stem, stages, head).double(), normal(SAMPLES, 2, 8, 8), labels(SAMPLES)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)), inplace=True)))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 2 * inputs
        widen = [nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish(inplace=True)]
        depthwise = [
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.Hardswish(inplace=True),
        ]
        narrow = [nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*widen, *depthwise, SqueezeExcite(wide), *narrow)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet() -> tuple[nn.Module, Any, Any]:
    stem = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True))
    blocks = nn.Sequential(InvertedResidual(4, 4, 1), InvertedResidual(4, 5, 2))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(5, CLASSES))
    return nn.Sequential(stem, blocks, head).double(), normal(SAMPLES, 2, 8, 8), labels(SAMPLES)


class WindowAttention(nn.Module):
    """Attention inside windows of 2 x 2, shifted or not, with a learned bias for every pair of places."""

    def __init__(self, width: int, shift: int) -> None:
        super().__init__()
        self.norm, self.project, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias, self.shift = nn.Parameter(torch.randn(4, 4)), shift

    def forward(self, x: Tensor) -> Tensor:
        n, height, breadth, width = x.shape
        h = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        h = h.view(n, height // 2, 2, breadth // 2, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, width)
        q, k, v = self.project(h).chunk(3, -1)
        h = self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias))
        h = h.view(n, height // 2, breadth // 2, 2, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return x + torch.roll(h, (self.shift, self.shift), (1, 2))


class Merge(nn.Module):
    """Four neighbours become one, twice as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1))


class Hierarchical(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 4, 2, stride=2)
        first = nn.Sequential(WindowAttention(4, 0), WindowAttention(4, 1))
        self.stages = nn.ModuleList([first, nn.Sequential(Merge(4), WindowAttention(8, 0))])
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).permute(0, 2, 3, 1)
        for stage in self.stages:
            h = stage(h)
        return self.head(h.mean((1, 2)))


def hierarchical() -> tuple[nn.Module, Any, Any]:
    return Hierarchical().double(), normal(SAMPLES, 2, 8, 8), labels(SAMPLES)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.unsqueeze(1) * torch.exp(-math.log(100.0) * torch.arange(2, dtype=t.dtype) / 2)
        return self.layers(torch.cat([angles.sin(), angles.cos()], 1))


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(6, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(2, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class PixelAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.project, self.out = nn.GroupNorm(2, width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, -1)
        h = self.out(F.scaled_dot_product_attention(q, k, v))
        return x + h.transpose(1, 2).view(x.shape)


class UNet(nn.Module):
    """Skips start at the stem's and the first stage's outputs; every block reads the time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.stem = TimeEmbedding(6), nn.Conv2d(1, 4, 3, padding=1)
        self.down, self.shrink = ResnetBlock(4, 4), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.middle, self.attend = ResnetBlock(6, 6), PixelAttention(6)
        self.up, self.out = ResnetBlock(6 + 4, 4), nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.time(t)
        high = self.down(self.stem(x), t)
        h = self.attend(self.middle(self.shrink(high), t))
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return self.out(self.up(torch.cat([h, high], 1), t))


def unet() -> tuple[nn.Module, Any, Any]:
    return UNet().double(), (normal(SAMPLES, 1, 4, 4), torch.rand(SAMPLES).double()), normal(SAMPLES, 1, 4, 4)


class Layer(nn.Module):
    """A recurrent layer that returns the outputs alone, all of them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 4)
        self.lstm = Layer(nn.LSTM(4, 3, batch_first=True, bidirectional=True))
        self.gru = Layer(nn.GRU(6, 5, num_layers=2, batch_first=True))
        self.out = nn.Linear(5, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.gru(self.lstm(self.embed(words))))


def tagger() -> tuple[nn.Module, Any, Any]:
    return Tagger().double(), torch.randint(WORDS, (SAMPLES, 5)), labels(SAMPLES, 5)


class Unrolled(nn.Module):
    """A cell called once for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.cell = nn.Linear(3 + 4, 4), nn.LSTMCell(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, state, found = x.new_zeros(len(x), 4), None, []
        for t in range(x.shape[1]):
            h = torch.tanh(self.weight(torch.cat([x[:, t], h], 1)))
            state = self.cell(h, state)
            found.append(state[0])
        return torch.stack(found, 1)


def unrolled() -> tuple[nn.Module, Any, Any]:
    embed = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    return (
        nn.Sequential(embed, Unrolled(), nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))).double(),
        normal(SAMPLES, 4, 2),
        labels(SAMPLES),
    )


class Packed(nn.Module):
    """Sequences of different lengths, packed; the last state of each."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2, 3, 4]), batch_first=True, enforce_sorted=False)
        return self.gru(packed)[1][0]


def packed() -> tuple[nn.Module, Any, Any]:
    embed = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    return nn.Sequential(embed, Packed(), nn.Linear(4, CLASSES)).double(), normal(SAMPLES, 4, 2), labels(SAMPLES)


class GCN(nn.Module):
    """Nodes are rows, and take the mean of their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        near = (torch.rand(5, 5) < 0.4).double() + torch.eye(5)
        self.register_buffer("adjacency", near / near.sum(1, keepdim=True))
        self.first, self.second, self.out = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.adjacency @ x).tanh()
        return self.out((self.adjacency @ self.second(h)).relu())


def gcn() -> tuple[nn.Module, Any, Any]:
    return GCN().double(), normal(5, 4), labels(5)


class MessagePassing(nn.Module):
    """Messages along edges, summed where they arrive; their maximum too, by a scatter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(2 * inputs, outputs), nn.Linear(inputs + 2 * outputs, outputs)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        m = torch.tanh(self.message(torch.cat([x[edges[0]], x[edges[1]]], 1)))
        total = torch.zeros(len(x), m.shape[1], dtype=x.dtype).index_add(0, edges[1], m)
        most = torch.full_like(total, -2.0).scatter_reduce(0, edges[1].unsqueeze(1).expand_as(m), m, "amax")
        return torch.relu(self.update(torch.cat([x, total, most], 1)))


class Messages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = MessagePassing(4, 5), MessagePassing(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.out(self.second(self.first(x, edges), edges))


def messages() -> tuple[nn.Module, Any, Any]:
    edges = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 0]])
    return Messages().double(), (normal(5, 4), edges), labels(5)


class Experts(nn.Module):
    """Each row goes to its two best experts, which see only the rows that come to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        weight, chosen = self.gate(rows).softmax(-1).topk(2, -1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, rank = torch.where(chosen == number)
            if len(row):
                out = out.index_add(0, row, expert(rows[row]) * weight[row, rank].unsqueeze(1))
        return x + out.view(x.shape)


def experts() -> tuple[nn.Module, Any, Any]:
    embed, head = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Sequential(nn.Flatten(), nn.Linear(10, CLASSES))
    return nn.Sequential(embed, Experts(5), head).double(), normal(SAMPLES, 2, 4), labels(SAMPLES)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 5), nn.Tanh())
        self.item = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.join, self.out = nn.Sequential(nn.Linear(10, 6), nn.GELU()), nn.Linear(6, CLASSES)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.out(self.join(torch.cat([self.user(user), self.item(item)], 1)))


def towers() -> tuple[nn.Module, Any, Any]:
    return Towers().double(), {"item": normal(SAMPLES, 3), "user": torch.randint(6, (SAMPLES,))}, labels(SAMPLES)


class Forces(nn.Module):
    """An energy of atoms and, as its gradient with respect to where they are, the forces."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(3, 6), nn.SiLU())
        self.energy = nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 1))

    def forward(self, places: Tensor) -> Tensor:
        with torch.enable_grad():
            places = places.detach().requires_grad_()
            energy = self.energy(self.embed(places)).sum((1, 2))
            (forces,) = torch.autograd.grad(-energy.sum(), places, create_graph=True)
        return torch.cat([energy.unsqueeze(1), forces.flatten(1)], 1)


def forces() -> tuple[nn.Module, Any, Any]:
    return Forces().double(), normal(SAMPLES, 2, 3), normal(SAMPLES, 7)


class Score(nn.Module):
    """A block that moves its input along the gradient of a learned energy."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, h: Tensor) -> Tensor:
        with torch.enable_grad():
            here = h if h.requires_grad else h.requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(here).sum(), here, create_graph=True)
        return h - slope


def score() -> tuple[nn.Module, Any, Any]:
    embed = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    return nn.Sequential(embed, Score(5), nn.Linear(5, CLASSES)).double(), normal(SAMPLES, 4), labels(SAMPLES)


class Shared(nn.Module):
    """One layer run three times, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.out = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for _ in range(3):
            h = self.layer(h)
        return self.out(h)


def shared() -> tuple[nn.Module, Any, Any]:
    return Shared().double(), normal(SAMPLES, 4), labels(SAMPLES)


def of_logits(output: Any, y: Tensor) -> Tensor:
    return of_words(output.logits, y)


def gpt2_as_it_is() -> tuple[nn.Module, Any, Any]:
    return gpt2(use_cache=False), text(), labels(3, 4, classes=WORDS)


GPT2 = ("net.transformer.h.0", "net.transformer.h.1")
BERT = ("bert.encoder.layer.0", "bert.encoder.layer.1")
CASES = [
    Case("gpt2", gpt2_masked, GPT2, loss=of_words, needs="transformers"),
    Case("gpt2-outputs", gpt2_as_it_is, ("transformer.h.0", "transformer.h.1"), loss=of_logits, needs="transformers"),
    # Its blocks append to a cache, which a second run of a block would find too long.
    Case("gpt2-cache", gpt2_with_dropout_and_cache, GPT2, loss=of_words, either=("bp checkpoint",), needs="transformers"),
    Case("gpt2-checkpoint", partial(gpt2_checkpointed, False), GPT2, loss=of_words, plain=gpt2_masked, needs="transformers"),
    Case(
        "gpt2-reentrant",
        partial(gpt2_checkpointed, True),
        GPT2,
        loss=of_words,
        plain=gpt2_masked,
        needs="transformers",
    ),
    Case(
        "llama",
        llama,
        ("net.model.layers.0", "net.model.layers.1"),
        loss=of_words,
        either=("bp checkpoint",),
        precision=1e-5,
        needs="transformers",
    ),
    Case(
        "bert",
        bert,
        tuple(f"net.{name}" for name in BERT),
        untaught={"net.bert.embeddings.word_embeddings.weight": 0},
        needs="transformers",
    ),
    Case("lora", lora, tuple(f"net.base_model.model.{name}" for name in BERT), needs="peft"),
    Case("vit", vit, ("net.vit.layers.0", "net.vit.layers.1"), needs="transformers"),
    # The fused attention has no forward derivative with respect to a mask that learns; the remedy is the other one.
    Case(
        "t5",
        t5,
        ("net.encoder.final_layer_norm", "net.decoder.final_layer_norm"),
        loss=of_words,
        refused=("fg forward weights", "fg forward weights cut"),
        precision=1e-5,
        needs="transformers",
    ),
    Case(
        "t5-eager",
        partial(t5, "eager"),
        ("net.encoder.final_layer_norm", "net.decoder.final_layer_norm"),
        loss=of_words,
        precision=1e-5,
        needs="transformers",
    ),
    # Every block of an encoder reads the bias that the first has learned, and returns a tuple.
    Case(
        "t5-blocks",
        partial(t5, "eager"),
        ("net.encoder.block.0", "net.encoder.final_layer_norm"),
        loss=of_words,
        refused=CUT,
        precision=1e-5,
        needs="transformers",
    ),
    Case("convnext", convnext, ("0", "1.0", "1.1")),
    Case("mobilenet", mobilenet, ("0", "1.0", "1.1"), told=OWN_SLOPES, unasked=PER_WEIGHT),
    Case("hierarchical", hierarchical, ("stages.0", "stages.1")),
    Case("unet", unet, ("time", "down", "attend"), loss=squares),
    Case("tagger", tagger, ("embed", "lstm", "gru"), loss=of_words),
    Case("unrolled", unrolled, ("0", "1")),
    Case("packed", packed, ("0", "1"), refused=MEASURING),  # PyTorch has no forward derivative of packing
    Case("gcn", gcn, ("first", "second"), told=OWN_SLOPES),
    Case("messages", messages, ("first", "second"), told=OWN_SLOPES),
    Case("experts", experts, ("0", "1")),
    Case("towers", towers, ("user", "item", "join")),
    # A cut in between would leave nothing to differentiate.
    Case("forces", forces, ("embed",), loss=squares, refused=CUT),
    Case("score", score, ("0", "1"), either=("fdfa",)),
    Case("shared", shared, ("layer",), refused=CUT),
]
