"""Pictures in files: matplotlib draws what `figures` describes, with the page's names, colours, symbols and dashes."""

from __future__ import annotations

import html
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from onward.lab.report.figures import BASELINE, SYMBOLS, Figure, Panel
from onward.lab.system import disk
from onward.lab.system.extra import lab_extra, reason_of

INCH = 75
"""Pixels of the page that are one inch of a picture."""
MARKERS = dict(zip((BASELINE["symbol"], *SYMBOLS), "osD^PXv*", strict=True))
DASHES = {"solid": "-", "dot": ":", "dash": "--"}


def draw(pictures: Mapping[Path, Callable[[Path], None]]) -> None:
    """Draw every picture, and print where they are. If one cannot be drawn, a warning says so: the results stand without it. If
    one cannot be written, an OSError is raised."""
    drawn = []
    for path, into in pictures.items():
        try:
            into(path)
            drawn.append(str(path))
        except OSError:
            raise
        except Exception as error:  # of fonts, of numbers, of a matplotlib that is not whole
            print(f"warning: {path} could not be drawn ({type(error).__name__}: {reason_of(error)})", file=sys.stderr)
    if drawn:
        print(f"picture{'s' if len(pictures) > 1 else ''}: {', '.join(drawn)}")


def picture(path: Path, grid: Sequence[Sequence[Panel | None]], title: str = "") -> None:
    """Draw rows of panels into a file, under a title; None is an empty place. What the panels name is explained once, in a
    legend below them, unless a panel has a legend of its own."""
    rows = [*zip(*zip_longest(*grid), strict=True)] or [(None,)]
    layouts = [[panel[1]["layout"] if panel else {} for panel in row] for row in rows]
    widths = [max(layout.get("width", 375) for layout in column) for column in zip(*layouts, strict=True)]
    heights = [max(layout.get("height", 30) for layout in row) for row in layouts]
    figure = empty(sum(widths) / INCH, sum(heights) / INCH)
    figure.suptitle(_text(title))
    places = figure.subplots(len(rows), len(widths), squeeze=False, width_ratios=widths, height_ratios=heights)
    named: dict[str, Any] = {}
    for axes, panel in zip(places.flat, (panel for row in rows for panel in row), strict=True):
        if panel is None:
            axes.set_visible(False)
            continue
        axes.set_title(_text(panel[0]), fontsize="medium")
        handles = _draw(axes, panel[1])
        if legend := panel[1]["layout"].get("legend"):
            heading = _text(legend["title"]["text"])
            axes.legend(handles.values(), handles, fontsize="x-small", title=heading, title_fontsize="x-small")
        else:
            named |= handles
    if named:
        fit = max(1, int(sum(widths) / (50 + 6 * max(map(len, named)))))
        figure.legend(named.values(), named, loc="outside lower center", fontsize="small", ncols=fit)
    save(figure, path)


def _draw(axes: Any, figure: Figure) -> dict[str, Any]:
    """Draw one figure; returns what a legend has to explain, by name."""
    named: dict[str, Any] = {}
    for trace in figure["data"]:
        if trace["type"] == "heatmap":
            _heat_map(axes, trace)
        elif "fill" in trace:
            axes.fill(trace["x"], trace["y"], color=trace["line"]["color"], alpha=0.18, linewidth=0)
        else:
            drawn = _line(axes, trace)
            named |= {_text(trace["name"]): drawn} if trace.get("showlegend", True) else {}
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        its = figure["layout"][f"{name}axis"]
        axes.set(**{f"{name}label": _text(its["title"]["text"]), f"{name}scale": its.get("type", "linear")})
        if "tickvals" in its:
            axis.set_ticks(its["tickvals"], [_text(value) for value in its.get("ticktext", its["tickvals"])])
        elif "dtick" in its:
            axis.get_major_locator().set_params(integer=True)
        if its.get("showgrid", True):
            axis.grid(alpha=0.3)
        if its.get("rangemode") == "tozero":
            axes.set(**{f"{name}lim": (0, None)})
        axis.set_inverted(its.get("autorange") == "reversed")
    return named


def _line(axes: Any, trace: Mapping[str, Any]) -> Any:
    """Draw a line, marks, or both, with their error bars."""
    line, marker = trace.get("line", {}), trace.get("marker", {})
    look = {"color": line.get("color") or marker["color"], "alpha": marker.get("opacity")}
    look |= {"linestyle": "none", "linewidth": 0.75 * line.get("width", 2)}
    if "lines" in trace["mode"]:
        look["linestyle"] = DASHES[line["dash"]]
    if "markers" in trace["mode"]:
        look |= {"marker": MARKERS[marker["symbol"]], "markersize": 0.75 * marker["size"]}
        look["markevery"] = -(-len(trace["x"]) // marker.get("maxdisplayed", len(trace["x"])))
    errors = {f"{axis}err": trace.get(f"error_{axis}", {}).get("array") for axis in "xy"}
    return axes.errorbar(trace["x"], trace["y"], **errors, **look)


def _heat_map(axes: Any, trace: Mapping[str, Any]) -> None:
    """Draw coloured cells, with their numbers or a scale of the colours."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("", trace["colorscale"])
    axes.set_facecolor("0.85")  # seen where a number is missing
    axes.locator_params(axis="x", nbins=5)
    values = [[float("nan") if value is None else value for value in row] for row in trace["z"]]
    look = {"cmap": colors, "vmin": trace["zmin"], "vmax": trace["zmax"], "edgecolors": "w" if trace["xgap"] else "none"}
    cells = axes.pcolormesh(_edges(trace["x"]), _edges(range(len(values))), values, **look)
    if "texttemplate" not in trace:
        axes.figure.colorbar(cells, ax=axes)
        return
    form = trace["texttemplate"].removeprefix("%{z:").removesuffix("}")
    for y, row in enumerate(values):
        for x, value in zip(trace["x"], row, strict=True):
            color = "w" if sum(cells.to_rgba(value)[:3]) < 1.5 else "k"
            axes.text(x, y, "" if value != value else f"{value:{form}}", ha="center", va="center", fontsize=8, color=color)


def _edges(centres: Sequence[float]) -> list[float]:
    """Where cells around these places begin and end.

    >>> _edges([0, 1, 3]), _edges([5])
    ([-0.5, 0.5, 2.0, 4.0], [4.5, 5.5])
    """
    if len(centres) == 1:
        return [centres[0] - 0.5, centres[0] + 0.5]
    between = [(a + b) / 2 for a, b in pairwise(centres)]
    return [2 * centres[0] - between[0], *between, 2 * centres[-1] - between[-1]]


def _text(text: object) -> str:
    """A text of a figure, for matplotlib: without plotly's escapes, and with no dollar that begins a formula."""
    return html.unescape(str(text)).replace("$", r"\$")


def empty(width: float, height: float) -> Any:
    """A matplotlib figure of that size in inches, for a file: a missing MPLBACKEND (a notebook's) does not stop it."""
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
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure, in the format that its name ends in; never half of it."""
    held = io.BytesIO()
    try:
        figure.savefig(held, format=path.suffix[1:], dpi=2 * INCH)
    except OSError as error:  # of a program or a font that it needs: not of the file
        raise RuntimeError(str(error)) from error
    disk.write_whole(path, lambda file: file.write(held.getbuffer()))


def formats() -> list[str]:
    """The endings of names, with their dots, that `save` knows; not .pgf, which needs LaTeX.

    >>> {".png", ".svg", ".pdf"} <= set(formats())
    True
    """
    return [f".{name}" for name in empty(1, 1).canvas.get_supported_filetypes() if name != "pgf"]
