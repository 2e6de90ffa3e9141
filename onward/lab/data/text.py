"""Text as data for next-token prediction: numbered, cut in two, and cut into windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from onward.errors import UsageError
from onward.lab.data.split import Data, Split
from onward.lab.settings import Text
from onward.lab.system.extra import lab_extra, reason_of
from onward.lab.tasks import NEXT


def python_reference() -> str:
    """Python's own reference, 0.5 million characters of English and code: what follows each; comes with Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


TEXTS: dict[str, Callable[[], str]] = {"python-reference": python_reference}
ENDINGS = (".txt", ".md", ".text", ".rst")
"""Of names that can be nothing but a file of text."""


PARTS = ("training", "test")


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
    parts: the characters that occur, in their order; all bytes; or that of a tokenizer.

    Raises:
        UsageError: a part is too short for a window.

    >>> data = of_text("letters", "abcd" * 30, Text(window=8))
    >>> data.class_names, len(data.train), len(data.test), data.train.inputs[0, :3], data.train.targets[0, :3]
    (('a', 'b', 'c', 'd'), 13, 1, tensor([0, 1, 2]), tensor([1, 2, 3]))
    """
    if test is None:
        cut = len(text) * 9 // 10
        text, test = text[:cut], text[cut:]
    vocabulary, numbers, padding = numbered([text, test], options, special=False)
    if padding == len(vocabulary) - 1 and options.tokenizer is None:
        vocabulary = vocabulary[:-1]  # windows need no filling
    train, held = (_windows(name, part, options.window, which) for which, part in zip(PARTS, numbers, strict=True))
    unit = "token" if options.tokenizer else options.unit.removesuffix("s")
    return Data(name, train, held, len(vocabulary), vocabulary, NEXT[unit].name, tokens=len(vocabulary))


def numbered(texts: Sequence[str | bytes], options: Text, *, special: bool) -> tuple[tuple[str, ...], list[Tensor], int]:
    """What each token stands for, the numbers of the tokens of each text, and the token that fills up short rows: the last
    one, which no text has, or that of a tokenizer, which with `special` also adds what marks beginnings and ends."""
    if options.tokenizer is not None:
        return _tokenized([text if isinstance(text, str) else text.decode() for text in texts], options.tokenizer, special)
    if options.unit == "bytes":
        found = [_numbers(text.encode() if isinstance(text, str) else text, torch.uint8) for text in texts]
        return (*map(str, range(256)), ""), found, 256
    points = [_numbers(text.encode("utf-32-le", "surrogatepass"), torch.int32) for text in texts if isinstance(text, str)]
    kinds = torch.cat(points).unique()
    return (*map(chr, kinds.tolist()), ""), [torch.searchsorted(kinds, part) for part in points], len(kinds)


def _numbers(raw: bytes, kind: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=kind).long() if raw else torch.zeros(0, dtype=torch.int64)


def _tokenized(texts: Sequence[str], source: str, special: bool) -> tuple[tuple[str, ...], list[Tensor], int]:
    with lab_extra("hf"):
        import transformers
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        found = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        why = f"--text.tokenizer {source} cannot be used ({reason_of(error)})"
        raise UsageError(f"{why}: give a name on the hub, or a folder that transformers has saved") from error
    fills = [number for number in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if number is not None]
    vocabulary = tuple(map(str, tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))))
    return vocabulary, [torch.tensor(row, dtype=torch.int64) for row in found], fills[0]


def _windows(name: str, tokens: Tensor, window: int, part: str) -> Split:
    count = (len(tokens) - 1) // window
    if count < 1:
        why = f"--text.window {window}: the {part} part of {name} has {len(tokens)} tokens"
        raise UsageError(f"{why}, and a window takes one more than it is long: use shorter windows, or more text")
    end = count * window
    return Split(tokens[:end].view(count, window), tokens[1 : end + 1].view(count, window), pixels=False)
