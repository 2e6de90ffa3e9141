"""Small images, the files that hold them, and the sentence that says why they cannot be used."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from onward.errors import UsageError
from onward.lab.data import load

CLASSES = ["cat", "dog", "owl"]


def pictures(count: int, mode: str = "L", size: tuple[int, int] = (6, 5), seed: int = 0) -> list[Image.Image]:
    shape = (count, size[1], size[0]) + ((3,) if mode == "RGB" else ())
    return [Image.fromarray(pixels) for pixels in np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)]


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: list, labels: list, *, names: list[str] | None = CLASSES, **columns) -> None:
    """A file as the hub stores it; `names=None` leaves the description of the features out."""
    encoded = [{"bytes": png(image) if isinstance(image, Image.Image) else image, "path": None} for image in images]
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(encoded, image_type), "label": labels, **columns})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        features |= {column: {"dtype": "int64", "_type": "Value"} for column in columns}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_classes(folder: Path, counts: dict[str, int], **options) -> None:
    for seed, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index, picture in enumerate(pictures(count, seed=seed, **options)):
            picture.save(folder / name / f"{index:03}.png")


def write_parts(folder: Path) -> Path:
    """A training and a test part of three classes."""
    write_parquet(folder / "train-00000-of-00001.parquet", pictures(9), [0, 1, 2] * 3)
    write_parquet(folder / "test-00000-of-00001.parquet", pictures(3, seed=1), [2, 1, 0])
    return folder


def refusal(*args, **options) -> str:
    """The one sentence with which loading is refused."""
    with pytest.raises(UsageError) as caught:
        load(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
