"""The one procedure behind every estimator that hands each hidden block an error signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from onward.derivatives.graph import backward, is_traced
from onward.derivatives.tangents import Tangents
from onward.errors import UsageError
from onward.estimators.base import Estimator, Step, check_last_block
from onward.network.cuts import cut_graph
from onward.network.gradients import allocate_gradients, forget_unused
from onward.network.padding import padding, without_padding
from onward.network.positions import LAST, Outputs, feature_axis
from onward.network.replay import Replay, check_same_output
from onward.network.run import LossGradient, as_rows, call, detached, from_rows, in_full, leaves, output_error, without_graph

_TOGETHER = 1 << 18  # bytes of error signals that are delivered in one call of autograd


class SignalEstimator(Estimator):
    """Cut the graph after every hidden block, deliver an error signal to each, and the true gradient to the last.

    A child class says what the signal of block k is (:meth:`signal`), and whether it needs tangents: then a direction is added
    at the output of every hidden block, all at once, and the signal is given the tangents of the output.

    Two forms of the same estimate. The plain one runs the network once and keeps every block's graph until the output error
    is known. ``low_memory=True`` runs it twice: first without any graph, for the output error and the tangents of the output;
    then block by block, where each block gets its signal, differentiates itself and is forgotten. Directions are redrawn
    instead of stored, dropout draws the same masks twice, running statistics move once.

    Settings:
        low_memory: run the network twice, and keep nothing of a block once it has learned.
        allow_bypass: take cuts that a skip connection goes around, which gradients then cross.
    """

    directions = 0  # tangents carried by the forward pass
    noise = "gaussian"
    reads_rows = True
    reads_outputs = False  # whether a signal depends on the values of the block's output, not only on its shape
    in_one_piece = False  # whether some steps need all blocks in this process

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        low_memory: bool = False,
        allow_bypass: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, cuts, **options)
        if low_memory and allow_bypass:
            raise UsageError("low_memory=True frees each block before the next, which a bypassed cut makes impossible")
        self.low_memory = low_memory
        self.allow_bypass = allow_bypass

    @property
    def tangents_on(self) -> str | None:  # type: ignore[override]
        return "outputs" if self.directions else None

    def signal(self, k: int, h: Tensor, known: Known) -> Tensor:
        """delta_k, the error signal for the output h of block k; learns from the same numbers where there is something to."""
        raise UsageError(f"{type(self).__name__} has no rule: write its method signal(k, h, known)")

    def direction(self, k: int, h: Tensor, index: int) -> Tensor:
        """The index-th random direction at the output h of block k in this step."""
        return self.drawn(h.shape, k, h, index, noise=self.noise, offset=self.shard.first)

    def _draw(self, x: Any, y: Any, k: int, h: Tensor) -> list[Tensor]:
        real = padding(x, self.cuts[k], y)
        return [without_padding(self.direction(k, h, index), real) for index in range(self.directions)]

    def _estimate(self, x: Any, y: Any) -> Step:
        return self._block_by_block(x, y) if self.low_memory else self._all_at_once(x, y)

    def _all_at_once(self, x: Any, y: Any) -> Step:
        passed = self.pass_forward(x, y=y)
        found = output_error(self.loss, passed.output, y)
        known = known_at(self, x, y, found, passed.tangents(found.at), passed.directions)
        self.learn(passed, known, found.at)
        return Step(found.loss, detached(passed.output))

    def pass_forward(
        self, x: Any, arrived: Sequence[Tensor] = (), weights: Mapping[str, Tensor] | None = None, *, y: Any = None
    ) -> Passed:
        """The half of a step that needs no signal: run the blocks of this process, and keep their graphs.

        ``arrived``: the tangents of x, where it is the output of a block elsewhere; ``weights``: what to run with in place of
        the network's parameters; ``y``: the targets, for what they tell of padding.
        """
        allocate_gradients(getattr(self, "feedback", nn.Module()))
        outputs: dict[int, Tensor] = {}
        versions: dict[int, int] = {}
        drawn: dict[int, list[Tensor]] = {}

        def deliver(k: int, h: Tensor) -> Tensor:
            check(k, h)
            outputs[k] = h
            if self.reads_outputs:
                versions[k] = h._version
            if tangents is None:
                return h.detach()
            with tangents.unseen(h):
                passed_on = h.detach()
                drawn[k] = perturb(tangents, h, passed_on, self._draw(x, y, k, passed_on))
            return passed_on

        tangents = Tangents(self.directions) if self.directions else None
        model = self.model if weights is None else partial(functional_call, self.model, dict(weights))
        looking = nullcontext(_allowed) if self.allow_bypass else self.separation(", or allow it with allow_bypass=True")
        with looking as check, tangents or nullcontext(), cut_graph(self.model, self.cuts, deliver):
            if tangents is not None and arrived:
                tangents.set(x, *arrived)
            output = call(model, x)
            check(len(self.cuts), *leaves(output))
        if self.ends_here:
            check_last_block(self.cuts, output)
        if self.reads_outputs:
            self._check_kept(outputs, versions)
        return Passed(outputs, drawn, output, partial(tangents_of, tangents, self.cuts))

    def learn(self, passed: Passed, known: Known, at: Sequence[Tensor]) -> None:
        """The other half: each block takes its signal from what is known at the output, and differentiates itself.

        ``at``: the tensors of the output that the loss depends on.
        """
        # Nothing has to wait for a later block, so the first blocks, with most to forget and the fewest parameters, go first.
        waiting = list(passed.outputs)
        ends = list(zip(at, from_rows(known.e, at), strict=True)) if self.ends_here else []
        while waiting:
            signals = self._signals(waiting, passed, known)
            if not (waiting or self.allow_bypass) and sum(delta.nbytes for _, delta in signals) < _TOGETHER:
                signals, ends = signals + ends, []
            if signals:
                backward(*zip(*signals, strict=True), retain_graph=self.allow_bypass)
        if ends:
            backward(*zip(*ends, strict=True))

    def _signals(self, waiting: list[int], passed: Passed, known: Known) -> list[tuple[Tensor, Tensor]]:
        """The outputs of the next blocks that are waiting, with their error signals: of as many as one call of autograd is
        worth, which costs as much as a small block. Large signals come alone, so that only one is there at a time."""
        found: list[tuple[Tensor, Tensor]] = []
        size = 0
        with torch.no_grad(), in_full(known.e.device.type):
            while waiting and size < _TOGETHER:
                k = waiting.pop(0)
                h = passed.outputs.pop(k)
                delta = self._signal(k, h.detach(), known)
                passed.drawn.pop(k, None)
                size += delta.nbytes
                if h.requires_grad:
                    found.append((h, self.observed(k, delta)))
        return found

    def _signal(self, k: int, h: Tensor, known: Known) -> Tensor:
        """What the rule says, checked: a rule of the user's own may say anything."""
        version = known.e._version
        delta = self.signal(k, h, known)
        if isinstance(delta, Tensor) and delta.shape == h.shape and known.e._version == version:
            return delta if delta.dtype is h.dtype else delta.to(h.dtype)
        who = f"{type(self).__name__}.signal for block {k}, which ends at cut {self.cuts[k]!r},"
        if not isinstance(delta, Tensor) or delta.shape != h.shape:
            said = f"a tensor of shape {tuple(delta.shape)}" if isinstance(delta, Tensor) else f"a {type(delta).__name__}"
            raise UsageError(f"{who} returned {said}: return one of the block's output's shape {tuple(h.shape)}")
        raise UsageError(
            f"{who} has changed known.e in place, which every other block reads too: compute something new from it, such as "
            "known.e.sign() instead of known.e.sign_()"
        )

    def _differentiate(self, k: int, h: Tensor, known: Known) -> None:
        """Hand block k its error signal, and let it find the gradients of its own parameters."""
        with torch.no_grad(), in_full(h.device.type):
            delta = self._signal(k, h.detach(), known)
        if h.requires_grad:
            backward(h, self.observed(k, delta))

    def _block_by_block(self, x: Any, y: Any) -> Step:
        fresh = allocate_gradients(self)
        again = Replay(self.model)
        known, found, output = measure_output(self, x, y, again, self.directions, partial(self._draw, x, y))

        def deliver(k: int, h: Tensor) -> Tensor:
            check(k, h)
            self._differentiate(k, h, known)
            return h.detach()

        first = self._separated_for is None
        with again, self.separation() as check, cut_graph(self.model, self.cuts, deliver):
            second = call(self.model, x)
            check(len(self.cuts), *leaves(second))
        if first:
            output_error(self.loss, second, y)  # for what the loss may read of blocks that keep a graph
        check_last_block(self.cuts, second)
        check_same_output(leaves(output), leaves(second), "use the form that runs the network once, low_memory=False")
        found.backward(second)
        forget_unused(fresh)
        return Step(found.loss, detached(output))

    def _check_kept(self, outputs: dict[int, Tensor], versions: dict[int, int]) -> None:
        for k, h in outputs.items():
            if h._version != versions[k]:
                raise UsageError(
                    f"what follows cut {self.cuts[k]!r} overwrites that block's output in place, and {type(self).__name__} "
                    "still needs it: use low_memory=True, or the form of that module that is not in place"
                )


def _allowed(k: int, *outputs: Tensor) -> None:
    """No check: the user has allowed cuts that are bypassed."""


def perturb(tangents: Tangents, h: Tensor, passed_on: Tensor, drawn: list[Tensor]) -> list[Tensor]:
    """Add directions to the tangents that arrive at the output h of a block; returns the directions.

    Where none arrives, no earlier cut leads here (two towers side by side).
    """
    moved = []
    for index, u in enumerate(drawn):
        arrived = tangents.get(h, index)
        moved.append(u.clone() if arrived is None else arrived + u)
    tangents.set(passed_on, *moved)
    return drawn


def tangents_of(tangents: Tangents | None, cuts: Sequence[str], output: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tangents of each tensor of the network's output, in each direction."""
    if tangents is None or not cuts:
        return []
    found = [[tangents.get(z, index) for z in output] for index in range(tangents.directions)]
    if all(t is None for of_one in found for t in of_one):
        raise UsageError(
            f"no tangent reached the network's output from cut {cuts[-1]!r}: something after it is invisible to forward mode, "
            "such as .detach(), NumPy, or a custom operation: replace it, or leave out the cuts before it"
        )
    return [[torch.zeros_like(z) if t is None else t for z, t in zip(output, of_one, strict=True)] for of_one in found]


def measure_output(
    estimator: Estimator, x: Any, y: Any, again: Replay, directions: int, draw: Callable[[int, Tensor], list[Tensor]]
) -> tuple[Known, LossGradient, Any]:
    """What is known at the network's output after a pass that builds no graph, and that output.

    That many tangents travel along; ``draw(k, h)`` gives the directions that are added at the output h of block k. ``again``
    lets the next pass draw the same masks and start from the same buffers.
    """

    def pass_on(k: int, h: Tensor) -> Tensor:
        if tangents is None:
            return h.detach()
        with tangents.unseen(h):
            passed_on = h.detach()
            perturb(tangents, h, passed_on, draw(k, passed_on))
        return passed_on

    model, cuts = estimator.model, estimator.cuts
    tangents = Tangents(directions, through_gradients=True) if directions else None
    with again.frozen(), without_graph(estimator), tangents or nullcontext(), cut_graph(model, cuts, pass_on):
        output = call(model, x)
    found = output_error(estimator.loss, output, y)
    return known_at(estimator, x, y, found, tangents_of(tangents, cuts, found.at), draw), found, output


def known_at(
    estimator: Estimator,
    x: Any,
    y: Any,
    found: LossGradient,
    tangents: Sequence[Sequence[Tensor]] = (),
    directions: Callable[[int, Tensor], list[Tensor]] = lambda k, h: [],
) -> Known:
    """What is known of a batch once the output error is found."""
    axis = feature_axis([e.shape for e in found.e], y, estimator.loss)

    def real(k: int | None) -> Tensor | None:
        return padding(x, None if k is None else estimator.cuts[k], y)

    return Known(found.e, tangents, directions, y=y, loss=found.loss, axis=axis, real=real, mean=estimator.shard.mean)


class Passed(NamedTuple):
    """What the forward half of a step leaves for the half that learns.

    By number of block, the outputs with their graphs and the directions added there; the network's output (in another
    process's place, that of the last block here), and a function that gives the tangents of tensors in it.
    """

    outputs: dict[int, Tensor]
    drawn: dict[int, list[Tensor]]
    output: Any
    tangents: Callable[[Sequence[Tensor]], list[list[Tensor]]]
    y: Any = None
    """The targets of these samples, where they have to wait for the signal."""

    def directions(self, k: int, h: Tensor) -> list[Tensor]:
        """The directions that were added at the output h of block k."""
        return self.drawn[k]


class Known:
    """All that a rule may need to make error signals, of some samples of a batch, once the network's output is known.

    It is the same in every form of an estimate: plain and low-memory, on one process, on shards, and in a pipeline.

    ``e`` is dL/dz (N x C, already divided by the batch's number of samples for a mean loss; where the loss depends on several
    outputs, side by side). ``tangents`` has one N x C matrix for each direction, the tangents of the output, and
    ``directions(k, h)`` gives the directions that were added at the output h of block k. ``targets`` are what the loss
    compares the output with, and ``one_hot`` the same as rows of e's shape. ``loss`` is the batch's mean loss, as far as these
    samples add to it, and ``share`` their part of the samples that it is a mean over: 1, or less of a microbatch.

    ``outputs`` says what those rows are made of: the shapes of the output's tensors, and where their positions are (tokens,
    pixels). ``real(k)`` is the N x T mask of the real tokens at the output of block k, or of the network (k None); None where
    the batch tells of no padding. ``counted`` are the output's positions that the loss depends on. ``mean(tensors)`` makes
    means over these samples means over those of all processes.

    >>> known = Known(torch.zeros(2, 3), [], lambda k, h: [], y=torch.tensor([2, 0]), loss=torch.tensor(1.1))
    >>> known.one_hot
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """

    def __init__(
        self,
        e: Tensor | Sequence[Tensor],
        tangents: Sequence[Tensor | Sequence[Tensor]],
        directions: Callable[[int, Tensor], list[Tensor]],
        *,
        y: Any,
        loss: Tensor,
        share: float = 1.0,
        axis: int = LAST,
        real: Callable[[int | None], Tensor | None] = lambda k: None,
        mean: Callable[[Sequence[Tensor]], list[Tensor]] = list,
    ) -> None:
        self.e = as_rows(e)
        self.outputs = Outputs(tuple(tuple(part.shape) for part in ([e] if isinstance(e, Tensor) else e)), axis)
        self.tangents = [as_rows(t) for t in tangents]
        self.directions = directions
        self.loss = loss
        self.share = share
        self.real, self.mean = real, mean
        self._y = y

    @property
    def targets(self) -> Any:
        """The targets of these samples.

        Raises :class:`onward.UsageError` where this process of a pipeline was given none.
        """
        if self._y is None:
            raise UsageError("this rule reads the targets, and y is None here: give y to estimate in every process")
        return self._y

    @property
    def one_hot(self) -> Tensor:
        """The targets as rows of the shape and type of ``e``: of class numbers a 1 at the class, real numbers as they are.

        There is one class for each sample, or for each position of the outputs. A class number below 0, which losses ignore,
        makes zeros. Raises :class:`onward.UsageError` for other targets.
        """
        y, samples, positions = self.targets, len(self.e), self.outputs.positions
        classes = self.outputs.features if positions else self.e.shape[1]
        fits = isinstance(y, Tensor) and not y.is_floating_point() and classes > 1
        if fits and positions == (1,) and y.shape == (samples,):
            y = y.unsqueeze(1)
        numbered = fits and y.shape == (samples, *positions)
        if numbered and is_traced():  # then it is looked at in every run
            torch._assert_async(y.max() < classes, "a target is no class below the number of outputs")
        if numbered and (is_traced() or int(y.max()) < classes):
            found = (y.unsqueeze(-1) == torch.arange(classes, device=y.device)).to(self.e.dtype)
            return self.outputs.joined(found.flatten(1, -2)) if positions else found
        if isinstance(y, Tensor) and y.numel() == self.e.numel():
            return y.reshape(self.e.shape).to(self.e.dtype)
        shape = f" of shape {tuple(y.shape)}" if isinstance(y, Tensor) else ""
        each = f"{samples} samples" + (f" at {positions} positions" if positions else "")
        raise UsageError(
            f"this rule takes the targets for error signals, and {type(y).__name__}{shape} is neither a class below "
            f"{classes} for each of {each} nor a number for each output: use a rule that reads the output error, such as DFA"
        )

    @cached_property
    def counted(self) -> Tensor:
        """Which positions of the outputs the loss depends on (N x P): those with an error that are no padding.

        A position whose target the loss ignores has no error at any output.
        """
        found = torch.linalg.vector_norm(self.outputs.split(self.e), float("inf"), 2) != 0
        real = self.real(None)
        return found & real if real is not None and real.shape == found.shape else found

    @cached_property
    def weights(self) -> Tensor:
        """What each position of the outputs weighs in a mean over those that count (N P x 1): zeros where none does."""
        counted = self.counted.to(self.e.dtype).view(-1, 1)
        return counted / counted.sum().clamp(min=1)
