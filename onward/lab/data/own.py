"""Data of the user's own: what a function in their file returns, checked."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from onward.errors import UsageError
from onward.lab import tasks
from onward.lab.data.inputs import Inputs, leaves, tensor, tensors
from onward.lab.data.items import Items
from onward.lab.data.split import Data, Split
from onward.lab.system import generators, own

PARTS = ("train", "test")
WANTED = "(train, test), each a pair of tensors (inputs, targets) or a torch.utils.data.Dataset of such pairs"


def depend_on_seed(name: str) -> bool:
    """Whether data of that name are others with another seed: a function of the user's own takes it."""
    owner = own.named("--data", name)
    return owner is not None and _takes_seed(own.load(owner))


def read(owner: own.Own, task: str = "auto", seed: int = 0) -> Data:
    """The data that the function returns, for the task of that name, or with `auto` the one that their targets look like.

    The function is called with `seed=` if it takes it. The generators of PyTorch, Python and NumPy start from that seed, or
    from 0, so that data which it draws are the same each time. Raises a UsageError if the function fails, which is told
    with its line, or returns something else than data.
    """
    make = own.load(owner)
    seeded = {"seed": seed} if _takes_seed(make) else {}
    with generators.untouched(torch.device("cpu")):
        generators.seed(seeded.get("seed", 0))
        with own.errors(owner, elsewhere=True):
            found = make(**seeded)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise UsageError(f"{owner} returned {_kind(found)}: return {WANTED}")
        given = [_split(owner, value, part) for value, part in zip(found, PARTS, strict=True)]
        shapes = [_shapes(split.inputs) for split in given]
    if shapes[0] != shapes[1]:
        raise UsageError(f"{owner}: a training input is {_said(shapes[0])}, a test input {_said(shapes[1])}: make both alike")
    try:
        chosen = tasks.of_targets(given[0].targets, task)
        train, test = (_for_task(split, chosen) for split in given)
        outputs = _outputs(train, test, chosen)
        tokens = _tokens(train, test)
        outputs = max(outputs, tokens or 0) if chosen.of_positions else outputs
    except UsageError as error:
        raise UsageError(f"{owner}: {error}") from None
    return Data(f"{owner.path}:{owner.name}", train, test, outputs, tuple(map(str, range(outputs))), chosen.name, tokens)


def _takes_seed(make: Any) -> bool:
    try:
        return "seed" in inspect.signature(make).parameters
    except ValueError:  # of a few built-in functions
        return False


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(type(part).__name__ for part in value[:4])})"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _split(owner: own.Own, value: Any, part: str) -> Split:
    """One of the two parts, with targets as they were given."""
    where = f"{owner}: {part}"
    if isinstance(value, TensorDataset) and len(value.tensors) == 2:
        value = value.tensors
    if isinstance(value, Dataset):
        with own.errors(owner, elsewhere=True):
            count = len(value) if hasattr(value, "__len__") and hasattr(value, "__getitem__") else None
        if count is None:
            raise UsageError(f"{where} is a {type(value).__name__} without a length or without items by number: give it both")
        if not count:
            raise UsageError(f"{where} has no samples: give some")
        items, y = Items(value, range(count), owner).looked_through(lambda x, y, start: _check(where, x, y, start))
        return Split(items, y, pixels=False)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise UsageError(f"{where} is {_kind(value)}: return {WANTED}")
    x, y = tensors(value[0], f"{where}'s inputs"), tensor(value[1], f"{where}'s targets")
    for name, one in (*leaves(x).items(), ("targets", y)):
        if not y.dim() or not one.dim() or len(one) != len(y):
            shape = f"the tensor {name}".rstrip() + f" has shape {tuple(one.shape)}"
            raise UsageError(f"{where} has targets of shape {tuple(y.shape)}, and {shape}: give both a row for each sample")
    if not len(y):
        raise UsageError(f"{where} has no samples: give some")
    _check(where, x, y)
    return Split(x, y, pixels=False)


def _check(where: str, x: Inputs, y: Tensor, start: int = 0) -> None:
    """Refuse numbers that nothing can be computed with."""
    for name, one in (*((f"input {name}".rstrip(), one) for name, one in leaves(x).items()), ("target", y)):
        if not (fine := one.isfinite().flatten(1).all(1) if one.dim() > 1 else one.isfinite()).all():
            row = start + int((~fine).nonzero()[0])
            why = f"{where}: the {name} of sample {row} is not finite (NaN or infinite)"
            raise UsageError(f"{why}: drop the sample, or fill it in")


def _shapes(inputs: Any) -> dict[str, tuple[Any, ...]]:
    """Of one sample: the type and sizes of each tensor."""
    x = inputs[torch.tensor([0])][0] if isinstance(inputs, Items) else inputs
    return {name: (str(one.dtype).removeprefix("torch."), *one.shape[1:]) for name, one in leaves(x).items()}


def _said(shapes: dict[str, tuple[Any, ...]]) -> str:
    return ", ".join(f"{name} {kind} {tuple(size)}".strip() for name, (kind, *size) in shapes.items())


def _for_task(split: Split, task: tasks.Task) -> Split:
    inputs = replace(split.inputs, task=task) if isinstance(split.inputs, Items) else split.inputs
    return replace(split, inputs=inputs, targets=task.read(split.targets))


def _tokens(train: Split, test: Split) -> int | None:
    """How many kinds of tokens the inputs are numbers of, where they are rows of whole numbers from 0."""
    parts = [split.inputs for split in (train, test)]
    if not all(isinstance(part, Tensor) and part.dim() == 2 and part.dtype == torch.int64 for part in parts):
        return None
    if min(int(part.min()) for part in parts) < 0:  # type: ignore[union-attr]
        return None
    return max(int(part.max()) for part in parts) + 1  # type: ignore[union-attr]


def _outputs(train: Split, test: Split, task: tasks.Task) -> int:
    """How many outputs the network needs."""
    outputs, of_test = (task.count(split.targets) for split in (train, test))
    if task.of_positions:
        return max(outputs, of_test)
    if task.name != tasks.CLASSIFICATION.name:
        if outputs != of_test:
            raise UsageError(f"a training sample has {outputs} {task.outputs}, a test sample {of_test}: give both as many")
        return outputs
    if outputs < 2:
        raise UsageError("all training labels are 0, a single class: give samples of at least two")
    if outputs > len(train):
        raise UsageError(f"a training label is {outputs - 1}, among {len(train)} samples: number the classes from 0")
    if of_test > outputs:
        why = f"a test label is {of_test - 1}, and training labels go up to {outputs - 1}"
        raise UsageError(f"{why}: drop it, or add such samples")
    return outputs
