"""Figures of how estimates align with the true gradient, from the lines of alignment.jsonl."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from onward.lab.plain import flat
from onward.lab.report.figures import Panel, heat_map

COSINES = {
    "signal.cosine": "Cosine of error signal and true gradient",
    "parameters.cosine": "Cosine of parameter gradient and true gradient",
    "feedback.cosine": "Cosine of feedback matrix and true Jacobian",
}
"""Measures of alignment.jsonl; any other number found there is shown too, folded up."""
DESCENT = "descent"
"""Of the whole network, not of a block."""
HISTOGRAM = "counts"
WORDS = {"signal": "error signal", "parameters": "parameter gradient", "feedback": "feedback matrix"}
WORDS |= {"norm_ratio": "length over the true one's", "bias": "bias over the true length", "snr": "signal to noise"}
WORDS |= {"variance": "variance over the true length squared", DESCENT: "Descent of a small step over the gradient's own"}

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
    """For every measure and name, a map over blocks and epochs; for every name, the samples' distribution after the last epoch.

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
    """The numbers of one run, and the last histogram of each block; of two lines, the one from more estimates counts."""
    cells: Cells = {}
    counts: Counts = {}
    dated = [({"epoch": at, "estimates": 0} | numbers(entry), entry) for at, entry in enumerate(lines, start=1)]
    for said, entry in sorted(dated, key=lambda line: (line[0]["epoch"], line[0]["estimates"])):
        if DESCENT in said:
            cells.setdefault(DESCENT, {})["network", said["epoch"]] = said[DESCENT]
        blocks = entry.get("blocks")
        for block, values in blocks.items() if isinstance(blocks, dict) else ():
            found = numbers(values)
            if (mean := found.pop("mean", None)) is not None:  # of the cosines: old lines have no other number
                found.setdefault("signal.cosine", mean)
            for measure, value in found.items():
                cells.setdefault(measure, {})[str(block), said["epoch"]] = value
            bins = values.get("counts") if isinstance(values, dict) else None
            if isinstance(bins, list) and all(isinstance(count, int | float) for count in bins) and sum(bins) > 0:
                counts[str(block)] = bins
    return cells, counts


def _map(measure: str, read: Mapping[str, Sequence[Cells]]) -> Map:
    """The means of a measure over the runs of each name; no figures if no run has it, or if it is constant and no cosine."""
    means: dict[str, dict[tuple[str, float], float]] = {}
    for name, runs in read.items():
        found: dict[tuple[str, float], list[float]] = {}
        for place, value in (pair for cells in runs for pair in cells.get(measure, {}).items()):
            found.setdefault(place, []).append(value)
        if found:
            means[name] = {place: statistics.fmean(values) for place, values in found.items()}
    every = [value for cells in means.values() for value in cells.values()]
    is_cosine = measure in COSINES
    words = ": ".join(WORDS.get(word, word.replace("_", " ")) for word in measure.split("."))
    title = COSINES.get(measure, words[:1].upper() + words[1:])
    fold = not is_cosine and measure != DESCENT
    if not every or (fold and len(set(every)) == 1):
        return Map(measure, title, [], fold)
    most = max(map(abs, every)) or 1.0
    limits = (-most, most) if is_cosine or min(every) < 0 else (0.0, most)
    figures = []
    for name, cells in means.items():
        blocks, epochs = [*dict.fromkeys(block for block, _ in cells)], sorted({epoch for _, epoch in cells})
        values = [[cells.get((block, epoch)) for epoch in epochs] for block in blocks]
        form = (".2f" if is_cosine else ".2g") if len(epochs) <= 7 else None
        said = {"title": "epoch", "hover": "epoch %{x}: %{z:.3f}"}
        figures.append((name, heat_map(values, epochs, blocks, limits=limits, form=form, **said)))
    return Map(measure, title, figures, fold)


def _histograms(read: Mapping[str, Sequence[Counts]]) -> Map:
    """The distribution of the samples' cosines in each block, over all runs of a name."""
    shares: dict[str, dict[str, list[float]]] = {}
    for name, runs in read.items():
        for block in dict.fromkeys(block for counts in runs for block in counts):
            sums = [sum(bins) for bins in zip(*(counts[block] for counts in runs if block in counts), strict=False)]
            shares.setdefault(name, {})[block] = [100 * count / sum(sums) for count in sums]
    most = max((share for blocks in shares.values() for block in blocks.values() for share in block), default=0.0)
    figures = []
    for name, blocks in shares.items():
        bins = len(next(iter(blocks.values())))
        middles = [round((2 * at + 1) / bins - 1, 4) for at in range(bins)]
        words = {"title": "cosine (colour: % of samples)", "hover": "cosine %{x:.2f}: %{z:.1f} % of samples"}
        figures.append((name, heat_map([*blocks.values()], middles, [*blocks], limits=(0.0, most), **words)))
    return Map(HISTOGRAM, "Samples by the cosine of their error signal, after the last epoch", figures, fold=False)
