"""Models of `transformers` as they come, labels in the batch: full and with LoRA, against autograd's own gradients."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from networks import WORDS, gpt2, llama, normal, small_bert, t5, vit
from torch import Tensor, nn

import onward

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
pytest.importorskip("transformers", reason="needs transformers (pip install onward[compat])")

IGNORED = -100


def words(task: str = "") -> dict[str, Tensor]:
    """Three sentences, the last two shorter than the first."""
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 4:] = mask[2, 2:] = 0
    ids = torch.randint(2, WORDS, (3, 5))
    if task == "classes":
        labels = torch.tensor([0, 2, 1])
    elif task == "translation":
        labels = torch.tensor([[2, 3, 4], [5, 3, IGNORED], [2, IGNORED, IGNORED]])
    else:
        labels = ids.masked_fill(mask == 0, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": normal(3, 3, 8, 8), "labels": torch.tensor([0, 2, 1])}


class Family(NamedTuple):
    """A kind of model, a batch for it, its layers, and what LoRA adapts in it."""

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    cuts: tuple[str, ...]
    targets: tuple[str, ...]
    precision: float = 1e-9  # where the model computes in float32 inside, 1e-5


FAMILIES = {
    "gpt2": Family(gpt2, words, ("transformer.h.0", "transformer.h.1"), ("c_attn",), 1e-5),
    "llama": Family(lambda: llama()[0].net, words, ("model.layers.0", "model.layers.1"), ("q_proj", "v_proj"), 1e-5),
    "bert": Family(
        small_bert,
        lambda: words("classes"),
        ("bert.encoder.layer.0", "bert.encoder.layer.1"),
        ("query", "value"),
    ),
    "vit": Family(lambda: vit()[0].net, pictures, ("vit.layers.0", "vit.layers.1"), ("q_proj", "v_proj")),
    "t5": Family(
        lambda: t5("eager")[0].net,
        lambda: words("translation"),
        ("encoder.final_layer_norm", "decoder.final_layer_norm"),
        ("q", "v"),
        1e-5,
    ),
}
MADE = [(name, lora) for name in FAMILIES for lora in (False, True)]


def built(name: str, lora: bool = False) -> tuple[nn.Module, dict[str, Tensor], tuple[str, ...]]:
    """The same model and batch each time, and its cuts."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    model, batch, cuts = family.make(), family.batch(), family.cuts
    if not lora:
        return model, batch, cuts
    peft = pytest.importorskip("peft", reason="needs peft (pip install onward[compat])")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(family.targets))).double()
    for parameter, p in model.named_parameters():
        if "lora_B" in parameter:  # zero at first, which would hide everything
            nn.init.normal_(p)
    kept = [f"base_model.model.{cut}" for cut in cuts]
    return model, batch, tuple(kept[:1] if name == "t5" else kept[:-1])  # behind the last layer nothing trains


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def true_gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the loss that the model computes itself."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    return loss.detach(), found


def along(one: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    return sum((one[name] * other[name]).sum() for name in one)  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "lora"), MADE)
def test_the_derivatives_are_those_of_the_models_own_loss(name: str, lora: bool) -> None:
    """`Backprop` equals `loss.backward()`; the forward passes measure inner products with that gradient."""
    model, batch, cuts = built(name, lora)
    precision = FAMILIES[name].precision
    loss, truth = true_gradients(model, batch)
    step = onward.Backprop(model).estimate(batch)
    assert step.loss == loss
    assert gradients(model).keys() == truth.keys()
    torch.testing.assert_close(gradients(model), truth, rtol=1e-12, atol=1e-15)

    model.zero_grad()
    weights = onward.ForwardGradient(model, space="avg-weight", seed=3, check=False)
    assert weights.estimate(batch).loss == loss
    v = {
        n: onward.directions.draw(p.shape, seed=3, step=0, block=n, dtype=p.dtype)
        for n, p in model.named_parameters()
        if n in truth
    }
    slope = along(truth, v)
    off = max((g - slope * v[n])[g != 0].abs().max() for n, g in gradients(model).items() if n in truth and g.any())
    assert off < precision * max(1, abs(slope))

    model.zero_grad()
    arrived: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(cut).register_forward_hook(
            lambda _m, _i, h, cut=cut: h.register_hook(lambda g: arrived.update({cut: g})) and None
        )
        for cut in cuts
    ]
    model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    estimator = onward.ForwardGradient(model, cuts, passes="block", seed=3)
    delivered: dict[int, Tensor] = {}
    estimator.observe = lambda k, delta: delivered.update({k: delta.clone()})
    assert estimator.estimate(batch).loss == loss
    for k, cut in enumerate(cuts):
        g = arrived[cut]
        u = onward.directions.draw(g.shape, seed=3, step=0, block=k, dtype=g.dtype)
        real = batch.get("attention_mask")
        if name == "t5" and "decoder" in cut:
            real = batch["labels"] != IGNORED
        if real is not None:
            u = u * (real.unsqueeze(-1) != 0)
        slopes = (g * u).flatten(1).sum(1).view(-1, 1, 1)
        torch.testing.assert_close(delivered[k], slopes * u, rtol=0, atol=precision)


class Mean(nn.Module):
    """A head that sees the mean over positions, and returns the model's logits."""

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        self.shape = like.shape[1:]
        self.layer = nn.Linear(width, self.shape.numel()).double()

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h.mean(1)).view(-1, *self.shape)


fg = onward.ForwardGradient
ESTIMATORS: dict[str, Callable[..., onward.Estimator]] = {
    "bp": lambda model, cuts, heads: onward.Backprop(model),
    "local": lambda model, cuts, heads: onward.LocalLoss(model, cuts, heads=heads),
    "dfa": lambda model, cuts, heads: onward.DFA(model, cuts),
    "dkp": lambda model, cuts, heads: onward.DKP(model, cuts),
    "fdfa": lambda model, cuts, heads: onward.FDFA(model, cuts),
    "fdfa low memory": lambda model, cuts, heads: onward.FDFA(model, cuts, low_memory=True),
    "fg": lambda model, cuts, heads: fg(model, cuts),
    "fg projected": lambda model, cuts, heads: fg(model, cuts, scaling="projection", engine="reverse"),
    "fg local": lambda model, cuts, heads: fg(model, cuts, guess="local", heads=heads),
    "fg local reverse": lambda model, cuts, heads: fg(model, cuts, guess="local", heads=heads, engine="reverse"),
    "fg of heads": lambda model, cuts, heads: fg(model, cuts, target="local", heads=heads),
    "fg ntk": lambda model, cuts, heads: fg(model, cuts, guess="fixed-ntk", heads=heads),
    "fg feedback": lambda model, cuts, heads: fg(model, cuts, guess="feedback"),
    "fg samples": lambda model, cuts, heads: fg(model, cuts, guess="feedback", space="weight", engine="reverse"),
    "fg weights": lambda model, cuts, heads: fg(model, space="avg-weight"),
}


@pytest.mark.parametrize("name", ["gpt2", "bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_padded_tokens_change_no_gradient(name: str) -> None:
    """Not in any estimator, in two steps (the second with feedback that has learned)."""
    model, batch, cuts = built(name)
    padded = batch["attention_mask"] == 0
    other = {**batch, "input_ids": torch.where(padded, (batch["input_ids"] + 3) % WORDS, batch["input_ids"])}
    with torch.no_grad():
        logits = model(**batch).logits
    wrong = []
    for kind, make in ESTIMATORS.items():
        found = []
        for x in (batch, other):
            torch.manual_seed(1)
            heads = {cut: Mean(8, logits) for cut in cuts}
            estimator = make(model, cuts, heads)
            estimator.check = False
            for _ in range(2):
                estimator.zero_grad()
                estimator.estimate(x)
                with torch.no_grad():
                    for group in estimator.parameter_groups(network={"fixed": True}):
                        for p in [] if "fixed" in group else group["params"]:
                            p -= 0.1 * p.grad
            found.append({n: p.grad.clone() for n, p in estimator.named_parameters() if p.grad is not None})
        one, two = found
        off = max((one[n] - two[n]).abs().max().item() for n in one)
        if one.keys() != two.keys() or off > 1e-12:
            wrong.append(f"{kind}: {off:.2g} in {[n for n in one if (one[n] - two[n]).abs().max() > 1e-12]}")
    assert not wrong, "\n".join(wrong)
