from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from onward.errors import UsageError
from onward.lab import cli as command
from onward.lab.plain import flat
from onward.lab.report import page as module
from onward.lab.report.page import find, grouped, read, report
from onward.lab.settings import Feedback, Heads, Network, Optimizer, Report, Schedule, Subset, Train, Transform

Write = Callable[..., Path]
HOSTILE = "</script><img src=x onerror=alert(1)><b a='\"&{{ 7*7 }}%{x}"


class Page(HTMLParser):
    """The elements of a page, the text of some, and the figures in it."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(path.read_text())
        self.figures = [json.loads(text) for text in self.texts.get("application/json", [])]
        body = {name: texts for name, texts in self.texts.items() if name not in ("script", "style", "application/json")}
        self.commands = body.get("pre", [])
        self.text = " ".join(text for texts in body.values() for text in texts)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.handle_data(" ")
        if tag not in ("meta", "input", "br", "wbr", "link", "img"):
            self.open.append(dict(attributes).get("type") or tag)
            self.texts.setdefault(self.open[-1], []).append("")

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for tag in {"pre", "tr", "li", self.open[-1]} & set(self.open) if self.open else ():
            self.texts[tag][-1] += data

    def rows(self, text: str) -> list[str]:
        """The rows of tables that hold the text, each as one line."""
        return [" ".join(row.split()) for row in self.texts["tr"] if text in row]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a run folder such as `onward train` leaves."""

    def write(
        name: str, epochs: int = 3, alignment: bool = False, values: Mapping[str, Any] | None = None, **changes: Any
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = Train(**{"algorithm": "bp", "epochs": epochs, "out": str(folder), **changes})
        saved = {"config": dataclasses.asdict(config), "environment": {"engine": "reverse", "device": "cpu (1 threads)"}}
        (folder / "config.json").write_text(json.dumps(saved))
        rows = [
            {
                "epoch": epoch,
                "train_loss": 1 / epoch,
                "test_loss": 2 / epoch,
                "test_accuracy": 90.0 + epoch + config.seed,
                "seconds": 0.5,
                "peak_memory_bytes": 5e8,
                **(values or {}),
            }
            for epoch in range(1, epochs + 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if alignment:
            entries = []
            for epoch in (0, 1, 2):
                parameters = {"cosine": 0.5, "norm_ratio": 2.0 + epoch, "snr": None}
                block = {"mean": 0.25, "counts": [0, 1, 3, 0], "parameters": parameters}
                entries.append({"epoch": epoch, "from": -1, "to": 1, "blocks": {"block1": block, "0.conv": block}})
            (folder / "alignment.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return folder

    return write


def make(out: Path, *runs: Path) -> Page:
    return Page(report(Report(runs=tuple(map(str, runs)), out=str(out))))


def test_a_page_has_tables_figures_and_commands(write: Write, tmp_path: Path) -> None:
    for seed in (0, 1):
        write(f"runs/bp-s{seed}", seed=seed)
        write(f"runs/fdfa-s{seed}", seed=seed, algorithm="fdfa", alignment=True, values={"seconds": 1.0})
    page = make(tmp_path / "new" / "page.html", tmp_path / "runs")
    assert page.rows("93.50")[0].startswith("bp 93.50 ± 0.71 – 93.50 ± 0.71 0.50 s1.00 × 500 MB 2 reverse")
    assert page.rows("93.50")[1].startswith("fdfa 93.50 ± 0.71 +0.00 93.50 ± 0.71 1.00 s2.00 × 500 MB 2 reverse")
    assert [row.split()[0] for row in page.rows("") if row.startswith(("bp-s", "fdfa-s"))] == [
        "bp-s0",
        "bp-s1",
        "fdfa-s0",
        "fdfa-s1",
    ]
    for figure in page.figures:
        go.Figure(figure)  # plotly knows every property
    curve = next(trace for trace in page.figures[0]["data"] if trace.get("name") == "fdfa")
    assert (curve["x"], curve["y"]) == ([1, 2, 3], [91.5, 92.5, 93.5])
    assert curve["customdata"][0] == "91.50 ± 0.71, n=2"
    band = next(trace for trace in page.figures[0]["data"] if trace["meta"] == curve["meta"] and "fill" in trace)
    assert band["y"][0] - band["y"][-1] == pytest.approx(2 * 2**-0.5)
    by_time = page.figures[1]["data"][-1]
    assert by_time["x"] == [1.0, 2.0, 3.0]
    time, memory = page.figures[4:6]
    assert {(trace["name"], *trace["x"], *trace["y"]) for trace in time["data"] if "error_y" in trace} == {
        ("bp", 1.5, 93.5),
        ("fdfa", 3.0, 93.5),
    }
    assert {value for trace in memory["data"] for value in trace["x"]} == {500.0}
    maps = [figure["data"][0] for figure in page.figures[6:]]
    assert [found["type"] for found in maps] == ["heatmap"] * 4
    assert [found["z"][0][0] for found in maps] == [0.25, 0.5, 25.0 * 0, 2.0]
    assert maps[2]["z"][0] == [0, 25.0, 75.0, 0]
    assert maps[0]["x"] == [0, 1, 2]
    assert page.figures[6]["layout"]["yaxis"]["ticktext"] == ["block1", "0.conv"]
    assert "Nothing but the algorithm differs." in page.text


def test_a_page_that_is_watched_is_written_until_asked_to_stop(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("bp-s0")
    out, naps = tmp_path / "page.html", []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 1:
            write("dfa-s0", algorithm="dfa")
        if "2 runs" in capsys.readouterr().out:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("onward.lab.report.page.time.sleep", nap)
    assert report(Report(runs=(str(tmp_path),), out=str(out), watch=0.05)) == out
    assert '<meta http-equiv="refresh" content="0.05">' in out.read_text()
    with pytest.raises(UsageError, match="--watch 0: use a positive number"):
        Report(watch=0)


def test_it_needs_no_network(write: Write, tmp_path: Path) -> None:
    page = make(tmp_path / "page.html", write("run"))
    policy = next(attributes for tag, attributes in page.elements if tag == "meta" and "http-equiv" in attributes)
    assert str(policy["content"]).startswith("default-src 'none';")
    assert not [tag for tag, attributes in page.elements if tag in ("link", "img", "iframe") or "src" in attributes]
    assert "url(" not in "".join(page.texts["style"])
    assert (tmp_path / "page.html").stat().st_size < 6e6


@pytest.mark.parametrize(
    "config",
    [
        Train(),
        Train(algorithm="bp", seed=3, epochs=7, lr=3e-5, out="runs/with spaces & 'quotes'", wandb=True),
        Train(data="owner/flowers", data_dir="-strange", device="cuda:1", wandb_name="--out", align_every=2),
        Train(model="nets/own.py:make", input="3,8,8", cuts=("0", "stage.1"), batch_size=3),
        Train(
            network=Network(width=0.1 + 0.2, layers=5, pool_first=True, downsample="avg-pool"),
            optimizer=Optimizer("sgd", momentum=0.9, weight_decay=5e-4),
            schedule=Schedule("step", gamma=0.5, step_size=3),
            algorithm="fg:guess=local,space=span-weight,engine=reverse,orthogonal=true,eps=1e-14",
            feedback=Feedback(lr=0.25, optimizer="sgd"),
            heads=Heads("linear", 7),
            transform=Transform(mean=(0.1, -0.2, 0.3), std=0.25, augment="crop-flip", size=32),
            subset=Subset(train=100, test=50, held_out=True),
        ),
    ],
)
def test_a_command_is_parsed_back_to_the_same_run(
    config: Train, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(Train) if entry.name != "epochs"}
    folder = write("run", epochs=config.epochs, **{**given, "overwrite": True})
    (line,) = make(tmp_path / "page.html", folder).commands
    command.main(["list"])  # imports all commands, which then keep the train that they know
    asked: list[Train] = []
    monkeypatch.setattr("onward.lab.run.loop.train", asked.append)
    words = shlex.split(line)
    assert words[0] == "onward"
    assert command.main(words[1:]) == 0
    assert asked == [config]  # and does not overwrite
    changed = {name for name, value in flat(config).items() if value != flat(Train())[name]}
    flags = {word.partition("=")[0] for word in words if re.match(r"--[a-z-.]+", word)} - {"--out"}
    assert {flag.removeprefix("--").replace("-", "_") for flag in flags} == changed - {"out"}


def test_every_switch_is_off_by_default() -> None:
    assert not [name for name, value in flat(Train()).items() if value is True]


def test_settings_that_differ_are_named_and_highlighted(write: Write, tmp_path: Path) -> None:
    write("runs/a", algorithm="dfa", lr=0.1)
    write("runs/b", algorithm="fdfa", lr=0.1)
    write("runs/c", algorithm="fdfa:directions=4", lr=0.1, feedback=Feedback(lr=0.5))
    write("runs/d", algorithm="fg:guess=local", lr=0.2, heads=Heads("mlp"))
    page = make(tmp_path / "page.html", tmp_path / "runs")
    labels = ["dfa", "fdfa", "fdfa:directions=4,feedback.lr=0.5", "fg:guess=local,heads.kind=mlp"]
    assert page.rows("what differs") == [f"what differs {' '.join(labels)}"]
    assert {"feedback.lr 0.0001 0.0001 0.5 0.0001", "heads.kind none none none mlp"} < set(page.rows(" "))
    assert [attributes for tag, attributes in page.elements if tag == "td" and attributes.get("class") == "rare"] == 3 * [
        {"class": "rare"}
    ]
    assert not page.rows("batch_size")
    assert any(text.startswith("In common, and not the default: ") for text in page.texts["p"])
    assert "epochs 3" in page.texts["code"]


def test_rates_that_were_searched_set_nothing_apart_that_is_apart_already(write: Write) -> None:
    checkpoint = "bp:checkpoint=true"
    first, other = write("a", lr=0.1), write("b", lr=0.2, algorithm=checkpoint)
    assert [group.label for group in grouped([read(first), read(other)])] == ["bp", "bp:checkpoint=true"]
    third = write("c", lr=0.1, algorithm=checkpoint)
    labels = [group.label for group in grouped([read(first), read(other), read(third)])]
    assert labels == ["bp", "bp:checkpoint=true,lr=0.2", "bp:checkpoint=true,lr=0.1"]


def test_networks_and_data_have_sections_of_their_own(write: Write, tmp_path: Path) -> None:
    write("a", algorithm="dfa")
    write("b", algorithm="dfa", network=Network(layers=4))
    write("c", algorithm="dfa", subset=Subset(held_out=True))
    page = make(tmp_path / "page.html", *(tmp_path / name for name in "abc"))
    assert page.texts["h2"] == ["mlp on digits", "mlp (layers 4) on digits", "mlp on digits (held out true)"]
    assert page.texts["h1"] == ["3 experiments"]
    names = {trace["name"] for figure in page.figures for trace in figure["data"] if "name" in trace}
    assert names == {"dfa"}


def test_tasks_have_sections_and_metrics_of_their_own(write: Write, tmp_path: Path) -> None:
    write("runs/a", algorithm="dfa")
    for seed in (0, 1):
        for algorithm, r2 in (("bp", 0.5), ("fdfa", 0.25)):
            values = {"test_r2": r2 + seed / 4, "test_rmse": 100.0}
            folder = write(f"runs/{algorithm}-s{seed}", algorithm=algorithm, seed=seed, values=values)
            saved = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**saved, "data": {"task": "regression"}}))
    page = make(tmp_path / "page.html", tmp_path / "runs")
    assert page.texts["h2"] == ["mlp on digits", "mlp on digits, regression"]
    headings = "algorithm test R²last epoch differenceover bp test R²best epoch test RMSElast epoch time"
    assert page.rows("over bp")[0].startswith(headings)
    assert page.rows("0.3750")[0].startswith("fdfa 0.3750 ± 0.1768 −0.2500 0.3750 ± 0.1768 100 ± 0 0.50 s")
    assert page.rows("fdfa-s1") == ["fdfa-s1 fdfa 1 3 0.5000 0.5000 100 0.3333 0.6667 1.50 s 500 MB"]
    axes = [figure["layout"]["yaxis"]["title"]["text"] for figure in page.figures]
    assert axes[:6] == ["test accuracy (%)"] * 2 + ["training loss", "test loss"] + ["test accuracy (%)"] * 2
    assert axes[6:] == ["test R²"] * 2 + ["test RMSE", "training loss", "test loss"] + ["test R²"] * 2


def test_what_is_broken_is_named_and_left_out(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    write("runs/good", values={"test_loss": float("nan")})
    (runs / "empty").mkdir()
    (write("runs/bad-json") / "config.json").write_text("{")
    (write("runs/bad-shape") / "config.json").write_text('["config"]')
    (write("runs/bad-type") / "config.json").write_text(
        json.dumps({"config": {"algorithm": "bp", "model": "mlp", "data": "digits", "lr": "fast"}})
    )
    (write("runs/nameless") / "config.json").write_text(json.dumps({"config": {"model": "mlp", "data": "digits"}}))
    (write("runs/no-epoch") / "metrics.jsonl").write_text("")
    (write("runs/no-metrics") / "metrics.jsonl").unlink()
    failed = write("runs/failed")
    (failed / "metrics.jsonl").unlink()
    (failed / "failed.txt").write_text("the training loss is nan at epoch 1\n")
    (write("runs/cut", seed=1) / "metrics.jsonl").write_text('{"epoch": 1, "test_accuracy": 50}\n{"epoch": 2, "te')
    assert command.main(["report", str(runs), str(tmp_path / "gone"), "--out", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("2 runs on one page of ")
    told = [line.removeprefix(f"warning: {runs}/") for line in said.err.splitlines()]
    assert told == [
        "bad-json/config.json cannot be read (JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column"
        " 2 (char 1)): train it again: skipped",
        "bad-shape/config.json cannot be read (AttributeError: 'list' object has no attribute 'get'): train it again: skipped",
        'bad-type/config.json: configuration: wrong value type for field "lr" - should be "float" instead of value "fast" of'
        ' type "str": skipped',
        "empty holds no run: give a folder that `onward train` has written: skipped",
        "failed holds no complete epoch (the training loss is nan at epoch 1): skipped",
        "nameless/config.json names no algorithm: train it again: skipped",
        "no-epoch holds no complete epoch (metrics.jsonl is empty): skipped",
        "no-metrics holds no complete epoch (metrics.jsonl is empty): skipped",
        f"warning: {tmp_path / 'gone'} holds no run: give a folder that `onward train` has written: skipped",
        "cut: line 2 of metrics.jsonl is not a JSON object, so it is read up to there",
        "cut: it stopped after epoch 1 of 3",
    ]
    page = Page(tmp_path / "page.html")
    assert len(page.commands) == 2
    assert all(name in " ".join(page.texts["li"]) for name in ("empty", "bad-json", "gone", "cut"))


def test_without_any_run_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "page.html"
    assert command.main(["report", str(tmp_path / "empty"), "--out", str(out)]) == 2
    said = f"there is no run to report: {tmp_path}/empty holds no run: give a folder that `onward train` has written"
    assert capsys.readouterr().err == f"error: {said}\n"
    assert command.main(["report"]) == 2
    assert capsys.readouterr().err.startswith("error: no run folders are given: name them")
    assert not out.exists()


def test_a_page_goes_only_where_one_can_be(write: Write, tmp_path: Path) -> None:
    run = write("run")
    with pytest.raises(UsageError, match=r"--out .*config.json: a page has a name that ends in .html"):
        make(run / "config.json", run)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError, match=r"--out .*folder.html cannot be written \(Is a directory\): choose another name"):
        make(tmp_path / "folder.html", run)


def test_runs_of_other_versions_are_read(write: Write, tmp_path: Path) -> None:
    folder = write("run")
    config = {"algorithm": "dfa", "model": "mlp", "data": "digits", "epochs": 2, "seed": 1, "histogram": True, "gone": None}
    config["network"] = {"width": 0.5, "depth": 9}
    (folder / "config.json").write_text(json.dumps({"config": config}))
    (folder / "metrics.jsonl").write_text('{"test_accuracy": 12.5}\n{"epoch": 2, "train_loss": null, "test_accuracy": true}\n')
    (folder / "alignment.jsonl").write_text('{"blocks": {"1": 0.5, "2": {"mean": 0.5, "counts": "many"}}}\n{"blocks": []}\n')
    run = read(folder)
    assert (run.config, run.unknown) == (
        Train(algorithm="dfa", epochs=2, seed=1, network=Network(width=0.5)),
        {"histogram": True, "network.depth": 9},
    )
    page = make(tmp_path / "page.html", folder)
    assert page.rows("12.50")[0] == "dfa – 12.50 – – 1 –"  # the last epoch has none
    (told,) = [row for row in page.texts["li"] if "histogram" in row]
    assert told.startswith("histogram is no setting of this version, so the commands of 1 of the 1 runs leave it out")
    assert page.commands == ["onward train --network.width 0.5 --epochs 2 --algorithm dfa --seed 1"]


def test_a_run_that_stopped_early_is_not_in_the_mean(write: Write, tmp_path: Path) -> None:
    write("runs/a", seed=0)
    (stopped := write("runs/b", seed=1)).joinpath("metrics.jsonl").write_text('{"epoch": 1, "test_accuracy": 10}\n')
    page = make(tmp_path / "page.html", tmp_path / "runs")
    assert page.rows("93.00")[0].startswith("bp 93.00 93.00 0.50 s 500 MB 1 + 1 not complete")
    assert any("1 of 3" in row for row in page.rows("b"))
    (alone,) = grouped([read(stopped)])
    assert alone.counted == alone.runs


def test_folders_below_are_found_once(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write("runs/deep/bp-s0")
    (tmp_path / "runs/notes").mkdir()
    (tmp_path / "runs/notes/text.md").write_text("no run")
    (run / "wandb/logs").mkdir(parents=True)
    assert find(tmp_path / "runs") == [run]
    assert find(tmp_path / "runs/notes") == [tmp_path / "runs/notes"]
    monkeypatch.chdir(tmp_path)
    page = make(tmp_path / "page.html", tmp_path / "runs", run, Path("runs"))
    assert len(page.commands) == 1


def test_trials_of_rates_are_no_results(write: Write, tmp_path: Path) -> None:
    run, other = write("runs/bp-s0"), write("runs/more/rates/bp-s1")  # only by its name
    write("runs/rates/bp-lr0.1")
    (tmp_path / "runs" / "rates.json").write_text("{}")
    assert find(tmp_path / "runs") == [run, other]
    assert len(find(tmp_path / "runs" / "rates")) == 1  # asked for by name


def test_what_align_found_at_the_checkpoint_is_shown(write: Write, tmp_path: Path) -> None:
    folder = write("run", alignment=True)
    later = [
        {"label": label, "epoch": epoch, "blocks": {"block1": {"mean": 0.75}}} for label in ("run", "other") for epoch in (2, 3)
    ]
    (folder / "alignment.json").write_text(json.dumps(later))
    page = make(tmp_path / "page.html", folder)
    cosine = next(figure["data"][0] for figure in page.figures if figure["data"][0]["type"] == "heatmap")
    assert (cosine["x"], cosine["z"][0]) == ([0, 1, 2, 3], [0.25, 0.25, 0.25, 0.75])
    later[0] |= {"estimates": 20}  # more than the run itself took
    (folder / "alignment.json").write_text(json.dumps(later[:2]))
    page = make(tmp_path / "page.html", folder)
    cosine = next(figure["data"][0] for figure in page.figures if figure["data"][0]["type"] == "heatmap")
    assert (cosine["x"], cosine["z"][0]) == ([0, 1, 2, 3], [0.25, 0.25, 0.75, 0.75])
    (folder / "alignment.json").write_text("3")
    assert len(read(folder).alignment) == 3


def test_the_same_run_twice_is_said(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write("runs/a"), write("runs/b")
    page = make(tmp_path / "page.html", tmp_path / "runs")
    assert f"{first} and {second} have the same settings and seed: each counts" in capsys.readouterr().err
    assert page.rows("93.00")[0].startswith("bp 93.00 ± 0.00")


def test_a_comparison_is_reported_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = shlex.split("--epochs 1 --network.width 0.04 --subset.train 64 --subset.test 32 --device cpu")
    asked = shlex.split("--algorithms bp fg:guess=local,heads.kind=linear --seeds 1 --align-every 1 --align-estimates 2")
    assert command.main(["compare", *asked, *small, "--out", str(tmp_path / "both")]) == 0
    assert command.main(["report", str(tmp_path / "both"), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().err == ""
    page = Page(tmp_path / "page.html")
    assert len(page.commands) == 2
    assert {trace["name"] for trace in page.figures[0]["data"] if "name" in trace} == {"bp", "fg:guess=local,heads.kind=linear"}
    blocks = [(figure["layout"]["yaxis"].get("ticktext", [""]), figure["data"][0].get("z")) for figure in page.figures]
    assert next(cells[-1] for names, cells in blocks if names[-1] == "output") == pytest.approx([1, 1])


def test_nothing_from_files_is_markup(write: Write, tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "")
    plain = make(tmp_path / "plain.html", write("run", alignment=True))
    folder = write(name, alignment=True, model=HOSTILE, data=HOSTILE, wandb_name=HOSTILE, algorithm=HOSTILE)
    saved = json.loads((folder / "config.json").read_text())
    saved["environment"] |= {"engine": HOSTILE, "device": HOSTILE, "torch": [HOSTILE]}
    saved["config"] |= {HOSTILE: HOSTILE}
    (folder / "config.json").write_text(json.dumps(saved))
    (folder / "alignment.jsonl").write_text(json.dumps({"epoch": 1, "blocks": {HOSTILE: {"mean": 0.5, HOSTILE: 1}}}) + "\n")
    page = make(tmp_path / "page.html", folder)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements} | {"ul", "li", "wbr"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert HOSTILE in page.texts["h1"][0]
    assert shlex.split(page.commands[0])[-2:] == ["--algorithm", HOSTILE]
    shown = json.dumps(page.figures)
    assert "<img" not in shown
    assert "&lt;img" in shown


BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


def browse(path: Path) -> tuple[str, list[str]]:
    """The document after its scripts have run, and what they said to the console."""
    assert BROWSER
    asked = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent / 'browser'}"]
    asked += ["--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom", path.as_uri()]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium or google-chrome")
def test_a_browser_draws_it_without_complaint(write: Write, tmp_path: Path) -> None:
    for seed in (0, 1):
        write(f"runs/bp-s{seed}", seed=seed)
        write(f"runs/fdfa-s{seed}", seed=seed, algorithm="fdfa", alignment=True)
    make(tmp_path / "page.html", tmp_path / "runs")
    check = """<script>
      document.querySelectorAll("details").forEach(details => { details.open = true; });
      document.querySelector(".legend input[value='1']").click();
      setTimeout(() => {
        const hidden = charts[0].data.filter(trace => trace.visible === false).length;
        parent.postMessage([
          document.querySelectorAll(".js-plotly-plot .main-svg .subplot").length, hidden,
          innerWidth, document.documentElement.scrollWidth <= innerWidth
        ].join(" "), "*");
      }, 500);
    </script>"""
    text = (tmp_path / "page.html").read_text()
    (tmp_path / "checked.html").write_text(text.replace("</body>", f"{check}</body>"))
    (tmp_path / "frames.html").write_text(  # no window can be as narrow as a phone
        "".join(f"<iframe src=checked.html width={width} height=900 style='border: 0'></iframe>" for width in (320, 1280))
        + "<script>addEventListener('message', event => { document.body.append(`found ${event.data}.`); });</script>"
    )
    document, said = browse(tmp_path / "frames.html")
    assert said == []
    assert "found 10 2 320 true." in document
    assert "found 10 2 1280 true." in document
    broken = text.replace("const charts", "undefinedName(); const charts")
    (tmp_path / "broken.html").write_text(broken)
    _, said = browse(tmp_path / "broken.html")
    assert "undefinedName is not defined" in said[0]  # a complaint would have been seen


def test_every_page_is_made_of_the_files_beside_the_module() -> None:
    assert (Path(module.__file__).parent / "report.html").exists()
