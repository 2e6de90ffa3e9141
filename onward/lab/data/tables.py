"""Rows of text from tables (csv, parquet, json lines, the hub): a class for each, or one long text to predict."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onward.errors import UsageError
from onward.lab.data.encoded import LABEL_NAMES, Unlabelled, image_column
from onward.lab.data.parts import choose_splits
from onward.lab.data.split import Data, Split, hold_out
from onward.lab.data.text import numbered, of_text
from onward.lab.settings import Text
from onward.lab.system.extra import lab_extra, reason_of

if TYPE_CHECKING:
    import pyarrow

TEXT_NAMES = ("text", "sentence", "content", "review", "document")
ENDINGS = (".csv", ".tsv", ".parquet", ".jsonl")

log = logging.getLogger(__name__)


def is_file(name: str) -> bool:
    """Whether the name of data is that of a file with a table.

    >>> is_file("reviews.csv"), is_file("owner/name")
    (True, False)
    """
    return Path(name).suffix.lower() in ENDINGS


def read(path: Path) -> pyarrow.Table:
    """The table in a file. Raises a UsageError if it cannot be read."""
    with lab_extra():
        import pyarrow
        import pyarrow.csv
        import pyarrow.json
        import pyarrow.parquet
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return pyarrow.parquet.read_table(path, partitioning=None)
        if kind == ".jsonl":
            return pyarrow.json.read_json(path)
        lines = pyarrow.csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ",", newlines_in_values=True)
        return pyarrow.csv.read_csv(path, parse_options=lines)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else reason_of(error)
        raise UsageError(f"--data {path} cannot be read as a table ({said}): give a readable {kind} file") from error


def are_text(table: pyarrow.Table, place: str) -> bool:
    """Whether a table has rows of text, and no images."""
    return image_column(table.schema, place) is None and bool(_strings(table))


def of_file(name: str, options: Text) -> Data:
    """The data in a file of a table; a fixed fifth of each class, or the last tenth of a text, is the test part."""
    return of_tables(Path(name).name, {"train": read(Path(name))}, options)


def of_parts(name: str, found: dict[str, Any], options: Text) -> Data:
    """The data of a table in parts, by the hub's names for these."""
    chosen = {
        split: [part for part in parts if split == "train" or _is_labelled(found[part], options)]
        for split, parts in choose_splits(found, f"data set {name}").items()
    }
    return of_tables(name, {split: found[parts[0]] for split, parts in chosen.items() if parts}, options)


def of_tables(name: str, tables: dict[str, pyarrow.Table], options: Text) -> Data:
    """Rows of text with the class of each; of tables without labels, the text of all rows, one to a line.

    The text is in the column of that type or usual name (text, sentence, ...), the class in that of type ClassLabel, or called
    label, class or target; `options` name others.

    Raises:
        UsageError: no such column, or several; a row without text or label; a test label that is not among the training ones.
    """
    columns = {split: _columns(table, f"{name} ({split})", options) for split, table in tables.items()}
    texts = {split: _texts(table, columns[split][0], f"{name} ({split})") for split, table in tables.items()}
    if columns["train"][1] is None:
        lines = {split: "\n".join(rows) for split, rows in texts.items()}
        return of_text(name, lines["train"], options, lines.get("test"))
    if "test" in tables and columns["test"][1] is None:
        raise Unlabelled(f"{name} (test) has no column of labels: name the one with the classes {columns['train'][1]!r}")
    classes = _classes(tables["train"], str(columns["train"][1]), f"{name} (train)")
    labels = {split: _labels(tables[split], str(columns[split][1]), classes, f"{name} ({split})") for split in tables}
    rows, labelled = list(texts["train"]), list(labels["train"])
    cut = len(rows)
    if "test" in tables:
        rows, labelled = rows + texts["test"], labelled + labels["test"]
        parts = list(range(cut)), list(range(cut, len(rows)))
    else:
        parts = hold_out(labelled)
        if not parts[1]:
            raise UsageError(f"{name} has no test part, and no class of 5 rows to hold one out of: add one")
        log.warning("data set %s has no test part: %d of its %d rows are held out for it", name, len(parts[1]), cut)
    inputs, vocabulary, padding = _filled(rows, options)
    whole = Split(inputs, torch.tensor(labelled), pixels=False)
    train, test = (whole.part(part) for part in parts)
    shared: dict[str, Any] = {"tokens": len(vocabulary), "vocabulary": vocabulary, "padding": padding}
    return Data(name, train, test, len(classes), tuple(classes.values()), **shared)


def _filled(rows: Sequence[str], options: Text) -> tuple[dict[str, Tensor], tuple[str, ...], int]:
    """Rows of tokens, cut or filled up to one length, as a network takes them: with a mask that says what is no filling."""
    vocabulary, numbers, padding = numbered(rows, options, special=True)
    length = min(options.window, max(map(len, numbers)))
    ids = torch.full((len(rows), length), padding)
    for row, found in enumerate(numbers):
        ids[row, : len(found)] = found[:length]
    filled = torch.tensor([len(found) for found in numbers]).unsqueeze(1)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < filled).long()}, vocabulary, padding


def _strings(table: pyarrow.Table) -> list[str]:
    import pyarrow as pa

    return [field.name for field in table.schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]


def _columns(table: pyarrow.Table, place: str, options: Text) -> tuple[str, str | None]:
    """The column of text, and that of labels if there is one."""
    held, strings = table.schema.names, _strings(table)
    for flag, asked in (("column", options.column), ("label", options.label)):
        if asked is not None and asked not in held:
            raise UsageError(f"--text.{flag} {asked}: {place} has the columns {', '.join(held)}, name one of them")
    label = options.label or next((name for name in LABEL_NAMES if name in held), None)
    others = [name for name in strings if name != label]
    column = options.column or next((name for name in TEXT_NAMES if name in others), None)
    if column is None and len(others) != 1:
        why = f"{place} has {len(others)} columns that may be its text ({', '.join(others or held)})"
        raise UsageError(f"{why}: name the one that is meant with --text.column")
    column = column or others[0]
    if column not in strings:
        raise UsageError(f"--text.column {column}: that column of {place} holds {table.schema.field(column).type}, no text")
    return column, label


def _texts(table: pyarrow.Table, column: str, place: str) -> list[str]:
    found = table[column].to_pylist()
    if not found:
        raise UsageError(f"{place} has no rows: give some")
    if (row := next((row for row, text in enumerate(found) if not text), None)) is not None:
        raise UsageError(f"row {row} of {place} has no text in column {column!r}: fill it in, or drop the row")
    return found


def _classes(table: pyarrow.Table, label: str, place: str) -> dict[Any, str]:
    """The values that stand for classes, in the order of their numbers, and what the classes are called: by the hub's features,
    or else as the values are."""
    import datasets
    import pyarrow as pa

    kind = table.schema.field(label).type
    if not any(fits(kind) for fits in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)):
        raise UsageError(f"labels in column {label!r} of {place} are {kind}: give the classes as names or whole numbers")
    feature = datasets.Features.from_arrow_schema(table.schema).get(label)
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(feature.names))
    values = sorted({value for value in table[label].to_pylist() if value is not None})
    if len(values) < 2:
        raise UsageError(f"column {label!r} of {place} holds {len(values)} class: give rows of at least two")
    return {value: str(value) for value in values}


def _labels(table: pyarrow.Table, label: str, classes: dict[Any, str], place: str) -> list[int]:
    numbers = {value: number for number, value in enumerate(classes)}
    values = table[label].to_pylist()
    for row, value in enumerate(values):
        if value not in numbers:
            why = f"row {row} of {place} has the label {value!r}, which is none of the training part's"
            raise UsageError(f"{why}: drop it, or add such rows there")
    return [numbers[value] for value in values]


def _is_labelled(table: pyarrow.Table, options: Text) -> bool:
    """Whether some row has a label; the hub's test parts often have -1 in each."""
    label = options.label or next((name for name in LABEL_NAMES if name in table.schema.names), None)
    return label not in table.schema.names or not {*table[label].unique().to_pylist()} <= {-1, None}
