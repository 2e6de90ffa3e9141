"""Batches: what is in them, and what their randomness depends on."""

import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from onward.errors import UsageError
from onward.lab.data import Split
from onward.lab.data.batches import batches
from onward.lab.data.encoded import Encoded, Sample
from onward.lab.settings import AUGMENTATIONS, Transform


def split_of(count: int, channels: int = 3, side: int = 8) -> Split:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count))


def epoch_of(split: Split, batch_size: int = 16, **options) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"transform": Transform(), "train": True} | options
    xs, ys = zip(*batches(split, batch_size, **options), strict=True)
    return torch.cat(xs), torch.cat(ys)


def test_evaluation_batches_are_the_normalised_images_in_file_order():
    split = split_of(10)
    transform = Transform(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x, y = epoch_of(split, 4, transform=transform, train=False)
    mean, std = torch.tensor(transform.mean).view(3, 1, 1), torch.tensor(transform.std).view(3, 1, 1)
    torch.testing.assert_close(x, (split.images / 255 - mean) / std)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert y.tolist() == list(range(10))


def test_normalisation_to_mean_and_standard_deviation_one_half_spans_minus_one_to_one():
    split = Split(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), torch.tensor([0, 1]))
    x, _ = epoch_of(split, 2, train=False)
    assert x.flatten().tolist() == [-1.0, 1.0]


def test_training_batches_hold_every_sample_once_with_its_own_label():
    split = split_of(50)
    x, y = epoch_of(split)
    assert y.tolist() != sorted(y.tolist())
    assert sorted(y.tolist()) == list(range(50))
    torch.testing.assert_close(x, (split.images[y] / 255 - 0.5) / 0.5)


def test_the_last_batch_is_short_or_dropped():
    sizes = [len(y) for _, y in batches(split_of(10), 4, transform=Transform(), train=True)]
    assert sizes == [4, 4, 2]
    sizes = [len(y) for _, y in batches(split_of(10), 4, transform=Transform(), train=True, drop_last=True)]
    assert sizes == [4, 4]


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_batches_depend_on_seed_and_epoch_and_on_nothing_else(augment):
    split, transform = split_of(40), Transform(augment=augment)
    torch.manual_seed(0)
    x, y = epoch_of(split, transform=transform, seed=3, epoch=2)
    torch.manual_seed(1)
    again_x, again_y = epoch_of(split, transform=transform, seed=3, epoch=2)
    assert torch.equal(x, again_x)
    assert torch.equal(y, again_y)
    for other in ({"seed": 4, "epoch": 2}, {"seed": 3, "epoch": 3}, {"seed": 2, "epoch": 3}, {"seed": -1, "epoch": 2}):
        other_x, other_y = epoch_of(split, transform=transform, **other)
        assert not torch.equal(y, other_y)
        assert not torch.equal(x, other_x)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_the_global_generator_is_not_moved(augment):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    epoch_of(split_of(20), transform=Transform(augment=augment))
    assert torch.equal(torch.rand(3), expected)


def test_a_batch_does_not_depend_on_what_is_drawn_between_batches():
    split, transform = split_of(40), Transform(augment="crop-flip")
    expected, _ = epoch_of(split, transform=transform)
    seen = []
    for x, _ in batches(split, 16, transform=transform, train=True):
        seen.append(x)
        torch.rand(7)
    assert torch.equal(torch.cat(seen), expected)


def test_each_batch_of_an_epoch_is_augmented_with_draws_of_its_own():
    """All images equal: batches could only agree if their draws did."""
    split = Split(split_of(1).images.expand(32, -1, -1, -1), torch.arange(32))
    (first, _), (second, _) = batches(split, 16, transform=Transform(augment="crop-flip"), train=True)
    assert not torch.equal(first, second)


def test_crop_flip_gives_a_shifted_perhaps_mirrored_image_on_black():
    split = split_of(64)
    x, y = epoch_of(split, transform=Transform(mean=0.0, std=1.0, augment="crop-flip"))
    shifts, mirrored = set(), 0
    for seen, label in zip(x, y, strict=True):
        padded = torch.nn.functional.pad(split.images[label] / 255, (4, 4, 4, 4))
        windows = {
            (top, left, flip): window.flip(-1) if flip else window
            for top in range(9)
            for left in range(9)
            for window in [padded[:, top : top + 8, left : left + 8]]
            for flip in (False, True)
        }
        top, left, flip = next(key for key, window in windows.items() if torch.allclose(seen, window, atol=1e-6))
        shifts.add((top, left))
        mirrored += flip
    assert len(shifts) > 20  # of 81: drawn for each sample, not for the batch
    assert 16 < mirrored < 48


def test_resized_crop_flip_gives_images_of_the_size_asked_for():
    split = split_of(8)
    x, _ = epoch_of(split, transform=Transform(mean=0.0, std=1.0, augment="resized-crop-flip", size=12))
    assert x.shape == (8, 3, 12, 12)
    assert x.min() >= 0
    assert x.max() <= 1
    x, _ = epoch_of(split, transform=Transform(augment="resized-crop-flip"))
    assert x.shape == (8, 3, 8, 8)


def test_random_parts_shrink_without_skipping_pixels():
    """As test images do: what is left of noise is an average over the pixels that go into one."""
    noise = torch.randint(256, (8, 1, 256, 256), dtype=torch.uint8)
    transform = Transform(mean=0.0, std=1.0, augment="resized-crop-flip", size=16)
    x, _ = epoch_of(Split(noise, torch.zeros(8, dtype=torch.int64)), transform=transform)
    assert x.flatten(1).std(1).median() < 0.08  # of single pixels: 0.29, of four: 0.14
    plain = torch.arange(256, dtype=torch.uint8).expand(2, 1, 256, 256)
    x, _ = epoch_of(Split(plain, torch.zeros(2, dtype=torch.int64)), transform=transform)
    for image in x:  # a ramp is one still
        steps = image.diff(dim=2).abs()[:, :, 1:-1]
        assert steps.min() > 0.9 * steps.max()


@pytest.mark.parametrize(("augment", "train"), [("none", True), ("crop-flip", True), ("resized-crop-flip", False)])
def test_size_resizes_every_batch(augment, train):
    grey = Split(torch.full((4, 1, 8, 8), 51, dtype=torch.uint8), torch.arange(4))
    for size in (5, 16):
        x, _ = epoch_of(grey, transform=Transform(mean=0.0, std=1.0, augment=augment, size=size), train=train)
        assert x.shape == (4, 1, size, size)
        if augment != "crop-flip":
            torch.testing.assert_close(x, torch.full_like(x, 0.2))


def test_images_that_are_not_square_lose_their_longer_sides():
    image = torch.zeros(1, 1, 4, 8, dtype=torch.uint8)
    image[..., 2:6] = 255
    x, _ = epoch_of(Split(image, torch.zeros(1)), transform=Transform(mean=0.0, std=1.0, size=4), train=False)
    assert torch.equal(x, torch.ones(1, 1, 4, 4))
    x, _ = epoch_of(Split(image, torch.zeros(1)), transform=Transform(mean=0.0, std=1.0, size=2), train=False)
    assert x.shape == (1, 1, 2, 2)
    x, _ = epoch_of(Split(image.mT, torch.zeros(1)), transform=Transform(mean=0.0, std=1.0, size=7), train=False)
    assert x.shape == (1, 1, 7, 7)


def encoded(folder: Path, *sizes: tuple[int, int]) -> tuple[Split, list[torch.Tensor]]:
    """A split of images of these sizes (height, width) that are decoded when needed, and the images."""
    images = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8) for size in sizes]
    samples = []
    for number, image in enumerate(images):
        Image.fromarray(image.numpy()).save(folder / f"{number}.png")
        samples.append(Sample(folder / f"{number}.png", number, str(number)))
    return Split(Encoded(samples, "RGB", "a test"), torch.arange(len(sizes))), [image.permute(2, 0, 1) for image in images]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("size", [8, 6])
def test_encoded_images_give_the_batches_that_images_in_memory_give(tmp_path, augment, size, train):
    split, images = encoded(tmp_path, *[(8, 8)] * 10)
    options = {"transform": Transform(augment=augment, size=size), "seed": 3, "epoch": 2, "train": train}
    x, y = epoch_of(split, 4, **options)
    expected_x, expected_y = epoch_of(Split(torch.stack(images), split.labels), 4, **options)
    assert torch.equal(x, expected_x)
    assert torch.equal(y, expected_y)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_images_of_several_sizes_make_a_batch(tmp_path, augment):
    split, images = encoded(tmp_path, (8, 8), (9, 12), (16, 10), (30, 40), (5, 6))
    options = {"transform": Transform(mean=0.0, std=1.0, augment=augment, size=8)}
    x, y = epoch_of(split, 5, **options, seed=1)
    assert x.shape == (5, 3, 8, 8)
    assert torch.equal(x, epoch_of(split, 5, **options, seed=1)[0])
    assert not torch.equal(x, epoch_of(split, 5, **options, seed=2)[0])
    x, y = epoch_of(split, 5, **options, train=False)
    assert y.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(x[0], images[0] / 255)
    shrunk = torch.nn.functional.interpolate(images[1][None] / 255, (8, 11), mode="bilinear", antialias=True)
    torch.testing.assert_close(x[1], shrunk[0, :, :, 1:9])


def test_encoded_images_need_a_size(tmp_path):
    split, _ = encoded(tmp_path, (8, 8), (8, 9))
    with pytest.raises(UsageError, match=r"a test, so each is decoded when it is needed: give the size .*--transform.size 224"):
        batches(split, 2, transform=Transform(), train=True)


def test_augmentation_is_for_training_only():
    split = split_of(8)
    x, _ = epoch_of(split, transform=Transform(augment="crop-flip"), train=False)
    torch.testing.assert_close(x, split.images / 127.5 - 1)


def test_the_split_is_left_alone():
    split = split_of(8)
    before = split.images.clone()
    epoch_of(split, transform=Transform(augment="crop-flip"))
    assert torch.equal(split.images, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "crop-filp"}, "unknown augmentation 'crop-filp': did you mean 'crop-flip'?"),
        ({"size": 0}, "--transform.size 0: use at least 1"),
        ({"std": (0.5, 0.0, 0.5)}, r"--transform.std \(0.5, 0.0, 0.5\): use positive numbers"),
    ],
)
def test_a_transform_that_cannot_work_says_why(options, message):
    with pytest.raises(UsageError, match=message):
        Transform(**options)


@pytest.mark.parametrize(
    ("batch_size", "options", "message"),
    [
        (0, {}, "batch size 0: use at least 1"),
        (11, {"drop_last": True}, "batch size 11 with only 10 images leaves no full batch"),
        (2, {"transform": Transform(mean=(0.5, 0.5))}, r"mean \(0.5, 0.5\) for images of 3 channel\(s\): give one number"),
    ],
)
def test_batches_that_cannot_be_made_say_why_before_the_first(batch_size, options, message):
    options = {"transform": Transform(), "train": True} | options
    with pytest.raises(UsageError, match=message):
        batches(split_of(10), batch_size, **options)


def test_an_epoch_of_sixty_thousand_small_images_takes_well_under_two_seconds():
    split = Split(torch.zeros(60_000, 1, 28, 28, dtype=torch.uint8), torch.zeros(60_000, dtype=torch.int64))
    start = time.perf_counter()
    for _ in batches(split, 64, transform=Transform(), train=True):
        pass
    assert time.perf_counter() - start < 2  # about 0.1 on one core


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_of_the_cpu():
    split, transform = split_of(40), Transform(augment="crop-flip")
    x, y = epoch_of(split, transform=transform)
    gpu_x, gpu_y = epoch_of(split, transform=transform, device="cuda")
    torch.testing.assert_close(gpu_x.cpu(), x)
    assert torch.equal(gpu_y.cpu(), y)
