"""Data sets: what comes out of the real formats, and what is said about files that cannot be used."""

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from onward.errors import UsageError
from onward.lab.data import Split, load
from onward.lab.system import memory
from tests.lab.image_files import CLASSES, pictures, png, refusal, write_classes, write_parquet, write_parts


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    return write_parts(tmp_path)


# ---- digits


def test_digits_are_whole_stratified_and_the_same_every_time():
    data, again = load("digits"), load("digits")
    assert (data.name, data.shape, data.outputs) == ("digits", (1, 8, 8), 10)
    assert data.class_names == tuple("0123456789")
    assert len(data.train) + len(data.test) == 1797
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert data.train.images.min() == 0
    assert data.train.images.max() == 255
    share = data.test.labels.bincount() / torch.cat([data.train.labels, data.test.labels]).bincount()
    assert ((share - 0.2).abs() < 0.01).all()
    assert torch.equal(data.test.images, again.test.images)
    assert torch.equal(data.train.labels, again.train.labels)


def test_the_splits_of_digits_hold_every_image_once():
    from sklearn.datasets import load_digits

    data = load("digits")
    ours = torch.cat([data.train.images, data.test.images]).flatten(1).tolist()
    theirs = np.rint(load_digits().images.reshape(1797, 64) * 255 / 16).astype(int).tolist()
    assert sorted(ours) == sorted(theirs)


# ---- folders


def test_parquet_files_give_their_pixels_and_labels_in_order(parquet):
    data = load("digits", parquet)
    assert (data.name, data.shape, data.outputs, data.class_names) == (parquet.name, (1, 5, 6), 3, tuple(CLASSES))
    assert data.train.labels.tolist() == [0, 1, 2] * 3
    assert data.test.labels.tolist() == [2, 1, 0]
    assert np.array_equal(data.train.images[:, 0], np.stack([np.asarray(picture) for picture in pictures(9)]))
    assert np.array_equal(data.test.images[:, 0], np.stack([np.asarray(picture) for picture in pictures(3, seed=1)]))


def test_what_the_hub_library_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(names=CLASSES))
    for part in ("train", "test"):
        table = {"img": pictures(6, "RGB"), "fine_label": [0, 1, 2] * 2}
        datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / f"{part}.parquet")
    data = load("digits", tmp_path)
    assert data.class_names == tuple(CLASSES)
    assert np.array_equal(data.train.images[4].permute(1, 2, 0), np.asarray(pictures(6, "RGB")[4]))


def test_shards_follow_each_other_and_validation_serves_for_test(tmp_path):
    for shard in range(2):
        labels = [0, 1] if shard == 0 else [1, 2]
        write_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet", pictures(2, seed=shard), labels)
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", pictures(1), [2])
    data = load("digits", tmp_path)
    assert data.train.labels.tolist() == [0, 1, 1, 2]
    assert np.array_equal(data.train.images[2, 0], np.asarray(pictures(2, seed=1)[0]))
    assert data.test.labels.tolist() == [2]


@pytest.mark.parametrize("layout", ["plain_text/{part}-00000-of-00001.parquet", "default/{part}/0000.parquet"])
def test_parquet_files_may_lie_in_the_folders_the_hub_gives_them(tmp_path, layout):
    for part in ("train", "test"):
        write_parquet(tmp_path / layout.format(part=part), pictures(3), [0, 1, 2])
    assert len(load("digits", tmp_path).train) == 3


def test_parquet_without_a_description_of_its_features_names_classes_by_number(tmp_path):
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", pictures(3), [0, 1, 2], names=None)
    assert load("digits", tmp_path).class_names == ("0", "1", "2")


def test_of_several_labels_the_fine_one_is_taken(tmp_path):
    table = {"img": [png(picture) for picture in pictures(3)], "coarse_label": [0, 0, 0], "fine_label": [0, 1, 2]}
    for part in ("train", "test"):
        pq.write_table(pa.table(table), tmp_path / f"{part}.parquet")
    assert load("digits", tmp_path).train.labels.tolist() == [0, 1, 2]


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path):
    write_classes(tmp_path / "train", {"owl": 2, "cat": 1}, mode="RGB")
    write_classes(tmp_path / "test", {"owl": 1}, mode="RGB")
    (tmp_path / "train" / "owl" / "notes.txt").write_text("no image")
    data = load("digits", tmp_path)
    assert (data.shape, data.outputs, data.class_names) == ((3, 5, 6), 2, ("cat", "owl"))
    assert data.train.labels.tolist() == [0, 1, 1]
    assert data.test.labels.tolist() == [1]
    assert np.array_equal(data.train.images[2].permute(1, 2, 0), np.asarray(pictures(2, "RGB")[1]))


def test_without_a_test_part_a_fixed_fifth_of_each_class_is_held_out_and_said_so(tmp_path, caplog):
    write_classes(tmp_path, {"cat": 10, "dog": 20})
    data, again = load("digits", tmp_path), load("digits", tmp_path)
    assert data.train.labels.bincount().tolist() == [8, 16]
    assert data.test.labels.bincount().tolist() == [2, 4]
    assert torch.equal(data.test.images, again.test.images)
    assert "has no test part: 6 of its 30 images are held out for it" in caplog.text


def test_a_subset_is_fixed_and_drawn_from_everywhere(tmp_path):
    write_parquet(tmp_path / "train.parquet", pictures(60), sorted([0, 1, 2] * 20))  # sorted by class
    write_parquet(tmp_path / "test.parquet", pictures(3), [0, 1, 2])
    data = load("digits", tmp_path, train_samples=12, test_samples=2)
    again = load("digits", tmp_path, train_samples=12)
    assert (len(data.train), len(data.test), len(again.test), data.outputs) == (12, 2, 3, 3)
    assert torch.equal(data.train.images, again.train.images)
    assert set(data.train.labels.tolist()) == {0, 1, 2}


# ---- data sets that do not fit in memory, or have no one size


def test_images_of_two_sizes_stay_encoded(parquet):
    test = parquet / "test-00000-of-00001.parquet"
    write_parquet(test, [*pictures(2, "RGB"), *pictures(1, size=(7, 4))], [0, 1, 2])
    data = load("digits", parquet)
    assert (data.shape, len(data.train), len(data.test), data.outputs) == ((3, None, None), 9, 3, 3)
    images = data.test.images[torch.tensor([2, 0])]
    assert [(image.dtype, image.shape) for image in images] == [(torch.uint8, (3, 4, 7)), (torch.uint8, (3, 5, 6))]
    assert np.array_equal(images[0][0], np.asarray(pictures(1, size=(7, 4))[0]))
    assert data.train.images.reason == (
        f"the images differ in size (6x5 pixels in row 0 of {parquet / 'train-00000-of-00001.parquet'}, 7x4 in row 2 of {test})"
    )


def test_images_that_take_more_than_a_quarter_of_the_memory_stay_encoded(tmp_path, monkeypatch):
    write_classes(tmp_path, {"cat": 10, "dog": 10}, mode="RGB")
    whole = load("digits", tmp_path)
    monkeypatch.setattr(memory, "physical", lambda: 4 * 20 * 90)
    assert isinstance(load("digits", tmp_path).train.images, torch.Tensor)
    monkeypatch.setattr(memory, "physical", lambda: 4 * 20 * 90 - 4)
    data = load("digits", tmp_path)
    assert data.train.images.reason == "the images would take 1.8e-06 GB of memory"
    for split, expected in ((data.train, whole.train), (data.test, whole.test)):
        assert torch.equal(torch.stack(split.images[torch.arange(len(split))]), expected.images)
        assert torch.equal(split.labels, expected.labels)
    assert len(load("digits", tmp_path, train_samples=3).train.images) == 3


def test_parquet_files_that_are_too_large_are_mapped_from_the_cache(parquet, monkeypatch, tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    whole = load("digits", parquet)
    assert not list(cache.rglob("*.arrow"))
    datasets.disable_progress_bars()
    monkeypatch.setattr(memory, "physical", lambda: 100)
    data = load("digits", parquet)
    assert len(list(cache.rglob("*.arrow"))) == 2
    assert torch.equal(torch.stack(data.train.images[torch.arange(9)]), whole.train.images)
    assert (data.class_names, data.test.labels.tolist()) == (whole.class_names, [2, 1, 0])
    (parquet / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    assert "test-00000-of-00001.parquet is not a readable parquet file (" in refusal("digits", parquet)


def test_an_encoded_image_that_does_not_decode_is_named_when_it_is_needed(tmp_path, monkeypatch):
    write_classes(tmp_path / "train", {"cat": 2, "dog": 2})
    write_classes(tmp_path / "test", {"cat": 2, "dog": 2})
    (tmp_path / "train" / "dog" / "001.png").write_bytes(b"no image")
    monkeypatch.setattr(memory, "physical", lambda: 100)
    images = load("digits", tmp_path).train.images
    assert len(images[torch.arange(3)]) == 3
    with pytest.raises(UsageError, match=r"dog/001.png does not decode as an image \(unknown format\): replace or remove it"):
        images[torch.tensor([3])]


def test_a_test_part_without_labels_is_passed_over(parquet):
    """As ImageNet's on the hub: -1 everywhere."""
    write_parquet(parquet / "test-00000-of-00001.parquet", pictures(2), [-1, -1])
    write_parquet(parquet / "validation-00000-of-00001.parquet", pictures(3, seed=5), [1, 1, 2])
    data = load("digits", parquet)
    assert data.test.labels.tolist() == [1, 1, 2]
    assert np.array_equal(data.test.images[0, 0], np.asarray(pictures(3, seed=5)[0]))


@pytest.mark.parametrize("labels", ["none", "missing", "null"])
def test_a_test_part_without_a_label_is_passed_over_whatever_stands_for_none(parquet, labels):
    path = parquet / "test-00000-of-00001.parquet"
    table = {"image": [png(picture) for picture in pictures(2)]}
    kinds = {"none": {}, "missing": {"label": pa.array([None, None], pa.int64())}, "null": {"label": [None, None]}}
    pq.write_table(pa.table(table | kinds[labels]), path)
    if labels == "none":
        assert (
            refusal("digits", parquet)
            == f"{path} has no column of labels (columns: image): name the one with the classes 'label'"
        )
    else:
        assert "the test part of data set" in refusal("digits", parquet)
    write_parquet(parquet / "dev.parquet", pictures(3, seed=5), [1, 1, 2])
    assert load("digits", parquet).test.labels.tolist() == [1, 1, 2]


# ---- what cannot be used


def test_an_unknown_name_is_answered_with_the_nearest():
    message = refusal("fashion_mnist")
    assert message.startswith("unknown data set 'fashion_mnist': did you mean 'fashion-mnist'?")
    assert refusal("/no/such/folder").startswith("unknown data set '/no/such/folder' (known: digits, ")


def test_a_folder_given_as_a_name_is_sent_to_data_dir(tmp_path, monkeypatch):
    (tmp_path / "my" / "pictures").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("my", "my/pictures", str(tmp_path)):
        assert refusal(name) == f"data set {name} is a folder here: give it with --data-dir"


def test_folders_that_are_no_data_set(tmp_path):
    assert "nowhere does not exist: give a folder of parquet files" in refusal("digits", tmp_path / "nowhere")
    assert "holds no parquet files and no class folders" in refusal("digits", tmp_path)
    (tmp_path / "file").write_text("")
    assert "file is a file: give the folder that holds it" in refusal("digits", tmp_path / "file")
    (tmp_path / "train").mkdir()
    assert "train has no class folders: put the images of each class" in refusal("digits", tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    assert f"class folder {tmp_path / 'train' / 'cat'} has no images: add some" in refusal("digits", tmp_path)


def test_several_data_sets_in_one_folder(tmp_path):
    for name in ("full", "cropped"):
        write_parquet(tmp_path / name / "train.parquet", pictures(3), [0, 1, 2])
    assert refusal("digits", tmp_path).endswith("holds several data sets: give one of its folders cropped, full")


def test_no_training_part(tmp_path):
    write_parquet(tmp_path / "test.parquet", pictures(3), [0, 1, 2])
    assert refusal("digits", tmp_path).endswith("has no training part (found: test): name it 'train'")
    write_classes(tmp_path / "images" / "test", {"cat": 3})
    assert refusal("digits", tmp_path / "images").endswith("has no training part (found: test): name it 'train'")


def test_a_missing_shard(parquet):
    (parquet / "train-00000-of-00001.parquet").rename(parquet / "train-00000-of-00003.parquet")
    assert refusal("digits", parquet).endswith(
        "train-00000-of-00003.parquet is one of 3 files, but 1 are there: fetch the others"
    )


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "other"])
def test_a_corrupt_parquet_file_is_named(parquet, damage):
    path = parquet / "test-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-100:-50] = bytes(byte ^ 255 for byte in content[-100:-50])
    path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "other": b"PNG" * 99}.get(damage, content))
    message = refusal("digits", parquet)
    assert str(path) in message
    assert message.endswith(("download or write it again", "write it again"))


def test_no_damage_to_a_parquet_file_escapes_as_another_error(parquet):
    path = parquet / "train-00000-of-00001.parquet"
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(100):
        content = bytearray(whole)
        for position in random.integers(len(content), size=random.integers(1, 8)):
            content[position] ^= 1 << random.integers(8)
        path.write_bytes(content)
        with contextlib.suppress(UsageError):
            load("digits", parquet)  # a bit of a label may go unseen


def test_an_image_that_does_not_decode_is_named(parquet, tmp_path_factory):
    path = parquet / "train-00000-of-00001.parquet"
    images = pictures(9)
    for bad, reason in ((b"no image", "unknown format"), (png(images[0])[:60], "")):
        write_parquet(path, [*images[:4], bad, *images[5:]], [0, 1, 2] * 3)
        message = refusal("digits", parquet)
        assert f"row 4 of {path} does not decode as an image ({reason}" in message
        assert message.endswith("replace or remove it")
    folder = tmp_path_factory.mktemp("classes")
    write_classes(folder, {"cat": 5, "dog": 5})
    (folder / "dog" / "003.png").write_bytes(b"")
    assert refusal("digits", folder).startswith(f"{folder / 'dog' / '003.png'} does not decode as an image (unknown")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None, 2], "row 1 of {file} has no label: fill in column 'label' or drop the row"),
        ([0, 1, -1], "row 2 of {file} has label -1: number the classes from 0, or drop unlabelled rows"),
        ([0.0, 1.0, 2.0], "labels in column 'label' of {file} are double, not integers: number the classes from 0"),
        (["a", "b", "c"], "labels in column 'label' of {file} are string, not integers: number the classes from 0"),
        ([0, 1, 3], "row 2 of {file} has label 3, but only 3 classes are named: correct either"),
    ],
)
def test_labels_that_cannot_be_used(parquet, labels, message):
    file = parquet / "train-00000-of-00001.parquet"
    write_parquet(file, pictures(3), labels)
    assert refusal("digits", parquet) == message.format(file=file)


def test_labels_that_are_no_class_numbers(tmp_path):
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", pictures(3), [0, 1, 10**12], names=None)
    message = refusal("digits", tmp_path)
    assert message.endswith("train.parquet has label 1000000000000 among 3 images: number the classes from 0")


def test_named_classes_may_outnumber_the_images(tmp_path):
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", pictures(2), [0, 2], names=[*CLASSES, "yak"])
    assert load("digits", tmp_path).outputs == 4


def test_a_single_class(tmp_path):
    write_classes(tmp_path / "train", {"images": 5})
    assert refusal("digits", tmp_path).endswith("has a single class: give images of at least two")


def test_a_class_that_only_the_test_part_has(parquet, tmp_path_factory):
    write_parquet(parquet / "train-00000-of-00001.parquet", pictures(4), [0, 1, 0, 1])
    test = parquet / "test-00000-of-00001.parquet"
    assert refusal("digits", parquet) == f"row 0 of {test} has label 2, which no training image has: drop it or add some"
    folder = tmp_path_factory.mktemp("classes")
    write_classes(folder / "train", {"cat": 2, "dog": 2})
    write_classes(folder / "test", {"cat": 1, "owl": 1})
    message = refusal("digits", folder)
    assert message == f"class folder {folder / 'test' / 'owl'} has no counterpart in the training part: add one or remove it"


def test_class_names_that_differ_between_files(parquet):
    write_parquet(parquet / "test-00000-of-00001.parquet", pictures(3), [0, 1, 2], names=["cat", "owl", "dog"])
    assert refusal("digits", parquet).endswith("name their classes differently: give files of one data set")


def test_columns_that_are_missing(parquet):
    file = parquet / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"image": ["a.png"], "label": [0]}), file)
    assert refusal("digits", parquet).startswith(f"{file} has no column of encoded images (columns: image, label): store")
    pq.write_table(pa.table({"image": [b""], "kind": [0]}), file)
    assert refusal("digits", parquet).startswith(f"{file} has no column of labels (columns: image, kind): name the one")
    write_parquet(file, [*pictures(2), None], [0, 1, 2])
    assert refusal("digits", parquet) == f"row 2 of {file} has no image bytes: store them in column 'image'"


def test_columns_that_are_as_likely_as_others(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    label, image = datasets.ClassLabel(names=CLASSES), datasets.Image()
    file, six = tmp_path / "train.parquet", [0, 1, 2] * 2

    def write(path, **columns):
        features = datasets.Features({name: label if column is six else image for name, column in columns.items()})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)

    write(file, image=pictures(6), breed=six, colour=six)
    assert refusal("digits", tmp_path) == (
        f"{file} has 2 columns of class labels (breed, colour), and none has a usual name (label, labels, fine_label, class, "
        "target): name the one that is meant 'label'"
    )
    write(file, front=pictures(6), back=pictures(6), breed=six)
    assert refusal("digits", tmp_path) == (
        f"{file} has 2 columns of images (front, back), and none has a usual name (image, img): name the one that is meant "
        "'image'"
    )
    pq.write_table(pa.table({"front": [b"a"], "back": [b"a"], "label": [0]}), file)
    assert refusal("digits", tmp_path).startswith(f"{file} has 2 columns of images (front, back), and none has")
    write(file, image=pictures(6), breed=six)
    write(tmp_path / "test.parquet", image=pictures(6), breed=six, label=six)
    assert refusal("digits", tmp_path) == (
        f"{file} has its labels in column 'breed', but {tmp_path / 'test.parquet'} in 'label': name the one with the classes "
        "'label' in both"
    )
    write(tmp_path / "test.parquet", image=pictures(6), breed=six)
    assert load("digits", tmp_path).class_names == tuple(CLASSES)


def test_labels_beyond_what_a_signed_number_holds(tmp_path):
    file = tmp_path / "train.parquet"
    for labels in ([0, 1, 2**63], [0, 2**64 - 1, 1]):
        write_parquet(file, pictures(3), pa.array(labels, pa.uint64()), names=None)
        row, label = labels.index(max(labels)), max(labels)
        expected = f"row {row} of {file} has label {label} among 3 images: number the classes from 0"
        assert refusal("digits", tmp_path) == expected


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([1, 2, 3], "no image has label 0, though labels go up to 3: "),
        ([0, 7, 7], "no image has labels 1, 2, 3, 4, 5 and 1 more, though labels go up to 7: "),
    ],
)
def test_numbers_that_labels_leave_out_are_told(tmp_path, caplog, labels, told):
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", pictures(9), labels * 3, names=None)
    assert load("digits", tmp_path).outputs == max(labels) + 1
    assert f"data set {tmp_path.name}: {told}" in caplog.text
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", pictures(9), labels * 3, names=list("abcdefgh"))
    caplog.clear()
    load("digits", tmp_path)
    assert not caplog.text


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_without_images(parquet, part):
    file = parquet / f"{part}-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    assert (
        refusal("digits", parquet) == f"the {part} part of data set {parquet.name} has no images with labels: give one that has"
    )


def test_too_few_images_to_hold_any_out(tmp_path):
    write_classes(tmp_path, {"cat": 4, "dog": 4})
    assert "has no test part, and no class of 5 images to hold one out of" in refusal("digits", tmp_path)


@pytest.mark.parametrize("name", ["folder", "digits"])
def test_more_samples_than_there_are(parquet, name):
    path, available, known = (parquet, 9, parquet.name) if name == "folder" else (None, 1442, "digits")
    for asked in (available + 1, 0, -5):
        expected = f"--subset.train {asked}: data set {known} has {available} train images, ask for 1 to {available}"
        assert refusal("digits", path, train_samples=asked) == expected


# ---- the digest


def test_the_digest_of_images_in_memory_changes_with_whatever_a_run_would_notice(images):
    data = images(train=12, test=8)
    same = images(train=12, test=8)
    assert data.digest == same.digest
    assert int(data.digest, 16) > 0
    train, test = data.train, data.test
    pixels, labels = train.images.clone(), train.labels.clone()
    pixels[3, 0, 0, 0] ^= 1
    labels[2] = (labels[2] + 1) % 4
    others = [
        replace(data, class_names=("0", "1", "3", "2")),
        replace(data, class_names=("0", "1", "2", "three")),
        replace(data, train=Split(pixels, train.labels)),
        replace(data, train=Split(train.images, labels)),
        replace(data, train=Split(train.images.flip(0), train.labels)),
        replace(data, train=Split(train.images.reshape(12, 4, 4, 4), train.labels)),
        replace(data, train=Split(train.images[:-1], train.labels[:-1])),
        replace(data, test=Split(test.images[:-1], test.labels[:-1])),
        replace(data, train=test, test=train),
    ]
    assert len({data.digest, *(other.digest for other in others)}) == len(others) + 1


def test_the_digest_of_encoded_images_changes_with_names_and_sizes_and_not_with_the_folders_place(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "physical", lambda: 100)
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        write_classes(folder / "train", {"cat": 2, "dog": 2})
        write_classes(folder / "test", {"cat": 1, "dog": 1})
    digest = load("digits", first).digest
    assert load("digits", second).digest == digest
    (second / "train" / "cat" / "001.png").rename(second / "train" / "cat" / "1.png")
    renamed = load("digits", second).digest
    with (second / "train" / "cat" / "1.png").open("ab") as file:
        file.write(b"\0")
    assert len({digest, renamed, load("digits", second).digest}) == 3


def test_the_digest_of_encoded_rows_changes_with_the_bytes_they_take(parquet, monkeypatch, tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(memory, "physical", lambda: 100)
    digest = load("digits", parquet).digest
    assert load("digits", parquet).digest == digest
    images = pictures(9)
    images[4] = Image.new("L", (6, 5))
    write_parquet(parquet / "train-00000-of-00001.parquet", images, [0, 1, 2] * 3)
    assert load("digits", parquet).digest != digest
