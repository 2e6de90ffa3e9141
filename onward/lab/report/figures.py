"""Figures as plotly describes them, in dicts: the page shows a description by plotly, `picture` draws it into a file."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from onward.lab.tasks import Metric, Task

Rows = Sequence[Mapping[str, Any]]
"""What one run measured, epoch by epoch; a measure may be missing."""
Results = Mapping[str, Sequence[Rows]]
"""The runs of every name; those of one name differ only by seed."""
Looks = Mapping[str, Mapping[str, str]]
"""What `styles` returns."""
Figure = dict[str, Any]
"""`data` and `layout` of plotly. The `meta` of a trace is the place of its name in the results, by which the page hides it."""
Panel = tuple[str, Figure]
"""A figure and its title."""

COLORS = ("#3b7dd8", "#e07b00", "#2a9d5c", "#c2458f", "#8a63d2", "#16a3b3", "#b58900", "#d9483b")
"""Told apart by most colour-blind readers, and readable on white as on black."""
SYMBOLS = {"square": "■", "diamond": "◆", "triangle-up": "▲", "cross": "✚", "x": "✕", "triangle-down": "▼", "star": "★"}
"""Signs by plotly's name."""
DASHES = ("solid", "dot", "dash")
BASELINE = {"color": "#848c96", "symbol": "circle", "sign": "●", "dash": "dash"}
DIVERGING = [[0, "#b2532c"], [0.25, "#e3a582"], [0.5, "#f4f4f2"], [0.75, "#86b3d8"], [1, "#1f63a6"]]
RISING = [[0, "#f4f4f2"], [0.35, "#9ec3e0"], [0.7, "#3d83c0"], [1, "#0d3f77"]]


class Loss(NamedTuple):
    """A loss of metrics.jsonl, with the fields by which figures show a `Metric` too."""

    key: str
    axis: str
    form: str = ".4g"
    better: str = "lower"
    unit: str = ""


LOSSES = (Loss("train_loss", "training loss"), Loss("test_loss", "test loss"))
Measure = Metric | Loss


def styles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """A colour, symbol (and a sign like it) and dash for each name; bp is the grey line that the others are compared with.

    Symbols and dashes differ as colours do, so that figures can be read without colour.

    >>> {name: look["color"] for name, look in styles(["dfa", "bp", "fdfa"]).items()}
    {'dfa': '#3b7dd8', 'bp': '#848c96', 'fdfa': '#e07b00'}
    """
    looks = {"bp": BASELINE}
    for place, name in enumerate(name for name in dict.fromkeys(names) if name != "bp"):
        symbol, sign = [*SYMBOLS.items()][place % len(SYMBOLS)]
        color, dash = COLORS[place % len(COLORS)], DASHES[place % len(DASHES)]
        looks[name] = {"color": color, "symbol": symbol, "sign": sign, "dash": dash}
    return {name: looks[name] for name in names}


def learning_curves(results: Results, task: Task) -> list[Panel]:
    """The task's main metric and the training loss over the epochs."""
    figures = [curves(results, styles(results), measure) for measure in (task.main, LOSSES[0])]
    return [("", figure) for figure in figures if figure]


def curves(results: Results, looks: Looks, measure: Measure, *, by_seconds: bool = False) -> Figure | None:
    """A measure over the epochs, or over the seconds of training: the mean of each name's runs, with a band of one standard
    deviation. None if no run has it.

    >>> runs = {"bp": [[{"epoch": 1, "train_loss": 2.0}], [{"epoch": 1, "train_loss": 4.0}]]}
    >>> figure = curves(runs, styles(runs), LOSSES[0])
    >>> [trace["y"] for trace in figure["data"]][-1]
    [3.0]
    """
    together = not by_seconds and len(results) <= 6  # one box for all names at an epoch
    bands, lines = [], []
    for place, (name, runs) in enumerate(results.items()):
        points = _points(runs, measure.key, by_seconds)
        if not points:
            continue
        said = [f"{spread(found, measure.form)}{f', n={len(found)}' if len(found) > 1 else ''}" for _, _, found in points]
        if not together:
            when = [f"epoch {epoch:g}{f', {duration(x)}' if by_seconds else ''}: " for epoch, x, _ in points]
            said = [at + text for at, text in zip(when, said, strict=True)]
        hover = f"{html.escape(_short(name, 26))}{': ' if together else '<br>'}%{{customdata}}<extra></extra>"
        band, line = _curve(name, looks[name], points)
        lines.append({**line, "meta": place, "customdata": said, "hovertemplate": hover})
        bands += [{**band, "meta": place}] if any(len(found) > 1 for *_, found in points) else []
    if not lines:
        return None
    means = [value for line in lines for value in line["y"]]
    y_axis: Figure = {}
    if measure.better == "lower" and min(means) > 0 and max(means) > 1000 * min(means):  # one that diverged
        y_axis = {"type": "log", "exponentformat": "power"}
        for trace in bands:  # a mean less its deviation may be below 0
            trace["y"] = [max(value, min(means) / 2) for value in trace["y"]]
    if by_seconds:
        layout = _layout("seconds of training", measure.axis, {"rangemode": "tozero"}, y_axis, hovermode="closest")
    else:
        axis: Figure = {"tickformat": "d", "unifiedhovertitle": {"text": "epoch %{x}"}}
        axis |= {"spikethickness": -1, "spikecolor": BASELINE["color"]}  # negative: without a halo
        axis |= {"dtick": 1} if max(len(line["x"]) for line in lines) <= 12 else {}
        layout = _layout("epoch", measure.axis, axis, y_axis, hovermode="x unified" if together else "closest")
    return {"data": bands + lines, "layout": layout}  # no band hides a line


def _points(runs: Sequence[Rows], key: str, by_seconds: bool) -> list[tuple[float, float, list[float]]]:
    """For each epoch its number, where it is on the axis, and what the runs measured."""
    at: dict[float, list[tuple[float, float]]] = {}
    for rows in runs:
        times = accumulate(row.get("seconds", math.nan) for row in rows)
        for row, time in zip(rows, times, strict=True):
            if key in row and not (by_seconds and math.isnan(time)):
                at.setdefault(row["epoch"], []).append((time if by_seconds else row["epoch"], row[key]))
    return [(epoch, statistics.fmean(x for x, _ in found), [y for _, y in found]) for epoch, found in sorted(at.items())]


def _curve(name: str, look: Mapping[str, str], points: Sequence[tuple[float, float, list[float]]]) -> tuple[Figure, Figure]:
    """The band of one standard deviation around the means of the runs, and the line through them."""
    x, color = [x for _, x, _ in points], look["color"]
    means = [statistics.fmean(found) for *_, found in points]
    stds = [statistics.stdev(found) if len(found) > 1 else 0.0 for *_, found in points]
    high, low = ([mean + sign * std for mean, std in zip(means, stds, strict=True)] for sign in (1, -1))
    faint = f"rgba({','.join(str(int(color[at : at + 2], 16)) for at in (1, 3, 5))},0.18)"
    band: Figure = {"type": "scatter", "x": [*x, *reversed(x)], "y": [*high, *reversed(low)]}
    band |= {"fill": "toself", "fillcolor": faint}
    band |= {"line": {"width": 0, "color": color}, "mode": "lines", "hoverinfo": "skip"}
    line: Figure = {"type": "scatter", "name": html.escape(name), "x": x, "y": means, "mode": "lines+markers"}
    line |= {"line": {"color": color, "dash": look["dash"], "width": 2}}
    return band, line | {"marker": {"color": color, "symbol": look["symbol"], "size": 7, "maxdisplayed": 30}}


def cost(results: Results, looks: Looks, measure: str, title: str, gain: Measure) -> Figure | None:
    """What was gained, after the last epoch, against what the run cost, its `seconds` in all or the most of another measure: a
    small mark for each run, a large one with error bars for their mean. None if no run has both.

    >>> run = [{"train_loss": 8.0, "seconds": 1.5}, {"train_loss": 4.0, "seconds": 1.5}]
    >>> (mean,) = cost({"bp": [run]}, styles(["bp"]), "seconds", "seconds", LOSSES[0])["data"]
    >>> mean["x"], mean["y"]
    ([3.0], [4.0])
    """
    small: list[Figure] = []
    large: list[Figure] = []
    say, unit = (duration, 1.0) if measure == "seconds" else (size, 1e6)
    for place, (name, runs) in enumerate(results.items()):
        pairs = [(total(rows, measure), last(rows, gain.key)) for rows in runs]
        found = [(spent, value) for spent, value in pairs if spent is not None and value is not None]
        if not found:
            continue
        costs, gains = ([*values] for values in zip(*found, strict=True))
        mean, text = statistics.fmean(costs), html.escape(name)
        trace = {"type": "scatter", "mode": "markers", "name": text, "meta": place}
        trace |= {"hovertemplate": "%{customdata}<extra></extra>"}
        marker = {"color": looks[name]["color"], "symbol": looks[name]["symbol"]}
        of = f", mean of {len(found)}" if len(found) > 1 else ""
        said = f"<b>{text}</b>{of}<br>{spread(gains, gain.form)} {gain.unit}<br>{say(mean)}"
        mark = {"x": [mean / unit], "y": [statistics.fmean(gains)], "customdata": [said], "marker": {**marker, "size": 13}}
        if len(found) > 1:
            each = [f"{text}, one run<br>{value:{gain.form}} {gain.unit}<br>{say(spent)}" for spent, value in found]
            points = {"x": [spent / unit for spent in costs], "y": gains, "customdata": each}
            small.append({**trace, **points, "marker": {**marker, "size": 6, "opacity": 0.5}})
            bar = {"type": "data", "thickness": 1.5, "width": 4, "color": marker["color"]}
            mark["error_x"] = {**bar, "array": [statistics.stdev(costs) / unit]}
            mark["error_y"] = {**bar, "array": [statistics.stdev(gains)]}
        large.append({**trace, **mark})
    if not large:
        return None
    means = [trace["x"][0] for trace in large]
    apart = min(means) > 0 and max(means) > 20 * min(means)
    axis = {"type": "log"} if apart else {"rangemode": "tozero"} if measure == "seconds" else {}
    return {"data": small + large, "layout": _layout(title, gain.axis, axis, {}, hovermode="closest")}


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
    both, few = limits[0] < 0 < limits[1], len(x) <= 12
    cells = {"type": "heatmap", "z": [list(row) for row in values], "x": list(x), "zmin": limits[0], "zmax": limits[1]}
    cells |= {"colorscale": DIVERGING, "zmid": 0} if both else {"colorscale": RISING}
    cells |= {"customdata": [[html.escape(name)] * len(x) for name in y], "hoverongaps": False}
    cells |= {"hovertemplate": f"%{{customdata}}, {hover}<extra></extra>", "xgap": int(few), "ygap": 1}
    if form:
        cells |= {"texttemplate": f"%{{z:{form}}}", "textfont": {"size": 11}, "showscale": False}
    else:
        cells["colorbar"] = {"thickness": 10, "outlinewidth": 0, "len": 1, "tickfont": {"size": 11}}
    x_axis = {"showgrid": False} | ({"tickvals": list(x)} if few else {})
    short = [_short(name, 18) for name in y]
    y_axis = {"tickvals": list(range(len(y))), "ticktext": [html.escape(name) for name in short]}
    y_axis |= {"autorange": "reversed", "showgrid": False, "automargin": False}
    layout = _layout(title, "", x_axis, y_axis, height=70 + max(3, len(y)) * (28 if len(y) <= 12 else 16))
    layout["margin"] |= {"l": 14 + 7 * max(map(len, short)), "r": 10 if form else 56}
    return {"data": [cells], "layout": layout}


def sweep(fits: Rows, rows: Rows, measures: Mapping[str, tuple[str, Callable[[Any], float]]], what: str) -> list[Panel]:
    """For each measure of `onward bench`, by its unit: what every algorithm needs at the values of a sweep, and the line that
    was fitted through it, with its slope in the legend.

    >>> rows = [{"algorithm": "bp", "error": None, "value": v, "seconds": s} for v, s in ((1, 5.0), (2, 7.0))]
    >>> fits = [{"algorithm": "bp", "s": {"slope": 2.0, "intercept": 3.0}}]
    >>> ((_, figure),) = sweep(fits, rows, {"s": ("time", lambda row: row["seconds"])}, "depth")
    >>> [(trace["name"], trace["y"]) for trace in figure["data"]]
    [('bp (2)', [5.0, 7.0]), ('bp (2)', [5.0, 7.0])]
    """
    looks = styles([fit["algorithm"] for fit in fits])
    panels = []
    for unit, (_, measured) in measures.items():
        traces = []
        for fit in fits:
            name, line = fit["algorithm"], fit.get(unit)
            good = [row for row in rows if row["algorithm"] == name and not row["error"]]
            x, color = [row["value"] for row in good], looks[name]["color"]
            trace: Figure = {"type": "scatter", "name": html.escape(f"{name} ({line['slope']:.3g})" if line else name)}
            marker = {"color": color, "symbol": looks[name]["symbol"], "size": 6}
            if good:
                traces.append({**trace, "mode": "markers", "x": x, "y": [measured(row) for row in good], "marker": marker})
            if good and line:
                ends = {"x": [min(x), max(x)], "y": [line["intercept"] + line["slope"] * end for end in (min(x), max(x))]}
                look = {"color": color, "dash": looks[name]["dash"]}
                traces.append({**trace, **ends, "mode": "lines", "line": look, "showlegend": False})
        legend = {"title": {"text": f"slope, {unit} per {what}"}}
        layout = _layout(what, unit, {}, {"rangemode": "tozero"}, width=300, height=337.5, showlegend=True, legend=legend)
        panels.append(("", {"data": traces, "layout": layout}))
    return panels


def last(rows: Rows, measure: str) -> float | None:
    """The measure after the last epoch; None if it is missing there."""
    return rows[-1].get(measure) if rows else None


def total(rows: Rows, measure: str) -> float | None:
    """The sum of `seconds`, the most of any other measure; None if there is none."""
    values = [row[measure] for row in rows if measure in row]
    return (sum(values) if measure == "seconds" else max(values)) if values else None


def spread(values: Iterable[float | None], form: str = ".2f") -> str:
    """Mean ± sample standard deviation, in words; empty if there is no value.

    >>> spread([1.0, 3.0]), spread([0.5, None]), spread([])
    ('2.00 ± 1.41', '0.50', '')
    """
    found = [value for value in values if value is not None]
    std = f" ± {statistics.stdev(found):{form}}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):{form}}{std}" if found else ""


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


def _layout(x_title: str, y_title: str, x: Figure, y: Figure, **others: Any) -> Figure:
    """What all figures share, with what is special to the axes of one. The page colours text and grid by its theme."""
    axis, clear, dark = {"zeroline": False, "ticks": ""}, "rgba(0,0,0,0)", "#20262d"
    figure: Figure = {
        "xaxis": {**axis, "automargin": False, "title": {"text": x_title, "standoff": 8}, **x},
        "yaxis": {**axis, "automargin": True, "title": {"text": y_title, "standoff": 8}, **y},
    }
    figure |= {"height": 300, "margin": {"l": 44, "r": 14, "t": 8, "b": 44}, "showlegend": False}
    figure |= {"font": {"family": "system-ui, sans-serif", "size": 12}, "paper_bgcolor": clear, "plot_bgcolor": clear}
    return figure | {"hoverlabel": {"bgcolor": dark, "bordercolor": dark, "font": {"color": "#ffffff"}}} | others
