"""Text as data for next-token prediction: numbered, cut in two, and cut into windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from onward.errors import UsageError
from onward.lab.data.split import Data, Split
from onward.lab.settings import Text
from onward.lab.system.extra import reason_of
from onward.lab.tasks import NEXT


def python_reference() -> str:
    """Python's own reference, 0.5 million characters of English and code: what follows each; comes with Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


TEXTS: dict[str, Callable[[], str]] = {"python-reference": python_reference}
ENDINGS = (".txt", ".md", ".text", ".rst")
"""Of names that can be nothing but a file of text."""


def is_file(name: str) -> bool:
    """Whether the name of data can be nothing but that of a file of text.

    >>> is_file("books/emma.txt"), is_file("owner/name"), is_file("rule.py:make")
    (True, False, False)
    """
    return Path(name).suffix.lower() in ENDINGS


def read(path: Path) -> str:
    """The text in a file. Raises a UsageError if it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        remedy = "write it again as such, or take its bytes by --text.unit bytes"
        raise UsageError(f"--data {path} is no text in UTF-8 ({reason_of(error)}): {remedy}") from error
    except OSError as error:
        raise UsageError(f"--data {path} cannot be read ({error.strerror}): give a file of text") from error


def of_file(name: str, options: Text) -> Data:
    """The windows of a file of text; of its bytes, whatever they are, if these are asked for."""
    path = Path(name)
    if options.unit == "bytes" and path.is_file():
        return of_text(path.name, path.read_bytes(), options)
    return of_text(path.name, read(path), options)


def of_text(name: str, text: str | bytes, options: Text, test: str | bytes | None = None) -> Data:
    """Windows of a text, with what follows each of their tokens as targets; the test part is the last tenth if none is given.

    Windows follow one another without overlap; what is left at the end of a part is not used. The vocabulary is that of both
    parts: the characters that occur, in their order, or all bytes.

    Raises:
        UsageError: a part is too short for a window.

    >>> data = of_text("letters", "abcd" * 30, Text(window=8))
    >>> data.class_names, len(data.train), len(data.test), data.train.inputs[0, :3], data.train.targets[0, :3]
    (('a', 'b', 'c', 'd'), 13, 1, tensor([0, 1, 2]), tensor([1, 2, 3]))
    """
    if test is None:
        cut = len(text) * 9 // 10
        text, test = text[:cut], text[cut:]
    vocabulary, numbers = numbered([text, test], options)
    parts = [_windows(name, part, options.window, which) for which, part in zip(("training", "test"), numbers, strict=True)]
    task = NEXT["byte" if options.unit == "bytes" else "character"].name
    return Data(name, *parts, len(vocabulary), vocabulary, task, tokens=len(vocabulary))


def numbered(texts: list[str | bytes], options: Text) -> tuple[tuple[str, ...], list[Tensor]]:
    """What each number stands for, and the numbers of the tokens of each text."""
    if options.unit == "bytes":
        found = [text.encode() if isinstance(text, str) else text for text in texts]
        return tuple(map(str, range(256))), [
            torch.frombuffer(bytearray(text), dtype=torch.uint8).long() if text else torch.zeros(0, dtype=torch.int64)
            for text in found
        ]
    characters = [text if isinstance(text, str) else text.decode() for text in texts]
    points = [
        torch.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), dtype=torch.int32)
        if text
        else torch.zeros(0, dtype=torch.int32)
        for text in characters
    ]
    kinds = torch.cat(points).unique()
    return tuple(map(chr, kinds.tolist())), [torch.searchsorted(kinds, part) for part in points]


def _windows(name: str, tokens: Tensor, window: int, part: str) -> Split:
    count = (len(tokens) - 1) // window
    if count < 1:
        why = f"--text.window {window}: the {part} part of {name} has {len(tokens)} tokens"
        raise UsageError(f"{why}, and a window takes one more than it is long: use shorter windows, or more text")
    end = count * window
    return Split(tokens[:end].view(count, window), tokens[1 : end + 1].view(count, window), pixels=False)
