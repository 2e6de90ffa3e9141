"""Recipes: published settings as files, and the table of what was reached with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from onward.errors import UsageError
from onward.lab.cli import main
from onward.lab.data import DATASETS
from onward.lab.networks.models import MODELS, build
from onward.lab.recipes.recipe import RECIPES, flags, read
from onward.lab.run import algorithms
from onward.lab.run.folder import read_config
from onward.lab.settings import Results, Train
from onward.lab.studies.results import BEGIN, END, results, table

ROOT = Path(__file__).parents[2]
OWN = """\
title = "bp, digits"
published = "97.0"
source = "nobody"

[settings]
algorithm = "bp"
batch-size = 16
epochs = 2

[settings.network]
width = 0.05

[settings.subset]
train = 64
test = 40
"""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_run(name: str) -> None:
    """It is read, names what there is, and its algorithm is spelled as run folders spell it."""
    recipe = read(name)
    config = recipe.config
    assert recipe.title
    assert recipe.source
    assert algorithms.variant(config.algorithm, config) == config
    assert config.model in MODELS
    assert config.data in DATASETS
    channels = 1 if "mnist" in config.data else 3
    size = config.transform.size or (28 if channels == 1 else 32)
    build(config.model, (channels, size, size), 10, replace(config.network, width=0.05))


def test_the_command_trains_a_recipe_and_what_is_given_comes_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(OWN)
    assert main(["train", "--recipe", "mine.toml", "--device", "cpu"]) == 0
    assert main(["train", "--epochs", "1", "--recipe=mine.toml", "--device", "cpu", "--out", "changed", "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert "recipe mine.toml\n" in said
    assert "recipe mine.toml, but for --epochs 1\n" in said
    plain, changed = (read_config(Path(folder)) for folder in ("runs/mine-bp-s0", "changed"))
    assert plain["config"]["batch_size"] == 16
    assert (plain["recipe"]["name"], plain["recipe"]["changed"]) == ("mine.toml", {})
    assert (changed["recipe"]["changed"], changed["config"]["epochs"]) == ({"epochs": 1}, 1)
    assert main(["train", "--resume", "changed", "--recipe", "mine.toml"]) == 2
    assert capsys.readouterr().err.startswith("error: --resume changed keeps what decides the result of the run: leave out")
    Path("mine.toml").unlink()  # a run keeps all of its settings
    assert main(["train", "--resume", "changed"]) == 0

    assert main(["results", "runs", "changed", "--keep", "kept"]) == 0
    first = capsys.readouterr().out
    value = json.loads(Path("kept/mine-s0.json").read_text())["value"]
    assert f"| `onward train --recipe mine.toml` |  | {value:.2f} (n=1) | 0 | 2 | cpu (" in first
    assert "| `onward train --recipe mine.toml --epochs 1` |  | " in first
    assert sorted(path.name for path in Path("kept").iterdir()) == ["mine-s0.json", "mine-s1-epochs=1.json"]
    shutil.rmtree("runs")
    Path("page.md").write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    assert main(["results", "--keep", "kept", "--into", "page.md"]) == 0  # what is kept is enough
    page = Path("page.md").read_text()
    assert page.startswith(f"above\n{BEGIN}\n#### cifar10\n\n| command | published | here |")
    assert page.endswith(f"|\n{END}\nbelow\n")
    assert table([json.loads(path.read_text()) for path in sorted(Path("kept").iterdir())]) in page


def test_several_seeds_are_one_row() -> None:
    kept = {"recipe": "nokland-vgg8b-cifar10", "changed": {}, "data": "cifar10", "epochs": 400, "task": "classification"}
    kept |= {"metric": "accuracy", "best": 95.0, "device": "cuda", "onward": "1", "torch": "2", "date": "2026-01-02"}
    text = table([{**kept, "seed": seed, "value": value} for seed, value in ((1, 94.0), (0, 95.0))])
    row = "| `onward train --recipe nokland-vgg8b-cifar10` | 94.42 | 94.50 ± 0.71 (n=2) | 0, 1 | 400 |"
    assert f"{row} cuda, onward 1, torch 2 | 2026-01-02 |" in text
    assert "| `onward train --recipe nokland-vgg11b-cifar10` | 94.70 | not run | | | | |" in text


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    for text, message in (
        ("title", "cannot be read"),
        ('title = "a"', r"it has no table \[settings\]"),
        (OWN.replace("source", "sauce"), "sauce is no text that a recipe has: give title, published, source, note"),
        (OWN.replace('source = "nobody"', ""), "it has no source: write one"),
        (OWN.replace("epochs = 2", "seed = 2"), "settings.seed is of a run and not of a recipe: leave it out"),
        (OWN.replace("epochs = 2", 'epochs = "two"'), 'wrong value type for field "epochs"'),
        (OWN.replace("epochs = 2", "epoch = 2"), 'can not match "epoch" to any data class field'),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=f"--recipe .*mine.toml.* ?{message}"):
            read(str(path))
    with pytest.raises(UsageError, match="unknown recipe 'fdfa-mlp-mnis': did you mean 'fdfa-mlp-mnist'"):
        read("fdfa-mlp-mnis")
    assert main(["train", "--recipe", "none.toml"]) == 2
    assert capsys.readouterr().err.startswith("error: --recipe none.toml cannot be read (")

    (tmp_path / "empty").mkdir()
    (tmp_path / "page.md").write_text("no place")
    (tmp_path / "kept.json").write_text('{"recipe": 3}')
    for asked, message in (
        (Results(runs=(str(tmp_path / "none"),)), "none is no folder: give run folders, or files that --keep has written"),
        (Results(runs=(str(tmp_path / "empty"),)), "empty holds no run and no result of one"),
        (Results(runs=(str(tmp_path / "kept.json"),)), "kept.json holds no result, its recipe is 3"),
        (Results(into=str(tmp_path / "page.md")), "page.md has no place for the table: write the lines <!-- onward results"),
    ):
        with pytest.raises(UsageError, match=message):
            results(asked)


def test_the_published_table_is_that_of_the_results_that_are_kept() -> None:
    text = results(Results(runs=tuple(map(str, sorted((ROOT / "docs/runs").glob("*.json"))))))
    assert f"{BEGIN}\n{text}\n{END}" in (ROOT / "docs/results.md").read_text(), (
        "onward results docs/runs --into docs/results.md"
    )


def test_recipes_are_installed() -> None:
    assert '"onward.lab.recipes" = ["*.toml"]' in (ROOT / "pyproject.toml").read_text()
    assert flags({"heads.kind": "linear", "drop_last": False}) == "--heads.kind linear --no-drop-last"
    assert Train().recipe is None
