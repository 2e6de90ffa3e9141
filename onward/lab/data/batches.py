"""Batches of normalised, augmented images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onward.errors import UsageError, unknown
from onward.lab.data.encoded import Encoded
from onward.lab.data.images import Split
from onward.lab.system.extra import lab_extra

AUGMENTATIONS = ("none", "crop-flip", "resized-crop-flip")
Augment = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Transform:
    """What happens to a batch: pixels go to [0, 1], then (x - mean) / std; training batches are augmented in between.

    Attributes:
        mean, std: one number, or one per channel.
        augment: what is done to training batches: `none`; `crop-flip`, a random crop of the image padded with 4 black
            pixels on every side, mirrored half of the time; `resized-crop-flip`, a random 8 to 100 % of its area,
            resized to `size`, mirrored half of the time.
        size: side of the images that come out, resized to it on their shorter side and cut to their middle square; None
            leaves them as they are.

    Raises:
        UsageError: an unknown augmentation, a size below 1, a standard deviation that is not positive.
    """

    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    augment: str = "none"
    size: int | None = None

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise unknown("augmentation", self.augment, AUGMENTATIONS)
        if self.size is not None and self.size < 1:
            raise UsageError(f"--transform.size {self.size}: use at least 1")
        if not all(0 < value < float("inf") for value in _tuple(self.std)):
            raise UsageError(f"--transform.std {self.std}: use positive numbers")


def batches(
    split: Split,
    batch_size: int,
    *,
    transform: Transform,
    train: bool,
    seed: int = 0,
    epoch: int = 0,
    skip: int = 0,
    device: str | torch.device = "cpu",
    drop_last: bool = False,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (x, y) of one epoch: x float32 (N, C, H, W), y int64 (N,).

    With `train`, samples come in an order that depends on (seed, epoch) only, augmented by draws that depend on
    (seed, epoch, number of the batch) only; the global generator is neither read nor moved. Without, in file order. The
    first `skip` batches are left out, and the others as they would be. One of several processes gets its part of each batch,
    augmented by draws of its own.

    Raises:
        UsageError: a batch size below 1, `drop_last` with no full batch, a mean or std for another number of channels.

    >>> split = Split(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5))
    >>> [(x.shape[0], x.min().item(), y.tolist()) for x, y in batches(split, 3, transform=Transform(), train=False)]
    [(3, -1.0, [0, 1, 2]), (2, -1.0, [3, 4])]
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size}: use at least 1")
    if drop_last and len(split) < batch_size:
        raise UsageError(f"batch size {batch_size} with only {len(split)} images leaves no full batch: use at most that")
    encoded = isinstance(split.images, Encoded)
    if encoded and transform.size is None:
        raise UsageError(
            f"{split.images.reason}, so each is decoded when it is needed: give the size that they are to have, for example "
            "--transform.size 224"
        )
    channels = split.images.channels if encoded else split.images.shape[1]
    for what, values in (("mean", _tuple(transform.mean)), ("std", _tuple(transform.std))):
        if len(values) not in (1, channels):
            raise UsageError(f"{what} {values} for images of {channels} channel(s): give one number, or one per channel")
    mean = torch.tensor(_tuple(transform.mean), device=device).view(-1, 1, 1)
    std = torch.tensor(_tuple(transform.std), device=device).view(-1, 1, 1)
    size = (transform.size, transform.size) if transform.size else tuple(split.images.shape[2:])
    crop, augment = _augmentation(transform.augment if train else "none", size)
    stop = len(split) - len(split) % batch_size if drop_last else len(split)

    def produce() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(split))
        if train:
            order = torch.randperm(len(split), generator=torch.Generator().manual_seed(_key(seed, epoch)))
        for number in range(skip, -(-stop // batch_size)):
            rows = order[number * batch_size : min((number + 1) * batch_size, stop)]
            rows = rows[len(rows) * rank // processes : len(rows) * (rank + 1) // processes]
            if not len(rows):
                continue
            images = split.images[rows if encoded else rows.to(split.images.device)]
            if encoded and len({image.shape for image in images}) == 1:
                images = torch.stack(images)
            with torch.random.fork_rng(devices=[]):  # kornia draws on the CPU, wherever the images are
                torch.default_generator.manual_seed(_key(seed, epoch, number, *((rank,) if processes > 1 else ())))
                if isinstance(images, Tensor):
                    x = crop(_unit(images.to(device)))
                else:
                    x = torch.cat([crop(_unit(image.unsqueeze(0))) for image in images]).to(device)
                x = augment(x)
            yield x.sub_(mean).div_(std), split.labels[rows.to(split.labels.device)].to(device)

    return produce()


def _tuple(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _key(*numbers: int) -> int:
    """One generator seed from several numbers, distinct for distinct ones and without a pattern."""
    import numpy as np

    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)[0])


def _unit(images: Tensor) -> Tensor:
    """Pixels from 0 to 1."""
    return images.to(torch.float32).div_(255)


def _fit(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The images in another size: resized until they just cover it, then cut to their middle."""
    height, width = x.shape[2:]
    scale = max(size[0] / height, size[1] / width)
    if scale != 1:
        new = max(size[0], round(scale * height)), max(size[1], round(scale * width))
        x = F.interpolate(x, new, mode="bilinear", antialias=scale < 1)
    top, left = (x.shape[2] - size[0]) // 2, (x.shape[3] - size[1]) // 2
    return x[:, :, top : top + size[0], left : left + size[1]]


def _resized_crop(x: Tensor, draw: Any, size: tuple[int, int]) -> Tensor:
    """The parts that kornia draws, resized as test images are: its own crops would skip pixels where they shrink."""
    corners = draw.generate_parameters(x.shape)["src"].long()  # from the upper left one on, clockwise, as (x, y)
    parts = [image[:, box[0, 1] : box[2, 1] + 1, box[0, 0] : box[2, 0] + 1] for image, box in zip(x, corners, strict=True)]
    return torch.cat([F.interpolate(part.unsqueeze(0), size, mode="bilinear", antialias=True) for part in parts])


def _augmentation(name: str, size: tuple[int, int]) -> tuple[Augment, Augment]:
    """What brings images of one size to `size`, and what is done to a batch of these."""
    fit = partial(_fit, size=size)
    if name == "none":
        return fit, lambda x: x
    with lab_extra():
        import kornia.augmentation as K
    # cropping_mode="slice" copies pixels; "resample" would interpolate them, slower and not quite where they were
    flip = K.RandomHorizontalFlip(p=0.5)
    if name == "resized-crop-flip":
        return partial(_resized_crop, draw=K.RandomResizedCrop(size), size=size), flip
    crop = K.RandomCrop(size, padding=4, cropping_mode="slice")
    return fit, lambda x: flip(crop(x))
