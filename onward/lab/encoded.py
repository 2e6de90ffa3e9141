"""Labelled images as their files hold them, and their decoding to uint8 tensors."""

from __future__ import annotations

import io
import multiprocessing
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from onward.errors import UsageError
from onward.lab.extra import lab_extra

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    from PIL import Image

PATIENCE = 300.0
"""Seconds without an image, after which a network file system or a disk is taken to have stalled."""
AHEAD = 1024
"""Images that are read before the first of them is taken."""
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")  # CIFAR-100 has a coarse_label too


class Sample(NamedTuple):
    """One encoded image, its label, and where both came from (a file, a row in it)."""

    image: pyarrow.Scalar | Path
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
    them -1, as in ImageNet's test part) has no samples. Images stay where the table has them, be that a file in the cache.

    Raises:
        UsageError: no such column, an image or a label missing, labels that are no integers from 0.
    """
    with lab_extra():
        import datasets
        import pyarrow as pa
        import pyarrow.compute as pc
    try:
        features = datasets.Features.from_arrow_schema(table.schema)
        columns = {field.name: field.type for field in table.schema}
    except Exception as error:  # names and metadata that are neither text nor JSON raise whatever parsing them does
        raise UsageError(f"{file} describes its columns in a way that cannot be read ({error}): write it again") from error
    held = ", ".join(columns) or "none"

    def pick(kind: type, fitting: list[str], names: Sequence[str]) -> str | None:
        typed = [name for name in columns if isinstance(features[name], kind)]
        candidates = typed or fitting
        return next((name for name in names if name in candidates), candidates[0] if candidates else None)

    image = pick(datasets.Image, [name for name in columns if _holds_bytes(columns[name])], IMAGE_NAMES)
    if image is None:
        raise UsageError(f"{file} has no column of encoded images (columns: {held}): store PNG or JPEG bytes in 'image'")
    label = pick(datasets.ClassLabel, [name for name in LABEL_NAMES if name in columns], LABEL_NAMES)
    if label is None:
        raise UsageError(f"{file} has no column of labels (columns: {held}): name the one with the classes 'label'")

    labels = table[label]
    if not pa.types.is_integer(labels.type):
        raise UsageError(f"labels in column {label!r} of {file} are {labels.type}, not integers: number the classes from 0")
    if labels.null_count:
        raise UsageError(f"row {_first(pc.is_null(labels))} of {file} has no label: fill in column {label!r} or drop the row")
    negative = pc.less(labels, 0)
    if len(labels) and pc.all(pc.equal(labels, -1)).as_py():
        return [], ()
    if pc.any(negative).as_py():
        row = _first(negative)
        raise UsageError(f"row {row} of {file} has label {labels[row]}: number the classes from 0, or drop unlabelled rows")
    names = tuple(features[label].names) if isinstance(features[label], datasets.ClassLabel) else ()

    encoded = table[image]
    if pa.types.is_struct(encoded.type):
        encoded = pc.struct_field(encoded, "bytes")
    if encoded.null_count:
        raise UsageError(f"row {_first(pc.is_null(encoded))} of {file} has no image bytes: store them in column {image!r}")
    rows = zip(encoded, labels.to_pylist(), strict=True)
    return [Sample(data, number, file, row) for row, (data, number) in enumerate(rows)], names


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
        with ThreadPool() as pool:
            return pool.map(_size, self.samples)

    def __getitem__(self, rows: Tensor) -> list[Tensor]:
        asked = [self.samples[row] for row in rows.tolist()]
        return [torch.from_numpy(image).permute(2, 0, 1) for image in _read(asked, self.mode, self.patience)]


def _size(sample: Sample) -> tuple[str, int]:
    size = sample.image.stat().st_size if isinstance(sample.image, Path) else sample.image.as_buffer().size
    return Path(sample.file).name, size


def decode(samples: Sequence[Sample], most: int, patience: float = PATIENCE) -> Tensor | Encoded:
    """The images as one uint8 tensor (N, C, H, W), or still encoded if they differ in size or take more than `most` bytes.

    C is 1 or 3, as the first image has it. The others follow the first: colours turn to luminance, grey is repeated; palettes
    are looked up, an alpha channel is dropped, 16-bit greys keep their upper 8 bits.

    Raises:
        UsageError: bytes that are no image, naming the row.
        TimeoutError: no image has come for `patience` seconds.
    """
    import numpy as np

    (first,) = _read(samples[:1], None, patience)
    mode = "L" if first.shape[2] == 1 else "RGB"
    if (needed := len(samples) * first.size) > most:
        return Encoded(samples, mode, f"the images would take {needed / 1e9:.3g} GB of memory", patience)
    pixels = np.empty((len(samples), *first.shape), np.uint8)
    for index, image in enumerate(_read(samples, mode, patience)):
        if image.shape != first.shape:
            (height, width, _), (other_height, other_width, _) = first.shape, image.shape
            return Encoded(
                samples,
                mode,
                f"the images differ in size ({width}x{height} pixels in {samples[0].place}, {other_width}x{other_height} in "
                f"{samples[index].place})",
                patience,
            )
        pixels[index] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _read(samples: Sequence[Sample], mode: str | None, patience: float) -> Iterator[np.ndarray]:
    """The images in their order, decoded by several threads: the one that reads is not the one that waits, and a read that
    never returns holds up neither the sentence that says so nor, as these threads are daemons, the end of the process."""
    with ThreadPool() as pool:
        for start in range(0, len(samples), AHEAD):
            part = samples[start : start + AHEAD]
            images = pool.imap(partial(_pixels, mode=mode), part)
            for sample in part:
                try:
                    yield images.next(min(patience, threading.TIMEOUT_MAX))
                except multiprocessing.TimeoutError:
                    raise TimeoutError(
                        f"{sample.place} could not be read within {patience:g} s: check the disk or the network that it is on, "
                        "or wait longer with --data-timeout"
                    ) from None


def _pixels(sample: Sample, mode: str | None) -> np.ndarray:
    """One image, uint8 (H, W, C), in the mode that was asked for, or "L" or "RGB" as it has it."""
    with lab_extra():
        import numpy as np
        from PIL import Image, UnidentifiedImageError
    try:
        with Image.open(sample.image if isinstance(sample.image, Path) else io.BytesIO(sample.image.as_py())) as image:
            image.load()
            if mode is None:
                mode = "L" if Image.getmodebase(image.mode) == "L" else "RGB"
            return np.array(_convert(image, mode)).reshape(image.height, image.width, len(mode))
    except Exception as error:  # Pillow's decoders raise half a dozen types, SyntaxError among them
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "unknown format" if unknown else str(error).partition("\n")[0]
        raise UsageError(f"{sample.place} does not decode as an image ({reason}): replace or remove it") from error


def _convert(image: Image.Image, mode: str) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode == mode:
        return image
    if image.mode.startswith("I"):  # 16 bits: convert() would clip to 255 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    elif image.mode == "P" and "transparency" in image.info:  # Pillow warns unless the palette's alpha is looked up too
        image = image.convert("RGBA")
    return image.convert(mode)
