"""Pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from onward.lab.extra import lab_extra

PANELS = {"test_accuracy": "test accuracy (%)", "train_loss": "training loss"}


def learning_curves(path: Path, results: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], title: str) -> None:
    """Accuracy and loss over the epochs: for each name the mean of its runs, with a band of one standard deviation."""
    with lab_extra():
        from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    for axes, (measure, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for name, runs in results.items():
            epochs = [row["epoch"] for row in runs[0]]
            values = [[row[measure] for row in rows] for rows in zip(*runs, strict=True)]
            means = [statistics.fmean(at) for at in values]
            (line,) = axes.plot(epochs, means, label=name)
            if len(runs) > 1:
                spread = [statistics.stdev(at) for at in values]
                low, high = zip(*((mean - s, mean + s) for mean, s in zip(means, spread, strict=True)), strict=True)
                axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
