"""Data from the Hugging Face hub: from its cache if they are there, else over the network."""

from __future__ import annotations

import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from onward.errors import UsageError
from onward.lab.data.encoded import Sample, columns, from_table, refuse_other_columns
from onward.lab.data.parts import Labelled, choose_splits, first_labelled
from onward.lab.system.extra import lab_extra, reason_of

log = logging.getLogger(__name__)

PATIENCE = 4.0  # seconds for the hub to give any answer; its own client would retry for 24


def fetch(name: str) -> dict[str, Any]:
    """The parts of `owner/name` or `owner/name:subset`, as Arrow tables that stay on the disk. Raises a UsageError if the hub
    is needed and cannot be reached, or there is no such data set."""
    with lab_extra():
        import datasets
    path, _, subset = name.partition(":")
    remedy = "or give a folder of parquet files or class folders of images with --data-dir"
    cache = f"data set {path} is not in the cache {datasets.config.HF_DATASETS_CACHE}"
    with _quiet():
        found = _from_cache(path, subset or None)
        if found is None:
            if datasets.config.HF_HUB_OFFLINE:
                raise UsageError(f"{cache} and HF_HUB_OFFLINE forbids to look on the Hugging Face hub: unset it, {remedy}")
            if silence := _silence(datasets.config.HF_ENDPOINT):
                why = f"{cache} and the Hugging Face hub at {datasets.config.HF_ENDPOINT} does not answer ({silence})"
                raise UsageError(f"{why}: connect to the network once, {remedy}")
            try:
                found = datasets.load_dataset(path, subset or None)
            except Exception as error:  # whatever the client raises: the user needs the sentence, not the stack
                why = f"data set {name} cannot be had from the Hugging Face hub ({reason_of(error)})"
                raise UsageError(f"{why}: check it, {remedy}") from error
    return {part: rows.with_format("arrow")[:] for part, rows in found.items()}


def labelled(found: dict[str, Any], name: str) -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
    """The labelled images of each split (train, and test unless there is none). Raises a UsageError if there is no training
    part, or no images."""
    path = name.partition(":")[0]
    used: dict[str, str] = {}
    notes: list[str] = []

    def read_part(part: str) -> Labelled:
        table, place = found[part], f"{path} ({part})"
        samples, names = from_table(table, place)
        if samples:
            used[place] = columns(table.schema, place)[1]
        return samples, names

    splits: dict[str, list[Sample]] = {}
    for split, parts in choose_splits(found, f"data set {path}").items():
        splits[split], names = first_labelled(parts, read_part, notes)
    refuse_other_columns(used)
    if notes:
        log.warning("data set %s: %s", name, "; ".join(notes))
    return splits, names


def _from_cache(path: str, subset: str | None) -> Any:
    """What an earlier download left, without a look at the network; None if nothing."""
    import datasets

    offline, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        return datasets.load_dataset(path, subset)
    except Exception:
        return None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _silence(endpoint: str) -> str | None:
    """Why the endpoint gives no answer; None if it gives any. In a thread: name resolution obeys no timeout."""
    result = [f"nothing heard for {PATIENCE:.0f} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PATIENCE).close()
        except urllib.error.HTTPError as error:  # an answer, if not a friendly one
            error.close()
        except (OSError, ValueError) as error:
            result[0] = str(getattr(error, "reason", error))
            return
        result.clear()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return result[0] if result else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's warnings to itself; its progress bars, which only a real download shows, stay."""
    import datasets
    import huggingface_hub.utils.logging as hub_logging

    loud = datasets.logging.get_verbosity(), hub_logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(loud[0])
        hub_logging.set_verbosity(loud[1])
