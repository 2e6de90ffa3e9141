"""The parts of a data set, found by their names, as the Hugging Face hub has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from onward.errors import UsageError
from onward.lab.data.encoded import Sample, Unlabelled

PARTS = {"train": ("train", "training"), "test": ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")}
"""The hub's words for parts, the likeliest first. Of each part, the first that is there and has labels is taken."""
WORDS = "|".join(word for words in PARTS.values() for word in words)
Labelled = tuple[list[Sample], tuple[str, ...]]
"""Samples, and the names of their classes (none if not stored)."""


def choose_splits(found: Iterable[str], place: str) -> dict[str, list[str]]:
    """Which of the names found may be the training part, and which the test part, the likeliest first.

    >>> choose_splits(["Train", "validation", "extra", "test_set"], "here")
    {'train': ['Train'], 'test': ['test_set', 'validation']}
    """
    found = list(found)
    chosen = {
        split: sorted((name for name in found if part_of(name) in words), key=lambda name: words.index(part_of(name)))
        for split, words in PARTS.items()
    }
    if not chosen["train"]:
        raise UsageError(f"{place} has no training part (found: {', '.join(found) or 'nothing'}): name it 'train'")
    if len(chosen["train"]) > 1:
        raise UsageError(f"{place} has {len(chosen['train'])} training parts ({', '.join(chosen['train'])}): keep one of them")
    return {split: names for split, names in chosen.items() if names}


def first_labelled(parts: Sequence[str], read: Callable[[str], Labelled], notes: list[str]) -> Labelled:
    """The first of the parts that has labels. If none has, no samples, or what is wrong with the first.

    The notes get what is to be told of those that are passed over before it, or not used after it.
    """
    refused = None
    for number, part in enumerate(parts):
        try:
            labelled = read(part)
        except Unlabelled as error:
            refused = refused or error
            continue
        if labelled[0]:
            if before := parts[:number]:
                notes.append(
                    f"passed over, without images that are labelled with the training part's classes: {', '.join(before)}"
                )
            if after := parts[number + 1 :]:
                notes.append(f"not used, for {part} is: {', '.join(after)}")
            return labelled
    if refused:
        raise refused
    return [], ()


def part_of(name: str) -> str | None:
    """The word for a part of a data set that a name is, if it is one.

    >>> [part_of(name) for name in ("Training", "val-set", "test images", "train2017", "test_1", "test tube")]
    ['training', 'val', 'test', 'train', 'test', None]
    """
    match = re.fullmatch(rf"({WORDS})([ _-]?(set|data|images))?([ _-]?\d+)?", name.lower())
    return match and match[1]


def part_of_file(stem: str) -> str | None:
    """The same of a file's name, or of a folder's above it, which goes on after the word.

    >>> part_of_file("Train-00000-of-00003"), part_of_file("testset_1"), part_of_file("trainer")
    ('train', 'test', None)
    """
    match = re.match(rf"({WORDS})([ _-]?set)?(?![a-z])", stem.lower())
    return match and match[1]


def goes_on(stem: str) -> bool:
    """Whether other words than those of shards follow the word for a part in a file's name, or a folder's above it.

    >>> [goes_on(stem) for stem in ("train-00000-of-00002-0a1b2c3d4e5f6071", "test_1", "train_augmented", "test.v2")]
    [False, False, True, True]
    """
    shard = r"([^a-z]|of|part|shard|split|chunk|set|data|images|[0-9a-f]{16})*"
    return re.fullmatch(rf"({WORDS}){shard}", stem.lower()) is None
