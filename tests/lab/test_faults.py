"""What goes wrong around a run: disks that are full, images that do not come, settings and data that cannot be used. Each ends
in one sentence, and leaves what there was."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import onward
from onward.lab import cli as command
from onward.lab.data import Data, load
from onward.lab.data.encoded import Sample, decode
from onward.lab.run.loop import TrainingFailed, resume, train
from onward.lab.settings import Network, Schedule, Train, Transform
from onward.lab.system import disk

Make = Callable[..., Data]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(onward.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def config(tmp_path: Path) -> Train:
    return Train(
        algorithm="bp",
        epochs=3,
        batch_size=16,
        lr=1e-2,
        device="cpu",
        out=str(tmp_path / "run"),
        network=Network(width=0.04),
        save_weights=1,
        align_every=1,
        align_estimates=2,
    )


def sentence(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """What the command says when it refuses."""
    assert command.main(list(arguments)) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "Traceback" not in said
    return said


def state(folder: Path) -> Any:
    """The final weights and metrics that do not depend on the clock."""
    found = torch.load(folder / "checkpoint.pt", weights_only=True)
    rows = [{name: row[name] for name in ("epoch", "train_loss", "test_loss")} for row in found["rows"]]
    return rows, {name: value.tolist() for name, value in found["estimator"].items() if isinstance(value, torch.Tensor)}


# ---- disks


class Full(io.FileIO):
    """A file on a disk with no space left, or with some other trouble."""

    trouble = errno.ENOSPC

    def write(self, content: Any) -> int:
        raise OSError(self.trouble, os.strerror(self.trouble))


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Files whose name the pattern matches can be opened, but not written to; from the `nth` of them on."""
    open_file = io.open

    def begin(pattern: str, nth: int = 1, trouble: int = errno.ENOSPC) -> None:
        seen = 0
        monkeypatch.setattr(Full, "trouble", trouble)

        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            nonlocal seen
            name = os.fsdecode(file) if isinstance(file, (str, bytes, Path)) else ""
            if re.search(pattern, name) and set(mode) & set("wax+"):
                seen += 1
                if seen >= nth:
                    raw = Full(file, mode.replace("b", "").replace("t", ""))
                    buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
                    return buffered if "b" in mode else io.TextIOWrapper(buffered, write_through=True)
            return open_file(file, mode, *arguments, **options)

        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(builtins, "open", opened)

    yield begin
    monkeypatch.undo()


WRITTEN = {
    "checkpoint.pt": "checkpoint",
    "metrics.jsonl": "metrics",
    "alignment.jsonl": "alignment",
    "weights-2.pt": "weights-2",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    name: str, config: Train, images: Make, tmp_path: Path, full: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole, images())
    full(WRITTEN[name], nth=1 if name.startswith("weights") else 2)
    with pytest.raises(OSError, match="No space left") as failed:
        train(config, images())
    kept = "1" if name in ("checkpoint.pt", "weights-2.pt") else "2"
    run = tmp_path / "run"
    assert str(failed.value) == (
        f"{run / name} cannot be written (No space left on device): make space on its disk, then go on by "
        f"onward train --resume {run}; {run / 'checkpoint.pt'} keeps the state after epoch {kept}"
    )
    assert not list(run.glob("*.partial"))
    monkeypatch.undo()
    resume(run, images())
    assert state(run) == state(tmp_path / "whole")
    assert len((run / "alignment.jsonl").read_text().splitlines()) == 4
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_logs_that_cannot_be_written_stop_the_run_in_one_sentence(
    config: Train, images: Make, full: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    """They are written by a thread, whose own complaint must not be printed."""
    full(r"events\.out")
    with pytest.raises(OSError, match=r"run/events.out.tfevents.\* cannot be written \(No space left on device\): make space"):
        train(config, images())
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("trouble", "remedy"),
    [
        (errno.EDQUOT, "make space on its disk"),
        (errno.EROFS, "allow writing there, or choose another folder"),
        (errno.EACCES, "allow writing there, or choose another folder"),
        (errno.EIO, "check its disk"),
    ],
)
def test_other_troubles_of_a_disk_have_their_remedies(
    trouble: int, remedy: str, config: Train, images: Make, full: Callable[..., None]
) -> None:
    full("config.json", trouble=trouble)
    with pytest.raises(OSError, match=r"config\.json") as failed:
        train(config, images())
    assert str(failed.value) == f"{config.out}/config.json cannot be written ({os.strerror(trouble)}): {remedy}"


def test_a_failed_run_says_why_on_a_full_disk_too(config: Train, images: Make, full: Callable[..., None]) -> None:
    full("failed.txt")
    with pytest.raises(TrainingFailed, match="the input is not finite"):
        train(replace(config, align_every=0, transform=Transform(mean=float("nan"))), images())


def test_a_table_that_cannot_be_written_is_named(
    tmp_path: Path, full: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--epochs", "1", "--network.width", "0.04", "--subset.train", "64", "--device", "cpu", "--out", str(tmp_path)]
    for name in ("table.json", "table.csv", "curves.png"):
        full(name)
        said = sentence(capsys, "compare", "--algorithms", "bp", "--seeds", "1", *small, code=1)
        assert said == f"error: {tmp_path / name} cannot be written (No space left on device): make space on its disk\n"


def test_what_is_no_file_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "elsewhere" / "file"
    os.mkfifo(pipe)
    file.parent.mkdir()
    file.write_text("old")
    link.symlink_to(file)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    disk.write_text(pipe, "new")
    assert os.read(reader, 9) == b"new"
    os.close(reader)
    disk.write_text(link, "new")
    assert (pipe.is_fifo(), link.is_symlink(), file.read_text()) == (True, True, "new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "file", "link", "pipe"]


@pytest.mark.parametrize("folder", ["/proc/onward", "/dev/null/onward"])
def test_a_folder_that_takes_no_files(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also to a superuser, whom permissions do not stop."""
    said = sentence(capsys, "train", "--out", folder, "--device", "cpu")
    assert said.startswith(f"error: {folder} cannot be written to (")
    assert said.endswith("): choose another folder with --out\n")


@pytest.fixture
def disk_of_400_kB(tmp_path: Path) -> Iterator[Path]:
    """A real one, where we may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_real_disk_that_fills_up(disk_of_400_kB: Path, config: Train, images: Make, tmp_path: Path) -> None:
    train(replace(config, out=str(tmp_path / "whole")), images())
    run, filling = disk_of_400_kB / "run", disk_of_400_kB / "filling"
    refused = []
    for free in (0, 8, 16, 40, 60, 100, 200, 280, 400):
        filling.write_bytes(bytes(1024 * (400 - free)))
        try:
            train(replace(config, out=str(run), overwrite=True), images())
        except (OSError, onward.UsageError) as error:
            refused.append(str(error))
            filling.unlink()
            if (run / "config.json").exists():
                resume(run, images())
                assert state(run) == state(tmp_path / "whole")
        for path in run.glob("*"):
            path.unlink()
    assert refused[0] == f"{run} cannot be written to (No space left on device): choose another folder with --out"
    assert len(refused) >= 4
    assert all("(No space left on device): make space on its disk" in said for said in refused[1:])
    assert re.search(r"run/checkpoint.pt of 0\.04\d+ MB cannot be written", refused[1])  # before anything is erased
    assert {"epoch 1", "no epoch"} <= {found for said in refused[1:] for found in re.findall(r"epoch \d|no epoch", said)}

    with pytest.raises(TrainingFailed):
        train(replace(config, out=str(run), align_every=0, schedule=Schedule(gamma=1e38)), images())
    subprocess.run(["mount", "-o", "remount,ro", disk_of_400_kB], check=True)
    with pytest.raises(OSError, match=r"cannot be written \(Read-only file system\): allow writing there, or choose another"):
        resume(run, images())


# ---- images that do not come


@pytest.fixture
def silent(tmp_path: Path) -> Path:
    """A file whose reading waits for ever, as on a network file system whose server is gone."""
    path = tmp_path / "silent.png"
    os.mkfifo(path)
    return path


def test_an_image_that_does_not_come_is_given_up(silent: Path) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"silent.png could not be read within 0.2 s: check the disk or the network"):
        decode([Sample(silent, 0, str(silent))], 10**9, patience=0.2)
    assert time.monotonic() - start < 5


STALL = """
import os, sys
from pathlib import Path
import torch
from onward.lab.data.batches import _key
from onward.lab import cli as command
from onward.lab.system import memory
from onward.lab.run import loop as train

loading = train.load_data

def load_data(config):
    data = loading(config)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(_key(config.seed, 1)))
    image = Path(data.train.images.samples[order[18]].file)  # of the fifth batch
    image.rename("aside.png")
    Path("name").write_text(str(image))
    os.mkfifo(image)
    return data

train.load_data = load_data
memory.physical = lambda: 100  # too little to keep the images
sys.exit(command.main(sys.argv[1:]))
"""


def test_a_run_whose_images_stall_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, which has to end although a thread still waits."""
    for number in range(40):
        folder = tmp_path / "images" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), color=5 * number).save(folder / f"{number:02}.png")
    config = Train(
        data_dir="images",
        out="run",
        epochs=2,
        batch_size=4,
        device="cpu",
        checkpoint_every="3",
        data_timeout=1.0,
        network=Network(width=0.04),
        transform=Transform(size=8),
    )
    small = "--data-dir images --out run --epochs 2 --batch-size 4 --device cpu --checkpoint-every 3 --data-timeout 1 "
    done = subprocess.run(
        [sys.executable, "-c", STALL, "train", *small.split(), "--network.width", "0.04", "--transform.size", "8"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.fullmatch(
        r"error: images/\d/\d\d.png could not be read within 1 s: check the disk or the network that it is on, or wait longer "
        r"with --data-timeout, then go on by onward train --resume run; run/checkpoint.pt keeps the state after step 4 of "
        r"epoch 1",
        done.stderr.splitlines()[-1],
    ), done.stderr
    monkeypatch.chdir(tmp_path)
    (tmp_path / "aside.png").replace((tmp_path / "name").read_text())
    resume(Path("run"))
    train(replace(config, out="whole"))
    assert state(Path("run")) == state(Path("whole"))


# ---- settings


def told(capsys: pytest.CaptureFixture[str], work: Callable[[], object]) -> str:
    """The one sentence that ends the command."""
    assert command.guarded(work) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", said)
    return said


def settings(kind: type, owner: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every field of a configuration, those of its parts too, and what it may be."""
    for name, hint in get_type_hints(kind).items():
        yield (*owner, name), hint
        if dataclasses.is_dataclass(hint):
            yield from settings(hint, (*owner, name))


def accepts(hint: Any, value: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(accepts(get_args(hint)[0], entry) for entry in value)
    if get_args(hint):
        return any(accepts(part, value) for part in get_args(hint))
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


SETTINGS = dict(settings(Train))
OF_ANY_TYPE = ("nonsense", 5, 1.5, True, None, [1.5], ["nonsense"], [[]], {"nonsense": 1})


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Path]:
    """A run folder whose config.json has another value for one setting."""

    def store(name: tuple[str, ...], value: Any) -> Path:
        found = dataclasses.asdict(Train(out=str(tmp_path / "run"), device="cpu"))
        part = found
        for owner in name[:-1]:
            part = part[owner]
        part[name[-1]] = value
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.json").write_text(json.dumps({"config": found}))
        return tmp_path / "run"

    return store


def names(said: str, name: tuple[str, ...]) -> bool:
    return f'"{".".join(name)}' in said or f"--{'.'.join(name).replace('_', '-')} " in said


@pytest.mark.parametrize("name", SETTINGS, ids=".".join)
def test_a_setting_of_the_wrong_type_is_named(
    name: tuple[str, ...], stored: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [value for value in OF_ANY_TYPE if not accepts(SETTINGS[name], value)]
    assert len(wrong) >= 5
    for value in wrong:
        folder = stored(name, value)
        said = told(capsys, lambda folder=folder: resume(folder))
        assert said.startswith(f"error: {folder / 'config.json'}: configuration: ")
        assert names(said, name), said


NUMBERS = [name for name, hint in SETTINGS.items() if accepts(hint, 5) and name != ("transform", "mean")]


@pytest.mark.parametrize("name", NUMBERS, ids=".".join)
def test_a_number_out_of_range_is_named(
    name: tuple[str, ...], stored: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = (
        [-1, 10**30] if accepts(SETTINGS[name], 5) and not accepts(SETTINGS[name], 1.5) else [-1.0, float("nan"), float("inf")]
    )
    for value in wrong:
        folder = stored(name, value)
        said = told(capsys, lambda folder=folder: resume(folder))
        assert names(said, name), said


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("algorithm", "nonsense", "unknown algorithm 'nonsense' (known: bp, dfa,"),
        ("model", "nonsense", "unknown model 'nonsense'"),
        ("model", "nowhere.py:make", "nowhere.py"),
        ("data", "nonsense", "unknown data set 'nonsense' (known: digits, diabetes, python-reference, mnist,"),
        ("data_dir", "/nowhere", "data folder /nowhere does not exist"),
        ("device", "nonsense", "--device nonsense cannot be used"),
        ("input", "nonsense", "--input nonsense"),
        ("input", "9,9,9", "--input 9,9,9: the inputs are 1,8,8"),
        ("cuts", ["nonsense"], "nonsense"),
        ("checkpoint_every", "nonsense", "--checkpoint-every nonsense: give a number of steps"),
        ("transform.augment", "nonsense", "unknown augmentation 'nonsense'"),
        ("transform.mean", [0.1, 0.2], "mean (0.1, 0.2) for images of 1 channel(s)"),
        ("transform.mean", [], "mean () for images of 1 channel(s)"),
        ("subset.train", 5000, "--subset.train 5000: data set digits has 1442 train images"),
        ("optimizer.momentum", 0.9, "--optimizer.momentum 0.9 is for --optimizer.name sgd"),
        ("network.pool_first", True, "--network.pool-first True: mlp has no such option"),
    ],
)
def test_a_value_without_a_meaning_is_named(
    name: str, value: Any, said: str, stored: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stored(tuple(name.split(".")), value)
    assert said in told(capsys, lambda: resume(folder))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", "null", '{"config": null}', '{"config": []}', "\0", "[" * 10**5, '{"config": {"lr": 1e999}}', "é"],
    ids=lambda content: content[:20] or "nothing",
)
def test_settings_that_are_no_settings(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    assert str(tmp_path / "config.json") in told(capsys, lambda: resume(tmp_path))


# ---- data


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def pictures(count: int = 12, size: tuple[int, int] = (8, 8), mode: str = "L") -> list[bytes]:
    return [encoded(Image.new("L", size, 20 * number).convert(mode), "JPEG") for number in range(count)]


def parquet(folder: Path, images: list[Any], labels: list[Any], **columns: Any) -> Path:
    file = folder / "train.parquet"
    pq.write_table(pa.table({"image": images, "label": labels, **columns}), file)
    return file


def class_folders(folder: Path, *content: bytes) -> None:
    for number, image in enumerate([*pictures(), *content]):
        (folder / str(number % 2)).mkdir(exist_ok=True)
        (folder / str(number % 2) / f"{number:02}.png").write_bytes(image)


LABELS = [0, 1] * 6


def truncated(folder: Path) -> None:
    file = parquet(folder, pictures(), LABELS)
    file.write_bytes(file.read_bytes()[:-20])


def without_rows(folder: Path) -> None:
    file = parquet(folder, pictures(), LABELS)
    pq.write_table(pq.read_table(file).slice(0, 0), file)


def without_labels(folder: Path) -> None:
    file = parquet(folder, pictures(), LABELS)
    pq.write_table(pq.read_table(file).rename_columns({"label": "nonsense"}), file)


def an_empty_class(folder: Path) -> None:
    class_folders(folder)
    (folder / "2").mkdir()


def a_class_of_text(folder: Path) -> None:
    an_empty_class(folder)
    (folder / "2" / "notes.txt").write_text("no image")


BAD_DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a truncated file": (truncated, "train.parquet is not a readable parquet file ("),
    "a file of nothing": (lambda folder: (folder / "train.parquet").touch(), "train.parquet is not a readable parquet file ("),
    "no rows": (without_rows, "has no images with labels: give one that has"),
    "no images": (
        lambda folder: parquet(folder, ["a.png"] * 12, LABELS),
        "has no column of encoded images (columns: image, label)",
    ),
    "no labels": (without_labels, "has no column of labels (columns: image, nonsense)"),
    "an image missing": (lambda folder: parquet(folder, [*pictures(11), None], LABELS), "row 11 of "),
    "a label missing": (lambda folder: parquet(folder, pictures(), [*LABELS[:11], None]), "row 11 of "),
    "a negative label": (
        lambda folder: parquet(folder, pictures(), [-7, *LABELS[1:]]),
        "has label -7: number the classes from 0",
    ),
    "a label out of range": (lambda folder: parquet(folder, pictures(), [10**9, *LABELS[1:]]), "has label 1000000000 among 12"),
    "labels of numbers": (lambda folder: parquet(folder, pictures(), [0.5, *LABELS[1:]]), "are double, not integers"),
    "labels of words": (lambda folder: parquet(folder, pictures(), ["cat", "dog"] * 6), "are string, not integers"),
    "one class": (lambda folder: parquet(folder, pictures(), [0] * 12), "has a single class"),
    "a truncated image": (lambda folder: class_folders(folder, pictures()[0][:150]), "12.png does not decode as an image ("),
    "no image": (lambda folder: class_folders(folder, b"no image"), "12.png does not decode as an image (unknown format)"),
    "images of two sizes": (lambda folder: class_folders(folder, *pictures(1, (9, 7))), "give the size that they are to have"),
    "an empty class": (an_empty_class, "2 has no images: add some or remove it"),
    "a class of text": (a_class_of_text, "2 has no images: add some or remove it"),
    "nothing": (lambda folder: None, "holds no parquet files and no class folders of images"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_data_that_cannot_be_used_cost_no_earlier_run(
    what: str, config: Train, images: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = BAD_DATA[what]
    (tmp_path / "images").mkdir()
    make(tmp_path / "images")
    earlier = tmp_path / "run" / "config.json"
    earlier.parent.mkdir()
    earlier.write_text("an earlier run")
    bad = replace(config, data_dir=str(tmp_path / "images"), overwrite=True)
    assert expected in told(capsys, lambda: train(bad))
    assert list(earlier.parent.iterdir()) == [earlier]
    assert earlier.read_text() == "an earlier run"


@pytest.mark.parametrize("first", ["L", "RGB", "CMYK"])
def test_images_of_several_kinds_get_colour_whichever_is_first(first: str, config: Train, tmp_path: Path) -> None:
    grey = Image.new("L", (8, 8), 100)
    deep = Image.fromarray(np.full((8, 8), 100 * 256, np.uint16))
    others = [*(encoded(grey.convert(mode)) for mode in ("L", "RGB", "RGBA", "LA", "P", "1")), encoded(deep)]
    others.append(encoded(grey.convert("CMYK"), "TIFF"))
    parquet(tmp_path, [encoded(grey.convert(first), "TIFF"), *others, *pictures(3)], LABELS)
    data = load("digits", tmp_path)
    assert data.shape == (3, 8, 8)
    assert len(train(replace(config, epochs=1, batch_size=5, data_dir=str(tmp_path)))) == 1
