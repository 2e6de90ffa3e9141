"""Forward gradients: a guess direction, scaled by the derivative of a target along it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.derivatives import directions as random_directions
from onward.derivatives.directions import seed_of
from onward.derivatives.per_sample import dots, weighted_sum
from onward.errors import UsageError, unknown
from onward.estimators.base import Estimator, Step
from onward.estimators.feedback import FEEDBACK
from onward.estimators.forward_gradient import forward, reverse, spaces
from onward.estimators.signals import OutputError
from onward.network.gradients import with_sparse_gradients
from onward.network.heads import Heads
from onward.network.probe import Mixing
from onward.network.run import Loss

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
ENGINES = {"forward": forward.estimate, "reverse": reverse.estimate}
PASSES = {"block": "a tangent for each block, exact", "one": "all blocks at once, with random signs"}
SCALINGS = {"unbiased": "<g, u> u", "projection": "<g, u> u / |u|^2"}
OF_TRAINED_HEADS = {"local", "above", "sum"}
OF_HEADS = OF_TRAINED_HEADS | {"ntk", "fixed-ntk"}
"""Targets and guesses that are gradients of heads' losses."""


class ForwardGradient(Estimator):
    """The gradient of a *target*, estimated along a *guess*, in a *space*; measured by the *engine*.

    With t_k the gradient of the target at the output of hidden block k and u_k the guess, in ``space="activation"``

        delta_{k,n} = (<t_k, u_k>_n / (|u_k|_n^2 + eps)) u_{k,n}        (random guesses: <t_k, u_k>_n u_{k,n}, unbiased)

    is delivered to the block; ``onward list`` has a line on each of the other spaces. The last block gets the exact gradient
    of the loss. Trained heads learn from their own exact local loss. ``heads`` maps each cut to a head where target or guess
    ask
    for one (:func:`onward.make_heads`).

    ``engine="forward"`` measures <t, u> by tangents in forward passes and keeps no graph beyond one block: memory does not
    grow with depth. ``passes="block"`` carries a tangent for each block, exact; ``passes="one"`` all at once, each sample and
    block with a random sign: unbiased, with cross-talk between blocks as noise. With batch statistics it measures each sample's
    own derivative, without what a sample does to the losses of others. ``engine="reverse"`` sweeps back over the cut graph:
    exact and fast, it keeps every block's graph; for studying estimators, and for those no forward pass can measure. Samples
    are the first dimension at every cut and at the output.

    Random guesses: ``noise`` of ``directions`` m directions, whose estimates are averaged, or with ``orthogonal`` t projected
    on their span. They are unbiased with ``scaling="unbiased"``; their variance grows with the number of dimensions d:
    E|est - g|^2 = (d + 1) |g|^2 for one Gaussian direction, (d - 1) |g|^2 for one Rademacher direction. In
    ``space="avg-weight"`` with the global target and no cuts, every parameter gets its estimate (Baydin et al.): no graph
    exists at any time.

    Fournier, Rivaud, Belilovsky, Eickenberg and Oyallon, "Can Forward Gradient Match Backpropagation?", 2023; Ren et al.,
    "Scaling Forward Gradient with Local Losses", 2023, eq. 3 (global or local, random, activation); Baydin et al.,
    "Gradients without Backpropagation", 2022 (global, random, avg-weight).

    Raises :class:`onward.UsageError` for unknown names, and for combinations with no meaning.

    >>> import onward
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x, y = torch.randn(3, 4), torch.tensor([0, 1, 1])
    >>> heads = onward.make_heads(model, x, "linear")
    >>> estimator = ForwardGradient(model, guess="local", heads=heads)
    >>> step = estimator.estimate(x, y)
    >>> model[0].weight.grad.shape, estimator.engine
    (torch.Size([8, 4]), 'forward, a tangent per block')
    """

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        loss: Loss = F.cross_entropy,
        target: str = "global",
        guess: str = "random",
        space: str = "activation",
        engine: str = "forward",
        passes: str | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        feedback: str = "fdfa",
        noise: str = "gaussian",
        scaling: str = "unbiased",
        directions: int = 1,
        orthogonal: bool = False,
        eps: float = 1e-16,
        seed: int = 0,
        check: bool = True,
    ) -> None:
        if engine == "reverse" and passes is not None:
            raise UsageError(f"passes={passes!r} is for engine='forward', and the engine is 'reverse': leave it out")
        passes = passes or ("one" if guess == "random" else "block")
        for kind, name, known in (
            ("target", target, TARGETS),
            ("guess", guess, GUESSES),
            ("space", space, spaces.SPACES),
            ("engine", engine, ENGINES),
            ("passes", passes, PASSES),
            ("feedback rule", feedback, FEEDBACK),
            ("noise", noise, random_directions.NOISES),
            ("scaling", scaling, SCALINGS),
        ):
            if name not in known:
                raise unknown(kind, name, known)
        uncut = space == "avg-weight" and guess == "random" and target == "global"
        if uncut and not cuts:
            cuts = ()
        super().__init__(model, cuts, loss=loss, seed=seed, check=check, uncut=uncut)
        self.target, self.guess, self.space, self.passes = target, guess, space, passes
        self.noise, self.scaling, self.directions, self.orthogonal, self.eps = noise, scaling, directions, orthogonal, eps
        self._check_combination(engine, heads)
        if space in (*spaces.OF_SAMPLES, "avg-weight") and (odd := [n for n, p in model.named_parameters() if p.is_complex()]):
            raise UsageError(
                f"space={space!r} compares gradients of parameters, and {odd[0]} is complex: use another space, such as "
                "activation, or parameters of real numbers (torch.view_as_complex in the network)"
            )
        self._estimate_by = ENGINES[engine]
        self.engine = engine
        # The random directions of parameters are the same everywhere, and so is what is made of them.
        self.sums_samples = not (engine == "forward" and space == "avg-weight" and guess == "random" and not self.cuts)
        if engine == "forward":
            self.engine += ", all blocks in one tangent" if passes == "one" else ", a tangent per block"
        frozen = guess in ("ntk", "fixed-ntk")
        trained = heads is not None and (not frozen or target in OF_TRAINED_HEADS)
        self.heads = Heads(self.cuts, heads) if heads is not None and trained else None
        self.frozen_heads = Heads(self.cuts, heads, frozen=True) if heads is not None and frozen else None
        self.feedback = FEEDBACK[feedback](model, self.cuts, seed) if guess == "feedback" else None
        self.reads_rows = space != "avg-weight" or guess == "feedback"
        if engine == "forward":
            of_weights = "parameters" if guess == "random" else "gradients"
            self.tangents_on = of_weights if space == "avg-weight" else "outputs"
        elif self.feedback is not None and self.feedback.directions:
            self.tangents_on = "outputs"

    def _check_combination(self, engine: str, heads: Mapping[str, nn.Module] | None) -> None:
        for what, name in (("target", self.target), ("guess", self.guess)):
            if heads is None and name in OF_HEADS:
                raise UsageError(f"{what}={name!r} is a gradient of heads: give heads=, one for each cut (onward.make_heads)")
        if self.directions < 1:
            raise UsageError(f"directions={self.directions}: a forward gradient needs at least 1")
        if self.guess != "random":
            for option, value, default in (
                ("directions", self.directions, 1),
                ("orthogonal", self.orthogonal, False),
                ("scaling", self.scaling, "unbiased"),
            ):
                if value != default:
                    raise UsageError(f"{option}={value!r} is for guess='random', and the guess is {self.guess!r}: leave it out")
        if self.orthogonal and self.space not in ("activation", "activation-2", "weight", "avg-weight"):
            raise UsageError(
                f"orthogonal=True projects on the span of the directions, and space={self.space!r} does not project on a "
                "direction: use it with activation, activation-2, weight or avg-weight"
            )
        if engine == "forward" and self.guess in ("global", "above", "sum"):
            raise UsageError(
                f"guess={self.guess!r} takes a backward sweep across the cuts, which the forward engine never makes: use "
                "engine='reverse', or a guess that is known in the block (local, random, ntk, fixed-ntk, feedback)"
            )
        if engine == "forward" and self.space in spaces.OF_SAMPLES and self.space != "random-sign-weight":
            raise UsageError(
                f"space={self.space!r} compares gradients of every parameter for every sample, and a forward pass measures one "
                "derivative for each sample: use engine='reverse', or the spaces activation, activation-2 or avg-weight"
            )
        if engine == "forward" and self.target in OF_TRAINED_HEADS and heads is not None:
            for name, head in heads.items():
                if hasattr(head, "local_loss"):
                    raise UsageError(
                        f"the {type(head).__name__} head at cut {name!r} compares samples with one another, so its loss has no "
                        "derivative for each sample: use engine='reverse', or another head"
                    )
        if engine == "forward" and self.space == "span-activation":
            raise UsageError(
                "space='span-activation' compares each sample's target with the guesses of all others, which takes as many "
                "forward passes as there are samples: use engine='reverse', or space='activation'"
            )

    def tell_mixing(self, seen: Mixing) -> None:
        if self.engine.startswith("forward"):
            where = f"cut {seen.module!r}" if seen.module else "the network"
            warnings.warn(
                f"samples influence one another before the output of {where}: changing half of a batch changes {seen.rows} of "
                "the other rows there. The forward engine measures each sample's own derivative, which leaves out what a "
                "sample does to the losses of others: the estimate is biased. engine='reverse' measures both",
                stacklevel=4,
            )

    @property
    def unbiased(self) -> bool:
        """Whether guesses are scaled by <t, u> alone."""
        return self.guess == "random" and self.scaling == "unbiased"

    def guesses(
        self, k: int, h: Tensor, y: Any, error: OutputError | None, wanted: Sequence[int] | None = None
    ) -> list[Tensor]:
        """The guess directions at the output h of block k, for guesses that are known there: all, or those wanted."""
        match self.guess:
            case "random":
                which = range(self.directions) if wanted is None else wanted
                return [self._draw(h.shape, k, i, h, self.seed, self.shard.first) for i in which]
            case "feedback":
                assert self.feedback is not None
                assert error is not None
                with torch.no_grad(), torch.autocast(h.device.type, enabled=False):
                    return [self.feedback.signal(k, h.detach(), error).to(h.dtype)]
        heads = self.heads if self.guess == "local" else self.frozen_heads
        assert heads is not None
        return [heads.differentiate(k, h, y, self.loss, self.mask_seed, self.step, learn=False)[0]]

    def feedback_direction(self, k: int, h: Tensor) -> list[Tensor]:
        """What is added at the output of block k for the feedback to learn from."""
        return [self._draw(h.shape, k, 0, h, self.seed, self.shard.first)]

    def drawn_weights(self, name: str, p: Tensor, i: int) -> Tensor:
        """The i-th direction of a parameter, one for the whole batch."""
        return self._draw(p.shape, name, i, p, self.seed)

    def drawn_rows(self, name: str, p: Tensor, k: int, i: int, part: slice) -> Tensor:
        """The i-th direction of a parameter for each of a range of samples."""
        shape = (part.stop - part.start, *p.shape)
        return self._draw(shape, k, i, p, seed_of(self.seed, name), self.shard.first + part.start)

    def coin(self, name: str, k: int, samples: int, like: Tensor) -> Tensor:
        """+1 or -1 for each sample, in units of this shard's guesses."""
        drawn = random_directions.draw(
            (samples, 1),
            seed=seed_of(self.seed, name),
            step=self.step,
            block=k,
            offset=self.shard.first,
            direction=-1,
            noise="rademacher",
            dtype=like.dtype,
            device=like.device,
        )
        return drawn.squeeze(1) * self._unit

    def _draw(self, shape: Sequence[int], block: int | str, i: int, like: Tensor, seed: int, offset: int = 0) -> Tensor:
        return random_directions.draw(
            shape,
            seed=seed,
            step=self.step,
            block=block,
            offset=offset,
            direction=i,
            noise=self.noise,
            dtype=like.dtype,
            device=like.device,
        )

    def weights(self, inner: Sequence[Tensor], products: dict[tuple[int, int], Tensor]) -> list[Tensor]:
        """The weight of each sample's guess in each direction, from <t, u_i> and the products <u_i, u_j>, all (N,)."""
        if self.orthogonal:
            m = range(self.directions)
            gram = torch.stack([torch.stack([products[min(i, j), max(i, j)] for j in m], -1) for i in m], -1)
            return spaces.average(inner, gram)
        scaled = [
            spaces.weights(self.space, one, None if self.unbiased else products.get((i, i)), self._eps, self._mean)
            for i, one in enumerate(inner)
        ]
        return [one * self._unit for one in spaces.average(scaled, None)]

    @property
    def _eps(self) -> float:
        """In units of this shard's guesses, which are gradients of the mean over fewer samples."""
        return self.eps if self.guess == "random" or self.space == "avg-weight" else self.eps / self.shard.share**2

    @property
    def _unit(self) -> float:
        """What makes a mean over shards a sum over samples, where neither guess nor weight is a share of the mean loss."""
        return 1 / self.shard.share if self.guess == "random" and self.space in spaces.SCALE_FREE else 1.0

    def _mean(self, of_samples: Tensor) -> Tensor:
        """The mean over the batch's samples."""
        return self.shard.mean([of_samples.mean()])[0]

    def pairs(self) -> list[tuple[int, int]]:
        """The (i, j) whose products <u_i, u_j> the weights need."""
        if self.orthogonal:
            return [(i, j) for j in range(self.directions) for i in range(j + 1)]
        scaled = not self.unbiased and self.space not in ("sign-weight", "random-sign-weight", "f-weight", "f-activation")
        return [(i, i) for i in range(self.directions)] if scaled else []

    def row_weights(self, inner: Sequence[Tensor], guesses: Sequence[Tensor]) -> list[Tensor]:
        """The weight of each sample's row of activations in each direction."""
        return self.weights(inner, {(i, j): dots(guesses[i], guesses[j]) for i, j in self.pairs()})

    def along(self, slopes: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        """The estimate of a parameter's gradient from its slopes, of shape (1,), along each direction."""
        flat = [u.reshape(1, -1) for u in directions]
        weights = self.weights(slopes, {(i, j): dots(flat[i], flat[j]) for i, j in self.pairs()})
        return weighted_sum([u.unsqueeze(0) for u in directions], weights).squeeze(0)

    def _estimate(self, x: Any, y: Any) -> Step:
        if self.guess == "ntk":
            assert self.frozen_heads is not None
            for k in range(len(self.cuts)):
                self.frozen_heads.redraw(k, self.seed, self.step)
        step = self._estimate_by(self, x, y)
        for p in with_sparse_gradients(self.model):
            if p.grad is not None and not p.grad.is_sparse:  # made of directions, or sample by sample
                p.grad = p.grad.to_sparse(1)
        return step

    def set_extra_state(self, state: Tensor | Mapping[str, int]) -> None:
        super().set_extra_state(state)
        if self.feedback is not None:
            self.feedback.seed = self.seed

    def _roles(self) -> dict[str, list[nn.Parameter]]:
        roles = super()._roles()
        if self.heads is not None:
            roles["heads"] = list(self.heads.parameters())
        if self.feedback is not None and self.feedback.learns:
            roles["feedback"] = list(self.feedback)
        return roles
