"""Padding: which positions of a batch of sequences are real tokens. The others carry no error, no direction, no feedback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

IGNORED = -100
"""The label that losses leave out, of PyTorch and of transformers."""


def padding(x: Any, cut: str | None = None, y: Any = None) -> Tensor | None:
    """The N x T mask of real tokens (True) in a batch that says so, or None: at the output of the network, or of a cut.

    A batch says so by an ``attention_mask`` of N x T integers, 1 and 0, as of transformers. An encoder-decoder has one for each
    half: ``attention_mask`` for what is in an encoder by its name, ``decoder_attention_mask`` for the rest; without the
    second, what follows the last label that counts is padding. Where the loss counts a position, by a label ``y`` (N x T) that
    is not -100, there or at the next one, it is no padding, whatever the mask says.

    >>> import torch
    >>> padding({"input_ids": torch.tensor([[5, 7], [3, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])})
    tensor([[ True,  True],
            [ True, False]])
    """
    if not isinstance(x, Mapping):
        return None
    name, decodes = "attention_mask", False
    if any(isinstance(key, str) and key.startswith("decoder_") for key in x):
        decodes = not any("encoder" in part and "decoder" not in part for part in (cut or "").split("."))
        if not decodes:
            y = None  # labels are of the decoder's positions
        else:
            name = "decoder_attention_mask"
    labels = _of_positions(y)
    mask = x.get(name)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point():
        # There is none, or one of pairs of positions, or of numbers to be added to scores.
        return None if labels is None or not decodes else labels.ne(IGNORED).flip(1).cumsum(1).ne(0).flip(1)
    real = mask.ne(0)
    if labels is not None and labels.shape == real.shape:
        counts = labels.ne(IGNORED)
        real = real | counts
        real[:, :-1] |= counts[:, 1:]
    return real


def _of_positions(y: Any) -> Tensor | None:
    """The labels in targets, if they are class numbers of positions (N x T)."""
    labels = y.get("labels") if isinstance(y, Mapping) else y
    return labels if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point() else None


def without_padding(h: Tensor, real: Tensor | None) -> Tensor:
    """h (N x T x ...) with zeros at the positions that are not real tokens; h itself where the mask is not of its positions.

    >>> import torch
    >>> without_padding(torch.ones(1, 2, 3), torch.tensor([[True, False]]))
    tensor([[[1., 1., 1.],
             [0., 0., 0.]]])
    """
    if real is None or h.dim() < 3 or h.shape[:2] != real.shape:
        return h
    return h.masked_fill(~real.view(*real.shape, *[1] * (h.dim() - 2)), 0)
