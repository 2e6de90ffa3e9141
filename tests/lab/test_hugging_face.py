"""Networks of transformers in the lab: from a configuration, from weights, with adapters; small, and never downloaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from onward.errors import UsageError
from onward.lab.networks.models import build
from onward.lab.run.algorithms import with_cuts
from onward.lab.run.loop import train
from onward.lab.settings import Network, Text, Train
from onward.network.run import call

transformers = pytest.importorskip("transformers")
LENGTH = 16


def configuration(**options: int) -> transformers.GPT2Config:
    sizes = {"n_layer": 3, "n_embd": 16, "n_head": 2, "n_positions": LENGTH, "vocab_size": 300} | options
    return transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)


@pytest.fixture
def drawn(tmp_path: Path) -> str:
    """A folder with a configuration alone."""
    configuration().save_pretrained(tmp_path / "drawn")
    return f"hf:{tmp_path / 'drawn'}"


def test_a_configuration_makes_a_network_for_the_datas_tokens(drawn: str) -> None:
    torch.manual_seed(0)
    x = torch.randint(7, (2, LENGTH))
    predicts = build(drawn, (LENGTH,), 7, Network(), x, vocabulary=7, positions=(LENGTH,))
    classifies = build(drawn, (LENGTH,), 3, Network(), x, vocabulary=7, padding=6)
    assert call(predicts, x).shape == (2, LENGTH, 7)
    assert call(classifies, {"input_ids": x, "attention_mask": torch.ones_like(x)}).shape == (2, 3)


def test_weights_are_those_of_the_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(configuration()).eval()
    theirs.save_pretrained(tmp_path)
    x = torch.randint(300, (2, LENGTH))
    ours = build(f"hf:{tmp_path}", (LENGTH,), 300, Network(), x, vocabulary=300, positions=(LENGTH,)).eval()
    assert torch.equal(ours(x), theirs(x).logits)
    for tokens in (103, 301):  # of characters, whose numbers would stand for other tokens
        with pytest.raises(UsageError, match=rf"knows 300 tokens, and there are {tokens} .*: give its --text.tokenizer, or a"):
            build(f"hf:{tmp_path}", (LENGTH,), tokens, Network(), x, vocabulary=tokens, positions=(LENGTH,))


@pytest.mark.parametrize(("algorithm", "lora"), [("fdfa", None), ("local", 2)])
def test_it_is_trained_as_any_other(algorithm: str, lora: int | None, drawn: str, tmp_path: Path) -> None:
    (tmp_path / "song.txt").write_text("row, row, row your boat, gently down the stream; " * 40)
    config = Train(
        model=drawn, data=str(tmp_path / "song.txt"), algorithm=algorithm, lr=1e-2, epochs=2, batch_size=16, device="cpu",
        text=Text(window=LENGTH), network=Network(lora=lora), out=str(tmp_path / "run"),
    )  # fmt: skip
    rows = train(config, advance=lambda _: None)
    assert rows[1]["train_loss"] < rows[0]["train_loss"]


def test_cuts_are_proposed_where_some_are_needed(drawn: str) -> None:
    x = torch.randint(7, (2, LENGTH))
    model = build(drawn, (LENGTH,), 7, Network(), x, vocabulary=7, positions=(LENGTH,))
    proposed = {
        entry: with_cuts(Train(model=drawn, algorithm=entry), model, x).cuts for entry in ("fdfa", "fg", "fg:space=avg-weight")
    }
    assert proposed["fdfa"] == proposed["fg"] == tuple(f"network.transformer.h.{k}" for k in range(3))
    assert proposed["fg:space=avg-weight"] is None  # which measures the whole network, as for any other


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hf:{}", Network(), r"the folder holds no config.json: give one that transformers has saved"),
        ("hf:{}/gone/away", Network(), r"cannot be had \(.*\): give a name on the hub, or a folder"),
        ("gpt", Network(lora=2), "--network.lora 2: gpt has no such option, leave it out"),
        ("hf:{}/drawn", Network(heads=2), "--network.heads 2: hf:.* has no such option, leave it out"),
    ],
)
def test_networks_that_cannot_be_had(name: str, options: Network, message: str, drawn: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        build(name.format(tmp_path), (8,), 7, options, vocabulary=7, positions=(8,))
    with pytest.raises(UsageError, match=r"has 16 positions, and the inputs 17: use a shorter --text.window"):
        build(drawn, (LENGTH + 1,), 7, Network(), vocabulary=7, positions=(LENGTH + 1,))


def test_a_missing_package_is_told(drawn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("peft", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=rf"{package} is not installed: pip install onward\[hf\]"):
            build(drawn, (8,), 7, Network(lora=2), vocabulary=7, positions=(8,))
