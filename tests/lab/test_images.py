"""Images of every kind: grey and coloured, turned, of few bits and of many."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from onward.lab.data import load
from onward.lab.data.encoded import Sample, decode, from_table
from tests.lab.image_files import pictures, refusal, write_classes, write_parquet


@pytest.mark.parametrize("first", ["L", "LA", "I", "RGB", "RGBA", "P"])
def test_every_kind_of_image_gets_colour_if_any_has_it_whichever_is_first(tmp_path, first):
    grey = Image.new("L", (4, 4), 100)
    transparent = Image.new("P", (4, 4), 0)
    transparent.putpalette([100, 100, 100])
    transparent.info["transparency"] = bytes([0])
    kinds = [grey.convert(mode) for mode in ("L", "RGB", "RGBA", "LA", "P")] + [transparent]
    kinds += [Image.fromarray(np.full((4, 4), 100 * 256 + 7, np.uint16))]
    start = Image.fromarray(np.full((4, 4), 100 * 256, np.uint16)) if first == "I" else grey.convert(first)
    images = [start, *kinds]
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", images, [0, 1] * 4, names=None)
    data = load("digits", tmp_path)
    assert data.shape == (3, 4, 4)
    assert data.train.images.unique().tolist() == [100]


@pytest.mark.parametrize("coloured", [0, 7, 12, 19, None])
@pytest.mark.parametrize("most", ["whole", "a quarter", "nothing"])
def test_one_image_in_colour_makes_all_of_them_coloured_and_keeps_their_pixels(tmp_path, monkeypatch, coloured, most):
    """Wherever it stands, in memory and encoded, and where grey images fit into memory but coloured ones do not."""
    images = pictures(20)
    expected = [np.asarray(image)[None].repeat(1 if coloured is None else 3, axis=0) for image in images]
    if coloured is not None:
        images[coloured] = pictures(20, "RGB")[coloured]
        expected[coloured] = np.asarray(images[coloured]).transpose(2, 0, 1)
    write_parquet(tmp_path / "train.parquet", images[:15], [0, 1, 2] * 5)
    write_parquet(tmp_path / "test.parquet", images[15:], [0, 1, 2, 0, 1])
    room = {"whole": 10**9, "a quarter": 4 * 20 * 30, "nothing": 100}[most]
    monkeypatch.setattr("onward.lab.data.images.memory.physical", lambda: room)
    monkeypatch.setattr("onward.lab.data.parquet._read_parquet", lambda file, mapped: pq.read_table(file))
    data = load("digits", tmp_path)
    assert data.shape[0] == (1 if coloured is None else 3)
    assert isinstance(data.train.images, torch.Tensor) == (most == "whole" or (most == "a quarter" and coloured is None))
    for split, start in ((data.train, 0), (data.test, 15)):
        for row in range(len(split)):
            assert np.array_equal(split.images[torch.tensor([row])][0], expected[start + row])


def test_a_subset_without_the_coloured_images_has_the_shape_of_the_whole(tmp_path):
    images = pictures(20)
    write_parquet(tmp_path / "test.parquet", images[:2], [0, 1])
    for coloured in (4, 11):
        some = [*images]
        some[coloured] = pictures(1, "RGB")[0]
        write_parquet(tmp_path / "train.parquet", some, [0, 1] * 10)
        assert {load("digits", tmp_path, train_samples=count).shape for count in (2, 5, 20)} == {(3, 5, 6)}


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_photographs_stand_upright_as_the_hub_library_has_them(turn, kind):
    datasets = pytest.importorskip("datasets")
    tag = Image.Exif()
    tag[0x0112] = turn
    buffer = io.BytesIO()
    pictures(1, "RGB", size=(9, 4))[0].save(buffer, kind, exif=tag)
    table = pa.table({"image": [{"bytes": buffer.getvalue(), "path": None}], "label": [0]})
    theirs = np.asarray(datasets.Image().decode_example({"bytes": buffer.getvalue(), "path": None}))
    assert theirs.shape[:2] == ((4, 9) if turn < 5 else (9, 4))
    ours = decode(from_table(table, "a.parquet")[0], 10**9)
    assert np.array_equal(ours[0].permute(1, 2, 0), theirs)


def test_a_damaged_exif_tag_turns_nothing(tmp_path):
    tag = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01\0\x06\0\0\0\0\0\0"  # a direction in words
    for index, name in enumerate(("cat", "dog") * 5):
        (tmp_path / name).mkdir(exist_ok=True)
        pictures(1)[0].save(tmp_path / name / f"{index}.jpg", exif=tag if index % 3 else b"Exif\0\0nothing at all")
    assert load("digits", tmp_path).shape == (1, 5, 6)


def test_greys_of_sixteen_bits_keep_the_upper_eight(tmp_path):
    values = np.arange(30, dtype=np.uint16).reshape(5, 6) * 2000
    for kind in ("TIFF", "PNG", "PPM"):
        Image.fromarray(values).save(tmp_path / "image", kind)
        assert np.array_equal(decode([Sample(tmp_path / "image", 0, "")], 10**9)[0, 0], values // 256)


@pytest.mark.parametrize(
    ("kind", "scale", "message"),
    [
        (np.int32, 1, "32-bit pixels have no fixed range"),
        (np.float32, 1, "floating-point pixels have no fixed range"),
        (np.uint16, 5, "none of its 16-bit pixels is above 145, so all would turn black"),
        (np.uint16, 0, None),  # black is black
    ],
)
def test_pixels_without_a_fixed_range_are_refused(tmp_path, kind, scale, message):
    write_classes(tmp_path, {"cat": 5, "dog": 5})
    path = tmp_path / "dog" / "005.tiff"
    Image.fromarray((np.arange(30).reshape(5, 6) * scale).astype(kind)).save(path)
    if message is None:
        assert len(load("digits", tmp_path).train) == 9
    else:
        assert refusal("digits", tmp_path) == f"{path} does not decode as an image ({message}): replace or remove it"


def test_bilevel_images_become_black_and_white(tmp_path):
    images = [Image.new("1", (4, 4), value) for value in (0, 1)]
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", images, [0, 1], names=None)
    assert load("digits", tmp_path).train.images.flatten(1).unique(dim=1).flatten().tolist() == [0, 255]
