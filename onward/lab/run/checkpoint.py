"""Checkpoints that are whole or not there: written beside the last one, sealed with a digest, opened without running code."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils._pytree import tree_map_only

from onward.errors import UsageError
from onward.lab.run import formats
from onward.lab.system import disk

log = logging.getLogger(__name__)
SEAL = b"\nonward sha256 "
_SEAL_SIZE = len(SEAL) + 64


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; the one before it stays as `<name>-previous.pt`. `torch.load(path, weights_only=True)` reads both.

    Raises:
        OSError: it could not be written, for want of space perhaps; what was there is still there.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
    >>> save(path, {"epoch": 1})
    >>> load(path)
    {'epoch': 1}
    """

    def write(file: BinaryIO) -> None:
        torch.save({"format": formats.FORMAT, **state}, file)
        file.flush()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        file.seek(0, os.SEEK_END)
        file.write(SEAL + digest.encode())

    disk.write_whole(path, write, keep=previous(path))


def check(state: dict[str, Any]) -> None:
    """Say now if such a state could not be saved, or not be read again, for what it holds besides tensors.

    Raises:
        UsageError: it could not be saved.

    >>> check({"weights": torch.zeros(3), "extra": lambda: 3})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    onward.errors.UsageError: no checkpoint can hold this network's state (...): let get_extra_state return ...
    """
    held = io.BytesIO()
    without_numbers = tree_map_only(torch.Tensor, lambda tensor: torch.empty(0), state)
    try:
        torch.save(without_numbers, held)
    except Exception as error:  # whatever pickling something raises
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"no checkpoint can hold this network's state ({type(error).__name__}: {reason}): let get_extra_state return "
            "tensors, numbers, texts, and lists and dicts of these"
        ) from error
    try:
        torch.load(io.BytesIO(held.getvalue()), weights_only=True)
    except pickle.UnpicklingError:
        log.warning(
            "this network's state holds more than tensors, numbers and texts (see its get_extra_state), which is not read from "
            "a file: a run of it cannot be resumed"
        )


def load(path: Path) -> dict[str, Any] | None:
    """The state in a checkpoint, or, where that one is damaged, in the one before it; None if there is neither.

    Raises:
        UsageError: there are files, and all of them are damaged, or hold more than numbers (nothing of which is run).
    """
    reasons = []
    for candidate in (path, previous(path)):
        try:
            return _open(candidate)
        except FileNotFoundError:
            continue
        except _Damaged as damage:
            reasons.append(f"{candidate.name} {damage}")
    if reasons:
        raise UsageError(f"no usable checkpoint in {path.parent}: {'; '.join(reasons)}: start the run anew with --overwrite")
    return None


def previous(path: Path) -> Path:
    """Where the checkpoint before this one is kept."""
    return path.with_name(f"{path.stem}-previous{path.suffix}")


class _Damaged(Exception):
    pass


def _open(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        content = file.read()
    body, seal = content[:-_SEAL_SIZE], content[-_SEAL_SIZE:]
    if not seal.startswith(SEAL) or hashlib.sha256(body).hexdigest().encode() != seal[len(SEAL) :]:
        raise _Damaged("is damaged or was not written by onward (its digest does not fit)")
    try:
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise _Damaged("holds more than numbers and names, and was not opened") from None
    except Exception as error:  # a digest proves that a file is whole, not who wrote it
        raise _Damaged(f"is no checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise _Damaged(f"holds a {type(state).__name__}, not the state of a run")
    try:
        formats.check(state.pop("format", 1))
    except UsageError as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    return state
