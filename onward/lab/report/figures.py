"""Pictures: PNG by matplotlib, and figures for a page, as the JSON that plotly draws."""

from __future__ import annotations

import html
import io
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console

from onward.lab.system import disk
from onward.lab.system.extra import lab_extra

Rows = Sequence[Mapping[str, float]]
"""What one run measured, epoch by epoch; a measure may be missing."""
Results = Mapping[str, Sequence[Rows]]
"""The runs of every name; those of one name differ only by seed."""
Looks = Mapping[str, Mapping[str, str]]
"""What `styles` gives."""
Figure = dict[str, Any]
"""`data` and `layout` of plotly. Every trace has the place of its name in the results as `meta`."""

PANELS = {"test_accuracy": "test accuracy (%)", "train_loss": "training loss"}
COLORS = ("#3b7dd8", "#e07b00", "#2a9d5c", "#c2458f", "#8a63d2", "#16a3b3", "#b58900", "#d9483b")
"""Told apart by most colour-blind readers, and readable on white as on black."""
SYMBOLS = {"square": "■", "diamond": "◆", "triangle-up": "▲", "cross": "✚", "x": "✕", "triangle-down": "▼", "star": "★"}
"""By plotly's name."""
DASHES = ("solid", "dash", "dot")
BASELINE = {"color": "#848c96", "symbol": "circle", "sign": "●", "dash": "dash"}
DIVERGING = [[0, "#b2532c"], [0.25, "#e3a582"], [0.5, "#f4f4f2"], [0.75, "#86b3d8"], [1, "#1f63a6"]]
RISING = [[0, "#f4f4f2"], [0.35, "#9ec3e0"], [0.7, "#3d83c0"], [1, "#0d3f77"]]


def learning_curves(path: Path, results: Results, title: str) -> None:
    """Accuracy and loss over the epochs: for each name the mean of its runs, with a band of one standard deviation."""
    figure = empty(10, 4)
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
    save(figure, path)


def empty(width: float, height: float) -> Any:
    """A matplotlib figure of that size, in inches, with nothing in it."""
    return _figure()(figsize=(width, height), layout="constrained")


def _figure() -> Any:
    """matplotlib's `Figure`. It writes files, and is not stopped by an MPLBACKEND (a notebook's) that is not installed here."""
    wanted = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        with lab_extra():
            import matplotlib
            from matplotlib.figure import Figure
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted
    if wanted:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = wanted  # for pictures of others in this process
    return Figure


def draw(pictures: Mapping[Path, Callable[[Path], None]]) -> None:
    """Draw every picture, and print where they are. One that cannot be drawn is told, as a result without it is a result.

    Raises:
        OSError: one cannot be written.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    drawn = []
    for path, into in pictures.items():
        try:
            into(path)
            drawn.append(str(path))
        except OSError:
            raise
        except Exception as error:  # of fonts, of numbers, of a matplotlib that is not whole
            reason = str(error).partition("\n")[0]
            print(f"warning: {path} could not be drawn ({type(error).__name__}: {reason})", file=sys.stderr)
    if drawn:
        console.print(f"picture{'s' if len(pictures) > 1 else ''}: {', '.join(drawn)}")


def save(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a matplotlib figure, in the format that its name ends in; never half of it."""
    held = io.BytesIO()
    try:
        figure.savefig(held, format=path.suffix[1:], dpi=dpi)
    except OSError as error:  # of a program or a font that it needs: not of the file
        raise RuntimeError(str(error)) from error
    disk.write_whole(path, lambda file: file.write(held.getbuffer()))


def formats() -> list[str]:
    """The endings of names, with their dots, that `save` knows; not .pgf, which needs LaTeX.

    >>> {".png", ".svg", ".pdf"} <= set(formats())
    True
    """
    return [f".{name}" for name in empty(1, 1).canvas.get_supported_filetypes() if name != "pgf"]


def styles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """A colour, symbol (and a sign like it) and dash for each name; bp is the grey line that the others are held against.

    >>> {name: look["color"] for name, look in styles(["dfa", "bp", "fdfa"]).items()}
    {'dfa': '#3b7dd8', 'bp': '#848c96', 'fdfa': '#e07b00'}
    """
    looks = {"bp": BASELINE}
    for place, name in enumerate(name for name in dict.fromkeys(names) if name != "bp"):
        lap, at = divmod(place, len(COLORS))
        symbol, sign = [*SYMBOLS.items()][place % len(SYMBOLS)]
        looks[name] = {"color": COLORS[at], "symbol": symbol, "sign": sign, "dash": DASHES[lap % len(DASHES)]}
    return {name: looks[name] for name in names}


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± sample standard deviation, in words.

    >>> spread([1.0, 3.0]), spread([0.5])
    ('2.00 ± 1.41', '0.50')
    """
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def curves(results: Results, looks: Looks, measure: str, title: str, *, by_seconds: bool = False) -> Figure | None:
    """A measure over the epochs, or over the seconds of training: the mean of each name's runs, with a band of one standard
    deviation. None if no run has it.

    >>> runs = {"bp": [[{"epoch": 1, "loss": 2.0}], [{"epoch": 1, "loss": 4.0}]]}
    >>> figure = curves(runs, styles(runs), "loss", "loss")
    >>> [trace["y"] for trace in figure["data"]][-1]
    [3.0]
    """
    traces: list[dict[str, Any]] = []
    together = not by_seconds and len(results) <= 6  # one box for all names at an epoch
    longest = max((len(rows) for runs in results.values() for rows in runs), default=0)
    for place, (name, runs) in enumerate(results.items()):
        look = looks[name]
        needed = (measure, "seconds") if by_seconds else (measure,)
        at: dict[float, list[tuple[float, float]]] = {}
        for rows in runs:
            times = accumulate(row.get("seconds", math.nan) for row in rows)
            for row, time in zip(rows, times, strict=True):
                if all(key in row for key in needed) and not (by_seconds and math.isnan(time)):
                    at.setdefault(row["epoch"], []).append((time, row[measure]))
        if not at:
            continue
        epochs = sorted(at)
        values = [[value for _, value in at[epoch]] for epoch in epochs]
        means = [statistics.fmean(found) for found in values]
        x = [statistics.fmean(time for time, _ in at[epoch]) for epoch in epochs] if by_seconds else epochs
        if any(len(found) > 1 for found in values):
            std = [statistics.stdev(found) if len(found) > 1 else 0.0 for found in values]
            high = [mean + s for mean, s in zip(means, std, strict=True)]
            low = [mean - s for mean, s in zip(means, std, strict=True)]
            traces.append(
                {
                    "type": "scatter",
                    "x": [*x, *reversed(x)],
                    "y": [*high, *reversed(low)],
                    "fill": "toself",
                    "fillcolor": _faint(look["color"]),
                    "line": {"width": 0},
                    "mode": "lines",
                    "hoverinfo": "skip",
                    "meta": place,
                }
            )
        form = ".2f" if "accuracy" in measure else ".4g"
        said = [f"{spread(found, form)}{f', n={len(found)}' if len(found) > 1 else ''}" for found in values]
        if by_seconds:
            said = [f"epoch {epoch:g}, {duration(s)}: {text}" for s, epoch, text in zip(x, epochs, said, strict=True)]
        elif not together:
            said = [f"epoch {epoch:g}: {text}" for epoch, text in zip(epochs, said, strict=True)]
        traces.append(
            {
                "type": "scatter",
                "name": html.escape(name),
                "x": x,
                "y": means,
                "mode": "lines+markers" if longest <= 30 else "lines",
                "line": {"color": look["color"], "dash": look["dash"], "width": 2},
                "marker": {"symbol": look["symbol"], "size": 7},
                "customdata": said,
                "hovertemplate": f"{html.escape(_short(name, 26))}{': ' if together else '<br>'}%{{customdata}}<extra></extra>",
                "meta": place,
            }
        )
    if not traces:
        return None
    traces.sort(key=lambda trace: "fill" not in trace)  # no band hides a line
    y_axis: dict[str, Any] = {"title": {"text": title}}
    means = [value for trace in traces if "fill" not in trace for value in trace["y"]]
    if measure.endswith("loss") and min(means) > 0 and max(means) > 1000 * min(means):  # one that diverged
        y_axis |= {"type": "log", "exponentformat": "power"}
        for trace in traces:
            trace["y"] = [max(value, min(means) / 2) for value in trace["y"]]
    if by_seconds:
        axis = {"title": {"text": "seconds of training"}, "rangemode": "tozero"}
    else:
        axis = {"title": {"text": "epoch"}, "tickformat": "d", "unifiedhovertitle": {"text": "epoch %{x}"}}
        axis |= {"spikethickness": -1, "spikecolor": BASELINE["color"]}  # negative: without a halo
        axis |= {"dtick": 1} if longest <= 12 else {}
    return {
        "data": traces,
        "layout": _layout(axis, y_axis) | {"hovermode": "x unified" if together else "closest"},
    }


def cost(results: Results, looks: Looks, measure: str, title: str) -> Figure | None:
    """Test accuracy after the last epoch against what the run cost, its `seconds` in all or the most of another measure: a
    small mark for each run, a large one with error bars for their mean. None if no run has both.

    >>> run = [{"test_accuracy": 80.0, "seconds": 1.5}, {"test_accuracy": 90.0, "seconds": 1.5}]
    >>> (mean,) = cost({"bp": [run]}, styles(["bp"]), "seconds", "seconds")["data"]
    >>> mean["x"], mean["y"]
    ([3.0], [90.0])
    """
    small: list[dict[str, Any]] = []
    large: list[dict[str, Any]] = []
    say, unit = (duration, 1.0) if measure == "seconds" else (size, 1e6)
    for place, (name, runs) in enumerate(results.items()):
        found = [point for rows in runs if (point := (total(rows, measure), last(rows, "test_accuracy"))) and None not in point]
        if not found:
            continue
        look = looks[name]
        costs, accuracies = ([*values] for values in zip(*found, strict=True))
        marker = {"color": look["color"], "symbol": look["symbol"]}
        shared = {"type": "scatter", "mode": "markers", "name": html.escape(name), "meta": place}
        hover = "%{customdata}<extra></extra>"
        if len(found) > 1:
            said = [f"{html.escape(name)}, one run<br>{a:.2f} %<br>{say(c)}" for c, a in found]
            points = {"x": [c / unit for c in costs], "y": accuracies, "customdata": said, "hovertemplate": hover}
            small.append({**shared, **points, "marker": {**marker, "size": 6, "opacity": 0.5}})
        mean = statistics.fmean(costs)
        n = f", mean of {len(found)}" if len(found) > 1 else ""
        trace = {
            **shared,
            "x": [mean / unit],
            "y": [statistics.fmean(accuracies)],
            "customdata": [f"<b>{html.escape(name)}</b>{n}<br>{spread(accuracies)} %<br>{say(mean)}"],
            "hovertemplate": hover,
            "marker": {**marker, "size": 13},
        }
        if len(found) > 1:
            bar = {"type": "data", "thickness": 1.5, "width": 4, "color": look["color"]}
            trace["error_x"] = {**bar, "array": [statistics.stdev(costs) / unit]}
            trace["error_y"] = {**bar, "array": [statistics.stdev(accuracies)]}
        large.append(trace)
    if not large:
        return None
    means = [trace["x"][0] for trace in large]
    apart = min(means) > 0 and max(means) > 20 * min(means)
    axis = {"title": {"text": title}, **({"type": "log"} if apart else {"rangemode": "tozero"} if measure == "seconds" else {})}
    return {
        "data": small + large,
        "layout": _layout(axis, {"title": {"text": PANELS["test_accuracy"]}}) | {"hovermode": "closest"},
    }


def heat_map(
    values: Sequence[Sequence[float | None]],
    x: Sequence[float],
    y: Sequence[str],
    *,
    title: str,
    hover: str,
    limits: tuple[float, float],
    form: str | None = None,
) -> Figure:
    """A row of coloured cells for each name in `y`, the first on top. Limits on both sides of 0 make 0 the neutral colour. With
    a `form` of numbers they are written into the cells, which then need no scale beside them.

    >>> heat_map([[0.5, None]], [1, 2], ["block1"], title="epoch", hover="%{z}", limits=(-1, 1))["data"][0]["zmid"]
    0
    """
    both = limits[0] < 0 < limits[1]
    cells = {
        "type": "heatmap",
        "z": [list(row) for row in values],
        "x": list(x),
        "customdata": [[html.escape(name)] * len(x) for name in y],
        "zmin": limits[0],
        "zmax": limits[1],
        **({"zmid": 0} if both else {}),
        "colorscale": DIVERGING if both else RISING,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "len": 1, "tickfont": {"size": 11}},
        "hovertemplate": f"%{{customdata}}, {hover}<extra></extra>",
        "hoverongaps": False,
        "xgap": 1 if len(x) <= 12 else 0,
        "ygap": 1,
        **({"texttemplate": f"%{{z:{form}}}", "textfont": {"size": 11}, "showscale": False} if form else {}),
    }
    x_axis = {"title": {"text": title}, "showgrid": False} | ({"tickvals": list(x)} if len(x) <= 12 else {})
    short = [_short(name, 18) for name in y]
    names = {"tickvals": list(range(len(y))), "ticktext": [html.escape(name) for name in short]}
    layout = _layout(x_axis, {"autorange": "reversed", "showgrid": False, "automargin": False, **names})
    layout["margin"] |= {"l": 14 + 7 * max(map(len, short)), "r": 10 if form else 56}
    layout["height"] = 70 + max(3, len(y)) * (28 if len(y) <= 12 else 16)
    return {"data": [cells], "layout": layout}


def last(rows: Rows, measure: str) -> float | None:
    """The measure after the last epoch; None if it is missing there."""
    return rows[-1].get(measure) if rows else None


def total(rows: Rows, measure: str) -> float | None:
    """The sum of `seconds`, the most of any other measure; None if there is none."""
    values = [row[measure] for row in rows if measure in row]
    return (sum(values) if measure == "seconds" else max(values)) if values else None


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(0.123), duration(75), duration(7500)
    ('0.12 s', '1 min 15 s', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    large, small = divmod(round(seconds if seconds < 3600 else seconds / 60), 60)
    return f"{large} min {small} s" if seconds < 3600 else f"{large} h {small} min"


def size(count: float) -> str:
    """Bytes as people say them.

    >>> size(497_100_000), size(12.34e9)
    ('497 MB', '12.3 GB')
    """
    return f"{count / 1e6:.0f} MB" if count < 1e10 else f"{count / 1e9:.1f} GB"


def _short(name: str, most: int) -> str:
    """The name without its middle if it is longer than so many letters."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"


def _faint(color: str) -> str:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _layout(x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
    """What all figures share. The page colours text and grid, so that they follow its theme."""
    plain = {"zeroline": False, "automargin": True, "ticks": "", "title": {"standoff": 8}}
    return {
        "xaxis": plain | {"automargin": False} | x | {"title": plain["title"] | x.get("title", {})},
        "yaxis": plain | y | {"title": plain["title"] | y.get("title", {})},
        "margin": {"l": 44, "r": 14, "t": 8, "b": 44},
        "height": 300,
        "showlegend": False,
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"bgcolor": "#20262d", "bordercolor": "#20262d", "font": {"color": "#ffffff"}},
    }
