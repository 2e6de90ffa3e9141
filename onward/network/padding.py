"""Padding: which positions of a batch of sequences are real tokens, and what the others carry, which is nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def padding(x: Any, cut: str | None = None) -> Tensor | None:
    """The N x T mask of real tokens (True) in a batch that says so, or None: at the output of the network, or of a cut.

    A batch says so by an ``attention_mask`` of N x T integers, 1 and 0, as of transformers. An encoder-decoder has one for each
    half: ``attention_mask`` for what is in an encoder by its name, ``decoder_attention_mask`` for the rest.

    >>> import torch
    >>> padding({"input_ids": torch.tensor([[5, 7], [3, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])})
    tensor([[ True,  True],
            [ True, False]])
    """
    if not isinstance(x, Mapping):
        return None
    name = "attention_mask"
    if any(isinstance(key, str) and key.startswith("decoder_") for key in x):
        parts = (cut or "").split(".")
        if not any("encoder" in part and "decoder" not in part for part in parts):
            name = "decoder_attention_mask"
    mask = x.get(name)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point():
        return None  # none, or one of pairs of positions, or numbers to be added to scores
    return mask != 0


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
