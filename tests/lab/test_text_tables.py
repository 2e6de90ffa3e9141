"""Rows of text from tables: columns, classes, padding, tokenizers, and the hub's parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from onward.errors import UsageError
from onward.lab.data import load, tables
from onward.lab.networks.models import build
from onward.lab.run.loop import train
from onward.lab.settings import Network, Text, Train

Write = Callable[[dict[str, list[Any]]], str]
ROWS = [("aab", "yes"), ("ba", "no"), ("aaaa", "yes"), ("b", "no"), ("bab", "no")] * 4


@pytest.fixture(params=["csv", "tsv", "parquet", "jsonl"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    """Write columns into a file of each kind."""

    def made(columns: dict[str, list[Any]]) -> str:
        path, rows = tmp_path / f"rows.{request.param}", list(zip(*columns.values(), strict=True))
        if request.param == "parquet":
            pq.write_table(pa.table(columns), path)
        elif request.param == "jsonl":
            path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
        else:
            between = "," if request.param == "csv" else "\t"
            path.write_text("".join(between.join(map(str, row)) + "\n" for row in [tuple(columns), *rows]))
        return str(path)

    return made


def test_rows_are_filled_up_and_say_so(write: Write) -> None:
    data = load(write({"id": list(range(20)), "review": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}))
    assert (data.class_names, data.vocabulary, data.tokens, data.padding) == (("no", "yes"), ("a", "b", ""), 3, 2)
    assert (data.task, len(data.train), len(data.test)) == ("classification", 17, 3)
    read = set()
    for split in (data.train, data.test):
        assert isinstance(split.inputs, dict)
        assert torch.equal(split.inputs["attention_mask"], (split.inputs["input_ids"] != 2).long())
        words = ["".join(data.vocabulary[number] for number in row) for row in split.inputs["input_ids"]]
        read |= {(word, data.class_names[label]) for word, label in zip(words, split.targets, strict=True)}
    assert read == set(ROWS)
    path = write({"text": ["abc"] * 9 + ["b"] * 9, "label": [0] * 9 + [7] * 9})
    assert load(path).class_names == ("0", "7")
    short = load(path, text=Text(window=2, unit="bytes"))
    assert short.train.inputs["input_ids"].shape == (16, 2)  # type: ignore[index, call-overload]
    assert short.tokens == 257


def test_rows_without_classes_are_one_text(write: Write) -> None:
    data = load(write({"text": [text for text, _ in ROWS]}), text=Text(window=4))
    words = "\n".join(text for text, _ in ROWS)
    assert data.task == "next-character"
    assert data.class_names == ("\n", "a", "b")
    assert "".join(data.class_names[number] for number in data.train.inputs[:3].flatten()) == words[:12]  # type: ignore[index, union-attr]


def table(**columns: list[Any]) -> pa.Table:
    return pa.table(columns)


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ({"train": table(text=["a", None], label=[0, 1])}, Text(), "row 1 of t .train. has no text in column 'text': fill it"),
        ({"train": table(text=["a", ""], label=[0, 1])}, Text(), "row 1 of t .train. has no text"),
        ({"train": table(text=["a", "b"], label=[0, 0])}, Text(), "column 'label' of t .train. holds 1 class: give rows"),
        ({"train": table(text=["a", "b"], label=[0.5, 0.1])}, Text(), "labels in column 'label' of t .train. are double: give"),
        ({"train": table(a=["a", "b"], b=["a", "b"])}, Text(), "has 2 columns that may be its text .a, b.: name the one"),
        ({"train": table(text=["a"], label=[0])}, Text(column="txt"), "--text.column txt: t .train. has the columns text, lab"),
        ({"train": table(text=["a"], n=[0])}, Text(column="n"), "--text.column n: that column of t .train. holds int64"),
        (
            {"train": table(text=["a", "b"], label=[0, 1]), "test": table(text=["a"], label=[2])},
            Text(),
            "row 0 of t .test. has the label 2, which is none of the training part's: drop it, or add such rows there",
        ),
        ({"train": table(text=["a", "b"], label=[0, 1]), "test": table(text=["a"])}, Text(), "t .test. has no column of label"),
        ({"train": table(text=["a", "b"], label=[0, 1])}, Text(), "t has no test part, and no class of 5 rows to hold one out"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used(parts: dict[str, pa.Table], options: Text, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tables.of_tables("t", parts, options)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_text("no")
    for name in ("broken.parquet", "gone.csv"):
        with pytest.raises(UsageError, match=rf"--data .*{name} cannot be read as a table \(.+\): give a readable"):
            load(str(tmp_path / name))


def test_the_hubs_first_test_part_with_labels_is_taken() -> None:
    classes = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})

    def part(rows: dict[str, list[Any]]) -> pa.Table:
        return datasets.Dataset.from_dict(rows, classes).with_format("arrow")[:]

    found = {
        "train": part({"sentence": ["a", "b"], "label": [1, 0]}),
        "test": part({"sentence": ["c"], "label": [-1]}),
        "validation": part({"sentence": ["b", "ab"], "label": [0, 1]}),
    }
    assert all(tables.are_text(one, "here") for one in found.values())
    data = tables.of_parts("here", found, Text())
    assert (data.class_names, data.train.targets.tolist(), data.test.targets.tolist()) == (("bad", "good"), [1, 0], [0, 1])


def test_padding_changes_no_output_of_the_transformer() -> None:
    torch.manual_seed(0)
    model = build("gpt", {"input_ids": (6,), "attention_mask": (6,)}, 3, Network(width=8), vocabulary=5).eval()
    x, mask = torch.randint(4, (2, 6)), torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    filled = x.where(mask == 1, 4)
    assert torch.equal(model(x, mask), model(filled, mask))
    assert torch.allclose(model(x[:1, :3]), model(x, mask)[:1], atol=1e-6)


@pytest.mark.parametrize("algorithm", ["fdfa", "local"])
def test_classes_of_rows_are_learned(algorithm: str, write: Write, tmp_path: Path) -> None:
    if not write({"text": ["a"]}).endswith("csv"):
        return
    rows = [("ab" * (n % 5 + 1), "x") for n in range(40)] + [("ba" * (n % 5 + 1), "y") for n in range(40)]
    path = write({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
    config = Train(
        model="gpt", data=path, algorithm=algorithm, lr=1e-2, epochs=3, batch_size=9, network=Network(width=16),
        device="cpu", out=str(tmp_path / "run"),
    )  # fmt: skip
    assert train(config, advance=lambda _: None)[-1]["test_accuracy"] > 80
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["vocabulary"] == ["a", "b", ""]


def test_a_tokenizer_says_what_a_token_is(tmp_path: Path, write: Write) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    whole = Tokenizer(models.WordLevel({"row": 0, "boat": 1, "?": 2, "[PAD]": 3}, unk_token="?"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="[PAD]").save_pretrained(tmp_path / "words")
    options = Text(tokenizer=str(tmp_path / "words"), window=4)
    rows = ["row row boat", "boat", "row your boat"] * 10
    data = load(write({"text": rows, "label": [0, 1, 0] * 10}), text=options)
    assert (data.tokens, data.padding, data.vocabulary) == (4, 3, ("row", "boat", "?", "[PAD]"))
    assert data.train.inputs["input_ids"][:2].tolist() == [[0, 0, 1], [1, 3, 3]]  # type: ignore[index, call-overload]
    data = load(write({"text": rows}), text=options)
    assert (data.task, data.class_names[:2]) == ("next-token", ("row", "boat"))
    with pytest.raises(UsageError, match=r"--text.tokenizer .*gone cannot be used \(.*\): give a name on the hub"):
        load(write({"text": rows}), text=Text(tokenizer=str(tmp_path / "gone")))
