"""Data sets that come with scikit-learn, and so need no network."""

from __future__ import annotations

from collections.abc import Callable

import torch

from onward.lab.data.split import Data, Split, hold_out
from onward.lab.system.extra import lab_extra


def digits() -> Data:
    """1,797 handwritten digits, 8x8 grey, 10 classes; comes with scikit-learn, needs no network."""
    with lab_extra():
        from sklearn.datasets import load_digits
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * 255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    train, test = (Split(images, labels).part(rows) for rows in hold_out(labels.tolist()))
    return Data("digits", train, test, 10, tuple(map(str, range(10))))


def diabetes() -> Data:
    """442 patients, 10 measurements each: how their disease progresses, a regression; comes with scikit-learn too.

    Inputs and targets are standardised: less their mean over the training part, divided by their standard deviation there.
    """
    with lab_extra():
        from sklearn.datasets import load_diabetes
    bunch = load_diabetes(scaled=False)
    x, y = torch.from_numpy(bunch.data), torch.from_numpy(bunch.target).view(-1, 1)
    rows, held = hold_out([0] * len(x))
    x, y = (((values - values[rows].mean(0)) / values[rows].std(0)).float() for values in (x, y))
    train, test = (Split(x, y, pixels=False).part(part) for part in (rows, held))
    return Data("diabetes", train, test, 1, ("progression",), "regression")


BUNDLED: dict[str, Callable[[], Data]] = {"digits": digits, "diabetes": diabetes}
