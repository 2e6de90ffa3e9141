"""Forward gradients: a guess direction, scaled by the derivative of a target along it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from torch import Tensor, nn

from onward.derivatives.directions import NOISES
from onward.errors import UsageError
from onward.estimators.base import Step
from onward.estimators.forward_gradient import forward, reverse
from onward.estimators.forward_gradient.rule import (
    FEEDBACK,
    GUESSES,
    OF_HEADS,
    OF_TRAINED_HEADS,
    PASSES,
    SCALINGS,
    TARGETS,
    Rule,
)
from onward.estimators.forward_gradient.spaces import SPACES
from onward.estimators.settings import AtLeast, OneOf
from onward.network.gradients import as_asked
from onward.network.heads import Heads
from onward.network.padding import padding
from onward.network.probe import Mixing

ENGINES = {"forward": forward.estimate, "reverse": reverse.estimate}


class ForwardGradient(Rule, name="fg"):
    """Forward gradients: the gradient of a *target*, estimated along a *guess*, in a *space*; measured by the *engine*.

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
    "Gradients without Backpropagation", 2022 (global, random, avg-weight); Flügel, Coquelin, Weiel, Streit and Götz, "Beyond
    Backpropagation: Optimization with Multi-Tangent Forward Gradients", 2024 (random, orthogonal). The antithetic pairs of
    evolution strategies (Salimans et al., 2017) bring nothing here, where -u gives the estimate of u: they are ``SPSA``,
    two-sided.

    Raises :class:`onward.UsageError` for unknown names, and for combinations with no meaning.

    Settings:
        target: whose gradient is estimated: the loss of the network, of the block's own head, of the next one, or of all from
            it on.
        guess: the direction: one of those gradients, noise, the gradient of a head drawn afresh for every batch or frozen, or
            the error signal of direct feedback.
        space: where target and guess are compared (`onward list` has a line on each).
        engine: dual numbers, or a backward sweep, which keeps every block's graph.
        passes: of the forward engine, one pass for every block, or one for all; if not given, one for random guesses.
        feedback: the kind of matrices of feedback guesses.
        noise: what random guesses are drawn from.
        scaling: of random guesses u, <g,u> u or that divided by |u|^2.
        directions: random guesses averaged in each step.
        orthogonal: project on the span of the random guesses instead of averaging over them (the multi-tangent forward
            gradients of Flügel et al., 2024).
        eps: added to squared lengths that are divided by.

    >>> import onward
    >>> import torch
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
        target: Annotated[str, OneOf(TARGETS)] = "global",
        guess: Annotated[str, OneOf(GUESSES)] = "random",
        space: Annotated[str, OneOf(SPACES)] = "activation",
        engine: Annotated[str, OneOf(ENGINES)] = "forward",
        passes: Annotated[str, OneOf(PASSES)] | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        feedback: Annotated[str, OneOf(FEEDBACK)] = "fdfa",
        noise: Annotated[str, OneOf(NOISES)] = "gaussian",
        scaling: Annotated[str, OneOf(SCALINGS)] = "unbiased",
        directions: Annotated[int, AtLeast(1)] = 1,
        orthogonal: bool = False,
        eps: Annotated[float, AtLeast(0)] = 1e-16,
        **options: Any,
    ) -> None:
        if engine == "reverse" and passes is not None:
            raise UsageError(f"passes={passes!r} is for engine='forward', and the engine is 'reverse': leave it out")
        passes = passes or ("one" if guess == "random" else "block")
        uncut = self.measures_whole(target=target, guess=guess, space=space)
        if uncut and not cuts:
            cuts = ()
        super().__init__(model, cuts, uncut=uncut, **options)
        self.target, self.guess, self.space, self.passes = target, guess, space, passes
        self.comparison = SPACES[space]
        self.noise, self.scaling, self.directions, self.orthogonal, self.eps = noise, scaling, directions, orthogonal, eps
        self._check_combination(engine, heads)
        if self.comparison.of != "rows" and (odd := [n for n, p in model.named_parameters() if p.is_complex()]):
            raise UsageError(
                f"space={space!r} compares gradients of parameters, and {odd[0]} is complex: use another space, such as "
                "activation, or parameters of real numbers (torch.view_as_complex in the network)"
            )
        self._estimate_by = ENGINES[engine]
        self.engine = engine
        # Every process draws the same directions of parameters, and makes the same estimate of slopes that it has exchanged.
        self.sums_samples = not (engine == "forward" and space == "avg-weight" and guess == "random" and not self.cuts)
        self.can_be_lean = not self.sums_samples
        if engine == "forward":
            self.engine += ", all blocks in one tangent" if passes == "one" else ", a tangent per block"
        frozen = guess in ("ntk", "fixed-ntk")
        trained = heads is not None and (not frozen or target in OF_TRAINED_HEADS)
        self.heads = Heads(self.cuts, heads) if heads is not None and trained else None
        self.frozen_heads = Heads(self.cuts, heads, frozen=True) if heads is not None and frozen else None
        self.feedback = FEEDBACK[feedback](model, self.cuts, self.seed) if guess == "feedback" else None
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
        if self.guess != "random":
            for option, value, default in (
                ("directions", self.directions, 1),
                ("orthogonal", self.orthogonal, False),
                ("scaling", self.scaling, "unbiased"),
            ):
                if value != default:
                    raise UsageError(f"{option}={value!r} is for guess='random', and the guess is {self.guess!r}: leave it out")
        if self.orthogonal and not self.comparison.projects:
            raise UsageError(
                f"orthogonal=True projects on the span of the directions, and space={self.space!r} does not project on a "
                "direction: use it with activation, activation-2, weight or avg-weight"
            )
        if engine == "forward" and self.guess in ("global", "above", "sum"):
            raise UsageError(
                f"guess={self.guess!r} takes a backward sweep across the cuts, which the forward engine never makes: use "
                "engine='reverse', or a guess that is known in the block (local, random, ntk, fixed-ntk, feedback)"
            )
        if engine == "forward" and self.comparison.of == "samples" and self.space != "random-sign-weight":
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

    @classmethod
    def needs_heads(cls, **settings: Any) -> bool:
        return bool({settings.get("target"), settings.get("guess")} & OF_HEADS)

    @classmethod
    def measures_whole(cls, **settings: Any) -> bool:
        asked = {"target": "global", "guess": "random", "space": "activation", **settings}
        return (asked["target"], asked["guess"], asked["space"]) == ("global", "random", "avg-weight")

    @classmethod
    def learns_feedback(cls, **settings: Any) -> bool:
        return settings.get("guess") == "feedback" and FEEDBACK[settings.get("feedback", "fdfa")].learns

    def _prepare(self) -> None:
        if self.guess == "ntk":
            assert self.frozen_heads is not None
            for k in range(len(self.cuts)):
                self.frozen_heads.redraw(k, self.seed, self.step)

    def _estimate(self, x: Any, y: Any) -> Step:
        self.real = [padding(x, cut, y) for cut in self.cuts]
        step = self._estimate_by(self, x, y)
        self.real = ()
        as_asked(self.model)
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
