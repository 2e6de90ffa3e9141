"""Text as data and as a task: windows, vocabularies, losses over tokens, and a small transformer that learns them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onward.errors import UsageError
from onward.lab.data import load
from onward.lab.data.split import held_out
from onward.lab.data.text import of_text
from onward.lab.networks.models import build
from onward.lab.run.loop import train
from onward.lab.settings import Heads, Network, TaskSettings, Text, Train
from onward.lab.tasks import NEXT

SONG = "row, row, row your boat, gently down the stream; "


@pytest.fixture
def song(tmp_path: Path) -> Path:
    path = tmp_path / "song.txt"
    path.write_text(SONG * 40, encoding="utf-8")
    return path


def test_windows_are_the_text_and_targets_what_follows() -> None:
    text = "".join(chr(97 + number * number % 23) for number in range(500)) + "é€𝄞"
    data = of_text("squares", text, Text(window=7))
    back = ["".join(data.class_names[number] for number in part.inputs.flatten()) for part in (data.train, data.test)]  # type: ignore[union-attr]
    follows = "".join(data.class_names[number] for number in data.train.targets.flatten())
    cut = len(text) * 9 // 10
    assert back[0] == text[: len(back[0])]
    assert follows == text[1 : len(back[0]) + 1]
    assert back[1] == text[cut : cut + len(back[1])]
    assert [cut - len(back[0]), len(text) - cut - len(back[1])] == [cut - (cut - 1) // 7 * 7, 51 - 50 // 7 * 7]
    assert data.class_names == tuple(sorted(set(text)))
    assert (data.task, data.tokens, data.outputs) == ("next-character", 15, 15)


def test_bytes_are_those_of_utf_8_or_of_any_file(tmp_path: Path) -> None:
    path = tmp_path / "any.txt"
    path.write_bytes(bytes(range(256)) * 4)
    data = load(str(path), text=Text(unit="bytes", window=8))
    assert data.train.inputs[:3].flatten().tolist() == list(range(24))  # type: ignore[index, union-attr]
    assert (data.task, data.outputs) == ("next-byte", 256)
    with pytest.raises(
        UsageError, match=r"any\.txt is no text in UTF-8 .*: write it again as such, or take its bytes by --text"
    ):
        load(str(path))
    assert of_text("é", "é" * 60, Text(unit="bytes", window=2)).train.inputs[0].tolist() == [0xC3, 0xA9]  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gone.txt", Text(), r"--data gone.txt cannot be read \(No such file or directory\): give a file of text"),
        (
            "python-reference",
            Text(window=10**6),
            r"--text.window 1000000: the training part of python-reference has \d+ tokens",
        ),
        ("digits", Text(window=8), "--text.window 8: data set digits holds no text, leave it out"),
    ],
)
def test_text_that_cannot_be_used(name: str, options: Text, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(name, text=options)


def test_pythons_reference_comes_with_python() -> None:
    data = load("python-reference")
    assert 5000 < len(data.train) < 10000
    assert len(data.train) // 9 - 1 <= len(data.test) <= len(data.train) // 9 + 1
    held = held_out(data)
    assert torch.equal(torch.cat([held.train.targets, held.test.targets]), data.train.targets)  # the end of it is held out


def test_tokens_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\ndef make():\n    x = torch.arange(60).view(10, 6) % 7\n    return (x, (x + 1) % 7), (x, (x + 1) % 7)\n"
    )
    data = load(f"{path}:make", task="next-token")
    assert (data.task, data.outputs, data.tokens) == ("next-token", 7, 7)
    with pytest.raises(
        UsageError, match=r"look like no task's .*next-token: the token that follows.*say which it is with --task"
    ):
        load(f"{path}:make")
    config = Train(
        model="gpt", data=f"{path}:make", algorithm="fdfa:low_memory=true", lr=1e-2, epochs=12, batch_size=5, device="cpu",
        task=TaskSettings("next-token"), network=Network(width=16), out=str(tmp_path / "run"),
    )  # fmt: skip
    assert train(config, advance=lambda _: None)[-1]["test_token_accuracy"] > 90
    with pytest.raises(
        UsageError, match=r"a mlp head at cut 'block1': .*reads all positions at once.*: use --heads.kind linear"
    ):
        train(replace(config, algorithm="local", heads=Heads("mlp"), out=str(tmp_path / "other")), advance=lambda _: None)


def test_losses_and_metrics_are_means_over_tokens() -> None:
    task, generator = NEXT["character"], torch.Generator().manual_seed(0)
    output = torch.randn(12, 5, 4, generator=generator)
    y = torch.randint(4, (12, 5), generator=generator)
    nats = [-math.log(output[n, t].softmax(0)[y[n, t]]) for n in range(12) for t in range(5)]
    right = [int(output[n, t].argmax() == y[n, t]) for n in range(12) for t in range(5)]
    mean = sum(nats) / 60
    assert task.loss(output, y).item() == pytest.approx(mean, rel=1e-5)
    for metric, wanted in zip(task.metrics, (mean / math.log(2), math.exp(mean), 100 * sum(right) / 60), strict=True):
        parts = [metric.measure(output[a:b], y[a:b]) for a, b in ((0, 3), (3, 12))]
        assert metric.value(torch.stack(parts).sum(0), 12) == pytest.approx(wanted, rel=1e-5)
    assert task.loss(torch.zeros(2, 3, 4), task.draw((2, 3), 4)).item() == pytest.approx(math.log(4))
    for wrong in (torch.zeros(2, 4), torch.zeros(2, 4, 3), {"logits": output}):
        with pytest.raises(UsageError, match=r"returned .* for targets of shape \(2, 3\) .*: return \(N, T, tokens\)"):
            task.loss(wrong, torch.zeros(2, 3, dtype=torch.int64))
    for wrong in (torch.tensor([1, 2]), torch.tensor([[0.5]]), torch.tensor([[-1]])):
        with pytest.raises(UsageError, match="are no tokens"):
            task.read(wrong)


def test_the_transformer_looks_at_no_later_token() -> None:
    torch.manual_seed(0)
    options = Network(width=16, layers=2, heads=2)
    model = build("gpt", (6,), 5, options, vocabulary=5, positions=(6,)).eval()
    x = torch.randint(5, (1, 6))
    with torch.no_grad():
        for changed in range(6):
            other = x.clone()
            other[0, changed] = (x[0, changed] + 1) % 5
            same = (model(x) == model(other)).all(2)[0]
            assert same[:changed].all()
            assert not same[changed:].any()
    pooled = build("gpt", (6,), 3, options, vocabulary=5)
    assert pooled(x).shape == (1, 3)
    assert sum(p.numel() for p in model.block2.parameters()) == 12 * 16 * 16 + 13 * 16


@pytest.mark.parametrize(
    ("options", "vocabulary", "message"),
    [
        (Network(heads=3), 5, "gpt of 2 layers, 128 features and 3 heads: use at least 1 of each, and features"),
        (Network(layers=0), 5, "gpt of 0 layers"),
        (Network(width=1e8), 5, r"--network.width 100000000.0: in gpt this is the number of features"),
        (Network(), None, r"gpt for inputs of shape \(6,\): it is for rows of tokens, such as text that --data names"),
    ],
)
def test_a_transformer_that_cannot_be(options: Network, vocabulary: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build("gpt", (6,), 5, options, vocabulary=vocabulary)


def test_a_text_is_learned_and_its_vocabulary_kept(song: Path, tmp_path: Path) -> None:
    config = Train(
        model="gpt", data=str(song), algorithm="bp", lr=1e-2, epochs=4, batch_size=16, network=Network(width=32, layers=2),
        text=Text(window=16), device="cpu", out=str(tmp_path / "run"),
    )  # fmt: skip
    rows = train(config, advance=lambda _: None)
    assert rows[-1]["test_bits"] < 2
    assert rows[-1]["test_bits"] == pytest.approx(rows[-1]["test_loss"] / math.log(2), rel=1e-5)
    assert rows[-1]["test_perplexity"] == pytest.approx(math.exp(rows[-1]["test_loss"]), rel=1e-5)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["data"]["class_names"] == sorted(set(SONG))
    with pytest.raises(UsageError, match=r"mlp takes real numbers, and the inputs are int64: give --model gpt"):
        train(replace(config, model="mlp", network=Network(), out=str(tmp_path / "other")), advance=lambda _: None)
