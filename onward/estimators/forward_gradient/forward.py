"""The forward engine of forward gradients: tangents measure derivatives, and no graph outlives one block's work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from onward.derivatives.directions import seed_of, without_row
from onward.derivatives.graph import backward, is_traced, padding_rows, parameters_behind
from onward.derivatives.layers import Use, record_uses
from onward.derivatives.per_sample import dots, weighted_sum
from onward.errors import UsageError
from onward.estimators.base import Step
from onward.estimators.forward_gradient.measure import Measured, Site, measure
from onward.estimators.forward_gradient.reverse import accumulate_rows, estimate_samples, through
from onward.estimators.forward_gradient.rule import Rule
from onward.estimators.lean import Along, deliver
from onward.estimators.signals import Known, measure_output
from onward.network.cuts import Elsewhere, cut_graph
from onward.network.gradients import ParameterNames, accumulate, allocate_gradients, forget_unused
from onward.network.parts import submodule
from onward.network.replay import Replay, check_same_output
from onward.network.run import call, detached, in_full, leaves

Guess = Callable[[], list[Tensor]]
_KEPT = 1 << 15  # bytes of guesses that are kept from one pass to the next


def estimate(fg: Rule, x: Any, y: Any) -> Step:
    """One step of ``fg``: passes without a graph, which measure, and one that differentiates block by block."""
    # Weights are measured after the pass that differentiates, which moves running statistics.
    again = Replay(fg, start_of_buffers=fg.comparison.of == "batch" and bool(fg.cuts))
    if not fg.cuts and fg.comparison.of == "batch":
        return _without_cuts(fg, x, y, again)
    fresh = allocate_gradients(fg)
    known = None
    if fg.feedback is not None:
        known, *_ = measure_output(fg, x, y, again, fg.feedback.directions, fg.feedback_direction)
    step = (_parameters if fg.comparison.of == "batch" else _activations)(fg, x, y, again, known)
    forget_unused(fresh)
    return step


def _activations(fg: Rule, x: Any, y: Any, again: Replay, known: Known | None) -> Step:
    """Measure along guesses at the blocks' outputs, then deliver to each block its own, weighted."""
    slopes: dict[Site, Tensor] = {}
    small: dict[Site, Tensor] = {}  # random guesses that take no longer to keep than to draw again
    measured = None
    if fg.space != "random-sign-weight":  # which compares with nothing
        here = [k for k, name in enumerate(fg.cuts) if not isinstance(submodule(fg.model, name), Elsewhere)]
        sites = [Site(k, None, i) for k in here for i in range(fg.directions)]
        slots = _slots(fg, sites)

        def inject(h: Tensor, wanted: Sequence[Site]) -> list[Tensor]:
            found = fg.guesses(wanted[0].block, h, y, known, [site.direction for site in wanted])
            if fg.guess == "random" and len(small) * found[0].nbytes < _KEPT:
                small.update(zip(wanted, found, strict=True))
            if not _signed(fg):
                return found
            return [weighted_sum([u], [_sign(fg, s, (len(h),))]) for s, u in zip(wanted, found, strict=True)]

        measured = measure(fg, x, y, again, slots, at_output=inject)
        slopes = measured.slopes
        for site, slope in slopes.items() if _signed(fg) else ():
            sign = _sign(fg, site, slope.shape[:1])
            slopes[site] = slope * (sign if slope.dim() == 1 else sign.unsqueeze(1))
    of_samples = fg.comparison.in_samples
    recording: AbstractContextManager[list[Use]] = record_uses(fg.model) if of_samples else nullcontext([])

    def learn(k: int, h: Tensor, guess: Guess) -> None:
        kept = [small[site] for i in range(fg.directions) if (site := Site(k, None, i)) in small]
        guesses = kept if len(kept) == fg.directions else guess()
        with in_full(h.device.type):
            differentiate(k, h, guesses)

    def differentiate(k: int, h: Tensor, guesses: list[Tensor]) -> None:
        ran = list(uses)  # without those that a recomputation in the backward pass adds
        if of_samples:
            fg.observed(k, guesses[0])
        if fg.space == "random-sign-weight":
            # Nothing is compared, but what follows takes a target first: any signal of the right shape does.
            signals = [guesses[0]] * (1 if fg.guess == "random" else 2)
            arrived = through(h, guesses[0], [use.output for use in ran])
            estimate_samples(fg, k, h, ran, signals, [arrived] * len(signals))
            return
        inner = [slopes[Site(k, None, i)] for i in range(fg.directions)]
        if fg.space == "activation-2":
            arrived_at = [through(h, u, [use.output for use in ran]) for u in guesses]
            accumulate_rows(h, ran, guesses, arrived_at, fg.row_weights(inner, guesses))
        else:
            backward(h, fg.observed(k, fg.weighted(k, inner, guesses)))

    with recording as uses:
        step = _block_by_block(fg, x, y, again, known, learn, after=uses.clear)
    if measured is not None:
        _check_same(measured.output, step)
    return step


def _check_same(output: Any, step: Step) -> None:
    if output is None:  # nothing was measured: nothing trains in the hidden blocks
        return
    check_same_output(leaves(output), leaves(step.output), "use engine='reverse', which runs the network once")


def _parameters(fg: Rule, x: Any, y: Any, again: Replay, known: Known | None) -> Step:
    """Find each block's parameter gradients under the guess, then measure along them."""
    members: dict[int, list[nn.Parameter]] = {}
    along: dict[Site, Tensor] = {}

    def learn(k: int, h: Tensor, guess: Guess) -> None:
        names = ParameterNames(fg.model)  # now: a layer may have been made in this pass
        members[k] = list(parameters_behind(h))
        if not members[k]:
            return
        for i in range(fg.directions):
            if fg.guess == "random":
                padding = padding_rows(h)
                reached = members[k]
                found = [without_row(fg.drawn_weights(names[p], p, i), padding.get(p)) for p in members[k]]
            else:
                arrived = zip(members[k], through(h, fg.observed(k, guess()[i]), members[k]), strict=True)
                kept = [(p, u) for p, u in arrived if u is not None]  # a custom function may return no gradient
                reached, found = [p for p, _ in kept], fg.shard.mean([u for _, u in kept])
            for p, direction in zip(reached, found, strict=True):
                along[Site(k, names[p], i)] = direction

    step = _block_by_block(fg, x, y, again, known, learn)
    _check_same(_estimate_along(fg, x, y, again, members, along).output, step)
    return step


def _without_cuts(fg: Rule, x: Any, y: Any, again: Replay) -> Step:
    """Baydin et al.: one direction for all parameters of the network; nothing is differentiated in reverse."""
    named = {name: p for name, p in fg.model.named_parameters() if p.requires_grad}
    if fg.kept is not None:
        return _lean(fg, x, y, again, named)
    along = {Site(0, name, i): fg.drawn_weights(name, p, i) for i in range(fg.directions) for name, p in named.items()}
    measured = _estimate_along(fg, x, y, again, {0: list(named.values())}, along)
    return Step(measured.loss, detached(measured.output))


def _lean(fg: Rule, x: Any, y: Any, again: Replay, named: Mapping[str, nn.Parameter]) -> Step:
    """The same without a gradient: directions are drawn where an operation needs them, and the estimate is its numbers."""
    if is_traced():
        raise UsageError("its directions are drawn where they are used, which no trace holds")

    def drawn(site: Site) -> Tensor:
        assert site.parameter is not None
        return fg.drawn_weights(site.parameter, named[site.parameter], site.direction)

    sites = [Site(0, name, i) for name in named for i in range(fg.directions)]
    members = {0: list(named.values())}
    measured = measure(fg, x, y, again, _slots(fg, sites), on_parameters=drawn, members=members)
    slopes_of = _checked(_mean_slopes(fg, measured.slopes), sites)
    weights: dict[str, list[float]] = {}
    for name, p in named.items():
        slopes = [slopes_of.get(Site(0, name, i), measured.loss.new_zeros(1)) for i in range(fg.directions)]
        products: dict[tuple[int, int], Tensor] = {}
        if pairs := fg.pairs():
            along = [without_row(drawn(Site(0, name, i)), measured.padding.get(p)) for i in range(fg.directions)]
            products = {(i, j): dots(along[i].view(1, -1), along[j].view(1, -1)) for i, j in pairs}
        weights[name] = torch.stack(fg.weights(slopes, products)).flatten().tolist()
    padding = {name: measured.padding[p] for name, p in named.items() if p in measured.padding}
    deliver(fg, Along(fg.seed, fg.step, fg.noise, weights, padding))
    return Step(measured.loss, detached(measured.output))


def _estimate_along(
    fg: Rule,
    x: Any,
    y: Any,
    again: Replay,
    members: Mapping[int, Sequence[nn.Parameter]],
    along: dict[Site, Tensor],
) -> Measured:
    """Measure along directions of parameters, block by block, and add the estimates to ``.grad``."""
    named = dict(fg.model.named_parameters())

    def tangent(site: Site) -> Tensor:
        return along[site] * _sign(fg, site, ()) if _signed(fg) else along[site]

    slots = _slots(fg, list(along))
    measured = measure(fg, x, y, again, slots, on_parameters=tangent, members=members)
    slopes_of = _checked(_mean_slopes(fg, measured.slopes), list(along))
    estimated: set[str] = set()
    for site in [site for site in along if site.direction == 0]:
        if fg.passes == "one" and fg.guess == "random" and site.parameter in estimated:
            continue  # one direction and one slope for all the blocks that use the parameter
        estimated.add(str(site.parameter))
        sites = [site._replace(direction=i) for i in range(fg.directions)]
        directions = [without_row(along.pop(s), measured.padding.get(named[str(s.parameter)])) for s in sites]
        zero = measured.loss.new_zeros(1)
        slopes = [slopes_of[s] * _sign(fg, s, ()) if s in slopes_of else zero for s in sites]
        assert site.parameter is not None
        with torch.no_grad():
            accumulate([named[site.parameter]], [fg.along(slopes, directions)])
    return measured


def _checked(slopes: dict[Site, Tensor], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """The slopes, of which there has to be one if there are sites."""
    if sites and not slopes:
        raise UsageError(
            "no tangent reached the target's loss from any parameter: part of the network is invisible to forward mode "
            "(.detach(), NumPy, a custom operation), or nothing in it requires a gradient"
        )
    return slopes


def _mean_slopes(fg: Rule, slopes: dict[Site, Tensor]) -> dict[Site, Tensor]:
    """The derivatives of the whole batch's loss; those that sites share, by sharing a tangent, are exchanged once."""
    measured = list({id(slope): slope for slope in slopes.values()}.values())
    means = dict(zip(map(id, measured), fg.shard.mean(measured), strict=True))
    return {site: means[id(slope)] for site, slope in slopes.items()}


def _block_by_block(
    fg: Rule,
    x: Any,
    y: Any,
    again: Replay,
    known: Known | None,
    learn: Callable[[int, Tensor, Guess], None],
    after: Callable[[], object] = lambda: None,
) -> Step:
    """The pass that differentiates: one block's graph, its guesses, ``learn``; the last block gets the exact gradient."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def deliver(k: int, h: Tensor) -> Tensor:
        check(k, h)
        local = None
        if fg.heads is not None:
            seed, real = fg.mask_seed, fg.real[k]
            local, value, z = fg.heads.differentiate(k, h, y, fg.loss, seed, fg.step, learn=True, real=real)
            seen[fg.cuts[k]] = value, z
        if h.requires_grad:
            of_head = [local] if fg.guess == "local" and local is not None else None
            learn(k, h, lambda: of_head or fg.guesses(k, h, y, known))
        if fg.feedback is not None:
            assert known is not None
            with torch.no_grad(), in_full(h.device.type):
                fg.feedback.learn(k, h.detach(), known)
        after()
        return h.detach()

    with again, fg.separation() as check, cut_graph(fg.model, fg.cuts, deliver):
        output = call(fg.model, x)
        check(len(fg.cuts), *leaves(output))
    loss = fg.learn_last(output, y)
    return Step(loss, detached(output), seen)


def _slots(fg: Rule, sites: Sequence[Site]) -> list[list[Site]]:
    """Which sites share a tangent."""
    if fg.passes == "block":
        return [[site] for site in sites]
    return [[site for site in sites if site.direction == i] for i in range(fg.directions)]


def _signed(fg: Rule) -> bool:
    return fg.passes == "one" and fg.guess != "random"  # noise has random signs already


def _sign(fg: Rule, site: Site, shape: Sequence[int]) -> Tensor:
    """What tells the sites in one tangent apart: a random sign for each sample at a block's output, one for a parameter."""
    like = next(fg.model.parameters())
    if not _signed(fg):
        return like.new_ones(shape)
    seed = seed_of(fg.seed, "sign", site.parameter or "")
    block = site.block if site.parameter is None else f"block {site.block}"
    return fg.drawn(shape, block, like, noise="rademacher", seed=seed, offset=fg.shard.first)
