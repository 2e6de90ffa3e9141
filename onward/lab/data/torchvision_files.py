"""Data sets as torchvision has downloaded them: MNIST's idx files, CIFAR's pickled batches, SVHN's Matlab files."""

from __future__ import annotations

import gzip
import pickle
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from onward.errors import UsageError
from onward.lab.data.encoded import Sample
from onward.lab.system.extra import lab_extra, reason_of

Read = tuple[dict[str, list[Sample]], tuple[str, ...]]
DIGITS = tuple("0123456789")
IDX_FOLDERS = {"mnist": "mnist", "fashionmnist": "fashion-mnist", "kmnist": "k-mnist", "kuzushijimnist": "k-mnist"}
"""What folders of idx files are called, in small letters and nothing else, and what is in them."""
UNREAD = ("emnist", "qmnist")
"""Data sets in idx files of the same names, but with images that lie on their side, or with labels of several numbers."""


class Downloaded(NamedTuple):
    """A data set that was found: its name here (empty if its files may be one or the other), its folder, and what reads it."""

    name: str
    folder: Path
    read: Callable[[Path], Read]


def find(folder: Path) -> list[Downloaded]:
    """The data sets in the folder, in its folders, and in a folder called raw in any of these."""
    near = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))]
    found = []
    for holder in dict.fromkeys(place for path in near for place in (path, path / "raw")):
        name = _idx_name(holder)
        if name in UNREAD and any(holder.glob("*idx?-ubyte*")):
            found.append(Downloaded(name, holder, _unread))
        elif any(_idx_file(holder, prefix, kind).is_file() for prefix in ("train", "t10k") for kind in ("images", "labels")):
            found.append(Downloaded(name, holder, _idx))
        if (holder / "data_batch_1").is_file():
            found.append(Downloaded("cifar10", holder, _cifar10))
        if holder.name == "cifar-100-python" and (holder / "train").is_file():
            found.append(Downloaded("cifar100", holder, _cifar100))
        if (holder / "train_32x32.mat").is_file():
            found.append(Downloaded("svhn", holder, _svhn))
    return found


def read(folder: Path, found: Sequence[Downloaded], name: str) -> Read:
    """The one of the data sets that is called `name`, or that is there alone. Raises a UsageError if it is another, or several
    without that name are there, or a file is missing, damaged or hostile."""
    known = {*IDX_FOLDERS.values(), *UNREAD, "cifar10", "cifar100", "svhn"}
    called = [one for one in found if one.name == name] or [one for one in found if name not in known or not one.name]
    if len(called) == 1:
        return called[0].read(called[0].folder)
    held = ", ".join(f"{one.name or 'unnamed'} in {one.folder}" for one in found)
    if called:
        raise UsageError(f"data folder {folder} holds several data sets ({held}): say with --data which, or give its folder")
    raise UsageError(f"data folder {folder} holds no {name}, but {held}: give that name with --data, or another folder")


def beside(folder: Path, found: Sequence[Downloaded]) -> list[Path]:
    """What else the folder holds: the files in it, and those of its folders that none of the data sets is in."""
    holders = {folder, *(one.folder for one in found)}
    return [path for path in folder.iterdir() if path.is_file() or not any(path in (one, *one.parents) for one in holders)]


def _samples(pixels: np.ndarray, labels: Sequence[int], file: Path) -> list[Sample]:
    """Pixels (N, H, W, C), uint8, with their labels."""
    if len(pixels) != len(labels):
        raise UsageError(f"{file} has {len(pixels)} images, but {len(labels)} labels belong to it: download both again")
    return [Sample(image, int(label), str(file), row) for row, (image, label) in enumerate(zip(pixels, labels, strict=True))]


def _present(file: Path) -> Path:
    if not file.is_file():
        raise UsageError(f"{file} is missing beside the other files of its data set: download it again")
    return file


def _idx_name(holder: Path) -> str:
    """Which data set the folder, or the nearest of the two above it, is called after; empty if none."""
    for path in (holder.resolve(), *holder.resolve().parents[:2]):
        letters = re.sub("[^a-z]", "", path.name.lower())
        if letters in IDX_FOLDERS or letters in UNREAD:
            return IDX_FOLDERS.get(letters, letters)
    return ""


def _unread(folder: Path) -> Read:
    name = _idx_name(folder)
    raise UsageError(f"{folder} holds {name}, which is not read from idx files: give another folder, or its images as files")


def _idx(folder: Path) -> Read:
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        files = [_idx_file(folder, prefix, kind) for kind in ("images", "labels")]
        pixels, labels = (_idx_array(_present(file), dimensions) for file, dimensions in zip(files, (3, 1), strict=True))
        splits[split] = _samples(pixels[..., None], labels.tolist(), files[0])
    digits = all(sample.label < 10 for samples in splits.values() for sample in samples)
    return splits, DIGITS if digits else ()


def _idx_file(folder: Path, prefix: str, kind: str) -> Path:
    """`train-images-idx3-ubyte` or `train-images.idx3-ubyte`, perhaps compressed: what is there, or the first if none is."""
    stem, ending = f"{prefix}-{kind}", f"idx{3 if kind == 'images' else 1}-ubyte"
    files = [folder / f"{stem}{dot}{ending}{packed}" for packed in ("", ".gz") for dot in "-."]
    return next((file for file in files if file.is_file()), files[0])


def _idx_array(file: Path, dimensions: int) -> np.ndarray:
    """An array of bytes: two zeros, type 8, the number of dimensions, each as four bytes, the content."""
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            magic, *shape = struct.unpack(f">{1 + dimensions}I", stream.read(4 + 4 * dimensions))
            content = stream.read()
    except (struct.error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{file} is not a whole idx file ({error}): download it again") from error
    if magic != 0x800 + dimensions:
        raise UsageError(f"{file} is no idx file of bytes in {dimensions} dimension(s): download it again")
    count = int(np.prod(shape, dtype=object))
    if len(content) != count:
        raise UsageError(f"{file} is not a whole idx file ({len(content)} bytes instead of {count}): download it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _cifar10(folder: Path) -> Read:
    files = [folder / f"data_batch_{number}" for number in range(1, 6)]
    train = [sample for file in files for sample in _cifar_batch(file, "labels")]
    return {"train": train, "test": _cifar_batch(folder / "test_batch", "labels")}, _cifar_names(
        folder / "batches.meta", "label_names"
    )


def _cifar100(folder: Path) -> Read:
    splits = {split: _cifar_batch(folder / split, "fine_labels") for split in ("train", "test")}
    return splits, _cifar_names(folder / "meta", "fine_label_names")


def _cifar_batch(file: Path, labels: str) -> list[Sample]:
    batch = _unpickle(file)
    pixels: Any = batch.get("data")
    numbers = batch.get(labels)
    if getattr(pixels, "shape", ())[1:] != (3 * 32 * 32,) or not isinstance(numbers, list):
        raise UsageError(f"{file} holds no rows of 32x32 colour images in 'data' with {labels!r}: download it again")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise UsageError(f"{file} has {labels!r} that are no numbers from 0: download it again")
    return _samples(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), numbers, file)


def _cifar_names(file: Path, key: str) -> tuple[str, ...]:
    names = _unpickle(file).get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{file} holds no class names in {key!r}: download it again")
    return tuple(names)


def _unpickle(file: Path) -> dict[str, Any]:
    """A dictionary of containers, numbers, texts and arrays of bytes. Nothing that the file names is called or imported."""
    try:
        with _present(file).open("rb") as stream:
            found = _Unpickler(stream, encoding="latin1").load()
        if not isinstance(found, dict):
            raise ValueError("no dictionary")  # noqa: TRY004, TRY301 (told below, as all that is wrong with it)
        found = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in found.items()}
        return {key: value.pixels() if isinstance(value, _Array) else value for key, value in found.items()}
    except _Foreign as error:
        raise UsageError(f"{file} asks for {error}, which no data set needs: do not use it, download it again") from error
    except UsageError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its broken steps do
        raise UsageError(f"{file} cannot be read ({reason_of(error)}): download it again") from error


class _Foreign(Exception):
    """A pickle names something else than an array."""


class _Array:
    """What a pickled array of bytes says of itself. Numpy would trust it, and a wrong type there reads any memory."""

    def __init__(self, content: Any = b"", kind: Any = None, shape: Any = (), order: str = "C") -> None:
        self.__setstate__((1, shape, kind, order == "F", content))

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.kind, self.columns_first, self.content = state

    def pixels(self) -> np.ndarray:
        content = self.content.encode("latin1") if isinstance(self.content, str) else self.content
        if not isinstance(self.kind, _Type) or self.kind.code not in ("u1", "|u1", "B", "uint8"):
            raise _Foreign("an array of something else than bytes")
        return np.frombuffer(content, np.uint8).reshape(self.shape, order="F" if self.columns_first else "C")


class _Type:
    """The type of a pickled array."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and the like, which single bytes do not have."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Stand-ins for the few names in a pickled array, by whichever Python and numpy wrote it."""
        found = STAND_INS.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise _Foreign(f"{module}.{name}")
        return found


STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy.core.numeric", "_frombuffer"): _Array,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
}


def _svhn(folder: Path) -> Read:
    return {split: _svhn_part(_present(folder / f"{split}_32x32.mat")) for split in ("train", "test")}, DIGITS


def _svhn_part(file: Path) -> list[Sample]:
    with lab_extra():
        import scipy.io
    try:
        found = scipy.io.loadmat(file, variable_names=["X", "y"])
        pixels, labels = found["X"], found["y"].ravel()
    except Exception as error:  # a damaged file raises whatever its broken parts do
        why = reason_of(error)
        raise UsageError(f"{file} is not a readable Matlab file of 'X' and 'y' ({why}): download it again") from error
    if pixels.ndim != 4 or pixels.shape[2] != 3 or pixels.dtype != "uint8" or labels.dtype.kind not in "iuf":
        raise UsageError(f"{file} holds no colour images in 'X' with numbers in 'y': download it again")
    return _samples(pixels.transpose(3, 0, 1, 2), [int(label) % 10 for label in labels], file)  # 10 stands for the digit 0
