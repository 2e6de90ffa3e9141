"""Places that a command runs in: whatever its streams and its environment are, no work is lost for a line or a picture."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_command import SMALL

import onward
from onward.errors import UsageError
from onward.lab import cli as command
from onward.lab.report import picture as plots
from onward.lab.run import processes
from onward.lab.run.loop import train
from onward.lab.run.record import read
from onward.lab.settings import Align, Bench, Compare, Network, Report, Subset, Train
from onward.lab.studies.compare import compare
from onward.lab.system import surroundings

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(onward.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)
COMPARE = ["compare", "--algorithms", "dfa", "--seeds", "2", *SMALL, "--out", "runs"]


def run(
    arguments: list[str], cwd: Path, redirected: str = "", options: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """The command, in a shell that may close its streams or send them elsewhere."""
    line = f"{shlex.join([sys.executable, *options.split(), '-m', 'onward', *arguments])} {redirected}"
    return subprocess.run(["bash", "-c", line], cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, timeout=120)


# ---- streams


@pytest.mark.parametrize("redirected", [pytest.param(">&-", marks=pytest.mark.slow), "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_work_without_standard_streams_comes_to_its_end(redirected: str, tmp_path: Path) -> None:
    assert run(["train", *SMALL, "--out", "run"], tmp_path, redirected).returncode == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_exit_code_tells_what_nobody_reads(tmp_path: Path) -> None:
    assert run(["list"], tmp_path, ">&- 2>&-").returncode == 0
    assert run(["nonsense"], tmp_path, ">&- 2>&-").returncode == 2


def test_a_file_does_not_become_the_stream_that_is_closed(tmp_path: Path) -> None:
    """The system gives its number to the next file that is opened; what is written to the stream would go there."""
    program = (
        "import os, sys; from onward.lab.system import surroundings\n"
        "with surroundings.settled():\n"
        "    file = open('file', 'w')\n"
        "    os.write(1, b'words'); print('words'); print('words', file=sys.stderr)\n"
        "    assert sys.stdin.read() == ''\n"
    )
    line = f"{shlex.join([sys.executable, '-c', program])} <&- >&- 2>&-"
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=120)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("options", [pytest.param("", marks=pytest.mark.slow), "-u"])
def test_words_that_an_encoding_does_not_have_are_replaced(options: str, tmp_path: Path) -> None:
    done = run([*COMPARE[:-1], "übung"], tmp_path, options=options, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b" ? " in done.stdout  # mean ± deviation
    assert done.stdout.splitlines()[-1] == b"picture: ?bung/curves.png"
    table = json.loads((tmp_path / "übung" / "table.json").read_text())
    assert table[0]["runs"] == 2
    assert (tmp_path / "übung" / "curves.png").exists()
    assert run(["--help"], tmp_path, options=options, PYTHONIOENCODING="latin-1").returncode == 0


@pytest.mark.slow
def test_a_system_that_prefers_ascii_reads_what_was_written(tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "runs" / "dfa-s0").mkdir(parents=True)
    assert run(COMPARE, tmp_path, **plain).returncode == 0
    (tmp_path / "runs" / "dfa-s1" / "failed.txt").write_text("the loss of b\u00fcro is nan\n", encoding="utf-8")
    done = run(COMPARE, tmp_path, **plain)
    assert done.returncode == 0
    assert b"dfa, seed 1 failed: the loss of b?ro is nan" in done.stdout
    assert run(["report", "runs"], tmp_path, **plain).returncode == 0


def test_streams_that_are_not_the_systems_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdin, sys.stdout, sys.stderr
    with surroundings.settled():
        assert (sys.stdin, sys.stdout, sys.stderr) == before
    assert (sys.stdin, sys.stdout, sys.stderr) == before


# ---- environment

OF_OTHERS = {
    "a notebook": {"MPLBACKEND": "module://matplotlib_inline_of_nobody.backend_inline", "CLICOLOR": "1", "FORCE_COLOR": "1"},
    "a launcher": {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "2",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    },
    "a narrow terminal": {"COLUMNS": "1", "LINES": "1", "TERM": "dumb", "NO_COLOR": "1"},
    "a developer": {"PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "1"},
    "threads": {"OMP_NUM_THREADS": "many", "KMP_AFFINITY": "nonsense", "MKL_NUM_THREADS": "0x", "NUMEXPR_MAX_THREADS": "x"},
}
WARNS = """
import warnings
from torch import nn

class Warns(nn.Flatten):
    def forward(self, x):
        warnings.warn("an old function")
        return super().forward(x)

def make():
    return nn.Sequential(nn.Sequential(Warns(), nn.Linear(64, 16), nn.ReLU()), nn.Linear(16, 10))
"""


SELDOM = [
    pytest.param(name, marks=pytest.mark.slow if name in ("a developer", "a launcher", "a narrow terminal", "threads") else ())
    for name in OF_OTHERS
]


@pytest.mark.parametrize("place", SELDOM)
def test_what_others_leave_in_the_environment_stops_nothing(place: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(WARNS)
    small = ["--epochs", "1", "--subset.train", "64", "--subset.test", "32", "--device", "cpu", "--model", "net.py:make"]
    done = run(["compare", "--algorithms", "dfa", "--seeds", "1", *small, "--out", "runs"], tmp_path, **OF_OTHERS[place])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "curves.png").stat().st_size > 1000
    assert (tmp_path / "runs" / "table.json").exists()


def test_help_has_an_end_in_the_narrowest_terminal(tmp_path: Path) -> None:
    assert b"--algorithm" in run(["train", "--help"], tmp_path, COLUMNS="1").stdout


def test_a_notebooks_backend_is_there_for_its_own_pictures(tmp_path: Path) -> None:
    program = (
        "from onward.lab.report import picture\n"
        "picture.empty(1, 1).savefig('picture.png')\n"
        "import os, matplotlib; print(matplotlib.rcParams['backend'], os.environ['MPLBACKEND'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**ENVIRONMENT, "MPLBACKEND": "svg"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "svg svg\n"
    assert (tmp_path / "picture.png").exists()


def torchrun(port: int, **changes: str) -> dict[str, str]:
    found = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**found, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", **changes}


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    def put(variables: dict[str, str]) -> None:
        for name in torchrun(0):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def test_only_a_torchrun_that_answers_has_started_several_processes(environ: Callable[[dict[str, str]], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        environ(torchrun(port))
        assert processes.asked_for() == 2
        for changes in (
            {"RANK": "2"},
            {"RANK": "x"},
            {"WORLD_SIZE": ""},
            {"MASTER_PORT": "none"},
            {"WORLD_SIZE": "1", "RANK": "0"},
        ):
            environ(torchrun(port, **changes))
            assert processes.asked_for() == 1
    environ({name: value for name, value in torchrun(port).items() if not name.startswith("TORCHELASTIC")})
    assert processes.asked_for() == 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = server.getsockname()[1]
    environ(torchrun(gone))
    assert processes.asked_for() == 1
    environ(torchrun(gone, TORCHELASTIC_USE_AGENT_STORE="False"))  # then the first process answers, once it is there
    assert processes.asked_for() == 2


def test_a_process_that_trains_alone_says_so(
    environ: Callable[[dict[str, str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    assert command.main(["train", *SMALL, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == "WORLD_SIZE=2 is not from torchrun: this process trains alone\n"


def test_warnings_are_warnings_again(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["error", "ignore::ResourceWarning", "err::FutureWarning:torch"]
    monkeypatch.setattr(sys, "warnoptions", options)
    monkeypatch.setenv("PYTHONWARNINGS", ",".join(options))
    with warnings.catch_warnings(), surroundings.settled():
        warnings.simplefilter("default")
        with pytest.warns(FutureWarning):
            warnings.warn("old", FutureWarning, stacklevel=1)
        assert options == ["ignore::ResourceWarning"]
        assert "PYTHONWARNINGS" not in os.environ


# ---- pictures


def test_a_picture_that_cannot_be_drawn_is_told_after_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        assert (tmp_path / "table.csv").exists()
        raise ValueError("no such font\nat all")

    monkeypatch.setattr("onward.lab.studies.compare.learning_curves", fail)
    small: dict[str, Any] = {"network": Network(width=0.04), "subset": Subset(64, 32), "device": "cpu"}
    table = compare(Compare(algorithms=("dfa",), seeds=1, epochs=1, out=str(tmp_path), **small))
    assert json.loads((tmp_path / "table.json").read_text()) == table
    told = capsys.readouterr()
    assert told.err == f"warning: {tmp_path / 'curves.png'} could not be drawn (ValueError: no such font)\n"
    assert told.out.splitlines()[-1].startswith("table: ")


def test_a_program_that_drawing_lacks_is_not_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Figure:
        def savefig(self, *_: object, **__: object) -> None:
            raise FileNotFoundError(2, "No such file or directory: 'latex'")

    plots.draw({tmp_path / "a.png": lambda path: plots.save(Figure(), path)})
    said = capsys.readouterr().err
    assert "a.png could not be drawn (RuntimeError: [Errno 2] No such file or directory: 'latex')" in said


@pytest.mark.slow
def test_no_columns_at_all_are_a_few(tmp_path: Path) -> None:
    for columns in ("0", "-3", "5"):
        assert b"written to run" in run(["train", *SMALL, "--overwrite", "--out", "run"], tmp_path, COLUMNS=columns).stdout


def test_the_other_pictures_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(path: Path) -> None:
        raise RuntimeError("no")

    pictures = {tmp_path / "a.png": fail, tmp_path / "b.png": lambda path: plots.save(plots.empty(1, 1), path)}
    plots.draw(pictures)
    assert capsys.readouterr().out == f"pictures: {tmp_path / 'b.png'}\n"
    assert (tmp_path / "b.png").exists()


def test_without_what_draws_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"matplotlib.* is not installed: pip install onward\[lab\]"):
        compare(Compare(out=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_a_path_is_printed_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"epochs": 1, "subset": Subset(64, 32), "device": "cpu"}
    train(Train(out=":ok:/[b]", algorithm="bp", **small))
    assert "written to :ok:/[b]" in capsys.readouterr().out


# ---- home


def test_a_home_folder_may_be_written_as_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "net.py").write_text(WARNS.replace('warnings.warn("an old function")', "pass"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    small = ["--epochs", "1", "--subset.train", "64", "--subset.test", "32", "--device", "cpu"]
    assert command.main(["train", *small, "--model", "~/net.py:make", "--out=~/runs/a"]) == 0
    assert read(home / "runs/a").config.model == f"{home}/net.py:make"
    assert command.main(["train", "--resume=~/runs/a"]) == 0
    assert command.main(["align", "~/runs/a", "--device", "cpu", "--align-estimates", "1"]) == 0
    assert (home / "runs/a/alignment.json").exists()
    assert command.main(["report", "~/runs", "--out=~/page.html"]) == 0
    assert (home / "page.html").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_every_path_has_its_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert Train(data_dir="~/images", resume="~/a").data_dir == "/home/me/images"
    assert Train(resume="~/a").resume == "/home/me/a"
    assert Align(runs=("~/a", "b")).runs == ("/home/me/a", "b")
    assert Report(runs=("~/a",), out="~/a.html") == Report(runs=("/home/me/a",), out="/home/me/a.html")
    assert (Bench(json="~/a.json").json, Bench(plot="~").plot) == ("/home/me/a.json", "/home/me")
    assert Train(out="a~", model="~/net.py:f").out == "a~"
    assert Train(algorithm="~/r.py:Rule:lr=1").algorithm == "/home/me/r.py:Rule:lr=1"
    assert Compare(algorithms=("bp", "~/r.py:Rule")).algorithms == ("bp", "/home/me/r.py:Rule")
    with pytest.raises(UsageError, match="--out ~no-such-person/a: there is no such home folder, write the whole path"):
        Train(out="~no-such-person/a")


def test_a_folder_of_ones_own_may_begin_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~old").mkdir()
    small: dict[str, Any] = {"network": Network(width=0.04), "subset": Subset(64, 32), "device": "cpu", "epochs": 1}
    train(Train(out="~old/a", **small))
    assert Path("~old/a/config.json").exists()
