"""Heads whose loss is taken piece by piece, so that a direction of activations has few dimensions to search in."""

from __future__ import annotations

from torch import Tensor, nn

from onward.errors import UsageError


class Pieces(nn.Module):
    """A linear classifier of the mean over positions, with a loss for each group of channels in each patch of positions.

    The channels of an output are divided into ``groups``, its positions into patches (``patches`` along each side of an image,
    or of a sequence). Every piece has the same loss, that of the classifier, of which it counts as its own what it alone adds
    to the logits: ``z_n = b + sum_m z_{n,m}``, ``z_{n,m} = W_m mean(h_{n,m})``. The sum over pieces of these losses' gradients
    is the gradient of the one loss, so local losses learn as from a linear head. A forward gradient of random guesses with
    ``target="local"`` in the spaces ``activation`` and ``f-activation`` measures along each piece by itself: it searches in
    d / M dimensions instead of d, and its variance falls as much.

    Ren, Kornblith, Liao and Hinton, "Scaling Forward Gradient With Local Losses", 2023.
    """

    def __init__(self, h: Tensor, classes: int, groups: int, patches: int) -> None:
        super().__init__()
        channels = h.shape[2] if h.dim() == 3 else h.shape[1]
        sides = {2: [], 3: [h.shape[1]], 4: list(h.shape[2:])}.get(h.dim())
        if sides is None:
            raise UsageError(f"the output has shape {tuple(h.shape)}, not (N, d), (N, T, d) or (N, C, H, W)")
        if channels % groups:
            raise UsageError(f"{channels} channels cannot be divided into {groups} groups of one size")
        if patches > 1 and not sides:
            raise UsageError(f"an output of shape {tuple(h.shape)} has no positions to divide into {patches} patches a side")
        if any(side % patches for side in sides):
            raise UsageError(f"{' x '.join(map(str, sides))} positions cannot be divided into {patches} patches a side")
        self.groups, self.patches, self.positions = groups, patches, [side // patches for side in sides]
        self.classify = nn.Linear(channels, classes)

    def rows(self, h: Tensor) -> Tensor:
        """An output in pieces: a row for each, sample by sample, (N M, d / M)."""
        g, p = self.groups, self.patches
        if h.dim() == 2:
            return h.reshape(len(h) * g, -1)
        if h.dim() == 3:
            (t,) = self.positions
            return h.reshape(len(h), p, t, g, -1).permute(0, 3, 1, 4, 2).reshape(len(h) * g * p, -1)
        a, b = self.positions
        return h.reshape(len(h), g, -1, p, a, p, b).permute(0, 1, 3, 5, 2, 4, 6).reshape(len(h) * g * p * p, -1)

    def whole(self, rows: Tensor, like: Tensor) -> Tensor:
        """What :meth:`rows` has made pieces of."""
        n, g, p = len(like), self.groups, self.patches
        if like.dim() == 2:
            return rows.reshape(like.shape)
        if like.dim() == 3:
            (t,) = self.positions
            return rows.view(n, g, p, -1, t).permute(0, 2, 4, 1, 3).reshape(like.shape)
        a, b = self.positions
        return rows.view(n, g, p, p, -1, a, b).permute(0, 1, 4, 2, 5, 3, 6).reshape(like.shape)

    def parts(self, h: Tensor) -> Tensor:
        """What each piece adds to the logits, (N, M, classes)."""
        patches = self.patches ** len(self.positions)
        channels = self.classify.in_features // self.groups
        means = self.rows(h).view(len(h), self.groups, patches, channels, -1).mean(4) / patches
        weight = self.classify.weight.view(-1, self.groups, channels).permute(1, 2, 0)  # groups x channels x classes
        return (means.transpose(1, 2).unsqueeze(3) @ weight).squeeze(3).transpose(1, 2).flatten(1, 2)

    def forward(self, h: Tensor) -> Tensor:
        return self.parts(h).sum(1) + self.classify.bias
