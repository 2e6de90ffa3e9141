"""Images that are quick to make and quick to learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from onward.lab.data import Data, Split


@pytest.fixture
def images() -> Callable[..., Data]:
    """Make data whose class is the bright row of a noisy image."""

    def make(train: int = 96, test: int = 40, channels: int = 1, size: int = 8, classes: int = 4) -> Data:
        generator = torch.Generator().manual_seed(0)

        def split(n: int) -> Split:
            labels = torch.arange(n) % classes
            pixels = torch.randint(0, 120, (n, channels, size, size), generator=generator)
            pixels[torch.arange(n), :, labels] += 100
            return Split(pixels.to(torch.uint8), labels)

        return Data("rows", split(train), split(test), classes, tuple(map(str, range(classes))))

    return make
