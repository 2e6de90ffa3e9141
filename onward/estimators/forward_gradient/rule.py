"""What a forward gradient is, whatever engine measures it: its guesses, and the weights that they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onward.derivatives.directions import seed_of
from onward.derivatives.per_sample import dots, weighted_sum
from onward.estimators.base import Estimator
from onward.estimators.dfa import RandomFeedback
from onward.estimators.dkp import KolenPollackFeedback
from onward.estimators.fdfa import ForwardFeedback
from onward.estimators.feedback import Feedback
from onward.estimators.forward_gradient import spaces
from onward.estimators.signals import Known
from onward.network.heads import Heads
from onward.network.padding import without_padding
from onward.network.pieces import Pieces
from onward.network.run import in_full

TARGETS = {
    "global": "the network's loss",
    "local": "the loss of the block's own head",
    "above": "the loss of the next block's head, through that block",
    "sum": "the losses of all heads from the block on, and the network's",
}
GUESSES = {
    **{name: f"the gradient of {line}" for name, line in TARGETS.items()},
    "random": "Gaussian or Rademacher noise",
    "ntk": "the gradient of a head's loss, its weights drawn afresh for every batch",
    "fixed-ntk": "the gradient of a head's loss, its weights frozen as they started",
    "feedback": "direct feedback, e B_k, by the rule of dfa, dkp or fdfa",
}
PASSES = {"block": "a tangent for each block, exact", "one": "all blocks at once, with random signs"}
SCALINGS = {"unbiased": "<g, u> u", "projection": "<g, u> u / |u|^2"}
FEEDBACK: dict[str, type[Feedback]] = {"dfa": RandomFeedback, "dkp": KolenPollackFeedback, "fdfa": ForwardFeedback}
"""The kinds of matrices of feedback guesses."""
OF_TRAINED_HEADS = {"local", "above", "sum"}
OF_HEADS = OF_TRAINED_HEADS | {"ntk", "fixed-ntk"}
"""Targets and guesses that are gradients of heads' losses."""


class Rule(Estimator):
    """A forward gradient without the engine that measures it; the settings are those of :class:`ForwardGradient`."""

    target: str
    guess: str
    space: str
    comparison: spaces.Space
    """What the space is."""
    passes: str
    noise: str
    scaling: str
    directions: int
    orthogonal: bool
    eps: float
    heads: Heads | None
    frozen_heads: Heads | None
    feedback: Feedback | None
    real: Sequence[Tensor | None] = ()
    """In a step, the mask of real tokens at the output of each block, where the batch tells of padding (N x T)."""

    @property
    def unbiased(self) -> bool:
        """Whether guesses are scaled by <t, u> alone."""
        return self.guess == "random" and self.scaling == "unbiased"

    def guesses(self, k: int, h: Tensor, y: Any, known: Known | None, wanted: Sequence[int] | None = None) -> list[Tensor]:
        """The guess directions at the output h of block k, for guesses that are known there: all, or those wanted."""
        match self.guess:
            case "random":
                which = range(self.directions) if wanted is None else wanted
                drawn = [self.drawn(h.shape, k, h, i, noise=self.noise, offset=self.shard.first) for i in which]
                return [without_padding(u, self.real[k]) for u in drawn]
            case "feedback":
                assert self.feedback is not None
                assert known is not None
                with torch.no_grad(), in_full(h.device.type):
                    return [without_padding(self.feedback.carry(k, h.detach(), known.e, known).to(h.dtype), self.real[k])]
        heads = self.heads if self.guess == "local" else self.frozen_heads
        assert heads is not None
        seed, step, real = self.mask_seed, self.step, self.real[k]
        return [heads.differentiate(k, h, y, self.loss, seed, step, learn=False, real=real)[0]]

    def feedback_direction(self, k: int, h: Tensor) -> list[Tensor]:
        """What is added at the output of block k for the feedback to learn from."""
        return [without_padding(self.drawn(h.shape, k, h, noise=self.noise, offset=self.shard.first), self.real[k])]

    def drawn_weights(self, name: str, p: Tensor, i: int) -> Tensor:
        """The i-th direction of a parameter, one for the whole batch."""
        return self.drawn(p.shape, name, p, i, noise=self.noise)

    def drawn_rows(self, name: str, p: Tensor, k: int, i: int, part: slice) -> Tensor:
        """The i-th direction of a parameter for each of a range of samples."""
        shape = (part.stop - part.start, *p.shape)
        seed, first = seed_of(self.seed, name), self.shard.first + part.start
        return self.drawn(shape, k, p, i, noise=self.noise, seed=seed, offset=first)

    def coin(self, name: str, k: int, samples: int, like: Tensor) -> Tensor:
        """+1 or -1 for each sample, in units of this shard's guesses."""
        seed, first = seed_of(self.seed, name), self.shard.first
        drawn = self.drawn((samples, 1), k, like, -1, noise="rademacher", seed=seed, offset=first)
        return drawn.squeeze(1) * self._unit

    def weights(self, inner: Sequence[Tensor], products: dict[tuple[int, int], Tensor]) -> list[Tensor]:
        """The weight of each sample's guess in each direction, from <t, u_i> and the products <u_i, u_j>, all (N,)."""
        if self.orthogonal:
            m = range(self.directions)
            gram = torch.stack([torch.stack([products[min(i, j), max(i, j)] for j in m], -1) for i in m], -1)
            return spaces.average(inner, gram)
        weigh = self.comparison.weigh
        assert weigh is not None
        scaled = [
            weigh(one, None if self.unbiased else products.get((i, i)), self._eps, self._mean) for i, one in enumerate(inner)
        ]
        return [one * self._unit for one in spaces.average(scaled, None)]

    @property
    def _eps(self) -> float:
        """In units of this shard's guesses, which are gradients of the mean over fewer samples."""
        return self.eps if self.guess == "random" or self.comparison.of == "batch" else self.eps / self.shard.share**2

    @property
    def _unit(self) -> float:
        """What makes a mean over shards a sum over samples, where neither guess nor weight is a share of the mean loss."""
        return 1 / self.shard.share if self.guess == "random" and self.comparison.scale_free else 1.0

    def _mean(self, of_samples: Tensor) -> Tensor:
        """The mean over the batch's samples."""
        return self.shard.mean([of_samples.mean()])[0]

    def pairs(self) -> list[tuple[int, int]]:
        """The (i, j) whose products <u_i, u_j> the weights need."""
        if self.orthogonal:
            return [(i, j) for j in range(self.directions) for i in range(j + 1)]
        scaled = not self.unbiased and self.comparison.projects
        return [(i, i) for i in range(self.directions)] if scaled else []

    def pieces(self, k: int) -> Pieces | None:
        """The head of block k, if its loss is taken piece by piece and so is what rows of activations are compared over."""
        whole = self.heads is None or self.target != "local" or self.comparison.of != "rows" or self.comparison.in_samples
        head = None if whole or self.heads is None else self.heads[k]
        return head if isinstance(head, Pieces) and not self.comparison.spans else None

    def compared(self, k: int, rows: Tensor) -> Tensor:
        """Rows of activations at the output of block k as they are compared: one for each sample, or for each of its pieces."""
        pieces = self.pieces(k)
        return rows if pieces is None else pieces.rows(rows)

    def weighted(self, k: int, inner: Sequence[Tensor], guesses: Sequence[Tensor]) -> Tensor:
        """The error signal of block k: guesses weighted by <t, u_i> of what is compared."""
        rows, pieces = [self.compared(k, u) for u in guesses], self.pieces(k)
        found = weighted_sum(rows, self.row_weights([one.flatten() for one in inner], rows))
        return found if pieces is None else pieces.whole(found, guesses[0])

    def row_weights(self, inner: Sequence[Tensor], guesses: Sequence[Tensor]) -> list[Tensor]:
        """The weight of each sample's row of activations in each direction."""
        return self.weights(inner, {(i, j): dots(guesses[i], guesses[j]) for i, j in self.pairs()})

    def along(self, slopes: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        """The estimate of a parameter's gradient from its slopes, of shape (1,), along each direction."""
        flat = [u.reshape(1, -1) for u in directions]
        weights = self.weights(slopes, {(i, j): dots(flat[i], flat[j]) for i, j in self.pairs()})
        return weighted_sum([u.unsqueeze(0) for u in directions], weights).squeeze(0)
