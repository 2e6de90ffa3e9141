"""Images as networks take them: pixels from 0 to 1, of the size asked for, augmented for training, normalised."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onward.errors import UsageError
from onward.lab.data.encoded import Encoded
from onward.lab.settings import Transform
from onward.lab.system.extra import lab_extra

Change = Callable[[Tensor], Tensor]


def reader(
    images: Tensor | Encoded, transform: Transform, device: str | torch.device, *, train: bool
) -> Callable[[Tensor, int], Tensor]:
    """A function of rows and a seed that makes a batch of these images: float32 (N, C, H, W). Raises a UsageError for a mean or
    std for another number of channels, and for encoded images without a size."""
    if isinstance(images, Encoded) and transform.size is None:
        why = f"{images.reason}, so each is decoded when it is needed"
        raise UsageError(f"{why}: give the size that they are to have, for example --transform.size 224")
    channels, *size = [images.channels] if isinstance(images, Encoded) else images.shape[1:]
    mean, std = (_per_channel(name, getattr(transform, name), channels, device) for name in ("mean", "std"))
    height, width = [transform.size] * 2 if transform.size else size
    crop, augment = _augmentation(transform.augment if train else "none", (height, width), transform.padding)
    hole = transform.cutout if train else 0

    def read(rows: Tensor, seed: int) -> Tensor:
        found = images[rows] if isinstance(images, Encoded) else images[rows.to(images.device)]
        if not isinstance(found, Tensor) and len({image.shape for image in found}) == 1:
            found = torch.stack(found)
        with torch.random.fork_rng(devices=[]):  # kornia draws on the CPU, wherever the images are
            torch.default_generator.manual_seed(seed)
            if isinstance(found, Tensor):
                x = crop(_unit(found.to(device)))
            else:
                x = torch.cat([crop(_unit(image.unsqueeze(0))) for image in found]).to(device)
            x = augment(x).sub_(mean).div_(std)
            return _cut_out(x, hole) if hole else x

    return read


def _per_channel(what: str, value: float | tuple[float, ...], channels: int, device: str | torch.device) -> Tensor:
    values = value if isinstance(value, tuple) else (value,)
    if len(values) not in (1, channels):
        raise UsageError(f"{what} {values} for images of {channels} channel(s): give one number, or one per channel")
    return torch.tensor(values, device=device).view(-1, 1, 1)


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


def _cut_out(x: Tensor, side: int) -> Tensor:
    """Set a square of each image to 0, which is the mean of normalised pixels; its middle is anywhere on the image, so that a
    part of it may be beside it. (DeVries and Taylor, 2017)

    >>> (_cut_out(torch.ones(1, 1, 3, 3), 2) == 0).sum().item() in (1, 2, 4)
    True
    """

    def across(edge: int) -> Tensor:
        first = torch.randint(edge, (len(x), 1)) - side // 2
        return (torch.arange(edge) >= first) & (torch.arange(edge) < first + side)

    rows, columns = across(x.shape[2]), across(x.shape[3])
    return x.masked_fill_((rows[:, None, :, None] & columns[:, None, None, :]).to(x.device), 0)


def _augmentation(name: str, size: tuple[int, int], padding: int) -> tuple[Change, Change]:
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
    crop = K.RandomCrop(size, padding=padding, cropping_mode="slice")
    return fit, lambda x: flip(crop(x))
