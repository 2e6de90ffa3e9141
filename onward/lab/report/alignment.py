"""Figures of how estimates align with the true gradient, from the lines of alignment.jsonl."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from onward.lab.report.figures import Panel, heat_map
from onward.lab.settings import flat

COSINES = {
    "signal.cosine": "Cosine of error signal and true gradient",
    "parameters.cosine": "Cosine of parameter gradient and true gradient",
    "feedback.cosine": "Cosine of feedback matrix and true Jacobian",
}
"""Measures of alignment.jsonl; any other number found there is shown too, folded up."""
HISTOGRAM = "counts"
WORDS = {
    "signal": "error signal",
    "parameters": "parameter gradient",
    "feedback": "feedback matrix",
    "norm_ratio": "length over the true one's",
    "bias": "bias over the true length",
    "variance": "variance over the true length squared",
    "snr": "signal to noise",
}

Lines = Sequence[Mapping[str, Any]]
"""Of alignment.jsonl, or like them."""
Cells = dict[str, dict[tuple[str, float], float]]
"""By measure, and then by block and epoch."""
Counts = dict[str, list[float]]
"""By block, how many samples fall into each bin of cosines."""


class Map(NamedTuple):
    """One measure: a figure for each name, all on one scale."""

    measure: str
    title: str
    figures: list[Panel]
    fold: bool
    """Whether it is of second importance."""


def maps(measured: Mapping[str, Sequence[Lines]]) -> list[Map]:
    """Of every measure, maps over blocks and epochs, one for each name: the mean over its runs. And how the samples were
    distributed after the last epoch.

    >>> lines = [{"epoch": 1, "blocks": {"block1": {"signal": {"cosine": 0.5}}}}]
    >>> [(found.title, found.figures[0][1]["data"][0]["z"]) for found in maps({"dfa": [lines]})]
    [('Cosine of error signal and true gradient', [[0.5]])]
    """
    read = {name: [_read(lines) for lines in runs] for name, runs in measured.items()}
    cells = {name: [cells for cells, _ in runs] for name, runs in read.items()}
    measures = dict.fromkeys([*COSINES, *(measure for runs in cells.values() for found in runs for measure in found)])
    found = [_map(measure, cells) for measure in measures]
    found.append(_histograms({name: [counts for _, counts in runs] for name, runs in read.items()}))
    return sorted((one for one in found if one.figures), key=lambda one: one.fold)


def numbers(entry: Any) -> dict[str, float]:
    """The finite numbers in an entry, by their names; what is nested has names such as signal.cosine.

    >>> numbers({"snr": None, "signal": {"cosine": 0.5}})
    {'signal.cosine': 0.5}
    """
    found = flat(entry) if isinstance(entry, dict) else {}
    return {name: value for name, value in found.items() if type(value) in (int, float) and math.isfinite(value)}


def _read(lines: Lines) -> tuple[Cells, Counts]:
    """The numbers of one run, and the last histogram of each block. Of two lines on one epoch, that from more estimates
    counts."""
    cells: Cells = {}
    counts: Counts = {}
    dated = []
    for at, entry in enumerate(lines, start=1):
        found = numbers(entry)
        dated.append((found.get("epoch", at), found.get("estimates", 0), entry))
    for epoch, _, entry in sorted(dated, key=lambda line: line[:2]):
        blocks = entry.get("blocks")
        for block, values in blocks.items() if isinstance(blocks, dict) else ():
            found = numbers(values)
            if (mean := found.pop("mean", None)) is not None:  # of the cosines: old lines have no other number
                found.setdefault("signal.cosine", mean)
            for measure, value in found.items():
                cells.setdefault(measure, {})[str(block), epoch] = value
            bins = values.get("counts") if isinstance(values, dict) else None
            if isinstance(bins, list) and all(isinstance(count, int | float) for count in bins) and sum(bins) > 0:
                counts[str(block)] = bins
    return cells, counts


def _map(measure: str, read: Mapping[str, Sequence[Cells]]) -> Map:
    """The means of a measure over the runs of a name; no figures where it is missing, or no cosine and everywhere the same."""
    means: dict[str, dict[tuple[str, float], float]] = {}
    for name, runs in read.items():
        places = dict.fromkeys(place for cells in runs for place in cells.get(measure, ()))
        if places:
            found = {place: [cells[measure][place] for cells in runs if place in cells.get(measure, ())] for place in places}
            means[name] = {place: statistics.fmean(values) for place, values in found.items()}
    every = [value for cells in means.values() for value in cells.values()]
    is_cosine = measure in COSINES
    words = ": ".join(WORDS.get(word, word.replace("_", " ")) for word in measure.split("."))
    title = COSINES.get(measure, words[:1].upper() + words[1:])
    if not every or (not is_cosine and len(set(every)) == 1):
        return Map(measure, title, [], not is_cosine)
    most = max(map(abs, every)) or 1.0
    figures = []
    for name, cells in means.items():
        blocks, epochs = [*dict.fromkeys(block for block, _ in cells)], sorted({epoch for _, epoch in cells})
        figure = heat_map(
            [[cells.get((block, epoch)) for epoch in epochs] for block in blocks],
            epochs,
            blocks,
            title="epoch",
            hover="epoch %{x}: %{z:.3f}",
            limits=(-most, most) if is_cosine or min(every) < 0 else (0.0, most),
            form=(".2f" if is_cosine else ".2g") if len(epochs) <= 7 else None,
        )
        figures.append((name, figure))
    return Map(measure, title, figures, not is_cosine)


def _histograms(read: Mapping[str, Sequence[Counts]]) -> Map:
    """The distribution of the samples' cosines in each block, over all runs of a name."""
    shares: dict[str, dict[str, list[float]]] = {}
    for name, runs in read.items():
        bins = max((len(counts) for blocks in runs for counts in blocks.values()), default=0)
        sums: dict[str, list[float]] = {}
        for blocks in runs:
            for block, counts in blocks.items():
                if len(counts) == bins:
                    sums[block] = [a + b for a, b in zip(sums.get(block, [0] * bins), counts, strict=True)]
        if sums:
            shares[name] = {block: [100 * count / sum(counts) for count in counts] for block, counts in sums.items()}
    most = max((share for blocks in shares.values() for block in blocks.values() for share in block), default=0.0)
    figures = []
    for name, blocks in shares.items():
        bins = len(next(iter(blocks.values())))
        middles = [round((2 * at + 1) / bins - 1, 4) for at in range(bins)]
        words = {"title": "cosine (colour: % of samples)", "hover": "cosine %{x:.2f}: %{z:.1f} % of samples"}
        figures.append((name, heat_map([*blocks.values()], middles, [*blocks], limits=(0.0, most), **words)))
    return Map(HISTOGRAM, "Samples by the cosine of their error signal, after the last epoch", figures, fold=False)
