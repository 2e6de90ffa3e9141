"""Data sets as torchvision leaves them on the disk: small ones in the real formats, damaged ones, and hostile ones."""

import contextlib
import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from onward.errors import UsageError
from onward.lab.data import load
from onward.lab.system import memory
from tests.lab.image_files import pictures, refusal, write_classes, write_parquet

FINE = [f"fine {number}" for number in range(100)]


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(folder: Path, train: int = 20, test: int = 10, *, packed: bool = False, joint: str = "-", seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (prefix, count) in enumerate((("train", train), ("t10k", test))):
        images, labels = pixels(count, 28, 28, seed=seed + number), np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images", images), ("labels", labels)):
            content = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()
            name = f"{prefix}-{kind}{joint}idx{array.ndim}-ubyte" + ".gz" * packed
            (folder / name).write_bytes(gzip.compress(content) if packed else content)


def pickled(value: object, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol)


def python2(data: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 has pickled it for CIFAR: its plain strings are bytes, which today's pickle has no way to write."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\nU\x02u1K\0K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    shape = b"".join(struct.pack("<ci", b"J", side) for side in data.shape) + b"\x86"
    content = struct.pack("<ci", b"T", data.size) + data.tobytes()
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"(K\x01" + shape + kind + b"\x89" + content + b"tbU\x06labels" + numbers + b"u."


def write_cifar10(folder: Path, each: int = 4, dump=pickled) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"]):
        labels = [(number + i) % 10 for i in range(10)][: max(each, 10 if name == "data_batch_1" else 0)]
        batch = {"batch_label": name, "labels": labels, "data": pixels(len(labels), 3072, seed=number), "filenames": []}
        (folder / name).write_bytes(dump(batch))
    (folder / "batches.meta").write_bytes(dump({"num_vis": 3072, "label_names": list("abcdefghij")}))


def write_cifar100(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(("train", "test")):
        batch = {b"fine_labels": [99, *range(9)], b"coarse_labels": [0] * 10, b"data": pixels(10, 3072, seed=number)}
        (folder / name).write_bytes(pickled(batch))
    (folder / "meta").write_bytes(pickled({"fine_label_names": FINE, "coarse_label_names": ["coarse"]}))


def write_svhn(folder: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(("train", "test")):
        labels = np.array([[10], [1], [2], [9], [5]], np.uint8)
        scipy_io.savemat(folder / f"{part}_32x32.mat", {"X": pixels(32, 32, 3, 5, seed=number), "y": labels})


# ---- MNIST


@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw", "mnist"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("joint", "-.")
def test_idx_files_give_their_pixels_and_labels(tmp_path, place, packed, joint):
    write_idx(tmp_path / place, packed=packed, joint=joint)
    data = load("digits", tmp_path)
    assert (data.shape, data.outputs, data.class_names) == ((1, 28, 28), 10, tuple("0123456789"))
    assert np.array_equal(data.train.images[:, 0], pixels(20, 28, 28))
    assert np.array_equal(data.test.images[:, 0], pixels(10, 28, 28, seed=1))
    assert data.train.labels.tolist() == [*range(10)] * 2


def test_a_part_of_the_digits_has_ten_classes_all_the_same(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw", train=4, test=2)
    assert load("mnist", tmp_path).outputs == 10


def test_an_unpacked_file_is_taken_before_the_packed_one(tmp_path):
    write_idx(tmp_path)
    write_idx(tmp_path, packed=True, seed=7)
    assert np.array_equal(load("digits", tmp_path).train.images[:, 0], pixels(20, 28, 28))


def test_of_several_data_sets_the_name_chooses(tmp_path):
    for seed, name in enumerate(("MNIST", "FashionMNIST", "KMNIST")):
        write_idx(tmp_path / name / "raw", seed=10 * seed)
    write_cifar10(tmp_path / "cifar-10-batches-py")
    for seed, name in enumerate(("mnist", "fashion-mnist", "k-mnist")):
        assert np.array_equal(load(name, tmp_path).train.images[:, 0], pixels(20, 28, 28, seed=10 * seed))
    assert load("cifar10", tmp_path).shape == (3, 32, 32)
    message = refusal("digits", tmp_path)
    assert f"holds several data sets (fashion-mnist in {tmp_path / 'FashionMNIST' / 'raw'}, k-mnist in" in message
    assert message.endswith("say with --data which, or give its folder")
    assert refusal("svhn", tmp_path).startswith(f"data folder {tmp_path} holds no svhn, but fashion-mnist in ")
    assert load("digits", tmp_path / "KMNIST").shape == (1, 28, 28)


def test_a_folder_of_another_data_set_is_not_taken_for_the_one_asked_for(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    held = f"holds no mnist, but cifar10 in {tmp_path / 'cifar-10-batches-py'}"
    expected = f"data folder {tmp_path} {held}: give that name with --data, or another folder"
    assert refusal("mnist", tmp_path) == expected


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", ["empty", "truncated", "longer", "huge", "other"])
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_a_damaged_idx_file_is_named(tmp_path, damage, kind, packed):
    write_idx(tmp_path, packed=packed)
    path = tmp_path / (f"t10k-{kind}-ubyte" + ".gz" * packed)
    content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    dimensions = 3 if kind[0] == "i" else 1
    content = {
        "empty": b"",
        "truncated": content[:-3],
        "longer": content + b"\0",
        "huge": struct.pack(f">{1 + dimensions}I", 0x800 + dimensions, *[2**32 - 1] * dimensions) + content[16:],
        "other": b"\0\0\x0d\x02" + content[4:],
    }[damage]
    path.write_bytes(gzip.compress(content) if packed else content)
    message = refusal("digits", tmp_path)
    assert message.startswith(f"{path} is n")
    assert message.endswith("download it again")


def test_a_broken_or_false_gzip_file_is_named(tmp_path):
    write_idx(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (whole[:-20], whole[:12], b"no gzip file", whole[:50] + b"\xff" * 50 + whole[100:]):
        path.write_bytes(content)
        assert refusal("digits", tmp_path).startswith(f"{path} is not a whole idx file (")


def test_idx_files_that_do_not_belong_together(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    missing = tmp_path / "t10k-labels-idx1-ubyte"
    assert refusal("digits", tmp_path) == f"{missing} is missing beside the other files of its data set: download it again"
    write_idx(tmp_path / "more" / "other", train=30)
    for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / "more" / "other" / name).replace(tmp_path / name)
    file = tmp_path / "train-images-idx3-ubyte"
    assert refusal("digits", tmp_path) == f"{file} has 20 images, but 30 labels belong to it: download both again"


FASHION = ["fashion-mnist", "Fashion_MNIST", "FASHIONMNIST/raw", "fashion-mnist/data/fashion", "fashion_mnist/data"]


@pytest.mark.parametrize("place", FASHION)
def test_folders_are_called_after_their_data_set_in_many_ways(tmp_path, place):
    write_idx(tmp_path / place)
    folder = (tmp_path / place).parent if len(Path(place).parts) > 1 else tmp_path
    held = f"holds no mnist, but fashion-mnist in {tmp_path / place}"
    for given in (folder, tmp_path / place):
        assert refusal("mnist", given) == f"data folder {given} {held}: give that name with --data, or another folder"
        assert load("fashion-mnist", given).shape == (1, 28, 28)


@pytest.mark.parametrize("place", ["EMNIST/raw", "qmnist", "e-mnist"])
def test_data_sets_in_idx_files_that_are_not_read(tmp_path, place):
    write_idx(tmp_path / place)
    name = place.lower().replace("-", "")[:6]
    assert refusal("digits", tmp_path) == (
        f"{tmp_path / place} holds {name}, which is not read from idx files: give another folder, or its images as files"
    )
    assert refusal("mnist", tmp_path).startswith(f"data folder {tmp_path} holds no mnist, but {name} in {tmp_path / place}")
    write_idx(tmp_path / "MNIST" / "raw")
    assert load("mnist", tmp_path).shape == (1, 28, 28)


@pytest.mark.parametrize("kept", ["t10k-images-idx3", "t10k-labels-idx1", "train-labels-idx1"])
def test_one_idx_file_without_the_others(tmp_path, kept):
    write_idx(tmp_path)
    for path in tmp_path.iterdir():
        if not path.name.startswith(kept):
            path.unlink()
    missing = tmp_path / "train-images-idx3-ubyte"
    assert refusal("digits", tmp_path) == f"{missing} is missing beside the other files of its data set: download it again"


@pytest.mark.parametrize("own", ["train", "train.parquet"])
def test_images_of_ones_own_beside_a_download_are_not_hidden(tmp_path, caplog, own):
    write_idx(tmp_path / "MNIST" / "raw")
    if own == "train":
        write_classes(tmp_path / "train", {"cat": 5, "dog": 5})
    else:
        write_parquet(tmp_path / own, pictures(3), [0, 1, 2])
    assert refusal("digits", tmp_path) == (
        f"data folder {tmp_path} holds what torchvision has downloaded (mnist in {tmp_path / 'MNIST' / 'raw'}) and other "
        f"images ({tmp_path / own}): give the folder of the one that is meant, or move the other away"
    )
    assert load("mnist", tmp_path).shape == (1, 28, 28)
    kind = "folder" if own == "train" else ".parquet"
    assert caplog.messages == [f"data folder {tmp_path}: 1 left out (only mnist is read): 1 {kind} ({own})"]


# ---- CIFAR


@pytest.mark.parametrize("protocol", range(2, 6))
def test_cifar10_is_read(tmp_path, protocol):
    write_cifar10(tmp_path / "cifar-10-batches-py", dump=lambda value: pickled(value, protocol))
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):
        data = load("cifar10", folder)
        assert (data.shape, data.class_names, len(data.train), len(data.test)) == ((3, 32, 32), tuple("abcdefghij"), 26, 4)
        assert np.array_equal(data.train.images[10:14].flatten(1), pixels(4, 3072, seed=1))
        assert data.test.labels.tolist() == [5, 6, 7, 8]


def test_cifar10_is_read_as_python_2_has_written_it(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(python2(pixels(10, 3072, seed=number), list(range(10))))
    data = load("cifar10", tmp_path)
    assert np.array_equal(data.train.images[:10].flatten(1), pixels(10, 3072, seed=1))
    assert data.train.labels.tolist() == [*range(10)] * 5


def test_cifar100_is_read_with_its_fine_labels(tmp_path):
    write_cifar100(tmp_path / "cifar-100-python")
    for folder in (tmp_path, tmp_path / "cifar-100-python"):
        data = load("cifar100", folder)
        assert (data.shape, data.outputs, data.class_names) == ((3, 32, 32), 100, tuple(FINE))
        assert data.train.labels.tolist() == [99, *range(9)]
        assert np.array_equal(data.test.images.flatten(1), pixels(10, 3072, seed=1))


class Hostile:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    folder, mark = tmp_path / "cifar-10-batches-py", tmp_path / "mark"
    write_cifar10(folder)
    good = {"labels": [0], "data": pixels(1, 3072)}
    calls = {
        "posix.system": Hostile(os.system, f"touch {mark}"),
        "builtins.eval": Hostile(eval, f"open({str(mark)!r}, 'w')"),
        "builtins.getattr": Hostile(getattr, "a", "upper"),
        "pathlib.PosixPath": mark,
        "numpy.load": Hostile(np.load, str(mark)),
    }
    for name, call in calls.items():
        for file in ("data_batch_3", "test_batch", "batches.meta"):
            whole = (folder / file).read_bytes()
            (folder / file).write_bytes(pickled({**good, "label_names": ["a"], "more": call}, 4))
            message = refusal("cifar10", tmp_path)
            assert message.startswith(f"{folder / file} asks for ")
            if name != "numpy.load":
                assert f"asks for {name}, which no data set needs: do not use it, download it again" in message
            (folder / file).write_bytes(whole)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": [0], "data": np.array([[None] * 3072])}, "asks for an array of something else than bytes"),
        ({"labels": [0], "data": pixels(1, 3072).astype(np.float32)}, "asks for an array of something else than bytes"),
        ({"labels": [0], "data": pixels(1, 3000)}, "holds no rows of 32x32 colour images in 'data' with 'labels'"),
        ({"labels": [0], "data": [1, 2]}, "holds no rows of 32x32 colour images"),
        ({"data": pixels(1, 3072)}, "holds no rows of 32x32 colour images in 'data' with 'labels'"),
        ({"labels": ["cat"], "data": pixels(1, 3072)}, "has 'labels' that are no numbers from 0"),
        ({"labels": [-1], "data": pixels(1, 3072)}, "has 'labels' that are no numbers from 0"),
        ({"labels": [1, 2], "data": pixels(1, 3072)}, "has 1 images, but 2 labels belong to it"),
        ([1, 2], "cannot be read (no dictionary): download it again"),
    ],
)
def test_batches_that_are_none(tmp_path, batch, message):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(pickled(batch))
    assert refusal("cifar10", tmp_path).startswith(f"{path} {message}")


def test_no_damage_to_a_pickle_escapes_as_another_error(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    path = folder / "batches.meta"
    random = np.random.default_rng(0)
    for whole in (pickled({"label_names": list("abcdefghij"), "more": pixels(3, 2)}, protocol) for protocol in range(6)):
        for _ in range(100):
            content = bytearray(whole)
            for position in random.integers(len(content), size=random.integers(1, 4)):
                content[position] ^= 1 << random.integers(8)
            path.write_bytes(bytes(content[: random.integers(1, len(content) + 1)]))
            with contextlib.suppress(UsageError):
                load("cifar10", tmp_path)  # a bit of a name may go unseen


def test_files_of_cifar_that_are_missing_are_named(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    for name in ("batches.meta", "test_batch", "data_batch_4"):
        (folder / name).unlink()
        assert refusal("cifar10", tmp_path) == (
            f"{folder / name} is missing beside the other files of its data set: download it again"
        )


# ---- SVHN


def test_svhn_is_read_and_its_ten_is_a_nought(tmp_path):
    write_svhn(tmp_path)
    data = load("svhn", tmp_path)
    assert (data.shape, data.outputs) == ((3, 32, 32), 10)
    assert data.train.labels.tolist() == [0, 1, 2, 9, 5]
    assert np.array_equal(data.test.images.permute(2, 3, 1, 0), pixels(32, 32, 3, 5, seed=1))


def test_damaged_matlab_files_are_named(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    write_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    whole = path.read_bytes()
    for content in (b"", b"no matlab file" * 20, whole[: len(whole) // 2], whole[:200]):
        path.write_bytes(content)
        assert refusal("svhn", tmp_path).startswith(f"{path} is not a readable Matlab file of 'X' and 'y' (")
    for found in ({"X": pixels(4, 4, 3, 2)}, {"X": pixels(4, 4, 2), "y": [1, 2]}, {"X": np.zeros((4, 4, 3, 2)), "y": [1, 2]}):
        scipy_io.savemat(path, found)
        assert str(path) in refusal("svhn", tmp_path)
    path.unlink()
    assert refusal("svhn", tmp_path) == f"{path} is missing beside the other files of its data set: download it again"


# ---- all of them


def test_they_may_stay_arrays_where_they_do_not_fit_into_memory_twice(tmp_path, monkeypatch):
    write_idx(tmp_path)
    whole = load("digits", tmp_path)
    monkeypatch.setattr(memory, "physical", lambda: 100)
    data = load("digits", tmp_path)
    assert torch.equal(torch.stack(data.train.images[torch.arange(20)]), whole.train.images)
    digest = data.digest
    write_idx(tmp_path, seed=5)
    assert load("digits", tmp_path).digest != digest


def test_subsets_are_those_of_other_data(tmp_path):
    write_idx(tmp_path)
    data = load("digits", tmp_path, train_samples=12, test_samples=10)
    assert (len(data.train), len(data.test)) == (12, 10)


def test_classes_that_look_alike_stay_class_folders(tmp_path):
    """A file called train is no data set."""
    write_classes(tmp_path, {"cat": 10, "dog": 10})
    (tmp_path / "cat" / "train").write_bytes(b"")
    assert load("digits", tmp_path).class_names == ("cat", "dog")
