"""The data sets that have a name here, and how any data are loaded."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from os import PathLike
from pathlib import Path

from onward.errors import UsageError, unknown
from onward.lab import tasks
from onward.lab.data import hub, own, tables
from onward.lab.data import text as text_files
from onward.lab.data.bundled import BUNDLED
from onward.lab.data.encoded import PATIENCE
from onward.lab.data.images import decoded, from_folder
from onward.lab.data.split import Data, subset
from onward.lab.data.text import TEXTS, of_text
from onward.lab.settings import Text
from onward.lab.system.own import named

ON_HUB = {
    "mnist": ("ylecun/mnist", "70,000 handwritten digits, 28x28 grey, 10 classes"),
    "fashion-mnist": ("zalando-datasets/fashion_mnist", "70,000 articles of clothing, 28x28 grey, 10 classes"),
    "k-mnist": ("tanganke/kmnist", "70,000 cursive Japanese characters, 28x28 grey, 10 classes"),
    "svhn": ("ufldl-stanford/svhn:cropped_digits", "99,289 house-number digits from photographs, 32x32 colour, 10 classes"),
    "cifar10": ("uoft-cs/cifar10", "60,000 photographs of animals and vehicles, 32x32 colour, 10 classes"),
    "cifar100": ("uoft-cs/cifar100", "60,000 photographs, 32x32 colour, 100 classes"),
    "imagenette": ("frgfm/imagenette:320px", "13,394 photographs of 10 of ImageNet's classes, 320 pixels on the short side"),
    "imagenet32": ("benjamin-paine/imagenet-1k-32x32", "1,331,167 photographs, 32x32 colour, 1,000 classes"),
    "imagenet": ("ILSVRC/imagenet-1k", "1,331,167 photographs of all sizes, 1,000 classes; accept its terms on the hub first"),
}
"""Images on the Hugging Face hub: what they are called there, and a line on them."""
DATASETS = {
    **{name: (make.__doc__ or "").partition("\n")[0].rstrip(".") for name, make in (BUNDLED | TEXTS).items()},
    **{name: line for name, (_, line) in ON_HUB.items()},
}
"""All that have a name here, with a line on each."""


def load(
    name: str,
    data_dir: str | PathLike[str] | None = None,
    *,
    train_samples: int | None = None,
    test_samples: int | None = None,
    patience: float = PATIENCE,
    task: str = "auto",
    seed: int = 0,
    text: Text | None = None,
) -> Data:
    """A data set by one of the `DATASETS` names, by its name on the Hugging Face hub, from a folder or the user's own file.

    `owner/name` (or `owner/name:subset`) is looked for in the hub's cache, then on the hub. `data_dir` wins over
    `name`: a folder of parquet files as on the hub (train-*.parquet, test-*.parquet), of class folders of images
    (train/cat/1.png, test/cat/2.png, or cat/1.png), or of files that torchvision has downloaded (of several data sets, the one
    called `name`). A part may have any of the hub's names for it (training, validation, dev, ...), and a number. Without a test
    part, a fixed fifth of each class is held out for it. `train_samples`, `test_samples` keep a fixed random subset.

    Images are decoded once, into memory, if they are all of one size and take at most a quarter of the machine's memory. If
    not, each is decoded when a batch needs it. Both ways give the same batches. An image may take `patience` seconds.

    `path/to/file.py:function` is called, with the `seed` if it takes it, and returns (train, test), each a pair of tensors or a
    Dataset of pairs. `path/to/file.txt` is text, cut into windows as `text` says; a table (csv, tsv, parquet, jsonl, or one on
    the hub without images) has rows of text, with classes or without. The `task` says what their targets are
    for; `auto` finds it out from the targets.

    Raises:
        UsageError: an unknown name, a data set out of reach, data that cannot be used, or not for this task.
        TimeoutError: an image does not come.

    >>> data = load("digits")
    >>> data.shape, data.outputs, len(data.train), len(data.test)
    ((1, 8, 8), 10, 1442, 355)
    """
    if task != "auto":
        tasks.named(task)  # says so if there is none
    asked = {"train": train_samples, "test": test_samples}
    options = text or Text()
    if owner := named("--data", name):
        if data_dir is not None:
            why = f"--data-dir {data_dir} beside {owner}"
            raise UsageError(f"{why}: the one is a folder of images, the other returns data, leave one out")
        return subset(own.read(owner, task, seed), asked)
    if data_dir is not None:
        path = Path(data_dir)
        data = decoded(path.resolve().name, *from_folder(path, name), asked, patience)
    elif name in BUNDLED:
        data = subset(BUNDLED[name](), asked)
    elif name in TEXTS:
        data = subset(of_text(name, TEXTS[name](), options), asked)
    elif text_files.is_file(name):
        data = subset(text_files.of_file(name, options), asked)
    elif tables.is_file(name):
        data = subset(tables.of_file(name, options), asked)
    else:
        if name not in ON_HUB and os.path.isdir(name.partition(":")[0]):  # noqa: PTH112 (no path may be made of some names)
            raise UsageError(f"data set {name} is a folder here: give it with --data-dir")
        if name not in ON_HUB and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
            raise unknown(
                "data set", name, [*DATASETS, "owner/name on the Hugging Face hub, path/to/file.txt, path/to/file.py:function"]
            )
        on_hub = ON_HUB[name][0] if name in ON_HUB else name
        found = hub.fetch(on_hub)
        if all(tables.are_text(table, f"{name} ({part})") for part, table in found.items()):
            data = subset(tables.of_parts(name, found, options), asked)
        else:
            data = decoded(name, *hub.labelled(found, on_hub), asked, patience)
    if task not in ("auto", data.task):
        raise UsageError(f"--task {task}: data set {data.name} is for {data.task}, leave it out")
    _refuse_of_text(options, data)
    return data


def _refuse_of_text(options: Text, data: Data) -> None:
    """Raise a UsageError for settings of text that the data are none of."""
    for entry in fields(Text):
        if data.tokens is None and (given := getattr(options, entry.name)) != entry.default:
            raise UsageError(f"--text.{entry.name} {given}: data set {data.name} holds no text, leave it out")
