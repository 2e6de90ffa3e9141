"""A picture has what the description of its figures says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from onward.lab.report import picture as module
from onward.lab.report.figures import LOSSES, cost, curves, heat_map, learning_curves, styles, sweep
from onward.lab.report.picture import empty, picture
from onward.lab.tasks import CLASSIFICATION

NAMES = ("bp", "dfa", "fg:guess=local,space=<b>$x$ & y")
RUNS = {
    name: [
        [
            {
                "epoch": epoch,
                "test_accuracy": 80.0 + 5 * place + seed + epoch,
                "train_loss": 10.0 ** (3 * place - epoch),
                "seconds": 1.0,
            }
            for epoch in (1, 2, 3)
        ]
        for seed in (0, 1)
    ]
    for place, name in enumerate(NAMES)
}


def colours(path: Path) -> dict[tuple[int, ...], int]:
    """How many pixels of the picture have each colour."""
    with Image.open(path) as found:
        counts = found.convert("RGB").getcolors(1 << 24)
    assert counts is not None
    return {colour: count for count, colour in counts}


def rgb(text: str) -> tuple[int, ...]:
    return tuple(int(text[at : at + 2], 16) for at in (1, 3, 5))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The matplotlib figures that are saved."""
    found: list[Any] = []
    save = module.save
    monkeypatch.setattr(module, "save", lambda figure, path: (found.append(figure), save(figure, path)))
    return found


def test_curves_have_the_colours_dashes_and_symbols_of_the_page(tmp_path: Path, drawn: list[Any]) -> None:
    picture(tmp_path / "a.png", [learning_curves(RUNS, CLASSIFICATION)], "title")
    found, looks = colours(tmp_path / "a.png"), styles(RUNS)
    for look in looks.values():
        assert found[rgb(look["color"])] > 200
    accuracy, loss = drawn[0].axes
    assert [line.get_linestyle() for line in accuracy.lines] == ["--", "-", ":"]
    assert [line.get_marker() for line in accuracy.lines] == ["o", "s", "D"]
    assert list(accuracy.lines[1].get_ydata()) == [86.5, 87.5, 88.5]
    band = accuracy.patches[1].get_xy()
    assert max(band[:, 1]) - 88.5 == pytest.approx(math.sqrt(0.5))
    assert (accuracy.get_ylabel(), accuracy.get_yscale(), loss.get_yscale()) == ("test accuracy (%)", "linear", "log")
    assert {text.get_text().replace("\\$", "$") for text in drawn[0].legends[0].get_texts()} == set(NAMES)


def test_costs_have_error_bars(tmp_path: Path, drawn: list[Any]) -> None:
    figure = cost(RUNS, styles(RUNS), "seconds", "seconds of training", CLASSIFICATION.main)
    picture(tmp_path / "a.svg", [[("", figure), None]])
    axes, hidden = drawn[0].axes
    assert not hidden.get_visible()
    assert sum(bar.has_yerr for bar in axes.containers) == 3
    assert axes.get_xlim()[0] == 0


def test_long_curves_have_a_few_symbols_only(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [{"epoch": epoch, "train_loss": 1.0 + 1 / epoch} for epoch in range(1, 101)]
    picture(tmp_path / "a.png", [[("", curves({"bp": [rows]}, styles(["bp"]), LOSSES[0]))]])
    assert drawn[0].axes[0].lines[0].get_markevery() == 4


def test_cells_have_the_colours_and_the_numbers_of_the_page(tmp_path: Path, drawn: list[Any]) -> None:
    words = {"title": "epoch", "hover": "", "limits": (-1.0, 1.0)}
    figure = heat_map([[1.0, -1.0], [0.0, None]], [1, 5], ["first", "second"], form=".2f", **words)
    picture(tmp_path / "a.png", [[("title", figure)]])
    found = colours(tmp_path / "a.png")
    missing = (217, 217, 217)
    for colour in (rgb("#1f63a6"), rgb("#b2532c"), rgb("#f4f4f2"), missing):
        assert max(count for near, count in found.items() if math.dist(near, colour) < 3) > 5000
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00", "-1.00", "0.00", ""]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "second"]
    assert axes.yaxis_inverted()
    picture(tmp_path / "b.png", [[("", heat_map([[1.0]] * 2, [1], ["a", "b"], **words))]])
    assert len(drawn[1].axes) == 2  # a scale beside it


def test_a_sweep_has_a_legend_of_slopes_in_each_panel(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [{"algorithm": name, "error": None, "value": v, "s": v * 2.0} for name in ("bp", "dfa") for v in (1, 2)]
    rows.append({"algorithm": "fg", "error": "out of memory", "value": 1})
    fits = [{"algorithm": "bp", "s": {"slope": 2.0, "intercept": 0.0}}, {"algorithm": "dfa"}, {"algorithm": "fg"}]
    picture(tmp_path / "a.png", [sweep(fits, rows, {"s": ("time", lambda row: row["s"])}, "depth")])
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["bp (2)", "dfa"]
    assert axes.get_ylim()[0] == 0
    assert not drawn[0].legends


def test_nothing_to_show_is_a_picture_too(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", [], "title")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_every_symbol_and_dash_is_known() -> None:
    looks = styles([f"name{at}" for at in range(40)] + ["bp"]).values()
    assert {look["symbol"] for look in looks} == module.MARKERS.keys()
    assert {look["dash"] for look in looks} == module.DASHES.keys()
    assert len({(look["symbol"], look["dash"]) for look in looks}) == 22
    assert empty(2, 1).get_size_inches().tolist() == [2, 1]
