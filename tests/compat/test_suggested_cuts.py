"""What is proposed for networks of `transformers` works, with a batch and without one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward import DFA, Backprop, UsageError

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers", reason="needs transformers (pip install onward[compat])")

WORDS, CLASSES, SAMPLES = 20, 3, 4


class Logits(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **x: Any) -> Tensor:
        return self.net(**x).logits


def sizes(**more: Any) -> dict[str, Any]:
    few = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return {**few, "max_position_embeddings": 16, "num_labels": CLASSES, "pad_token_id": 0, **more}


def encoder_decoder(**more: Any) -> dict[str, Any]:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "use_cache": False}
    return {"vocab_size": WORDS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, **heads, **ends, **more}


def made(name: str, task: str, **settings: Any) -> nn.Module:
    net = getattr(transformers, name + task)(getattr(transformers, f"{name}Config")(**settings))
    return Logits(net).train()


def words() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, WORDS, (SAMPLES, 6))}


def sentences() -> dict[str, Any]:
    return {**words(), "decoder_input_ids": torch.randint(3, WORDS, (SAMPLES, 5))}


def pictures() -> dict[str, Any]:
    return {"pixel_values": torch.randn(SAMPLES, 3, 32, 32)}


def classifier(name: str, **more: Any) -> nn.Module:
    return made(name, "ForSequenceClassification", **sizes(**more))


def writer(name: str, **more: Any) -> nn.Module:
    return made(name, "ForCausalLM", **sizes(use_cache=False, bos_token_id=1, eos_token_id=2, **more))


def gpt2(**more: Any) -> nn.Module:
    few = {"vocab_size": WORDS, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return made("GPT2", "LMHeadModel", **few, bos_token_id=0, eos_token_id=0, **more)


def vision(name: str, **more: Any) -> nn.Module:
    return made(name, "ForImageClassification", num_labels=CLASSES, **more)


def patches(name: str) -> nn.Module:
    few = sizes(image_size=32, patch_size=8)
    for key in ("vocab_size", "max_position_embeddings", "pad_token_id", "num_labels"):
        del few[key]
    return vision(name, **few)


def t5() -> nn.Module:
    few = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    return made("T5", "ForConditionalGeneration", **few, decoder_start_token_id=0, use_cache=False)


def bart(name: str, **more: Any) -> nn.Module:
    settings = encoder_decoder(max_position_embeddings=16, encoder_layerdrop=0.0, decoder_layerdrop=0.0, **more)
    return made(name, "ForConditionalGeneration", **settings)


def frozen_bert() -> nn.Module:
    """As it is fine-tuned: nothing below the second layer trains, nor the output."""
    model = classifier("Bert", num_hidden_layers=4)
    for part in (model.net.bert.embeddings, model.net.bert.encoder.layer[0], model.net.bert.pooler, model.net.classifier):
        part.requires_grad_(False)
    return model


def with_adapters(model: nn.Module, task: str, targets: list[str]) -> nn.Module:
    peft = pytest.importorskip("peft", reason="needs peft (pip install onward[compat])")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.net = peft.get_peft_model(model.net, peft.LoraConfig(task_type=task, r=2, target_modules=targets))
    return model


def layers(path: str, count: int = 2) -> tuple[str, ...]:
    return tuple(f"net.{path}.{i}" for i in range(count))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "BERT": (
        lambda: classifier("Bert"),
        words,
        ("net.bert.embeddings", *layers("bert.encoder.layer"), "net.bert.pooler"),
    ),
    "BERT, frozen in part": (frozen_bert, words, ("net.bert.encoder.layer.1", "net.bert.encoder.layer.2")),
    "BERT, words": (
        lambda: made("Bert", "ForMaskedLM", **sizes()),
        words,
        ("net.bert.embeddings", *layers("bert.encoder.layer")),
    ),
    "RoBERTa": (lambda: classifier("Roberta"), words, ("net.roberta.embeddings", *layers("roberta.encoder.layer"))),
    "DistilBERT": (
        lambda: made(
            "DistilBert",
            "ForSequenceClassification",
            vocab_size=WORDS,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=16,
            num_labels=CLASSES,
        ),
        words,
        ("net.distilbert.embeddings", *layers("distilbert.transformer.layer")),
    ),
    "MegatronBERT, whose layers return tuples": (
        lambda: made("MegatronBert", "ForMaskedLM", **sizes()),
        words,
        ("net.bert.embeddings", "net.bert.encoder.layer.0", "net.bert.encoder.ln"),
    ),
    "ALBERT, whose layers are one": (lambda: classifier("Albert", embedding_size=8), words, ("net.albert.embeddings",)),
    "MPNet, with one table of positions": (
        lambda: made("MPNet", "ForMaskedLM", **sizes()),
        words,
        ("net.mpnet.embeddings", "net.mpnet.encoder.layer.1"),
    ),
    "GPT-2": (lambda: gpt2(use_cache=False), words, layers("transformer.h")),
    "Llama": (lambda: writer("Llama"), words, layers("model.layers")),
    "Bloom": (
        lambda: made("Bloom", "ForCausalLM", vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=2, use_cache=False),
        words,
        layers("transformer.h"),
    ),
    "Falcon": (lambda: writer("Falcon"), words, layers("transformer.h")),
    "T5": (t5, sentences, ("net.encoder.final_layer_norm", "net.decoder.block.1")),
    "BART": (lambda: bart("Bart"), sentences, (*layers("model.encoder.layers"), *layers("model.decoder.layers"))),
    "mBART, with a norm behind the encoder": (
        lambda: bart("MBart"),
        sentences,
        ("net.model.encoder.layers.0", "net.model.encoder.layer_norm", *layers("model.decoder.layers")),
    ),
    "ViT": (lambda: patches("ViT"), pictures, ("net.vit.embeddings", *layers("vit.layers"))),
    "DINOv2": (lambda: patches("Dinov2"), pictures, ("net.dinov2.embeddings", *layers("dinov2.encoder.layer"))),
    "ResNet": (
        lambda: vision("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"),
        pictures,
        ("net.resnet.embedder", *layers("resnet.encoder.stages")),
    ),
    "LoRA in GPT-2": (
        lambda: with_adapters(gpt2(use_cache=False), "CAUSAL_LM", ["c_attn"]),
        words,
        ("net.base_model.model.transformer.h.0",),
    ),
    "LoRA in T5, whose table of positions is frozen": (
        lambda: with_adapters(t5(), "SEQ_2_SEQ_LM", ["q", "v"]),
        sentences,
        (
            "net.base_model.model.encoder.block.0",
            "net.base_model.model.encoder.block.1",
            "net.base_model.model.decoder.block.0",
        ),
    ),
    "LoRA in ViT": (
        lambda: with_adapters(patches("ViT"), "FEATURE_EXTRACTION", ["q_proj", "v_proj"]),
        pictures,
        ("net.base_model.model.vit.layers.0",),
    ),
    "LoRA in BERT": (
        lambda: with_adapters(classifier("Bert"), "SEQ_CLS", ["query", "value"]),
        words,
        layers("base_model.model.bert.encoder.layer"),
    ),
}


def loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), y.flatten())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("given", [False, True], ids=["", "batch"])
def test_proposed(name: str, given: bool) -> None:
    make, batch, cuts = NETWORKS[name]
    model, x = make(), batch()
    assert onward.suggest_cuts(model, x if given else None) == cuts
    with torch.no_grad():
        labels = torch.randint(CLASSES, model(**x).shape[:-1])
    DFA(model, cuts, loss=loss).estimate(x, labels)


SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}


OTHERS = {"Swinv2": lambda: vision("Swinv2", **SWIN), "BEiT": lambda: patches("Beit"), "NeoX": lambda: writer("GPTNeoX")}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_proposed_whatever_it_is(make: Callable[[], nn.Module]) -> None:
    model = make()
    x = words() if hasattr(model.net, "gpt_neox") else pictures()
    for cuts in (onward.suggest_cuts(model), onward.suggest_cuts(model, x)):
        with torch.no_grad():
            labels = torch.randint(CLASSES, model(**x).shape[:-1])
        DFA(model, cuts, loss=loss).estimate(x, labels)


def test_a_cache_and_checkpointing() -> None:
    """A block that is run again would append to the cache: it is off, and one that is asked for is refused."""
    model = gpt2()
    x = {**words(), "attention_mask": torch.ones(SAMPLES, 6, dtype=torch.long)}
    x["attention_mask"][0, 4:] = 0
    estimator = Backprop(model, onward.suggest_cuts(model), loss=loss, checkpoint=True)
    with pytest.raises(UsageError, match="the batch has use_cache=True: keys and values are kept for generating text"):
        estimator.estimate({**x, "use_cache": True}, x["input_ids"])
    estimator.estimate(x, x["input_ids"])
    assert model.net.config.use_cache
