"""The generators that a network may draw from: PyTorch's, Python's and NumPy's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from onward.lab.system.extra import lab_extra

with lab_extra():
    import numpy as np


def seed(number: int) -> None:
    """Start all three from one number.

    >>> seed(3); first = random.random(), np.random.rand(), torch.rand(()).item()
    >>> seed(3); first == (random.random(), np.random.rand(), torch.rand(()).item())
    True
    """
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 (the one that is shared)


def states(device: torch.device) -> dict[str, Any]:
    """The states of all of them, as numbers and tensors, which `torch.load(weights_only=True)` reads."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state()  # noqa: NPY002
    kind, key, *rest = numpy
    found: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "python": (version, _as_tensor(np.array(words, np.uint32)), gauss),
        "numpy": (kind, _as_tensor(key), *rest),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore(states: dict[str, Any], device: torch.device) -> None:
    """Give them the states that :func:`states` returned. One that is missing there, as in old checkpoints, is left alone."""
    torch.set_rng_state(states["cpu"])
    if "python" in states:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(_as_words(words).tolist()), gauss))
    if "numpy" in states:
        kind, key, *rest = states["numpy"]
        np.random.set_state((kind, _as_words(key), *rest))  # noqa: NPY002
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """After the body the generators are as before it, whatever it has drawn.

    >>> with untouched(torch.device("cpu")):
    ...     first = random.random()
    >>> first == random.random()
    True
    """
    before = states(device)
    try:
        yield
    finally:
        restore(before, device)


def _as_tensor(words: np.ndarray) -> torch.Tensor:
    """Unsigned words of 32 bits as signed ones, because parts of PyTorch have no unsigned type."""
    return torch.from_numpy(words.view(np.int32).copy())


def _as_words(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().view(np.uint32)
