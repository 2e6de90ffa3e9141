"""Data sets from the Hugging Face hub, or from a stand-in for it."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from onward.lab.data.bundled import BUNDLED
from onward.lab.data.encoded import decode, from_table
from onward.lab.data.sets import DATASETS, ON_HUB
from onward.lab.data.text import TEXTS
from tests.lab.fake_hub import serve
from tests.lab.image_files import pictures, write_classes, write_parquet, write_parts

SCRIPT = """
import sys, time
from onward.errors import UsageError
from onward.lab.data import load
for name in sys.argv[1:]:
    start = time.perf_counter()
    try:
        data = load(name)
        print(name, data.shape, len(data.train), len(data.test), *data.class_names)
    except UsageError as error:
        print(error)
    assert time.perf_counter() - start < 10
"""


TEXT_SCRIPT = """
import sys
from onward.lab.data import load
data = load(sys.argv[1])
print(data.task, len(data.train), len(data.test), data.tokens, *data.class_names)
"""


def load_elsewhere(home: Path, endpoint: str, *names: str, script: str = SCRIPT, **environment: str) -> tuple[list[str], str]:
    """Load in a process of its own, for the hub's client reads its settings when imported; gives lines and noise."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, **environment}
    command = [sys.executable, "-c", textwrap.dedent(script), *names]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    return result.stdout.splitlines(), result.stderr


def test_known_names_are_those_with_a_source():
    assert list(DATASETS) == [*BUNDLED, *TEXTS, *ON_HUB]


def test_without_a_network_and_a_cache_one_sentence_comes_within_ten_seconds(tmp_path):
    start = time.perf_counter()
    lines, noise = load_elsewhere(tmp_path, "http://127.0.0.1:9", "mnist", "someone/something")
    assert time.perf_counter() - start < 20  # two of them, and the imports
    assert noise == ""
    assert [line.partition(" does not answer")[0] for line in lines] == [
        f"data set {name} is not in the cache {tmp_path / 'datasets'} and the Hugging Face hub at http://127.0.0.1:9"
        for name in ("ylecun/mnist", "someone/something")
    ]
    assert all(line.endswith("or class folders of images with --data-dir") for line in lines)


def test_a_data_set_comes_from_the_hub_once_and_from_its_cache_afterwards(tmp_path, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    files = {f"data/{file.name}": file.read_bytes() for file in write_parts(tmp_path).iterdir()}
    with serve("someone/animals", files) as endpoint:
        lines, _ = load_elsewhere(home, endpoint, "someone/animals", "someone/animals:wild", "someone/plants")
    assert lines[0] == "someone/animals (1, 5, 6) 9 3 cat dog owl"
    assert lines[1].startswith("data set someone/animals:wild cannot be had from the Hugging Face hub (BuilderConfig 'wild'")
    assert lines[2].startswith("data set someone/plants cannot be had from the Hugging Face hub (")
    lines, noise = load_elsewhere(home, "http://127.0.0.1:9", "someone/animals", HF_HUB_OFFLINE="1")
    assert lines == ["someone/animals (1, 5, 6) 9 3 cat dog owl"]
    assert noise == ""


@pytest.mark.slow
def test_text_comes_from_the_hub_with_classes_or_without(tmp_path):
    rows = {"train": [("ab", "x"), ("ba", "y")] * 3, "test": [("b", "x")]}
    files = {f"{part}.csv": "".join(",".join(row) + "\n" for row in [("text", "label"), *of]) for part, of in rows.items()}
    with serve("someone/words", {name: text.encode() for name, text in files.items()}) as endpoint:
        lines, _ = load_elsewhere(tmp_path / "a", endpoint, "someone/words", script=TEXT_SCRIPT)
    assert lines == ["classification 6 1 3 x y"]
    files = {f"{part}.txt": "abc\n" * 100 for part in ("train", "test")}
    with serve("someone/book", {name: text.encode() for name, text in files.items()}) as endpoint:
        lines, _ = load_elsewhere(tmp_path / "b", endpoint, "someone/book", script=TEXT_SCRIPT)
    assert lines[0].startswith("next-character 6 6 4 ")


def test_parts_of_the_hub_that_are_passed_over_or_not_used_are_told(tmp_path):
    parts = {"train": [0, 1, 2], "test": [-1] * 3, "validation": [2, 1, 0], "dev": [0, 1, 2]}
    for part, labels in parts.items():
        write_parquet(tmp_path / "files" / f"{part}-00000-of-00001.parquet", pictures(3), labels)
    files = {f"data/{file.name}": file.read_bytes() for file in (tmp_path / "files").iterdir()}
    with serve("someone/animals", files) as endpoint:
        lines, noise = load_elsewhere(tmp_path / "home", endpoint, "someone/animals")
    assert lines == ["someone/animals (1, 5, 6) 3 3 cat dog owl"]
    assert "passed over, without images that are labelled with the training part's classes: test" in noise


def test_an_image_folder_of_the_hub_library_is_read(tmp_path):
    """Its rows name files in the cache instead of holding bytes."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    write_classes(tmp_path / "pets" / "train", {"cat": 3, "dog": 3}, mode="RGB")
    table = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "pets"), split="train", cache_dir=str(tmp_path / "cache")
    )
    samples, names = from_table(table.with_format("arrow")[:], "someone/pets (train)")
    assert (names, [sample.label for sample in samples]) == (("cat", "dog"), [0, 0, 0, 1, 1, 1])
    assert np.array_equal(decode(samples, 10**9)[4].permute(1, 2, 0), np.asarray(pictures(3, "RGB", seed=1)[1]))
