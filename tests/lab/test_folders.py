"""Folders as people have them: what their parts are called, what lies in them that is no image, and what is said of it."""

import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from onward.lab.data import load
from tests.lab.image_files import pictures, png, refusal, write_classes, write_parquet

TESTS = ["test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"]


def fill(folder: Path, *classes: str, count: int = 6, start: int = 0) -> None:
    """Class folders of images, each of a grey of its own."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("L", (2, 2), start + 40 * number + i).save(folder / name / f"{i}.png")


def greys(split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def left_out(caplog) -> str:
    """The one line that says so."""
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    return line


# ---- parts


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("train", ["train", "Training", "TRAIN_SET", "training-set", "trainset", "Train Images"])
def test_parts_have_any_of_their_names_in_folders(tmp_path, train, test):
    fill(tmp_path / train, "cat", "dog")
    fill(tmp_path / test.title(), "cat", "dog", start=100)
    data = load("digits", tmp_path)
    assert data.class_names == ("cat", "dog")
    assert greys(data.train) == [*range(6), *range(40, 46)]
    assert greys(data.test) == [*range(100, 106), *range(140, 146)]


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize(
    "layout", ["{}.parquet", "{}-00000-of-00001.parquet", "data/{}_set.parquet", "default/{}/0000.parquet"]
)
def test_parts_have_any_of_their_names_in_parquet_files(tmp_path, test, layout):
    for part, seed in (("Training", 0), (test.upper(), 1)):
        write_parquet(tmp_path / layout.format(part), pictures(3, seed=seed), [0, 1, 2])
    data = load("digits", tmp_path)
    assert (len(data.train), len(data.test)) == (3, 3)
    assert not torch.equal(data.train.images, data.test.images)


def test_the_likeliest_test_part_wins(tmp_path):
    fill(tmp_path / "train", "cat", "dog")
    for start, part in enumerate(reversed(TESTS)):
        fill(tmp_path / part, "cat", "dog", start=start)
        assert greys(load("digits", tmp_path).test)[0] == start


def test_a_test_part_without_class_folders_is_passed_over(tmp_path):
    for part in ("train", "val"):
        fill(tmp_path / part, "cat", "dog", start=100 * (part == "val"))
    (tmp_path / "test").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "test" / "0.png")
    assert greys(load("digits", tmp_path).test) == [*range(100, 106), *range(140, 146)]
    (tmp_path / "test" / "images").mkdir()  # as Tiny ImageNet has it
    Image.new("L", (2, 2)).save(tmp_path / "test" / "images" / "0.png")
    assert len(load("digits", tmp_path).test) == 12
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    assert refusal("digits", tmp_path) == (
        f"{tmp_path / 'test'} has none of the class folders of {tmp_path / 'train'}: sort its images into such, or move it "
        "away, and a part of the training images is held out instead"
    )


def test_two_training_parts_are_refused(tmp_path):
    for part in ("train", "Training"):
        fill(tmp_path / part, "cat", "dog")
    assert refusal("digits", tmp_path).endswith("has 2 training parts (train, Training): keep one of them")


@pytest.mark.parametrize(
    "classes", [("bus", "car", "train"), ("control", "test"), ("dev", "qa"), ("eval", "test", "x", "train")]
)
def test_a_class_may_be_called_as_a_part_is(tmp_path, classes):
    fill(tmp_path, *classes)
    assert load("digits", tmp_path).class_names == tuple(sorted(classes))


def test_a_class_called_train_may_hold_folders(tmp_path):
    fill(tmp_path, "bus", "car")
    fill(tmp_path / "train", "steam", "diesel")
    data = load("digits", tmp_path)
    assert data.class_names == ("bus", "car", "train")
    assert torch.cat([data.train.labels, data.test.labels]).bincount().tolist() == [6, 6, 12]


def test_parts_stay_parts_beside_folders_of_other_names(tmp_path, caplog):
    for part in ("train", "test", "extra"):
        fill(tmp_path / part, "cat", "dog")
    (tmp_path / "docs").mkdir()
    data = load("digits", tmp_path)
    assert (data.class_names, len(data.train), len(data.test)) == (("cat", "dog"), 12, 12)
    assert left_out(caplog).endswith("2 folder (docs, ...)")


def test_parts_without_class_folders_are_no_classes(tmp_path):
    fill(tmp_path, "train", "test")
    assert refusal("digits", tmp_path).endswith(
        "train has no class folders: put the images of each class in a folder of its own"
    )


@pytest.mark.parametrize("parts", [("A", "B"), ("fold1", "fold2", "fold3"), ("seg_train/seg_train", "seg_test/seg_test")])
def test_classes_that_hold_the_same_class_folders_are_refused(tmp_path, parts):
    for part in parts:
        fill(tmp_path / part, "cat", "dog")
    first, second = sorted(tmp_path / Path(part).parts[0] for part in parts)[:2]
    assert refusal("digits", tmp_path) == (
        f"{first} and {second} hold folders of the same names (cat, dog): name them train and test if they are parts of a data "
        "set, or put the images right into them if they are classes"
    )


def test_a_test_part_beside_the_classes_of_the_training_part_is_no_class(tmp_path):
    for place in (tmp_path, tmp_path / "test"):
        fill(place, "cat", "dog")
    assert refusal("digits", tmp_path) == (
        f"{tmp_path / 'test'} holds folders of the same names as those beside it (cat, dog): if it is a part of the data set, "
        "put those beside it into a folder called train, or test"
    )


def test_a_data_set_is_no_class(tmp_path):
    for name, classes in (("pets", ("cat", "dog")), ("vehicles", ("bus", "car"))):
        for part in ("train", "val"):
            fill(tmp_path / name / part, *classes)
        message = (
            f"{tmp_path / 'pets'} holds parts of a data set (train, val), not the images of a class: give it as the data folder"
        )
        assert refusal("digits", tmp_path) == message


def test_classes_may_hold_folders_of_their_own_and_one_of_the_same_name(tmp_path):
    for name, kinds in (("cat", ("tabby", "siamese")), ("dog", ("husky", "pug"))):
        fill(tmp_path / "nested" / name, *kinds)
        fill(tmp_path / "tiny" / name, "images")
    assert load("digits", tmp_path / "nested").class_names == load("digits", tmp_path / "tiny").class_names == ("cat", "dog")


@pytest.mark.parametrize("test", ["test1", "test_1", "Test 2", "val2017", "testset-1"])
@pytest.mark.parametrize("train", ["train", "train2017", "train_1"])
def test_parts_may_have_numbers(tmp_path, train, test):
    fill(tmp_path / train, "cat", "dog")
    fill(tmp_path / test, "cat", "dog", start=100)
    data = load("digits", tmp_path)
    assert data.class_names == ("cat", "dog")
    assert greys(data.test) == [*range(100, 106), *range(140, 146)]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "test1"), "train has no class folders: put the images of each class in a folder of its own"),
        (("train2017", "val2017"), "train2017 has no class folders: put the images of each class in a folder of its own"),
        (
            ("train2017", "val2017", "unlabeled2017"),
            "train2017 has no class folders: put the images of each class in a folder ",
        ),
        (("train1", "train2"), "has 2 training parts (train1, train2): keep one of them"),
        (("test1", "test2"), "has no training part (found: test1, test2): name it 'train'"),
    ],
)
def test_numbered_parts_without_class_folders_are_no_classes(tmp_path, folders, message):
    fill(tmp_path, *folders)
    assert message in refusal("digits", tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances.json").write_text("{}")
    assert message in refusal("digits", tmp_path)


def test_parts_that_are_passed_over_or_not_used_are_told_in_the_one_line(tmp_path, caplog):
    for start, part in enumerate(("train", "val", "dev")):
        fill(tmp_path / part, "cat", "dog", start=start)
    fill(tmp_path / "test", "0", "1")
    (tmp_path / "labels.csv").write_text("")
    assert greys(load("digits", tmp_path).test)[0] == 1
    assert left_out(caplog).endswith(
        "1 .csv (labels.csv); passed over, without images that are labelled with the training part's classes: test; "
        "not used, for val is: dev"
    )
    for path in (tmp_path / "test").rglob("*.png"):
        path.unlink()
    for old, new in (("0", "cat"), ("1", "dog")):
        (tmp_path / "test" / old).rename(tmp_path / "test" / new)
    caplog.clear()
    assert greys(load("digits", tmp_path).test)[0] == 1
    assert "passed over, without images that are labelled with the training part's classes: test;" in left_out(caplog)
    fill(tmp_path / "test", "dog")
    assert refusal("digits", tmp_path) == f"class folder {tmp_path / 'test' / 'cat'} has no images: add some or remove it"


def test_parquet_parts_that_are_passed_over_or_not_used_are_told(tmp_path, caplog):
    for name, labels in (("train", [0, 1, 2]), ("test", [-1] * 3), ("validation", [0, 1, 2]), ("dev", [2, 1, 0])):
        write_parquet(tmp_path / f"{name}.parquet", pictures(3), labels)
    assert load("digits", tmp_path).test.labels.tolist() == [0, 1, 2]
    assert caplog.messages == [
        f"data folder {tmp_path}: passed over, without images that are labelled with the training part's classes: test; not "
        "used, for validation is: dev"
    ]


def test_files_whose_names_go_on_after_the_word_join_and_replace_no_others(tmp_path, caplog):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "train_augmented", "test_predictions", "dev"):
        write_parquet(tmp_path / f"{name}.parquet", pictures(3), [2, 2, 2] if name == "test_predictions" else [0, 1, 2])
    data = load("digits", tmp_path)
    assert (len(data.train), data.test.labels.tolist()) == (6, [0, 1, 2])
    assert left_out(caplog).endswith("are read): 2 .parquet (train_augmented.parquet, ...)")
    (tmp_path / "dev.parquet").unlink()
    caplog.clear()
    assert load("digits", tmp_path).test.labels.tolist() == [2, 2, 2]
    assert left_out(caplog).endswith("1 .parquet (train_augmented.parquet); taken for the test part: test_predictions.parquet")


@pytest.mark.parametrize(
    ("one", "other", "suffix"), [("images", "masks", ""), ("JPEGImages", "labels", ""), ("train_img", "train_mask", "_mask")]
)
@pytest.mark.parametrize("part", ["", "train"])
def test_images_and_their_masks_are_no_classes(tmp_path, part, one, other, suffix):
    root = tmp_path / part
    fill(root, one, other)
    for path in (root / other).iterdir():
        path.rename(path.with_stem(path.stem + suffix))
    assert refusal("digits", tmp_path) == (
        f"{root / one} and {root / other} hold files of the same names (0, 1, 2), as images and their masks do: segmentation "
        "is not learnt here, give images in a folder for each class"
    )


@pytest.mark.parametrize("name", ["meta.parquet", "train/metadata.parquet"])
def test_a_table_beside_class_folders_is_left_out_and_named(tmp_path, caplog, name):
    for part in ("train", "test"):
        fill(tmp_path / part, "cat", "dog")
    pq.write_table(pa.table({"file_name": ["cat/0.png"], "label": [1]}), tmp_path / name)
    data = load("digits", tmp_path)
    assert (data.class_names, len(data.train), len(data.test)) == (("cat", "dog"), 12, 12)
    assert left_out(caplog).endswith(f"1 .parquet ({name})")


# ---- what is no image


def test_hidden_copies_and_what_file_managers_leave_are_no_images(tmp_path, caplog):
    fill(tmp_path, "cat", "dog", count=10)
    for place in (tmp_path, tmp_path / "cat", tmp_path / "dog"):
        fill(place, ".ipynb_checkpoints", "__MACOSX", "@eaDir", count=1)
        for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini"):
            (place / name).write_bytes(b"no image")
    data = load("digits", tmp_path)
    assert sorted(greys(data.train) + greys(data.test)) == [*range(10), *range(40, 50)]
    assert "left out" not in caplog.text


def test_hidden_copies_of_parquet_files_are_not_read(tmp_path):
    for name in ("train", "test", ".cache/train", ".ipynb_checkpoints/test-checkpoint", "__MACOSX/train", "._train"):
        write_parquet(tmp_path / f"{name}.parquet", pictures(3), [0, 1, 2])
    data = load("digits", tmp_path)
    assert (len(data.train), len(data.test)) == (3, 3)


def test_a_data_folder_may_lie_below_a_hidden_one(tmp_path):
    fill(tmp_path / ".cache" / "__MACOSX" / "pets", "cat", "dog", count=5)
    assert len(load("digits", tmp_path / ".cache" / "__MACOSX" / "pets").train) == 8


def test_files_that_are_left_out_are_counted_and_named_in_one_line(tmp_path, caplog):
    fill(tmp_path / "train", "cat", "dog")
    fill(tmp_path / "test", "cat", "dog")
    for i in range(3):
        (tmp_path / "train" / "cat" / f"IMG_{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
        (tmp_path / "test" / "dog" / f"n{i}").write_bytes(png(pictures(1)[0]))
    (tmp_path / "train" / "stray.png").write_bytes(png(pictures(1)[0]))
    (tmp_path / "labels.csv").write_text("0")
    load("digits", tmp_path)
    assert left_out(caplog) == (
        f"data folder {tmp_path}: 8 left out (only images in class folders are read, by their endings): 1 .csv (labels.csv), "
        "1 .png (train/stray.png), 3 .heic (train/cat/IMG_0.HEIC, ...), 3 without an ending (test/dog/n0, ...)"
    )


def test_a_class_of_nothing_else_is_refused(tmp_path):
    fill(tmp_path, "cat", "dog")
    (tmp_path / "owl").mkdir()
    (tmp_path / "owl" / "1.heic").write_bytes(b"")
    assert refusal("digits", tmp_path) == (
        f"class folder {tmp_path / 'owl'} has no images: add some or remove it (what it holds is not read: 1 .heic (1.heic))"
    )


def test_parquet_files_of_no_part_and_images_beside_them_are_named(tmp_path, caplog):
    for name in ("train", "test", "extra", "unlabelled-0"):
        write_parquet(tmp_path / f"{name}.parquet", pictures(3), [0, 1, 2])
    fill(tmp_path / "pictures", "cat", count=3)
    load("digits", tmp_path)
    assert left_out(caplog).endswith(
        "5 left out (only parquet files with the name of a part are read): 2 .parquet (extra.parquet, ...), "
        "3 .png (pictures/cat/0.png, ...)"
    )


# ---- links


def test_links_to_folders_and_files_are_followed(tmp_path, caplog):
    fill(tmp_path / "store", "cat", "dog", "more")
    data_folder = tmp_path / "data"
    data_folder.mkdir()
    (data_folder / "train").mkdir()
    for name in ("cat", "dog"):
        (data_folder / "train" / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "store" / "cat" / "more").symlink_to(Path("..") / "more")
    (tmp_path / "store" / "dog" / "6.png").symlink_to(tmp_path / "store" / "more" / "0.png")
    (data_folder / "test").symlink_to(data_folder / "train")
    data = load("digits", data_folder)
    assert greys(data.train) == greys(data.test) == [*range(6), *range(80, 86), *range(40, 46), 80]
    assert "left out" not in caplog.text


def test_links_that_lead_back_are_left_out_and_named(tmp_path, caplog):
    fill(tmp_path / "data", "cat", "dog")
    fill(tmp_path, "store", count=1)
    (tmp_path / "data" / "cat" / "same").symlink_to(tmp_path / "data" / "cat")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cat" / "store").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "round").symlink_to(tmp_path / "data" / "cat")
    data = load("digits", tmp_path / "data")
    assert len(data.train) + len(data.test) == 13
    assert left_out(caplog).endswith("3 folder (cat/same, ...)")


@pytest.mark.parametrize(
    "link", ["train/cat/far.png", "train/cat/far", "train/owl", "test/dog/more", "valid", "train/cat/far.heic"]
)
def test_links_that_lead_nowhere_are_refused_by_name(tmp_path, link):
    for part in ("train", "test"):
        fill(tmp_path / part, "cat", "dog")
    (tmp_path / link).symlink_to("/nowhere/annex/key")
    expected = f"link {tmp_path / link} leads to /nowhere/annex/key, which is not there: fetch that, or remove the link"
    assert refusal("digits", tmp_path) == expected


def test_a_parquet_file_behind_a_dangling_link_is_refused_by_name(tmp_path):
    write_parquet(tmp_path / "train.parquet", pictures(10), [0, 1] * 5)
    (tmp_path / "test.parquet").symlink_to("gone.parquet")
    assert refusal("digits", tmp_path).startswith(f"link {tmp_path / 'test.parquet'} leads to gone.parquet, which is not there")


def test_a_link_to_itself_is_refused_by_name(tmp_path):
    fill(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "loop").symlink_to("loop")
    assert re.search(r"cannot be read \(Too many levels of symbolic links\): check .*cat/loop$", refusal("digits", tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="no pipes")
def test_a_pipe_is_no_image(tmp_path, caplog):
    fill(tmp_path, "cat", "dog")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    assert len(load("digits", tmp_path).train) == 10
    assert left_out(caplog).endswith("1 .png (cat/pipe.png)")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused_by_name(tmp_path):
    fill(tmp_path, "cat", "dog")
    (tmp_path / "dog").chmod(0)
    assert refusal("digits", tmp_path).endswith(f"cannot be read (Permission denied): check {tmp_path / 'dog'}")


def test_images_come_in_the_order_of_their_paths(tmp_path):
    """As they always have: what a seed draws depends on it."""
    write_classes(tmp_path / "train", {"a": 1, "b": 1})
    for name in ("10.png", "9.png", "b/1.png", "b.png", "b-1.png", "B.png", "b/a/2.png"):
        path = tmp_path / "train" / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 5), len(list((tmp_path / "train").rglob("*")))).save(path)
    write_classes(tmp_path / "test", {"a": 1, "b": 1})
    ours = greys(load("digits", tmp_path).train)
    paths = sorted(path for path in (tmp_path / "train").rglob("*") if path.is_file())
    assert ours == [Image.open(path).getpixel((0, 0)) for path in paths]
