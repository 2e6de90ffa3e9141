"""The reverse engine of forward gradients: one forward pass, and a backward sweep from block to block over the cut graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from onward.derivatives.directions import without_row
from onward.derivatives.graph import backward, grad, padding_rows, parameters_behind
from onward.derivatives.layers import Use, per_sample_gradients, record_uses
from onward.derivatives.per_sample import Drawn, PerSample, dots
from onward.derivatives.tangents import Tangents
from onward.errors import UsageError
from onward.estimators.base import Step, check_last_block
from onward.estimators.forward_gradient import spaces
from onward.estimators.forward_gradient.rule import Rule
from onward.estimators.signals import Known, known_at, perturb, tangents_of
from onward.network.cuts import cut_graph, enter
from onward.network.gradients import ParameterNames, accumulate
from onward.network.run import LossGradient, call, detached, in_full, leaves, output_error

SWEPT = ("global", "above", "sum")  # gradients that reach a block through the blocks after it


class Block(NamedTuple):
    """A hidden block after the forward pass.

    Its output and that output's version; the gradients of its head and of its frozen head; the runs of its layers.
    """

    h: Tensor
    local: Tensor | None
    guesses: list[Tensor] | None
    uses: list[Use]
    version: int


class Sweep:
    """The gradients that reach blocks through the blocks after them, by kind and number of block.

    ``entries`` are the places where what follows a cut was entered: of the next block, or also of later ones, which a skip
    connection leads to.
    """

    def __init__(self, kinds: Sequence[str], entries: dict[int, GradientEdge]) -> None:
        self.kinds, self.entries = kinds, entries
        self.arrived: dict[str, dict[int, Tensor]] = {kind: {} for kind in kinds}

    def before(self, k: int) -> list[int]:
        """The cuts that block k may have been entered from."""
        return [j for j in self.entries if j < k]

    def add(self, kind: str, cuts: Sequence[int], found: Sequence[Tensor | None]) -> None:
        """Take in what of a block's signal arrives at the entries of earlier cuts."""
        for k, gradient in zip(cuts, found, strict=True):
            if gradient is not None:
                known = self.arrived[kind].get(k)
                self.arrived[kind][k] = gradient if known is None else known + gradient


def estimate(fg: Rule, x: Any, y: Any) -> Step:
    """One step of ``fg``: target and guess share the forward pass."""
    blocks: dict[int, Block] = {}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    drawn: dict[int, list[Tensor]] = {}
    swept = [kind for kind in dict.fromkeys((fg.target, fg.guess)) if kind in SWEPT]
    of_samples = fg.comparison.in_samples
    sweep = Sweep(swept, {})

    def deliver(k: int, h: Tensor) -> Tensor:
        check(k, h)
        local, guesses = None, None
        if fg.heads is not None:
            seed, real = fg.mask_seed, fg.real[k]
            local, *of_head = fg.heads.differentiate(k, h, y, fg.loss, seed, fg.step, learn=True, real=real)
            seen[fg.cuts[k]] = (of_head[0], of_head[1])
        if fg.frozen_heads is not None:
            guesses = fg.guesses(k, h, y, None)
        blocks[k] = Block(h, local, guesses, list(uses), h._version)
        uses.clear()
        passed_on = enter(h) if swept else h.detach()
        if swept:
            sweep.entries[k] = get_gradient_edge(passed_on)
        if tangents is not None:
            drawn[k] = perturb(tangents, h, passed_on, fg.feedback_direction(k, h))
        return passed_on

    tangents = Tangents(fg.feedback.directions) if fg.feedback is not None and fg.feedback.directions else None
    recording: AbstractContextManager[list[Use]] = record_uses(fg.model) if of_samples else nullcontext([])
    cutting = cut_graph(fg.model, fg.cuts, deliver, entered=bool(swept))
    with recording as uses, fg.separation() as check, tangents or nullcontext(), cutting:
        output = call(fg.model, x)
        check(len(fg.cuts), *leaves(output))
    ends = leaves(output)
    found = LossGradient(ends[0].new_zeros(()), [], [], [])  # where the last block is in another process
    if fg.ends_here:
        check_last_block(fg.cuts, output, entered=bool(swept))
        found = output_error(fg.loss, output, y)
    known = None
    if fg.feedback is not None:
        moved = tangents_of(tangents, fg.cuts, found.at)
        known = known_at(fg, x, y, found, moved, lambda k, h: drawn[k])
    with in_full(ends[0].device.type):
        _sweep(fg, blocks, found, sweep, known, y)
    return Step(found.loss, detached(output), seen)


def _sweep(fg: Rule, blocks: dict[int, Block], found: LossGradient, sweep: Sweep, known: Known | None, y: Any) -> None:
    """Fill ``.grad`` from the last block to the first; each is forgotten when it is done."""
    trained = [z for z in found.at if z.requires_grad]
    parameters = list(parameters_behind(*trained))
    e = [e.to(z.dtype) for z, e in zip(found.at, found.e, strict=True) if z.requires_grad]
    if not fg.cuts and fg.comparison.of == "batch":  # there is no last block
        _estimate_parameters(fg, parameters, through(trained, e, parameters), None, padding_rows(*trained))
        return
    if fg.ends_here:
        entered = list(sweep.entries)
        gradients = through(trained, e, [*parameters, *sweep.entries.values()])
        for kind in sweep.kinds:
            last = entered[-1:] if kind == "above" else entered
            sweep.add(kind, last, gradients[len(gradients) - len(last) :])
        accumulate(parameters, gradients[: len(parameters)])
    while blocks:
        k, block = blocks.popitem()
        if block.h.requires_grad:
            _learn(fg, k, block, sweep, known, y)
        if fg.feedback is not None:
            assert known is not None
            _check_kept(fg, k, block)
            with torch.no_grad():
                fg.feedback.learn(k, block.h.detach(), known)


def _learn(fg: Rule, k: int, block: Block, sweep: Sweep, known: Known | None, y: Any) -> None:
    """Fill ``.grad`` of block k, and hand what reaches it on to the blocks before it."""
    h, uses = block.h, block.uses
    parameters = list(parameters_behind(h))
    handed_on: set[str] = set()

    def signal(kind: str) -> Tensor:
        if kind == "local":
            assert block.local is not None
            return block.local
        arriving = sweep.arrived[kind].get(k)
        if arriving is None:  # nothing after this block depends on it
            arriving = torch.zeros_like(h)
        return arriving if kind != "sum" or block.local is None else arriving + block.local

    def deliver(kind: str, delivered: Tensor, edges: Sequence[Any]) -> list[Tensor | None]:
        """What of a signal arrives at the edges; takes note of what goes on to earlier blocks."""
        before = sweep.before(k) if kind in SWEPT and kind not in handed_on else []
        handed_on.add(kind)
        if kind == "above":
            next_before = [j for j in before if j == k - 1]
            sweep.add(kind, next_before, through(h, signal("local"), [sweep.entries[j] for j in next_before]))
            before = []
        found = through(h, delivered, [*edges, *(sweep.entries[j] for j in before)])
        if before:
            sweep.add(kind, before, found[len(edges) :])
        return found[: len(edges)]

    target = signal(fg.target)
    drawn_in_weights = fg.guess == "random" and fg.comparison.of != "rows"
    if drawn_in_weights:
        guesses = []
    elif fg.guess in ("local", *SWEPT):
        guesses = [signal(fg.guess)]
    else:
        guesses = block.guesses or fg.guesses(k, h, y, known)
    edges: Sequence[Any] = []
    if fg.comparison.of == "batch":
        edges = parameters
    elif fg.comparison.in_samples:
        edges = [use.output for use in uses]
    weighs_rows = fg.comparison.of == "rows" and fg.comparison.in_samples
    compared = [] if weighs_rows else edges  # the target itself is not needed inside the block
    at_target = deliver(fg.target, target, compared)
    same = fg.guess == fg.target and compared is edges
    at_guesses = [at_target] if same else [deliver(fg.guess, u, edges) for u in guesses]
    if not parameters:
        return
    if fg.comparison.of == "batch":
        _estimate_parameters(fg, parameters, at_target, None if drawn_in_weights else at_guesses, padding_rows(h))
    elif fg.comparison.of == "samples":
        estimate_samples(fg, k, h, uses, [target, *guesses], [at_target, *at_guesses])
    elif weighs_rows:
        weights = fg.row_weights([dots(target, u) for u in guesses], guesses)
        accumulate_rows(h, uses, guesses, at_guesses, weights)
    else:
        backward(h, fg.observed(k, _estimate_signal(fg, k, target, guesses)), inputs=parameters)
        return
    if not drawn_in_weights:
        fg.observed(k, guesses[0])


def _estimate_signal(fg: Rule, k: int, target: Tensor, guesses: Sequence[Tensor]) -> Tensor:
    """The estimate in the spaces of each sample's rows of activations."""
    if fg.comparison.spans:
        return torch.stack([spaces.span_rows(target, fg.shard.gather(u)) for u in guesses]).mean(0)
    inner = [dots(fg.compared(k, target), fg.compared(k, u)) for u in guesses]
    return fg.weighted(k, inner, guesses)


def accumulate_rows(
    h: Tensor,
    uses: Sequence[Use],
    guesses: Sequence[Tensor],
    arrived: Sequence[Sequence[Tensor | None]],
    weights: Sequence[Tensor],
) -> None:
    """Add to ``.grad`` the sum over samples and directions i of weights^i_n times the parameter gradients under guess i."""
    for p, gradients in per_sample_gradients(h, uses, guesses, arrived):
        accumulate([p], [gradients.totals(weights, first=0)])


def estimate_samples(
    fg: Rule,
    k: int,
    h: Tensor,
    uses: Sequence[Use],
    signals: Sequence[Tensor],
    arrived: Sequence[Sequence[Tensor | None]],
) -> None:
    """Add to ``.grad`` the estimates in the spaces of each sample's parameter gradients."""
    names = ParameterNames(fg.model)
    padding = padding_rows(h)
    for p, gradients in per_sample_gradients(h, uses, signals, arrived):
        name, row = names[p], padding.get(p)
        if len(signals) == 1:

            def rows(i: int, part: slice, name: str = name, p: Tensor = p, row: int | None = row) -> Tensor:
                return without_row(fg.drawn_rows(name, p, k, i, part), row, dim=1)

            gradients = Drawn(gradients, rows)
        accumulate([p], [_estimate_one(fg, name, k, gradients, p)])


def _estimate_one(fg: Rule, name: str, k: int, gradients: PerSample, p: Tensor) -> Tensor:
    m = range(fg.directions)
    if fg.comparison.spans:
        gradients = fg.shard.gather_rows(gradients, fg.directions)
        return torch.stack([spaces.span_total(gradients, 1 + i) for i in m]).mean(0)
    if fg.space == "random-sign-weight":
        return gradients.totals([fg.coin(name, k, gradients.samples, p) / fg.directions for _ in m])
    pairs = fg.pairs()

    def weigh(found: Sequence[Tensor]) -> Sequence[Tensor]:
        return fg.weights(found[: fg.directions], dict(zip(pairs, found[fg.directions :], strict=True)))

    compared = [*((0, 1 + i) for i in m), *((1 + i, 1 + j) for i, j in pairs)]
    return gradients.weighed(compared, weigh, by_sample=fg.comparison.weigh is not spaces.filtered)


@torch.no_grad()
def _estimate_parameters(
    fg: Rule,
    parameters: Sequence[nn.Parameter],
    target: Sequence[Tensor | None],
    guesses: Sequence[Sequence[Tensor | None]] | None,
    padding: Mapping[nn.Parameter, int],
) -> None:
    """Add to ``.grad`` the estimates in the space of the batch's gradients; guesses None: random, but for rows of padding."""
    names = ParameterNames(fg.model)
    # A custom function may return no gradient; what then does not arrive has no estimate either.
    kept = [j for j, found in enumerate(zip(target, *(guesses or ()), strict=True)) if all(g is not None for g in found)]
    reached = fg.shard.mean([g for j in kept if (g := target[j]) is not None])
    known = [fg.shard.mean([u for j in kept if (u := at_guess[j]) is not None]) for at_guess in guesses or ()]
    for index, (p, g) in enumerate(zip([parameters[j] for j in kept], reached, strict=True)):
        if guesses is None:
            along = [without_row(fg.drawn_weights(names[p], p, i), padding.get(p)) for i in range(fg.directions)]
        else:
            along = [at_guess[index] for at_guess in known]
        slopes = [dots(g.unsqueeze(0), u.unsqueeze(0)) for u in along]
        accumulate([p], [fg.along(slopes, along)])


def through(h: Tensor | Sequence[Tensor], signal: Tensor | Sequence[Tensor], edges: Sequence[Any]) -> list[Tensor | None]:
    """What of a signal at h arrives at each edge of its graph, which is kept."""
    if not edges:
        return []
    arrived = grad(h, edges, signal, retain_graph=True, allow_unused=True)
    return [a.to_dense() if a is not None and a.is_sparse else a for a in arrived]


def _check_kept(fg: Rule, k: int, block: Block) -> None:
    assert fg.feedback is not None
    if fg.feedback.reads_outputs and block.h._version != block.version:
        raise UsageError(
            f"what follows cut {fg.cuts[k]!r} overwrites that block's output in place, and the feedback rule still needs it: "
            "use the form of that module that is not in place, or another feedback rule"
        )
