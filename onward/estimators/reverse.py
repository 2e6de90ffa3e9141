"""The reverse engine of forward gradients: one forward pass, and a backward sweep from block to block over the cut graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from onward import spaces
from onward.cuts import cut_graph, enter
from onward.errors import UsageError
from onward.estimators.base import Step, accumulate, call, check_last_block, output_error
from onward.estimators.signals import OutputError, perturb, tangents_of
from onward.forward_mode import Tangents
from onward.per_sample import Drawn, PerSample, Use, dots, parameters_behind, per_sample_gradients, record_uses, weighted_sum

if TYPE_CHECKING:
    from onward.estimators.forward_gradient import ForwardGradient

SWEPT = ("global", "above", "sum")  # gradients that reach a block through the blocks after it


class Block(NamedTuple):
    """A hidden block after the forward pass.

    Its output and that output's version; where it was entered; the gradients of its head and of its frozen head; the runs of
    its layers.
    """

    h: Tensor
    entry: GradientEdge | None
    local: Tensor | None
    guesses: list[Tensor] | None
    uses: list[Use]
    version: int


def estimate(fg: ForwardGradient, x: Any, y: Any) -> Step:
    """One step of ``fg``: target and guess share the forward pass."""
    blocks: dict[int, Block] = {}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    drawn: dict[int, list[Tensor]] = {}
    swept = [kind for kind in dict.fromkeys((fg.target, fg.guess)) if kind in SWEPT]
    of_samples = fg.space in (*spaces.OF_SAMPLES, "activation-2")
    entry: GradientEdge | None = None

    def deliver(k: int, h: Tensor) -> Tensor:
        nonlocal entry
        local, guesses = None, None
        if fg.heads is not None:
            local, *of_head = fg.heads.differentiate(k, h, y, fg.loss, fg.mask_seed, fg.step, learn=True)
            seen[fg.cuts[k]] = (of_head[0], of_head[1])
        if fg.frozen_heads is not None:
            guesses = fg.guesses(k, h, y, None)
        blocks[k] = Block(h, entry, local, guesses, list(uses), h._version)
        uses.clear()
        passed_on = enter(h) if swept else h.detach()
        entry = get_gradient_edge(passed_on) if swept else None
        if tangents is not None:
            drawn[k] = perturb(tangents, fg.cuts[k], k, h, passed_on, fg.feedback_direction(k, h))
        return passed_on

    tangents = Tangents(fg.feedback.directions) if fg.feedback is not None and fg.feedback.directions else None
    recording: AbstractContextManager[list[Use]] = record_uses(fg.model) if of_samples else nullcontext([])
    with recording as uses, tangents or nullcontext(), cut_graph(fg.model, fg.cuts, deliver):
        logits = call(fg.model, x)
        tangents_out = tangents_of(tangents, fg.cuts, logits)
    with fg.separation() as check:
        for k, block in blocks.items():
            check(k, block.h)
        check(len(fg.cuts), logits)
    parameters = list(parameters_behind(logits)) if logits.requires_grad else []
    loss, e = logits.new_zeros(()), logits  # what the sweep starts with, but where the last block is in another process
    if fg.ends_here:
        check_last_block(fg.cuts, bool(parameters))
        loss, e = output_error(fg.loss, logits, y)
    error = OutputError(e, tangents_out, lambda k, h: drawn[k])
    with torch.autocast(logits.device.type, enabled=False):
        _sweep(fg, blocks, logits, parameters, entry, swept, error, e.to(logits.dtype), y)
    return Step(loss, logits.detach(), seen)


def _sweep(
    fg: ForwardGradient,
    blocks: dict[int, Block],
    logits: Tensor,
    parameters: list[nn.Parameter],
    entry: GradientEdge | None,
    swept: Sequence[str],
    error: OutputError,
    e: Tensor,
    y: Any,
) -> None:
    """Fill ``.grad`` from the last block, entered at ``entry``, to the first; each is forgotten when it is done."""
    if not fg.cuts and fg.space == "avg-weight":  # Baydin et al.: there is no last block
        _estimate_parameters(fg, parameters, through(logits, e, parameters), None)
        return
    gradients = through(logits, e, [*parameters, *([entry] if entry else [])])
    carried: dict[str, Tensor | None] = dict.fromkeys(swept, gradients.pop() if entry else None)
    accumulate(parameters, gradients)
    while blocks:
        k, block = blocks.popitem()
        if block.h.requires_grad:
            carried = _learn(fg, k, block, carried, error, y)
        if fg.feedback is not None:
            _check_kept(fg, k, block)
            with torch.no_grad():
                fg.feedback.learn(k, block.h.detach(), error)


def _learn(
    fg: ForwardGradient, k: int, block: Block, carried: dict[str, Tensor | None], error: OutputError, y: Any
) -> dict[str, Tensor | None]:
    """Fill ``.grad`` of block k, given the swept signals that reach its output; returns what reaches the block before it."""
    h, uses = block.h, block.uses
    parameters = list(parameters_behind(h))
    carried_on: dict[str, Tensor | None] = {}

    def signal(kind: str) -> Tensor:
        if kind == "local":
            assert block.local is not None
            return block.local
        arriving = carried[kind]
        if arriving is None:  # nothing after this block depends on it
            arriving = torch.zeros_like(h)
        return arriving if kind != "sum" or block.local is None else arriving + block.local

    def sweep(kind: str, delivered: Tensor, edges: Sequence[Any]) -> list[Tensor | None]:
        """What of a signal arrives at the edges; notes what of its kind goes on to the block before this one."""
        entry = [block.entry] if kind in SWEPT and block.entry is not None else []
        if entry and kind == "above":
            (carried_on[kind],) = through(h, signal("local"), entry)
            entry = []
        found = through(h, delivered, [*edges, *entry])
        if entry:
            carried_on[kind] = found.pop()
        return found

    target = signal(fg.target)
    drawn_in_weights = fg.guess == "random" and fg.space in (*spaces.OF_SAMPLES, "avg-weight")
    if drawn_in_weights:
        guesses = []
    elif fg.guess in ("local", *SWEPT):
        guesses = [signal(fg.guess)]
    else:
        guesses = block.guesses or fg.guesses(k, h, y, error)
    edges: Sequence[Any] = []
    if fg.space == "avg-weight":
        edges = parameters
    elif fg.space in (*spaces.OF_SAMPLES, "activation-2"):
        edges = [use.output for use in uses]
    compared = [] if fg.space == "activation-2" else edges  # the target itself is not needed inside the block
    at_target = sweep(fg.target, target, compared)
    same = fg.guess == fg.target and compared is edges
    at_guesses = [at_target] if same else [sweep(fg.guess, u, edges) for u in guesses]
    if not parameters:
        return carried_on
    if fg.space == "avg-weight":
        _estimate_parameters(fg, parameters, at_target, None if drawn_in_weights else at_guesses)
    elif fg.space == "activation-2":
        weights = fg.row_weights([dots(target, u) for u in guesses], guesses)
        accumulate_rows(h, uses, guesses, at_guesses, weights)
    elif fg.space in spaces.OF_SAMPLES:
        estimate_samples(fg, k, h, uses, [target, *guesses], [at_target, *at_guesses])
    else:
        if fg.space == "span-activation":
            delta = torch.stack([spaces.span_rows(target, fg.shard.gather(u)) for u in guesses]).mean(0)
        else:
            delta = weighted_sum(guesses, fg.row_weights([dots(target, u) for u in guesses], guesses))
        torch.autograd.backward(h, fg.observed(k, delta), inputs=parameters)
        return carried_on
    if not drawn_in_weights:
        fg.observed(k, guesses[0])
    return carried_on


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
    fg: ForwardGradient,
    k: int,
    h: Tensor,
    uses: Sequence[Use],
    signals: Sequence[Tensor],
    arrived: Sequence[Sequence[Tensor | None]],
) -> None:
    """Add to ``.grad`` the estimates in the spaces of each sample's parameter gradients."""
    names = {p: name for name, p in fg.model.named_parameters()}
    for p, gradients in per_sample_gradients(h, uses, signals, arrived):
        name = names[p]
        if len(signals) == 1:
            gradients = Drawn(gradients, partial(fg.drawn_rows, name, p, k))
        accumulate([p], [_estimate_one(fg, name, k, gradients, p)])


def _estimate_one(fg: ForwardGradient, name: str, k: int, gradients: PerSample, p: Tensor) -> Tensor:
    m = range(fg.directions)
    if fg.space == "span-weight":
        gradients = fg.shard.gather_rows(gradients, fg.directions)
        return torch.stack([spaces.span_total(gradients, 1 + i) for i in m]).mean(0)
    if fg.space == "random-sign-weight":
        return gradients.totals([fg.coin(name, k, gradients.samples, p) / fg.directions for _ in m])
    pairs = fg.pairs()

    def weigh(found: Sequence[Tensor]) -> Sequence[Tensor]:
        return fg.weights(found[: fg.directions], dict(zip(pairs, found[fg.directions :], strict=True)))

    compared = [*((0, 1 + i) for i in m), *((1 + i, 1 + j) for i, j in pairs)]
    return gradients.weighed(compared, weigh, by_sample=fg.space != "f-weight")


@torch.no_grad()
def _estimate_parameters(
    fg: ForwardGradient,
    parameters: Sequence[nn.Parameter],
    target: Sequence[Tensor | None],
    guesses: Sequence[Sequence[Tensor | None]] | None,
) -> None:
    """Add to ``.grad`` the estimates in the space of the batch's gradients; guesses None: random."""
    names = {p: name for name, p in fg.model.named_parameters()}
    # A custom function may return no gradient; what then does not arrive has no estimate either.
    kept = [j for j, found in enumerate(zip(target, *(guesses or ()), strict=True)) if all(g is not None for g in found)]
    reached = fg.shard.mean([g for j in kept if (g := target[j]) is not None])
    known = [fg.shard.mean([u for j in kept if (u := at_guess[j]) is not None]) for at_guess in guesses or ()]
    for index, (p, g) in enumerate(zip([parameters[j] for j in kept], reached, strict=True)):
        if guesses is None:
            along = [fg.drawn_weights(names[p], p, i) for i in range(fg.directions)]
        else:
            along = [at_guess[index] for at_guess in known]
        slopes = [dots(g.unsqueeze(0), u.unsqueeze(0)) for u in along]
        accumulate([p], [fg.along(slopes, along)])


def through(h: Tensor, signal: Tensor, edges: Sequence[Any]) -> list[Tensor | None]:
    """What of a signal at h arrives at each edge of its graph, which is kept."""
    if not edges:
        return []
    arrived = torch.autograd.grad(h, edges, signal, retain_graph=True, allow_unused=True)
    return [a.to_dense() if a is not None and a.is_sparse else a for a in arrived]


def _check_kept(fg: ForwardGradient, k: int, block: Block) -> None:
    assert fg.feedback is not None
    if fg.feedback.reads_outputs and block.h._version != block.version:
        raise UsageError(
            f"what follows cut {fg.cuts[k]!r} overwrites that block's output in place, and the feedback rule still needs it: "
            "use the form of that module that is not in place, or another feedback rule"
        )
