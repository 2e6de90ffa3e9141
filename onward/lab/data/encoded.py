"""Labelled images as their files hold them, and their decoding to uint8 tensors."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from onward.errors import UsageError
from onward.lab.system.extra import lab_extra, reason_of

with lab_extra():
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import pyarrow

PATIENCE = 300.0
"""Seconds without an image, after which a network file system or a disk is taken to have stalled."""
AHEAD = 1024
"""Images that are read before the first of them is taken."""
SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose greys have at most 16 bits, though Pillow may open them as 32-bit numbers."""
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")  # CIFAR-100 has a coarse_label too


class Unlabelled(UsageError):
    """A table has no column of labels."""


class Sample(NamedTuple):
    """One image (a file, the bytes of one, or pixels (H, W, C)), its label, and where both came from (a file, a row in it)."""

    image: pyarrow.Scalar | Path | np.ndarray
    label: int
    file: str
    row: int | None = None

    @property
    def place(self) -> str:
        return self.file if self.row is None else f"row {self.row} of {self.file}"


def from_table(table: pyarrow.Table, file: str) -> tuple[list[Sample], tuple[str, ...]]:
    """The samples of an Arrow table in the layout of the Hugging Face hub, and its class names (none if it has none).

    The image column is the one of feature type `Image` (or of bytes), the label column the one of type `ClassLabel`
    (or called label, labels, fine_label, class, target); where several fit, the usual names win. A table without labels (all of
    them missing, or -1 as in ImageNet's test part) has no samples. Images stay where the table has them.

    Raises:
        Unlabelled: no column of labels.
        UsageError: no column of images, or several; an image or a label is missing; labels are no integers from 0.
    """
    with lab_extra():
        import datasets
        import pyarrow as pa
        import pyarrow.compute as pc
    image, label, feature = columns(table.schema, file)
    labels = table[label]
    if len(labels) and labels.null_count == len(labels):
        return [], ()
    if not pa.types.is_integer(labels.type):
        raise UsageError(f"labels in column {label!r} of {file} are {labels.type}, not integers: number the classes from 0")
    if labels.null_count:
        raise UsageError(f"row {_first(pc.is_null(labels))} of {file} has no label: fill in column {label!r} or drop the row")
    if pa.types.is_signed_integer(labels.type):  # pyarrow cannot compare large unsigned ones with a negative number, or 0
        negative = pc.less(labels, 0)
        if len(labels) and pc.all(pc.equal(labels, -1)).as_py():
            return [], ()
        if pc.any(negative).as_py():
            row = _first(negative)
            raise UsageError(f"row {row} of {file} has label {labels[row]}: number the classes from 0, or drop unlabelled rows")
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()

    encoded, numbers = table[image], labels.to_pylist()
    if pa.types.is_struct(encoded.type):
        if files := _files(encoded):
            return [Sample(path, number, str(path)) for path, number in zip(files, numbers, strict=True)], names
        encoded = pc.struct_field(encoded, "bytes")
    if encoded.null_count:
        raise UsageError(f"row {_first(pc.is_null(encoded))} of {file} has no image bytes: store them in column {image!r}")
    return [Sample(data, number, file, row) for row, (data, number) in enumerate(zip(encoded, numbers, strict=True))], names


def columns(schema: pyarrow.Schema, file: str) -> tuple[str, str, Any]:
    """The column of images, that of labels, and what the hub's library knows of the labels."""
    features, held = _features(schema, file), ", ".join(schema.names) or "none"
    import datasets

    image = image_column(schema, file)
    if image is None:
        raise UsageError(f"{file} has no column of encoded images (columns: {held}): store PNG or JPEG bytes in 'image'")
    typed = [name for name in schema.names if isinstance(features[name], datasets.ClassLabel)]
    label = _pick(typed or [name for name in LABEL_NAMES if name in schema.names], LABEL_NAMES, "class labels", file)
    if label is None:
        raise Unlabelled(f"{file} has no column of labels (columns: {held}): name the one with the classes 'label'")
    return image, label, features[label]


def image_column(schema: pyarrow.Schema, file: str) -> str | None:
    """The column of images, if there is one."""
    features = _features(schema, file)
    import datasets

    typed = [name for name in schema.names if isinstance(features[name], datasets.Image)]
    return _pick(typed or [field.name for field in schema if _holds_bytes(field.type)], IMAGE_NAMES, "images", file)


def refuse_other_columns(used: dict[str, str]) -> None:
    """Refuse files that have their labels in columns of different names: the one may be another kind of label."""
    first, label_of_first = next(iter(used.items()), ("", ""))
    for file, label in used.items():
        if label != label_of_first:
            why = f"{first} has its labels in column {label_of_first!r}, but {file} in {label!r}"
            raise UsageError(f"{why}: name the one with the classes 'label' in both")


def _features(schema: pyarrow.Schema, file: str) -> Any:
    with lab_extra():
        import datasets
    try:
        features = datasets.Features.from_arrow_schema(schema)
        return {name: features[name] for name in schema.names}
    except Exception as error:  # names and metadata that are neither text nor JSON raise whatever parsing them does
        raise UsageError(f"{file} describes its columns in a way that cannot be read ({error}): write it again") from error


def _pick(candidates: list[str], usual: Sequence[str], content: str, file: str) -> str | None:
    """The candidate with the likeliest of the usual names, or the only one; the order of columns tells nothing."""
    if named := next((name for name in usual if name in candidates), None):
        return named
    if len(candidates) > 1:
        why = f"{file} has {len(candidates)} columns of {content} ({', '.join(candidates)})"
        raise UsageError(f"{why}, and none has a usual name ({', '.join(usual)}): name the one that is meant {usual[0]!r}")
    return candidates[0] if candidates else None


def _files(encoded: pyarrow.ChunkedArray) -> list[Path]:
    """The files that a column of images names where it holds no bytes, as `datasets` stores an image folder; else none."""
    import pyarrow.compute as pc

    if "path" not in [field.name for field in encoded.type] or pc.struct_field(encoded, "bytes").null_count < len(encoded):
        return []
    paths = [Path(path or "") for path in pc.struct_field(encoded, "path").to_pylist()]
    return paths if all(path.is_absolute() for path in paths) else []


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _first(mask: Any) -> int:
    return int(mask.index(True).as_py())


@dataclass(frozen=True)
class Encoded:
    """Images that are decoded each time they are asked for, for the `reason` given.

    `images[rows]` are uint8 tensors (C, H, W), each of its own size; C is 1 or 3, as `mode` ("L" or "RGB") says. A
    TimeoutError is raised if none comes for `patience` seconds.
    """

    samples: Sequence[Sample]
    mode: str
    reason: str
    patience: float = PATIENCE

    @property
    def channels(self) -> int:
        return len(self.mode)

    def __len__(self) -> int:
        return len(self.samples)

    def sizes(self) -> list[tuple[str, int]]:
        """The name of each image's file, without its folder, and the bytes that the image takes there."""
        return list(_each(_size, self.samples, self.patience))

    def part(self, rows: Sequence[int]) -> Encoded:
        """Some of the images."""
        return replace(self, samples=[self.samples[row] for row in rows])

    def __getitem__(self, rows: Tensor) -> list[Tensor]:
        asked = [self.samples[row] for row in rows.tolist()]
        read = partial(_pixels, mode=self.mode)
        return [torch.from_numpy(image).permute(2, 0, 1) for image in _each(read, asked, self.patience)]


def decode(samples: Sequence[Sample], most: int, patience: float = PATIENCE, others: Sequence[Sample] = ()) -> Tensor | Encoded:
    """The images as one uint8 tensor (N, C, H, W), or still encoded if they differ in size or take more than `most` bytes.

    C is 3 if any image has colour, and grey is repeated; else it is 1. The `others` count as well, so that a subset has the
    shape of the whole. Palettes are looked up, an alpha channel is dropped, 16-bit greys keep their upper 8
    bits, and pictures that a camera has marked as turned (by EXIF) are turned upright.

    Raises:
        UsageError: bytes that are no image, or pixels without a fixed range, naming the row.
        TimeoutError: no image has come for `patience` seconds.
    """

    def encoded(reason: str, *, colour: bool) -> Encoded:
        colour = colour or _any_colour(samples, patience) or _any_colour(others, patience)
        return Encoded(samples, "RGB" if colour else "L", reason, patience)

    pixels = np.empty((len(samples), 0, 0, 0), np.uint8)
    for index, image in enumerate(_each(_pixels, samples, patience)):
        (height, width), (other_height, other_width) = pixels.shape[1:3], image.shape[:2]
        if index and (height, width) != (other_height, other_width):
            return encoded(
                f"the images differ in size ({width}x{height} pixels in {samples[0].place}, {other_width}x{other_height} in "
                f"{samples[index].place})",
                colour=pixels.shape[3] == 3 or image.shape[2] == 3,
            )
        if image.shape[2] > pixels.shape[3]:  # the first image, or the first that has colour
            if (needed := len(samples) * image.size) > most:
                return encoded(_too_large(needed), colour=image.shape[2] == 3)
            grey, pixels = pixels, np.empty((len(samples), *image.shape), np.uint8)
            if index:
                pixels[:index] = grey[:index]
        pixels[index] = image
    if pixels.shape[3] == 1 and _any_colour(others, patience):
        if (needed := 3 * pixels.size) > most:
            return encoded(_too_large(needed), colour=True)
        pixels = pixels.repeat(3, axis=3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _too_large(needed: int) -> str:
    return f"the images would take {needed / 1e9:.3g} GB of memory"


def _any_colour(samples: Sequence[Sample], patience: float) -> bool:
    return any(_each(_has_colour, samples, patience))


Found = TypeVar("Found")


def _each(function: Callable[[Sample], Found], samples: Sequence[Sample], patience: float) -> Iterator[Found]:
    """What the function makes of each sample, in their order.

    Daemon threads call it, and this one waits, so that after a read that never returns the process can still end.
    """
    with ThreadPool() as pool:
        for start in range(0, len(samples), AHEAD):
            part = samples[start : start + AHEAD]
            results = pool.imap(function, part)
            for sample in part:
                try:
                    yield results.next(min(patience, threading.TIMEOUT_MAX))
                except multiprocessing.TimeoutError:
                    why = f"{sample.place} could not be read within {patience:g} s: check the disk or the network that it is on"
                    raise TimeoutError(f"{why}, or wait longer with --data-timeout") from None


def _size(sample: Sample) -> tuple[str, int]:
    """The name and bytes of an image; of pixels in memory a checksum, because each has as many bytes."""
    name = Path(sample.file).name
    if isinstance(sample.image, Path):
        try:
            return name, sample.image.stat().st_size
        except OSError as error:
            raise UsageError(f"{sample.place} cannot be read ({error.strerror}): put it back") from error
    image: Any = sample.image
    return name, image.as_buffer().size if hasattr(image, "as_buffer") else zlib.crc32(image.tobytes())


def _open(sample: Sample) -> Image.Image:
    """Open an image, and read no more than its header."""
    image: Any = sample.image
    return Image.open(image if isinstance(image, Path) else io.BytesIO(image.as_buffer()))


def _has_colour(sample: Sample) -> bool:
    """Whether the header says that there is colour; if the header says nothing, decoding will tell."""
    if isinstance(sample.image, np.ndarray):
        return sample.image.shape[2] == 3
    try:
        with _open(sample) as image:
            return _mode(image) == "RGB"
    except Exception:
        return False


def _mode(image: Image.Image) -> str:
    """ "L" of a grey image, "RGB" of one that has colour or a palette."""
    return "L" if Image.getmodebase(image.mode) == "L" else "RGB"


def _pixels(sample: Sample, mode: str | None = None) -> np.ndarray:
    """One image, uint8 (H, W, C), in the mode that was asked for, or "L" or "RGB" as it has it."""
    if isinstance(sample.image, np.ndarray):
        return sample.image if mode is None else sample.image.repeat(len(mode) // sample.image.shape[2], axis=2)
    try:
        with _open(sample) as image:
            image.load()
            with contextlib.suppress(Exception):  # a damaged tag turns nothing
                ImageOps.exif_transpose(image, in_place=True)
            mode = mode or _mode(image)
            return np.array(_convert(image, mode)).reshape(image.height, image.width, len(mode))
    except Exception as error:  # Pillow's decoders raise half a dozen types, SyntaxError among them
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else reason_of(error)
        raise UsageError(f"{sample.place} does not decode as an image ({reason}): replace or remove it") from error


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):
        image = Image.fromarray(_upper_bits(np.asarray(image), image))
    elif image.mode == "P" and "transparency" in image.info:  # Pillow warns unless the palette's alpha is looked up too
        image = image.convert("RGBA")
    return image.convert(mode)


def _upper_bits(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """The upper 8 of 16 bits, or of the fewer that a TIFF file says it has; convert() would clip at 255, not scale."""
    if image.mode == "I" and image.format not in SIXTEEN_BITS:
        raise ValueError("32-bit pixels have no fixed range")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]
    if 0 < values.max() < 2 ** (bits - 8):
        raise ValueError(f"none of its {bits}-bit pixels is above {values.max()}, so all would turn black")
    return (values >> (bits - 8)).astype(np.uint8)
