"""The passes of the forward engine that measure: tangents enter at blocks, slopes are read where the target's losses are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onward.derivatives.per_sample import dots
from onward.derivatives.tangents import Tangents
from onward.errors import UsageError
from onward.estimators.forward_gradient.rule import Rule
from onward.network.cuts import cut_graph
from onward.network.gradients import ParameterNames
from onward.network.padding import without_padding
from onward.network.replay import Replay
from onward.network.run import Loss, as_rows, call, check_samples, leaves, output_error, without_graph

_AT_ONCE = 4  # tangents in one pass where every block has its own, so that memory does not grow with the number of blocks


class Site(NamedTuple):
    """Where a guess is a tangent: at the output of a block, or on a parameter while that block runs."""

    block: int
    parameter: str | None
    direction: int


class Measured(NamedTuple):
    """The derivative along each site's tangent, of shape (N,), or (1,) for a parameter's; what the passes saw."""

    slopes: dict[Site, Tensor]
    loss: Tensor
    output: Any
    padding: dict[nn.Parameter, int]
    """The rows of parameters that the network leaves out of their gradients, where it was run as a whole."""


AtOutput = Callable[[Tensor, "Sequence[Site]"], list[Tensor]]
"""Gives the tangents that enter at the output h of a block, for its sites."""
OnParameter = Callable[[Site], Tensor]
"""Gives the tangent of a site's parameter."""


def measure(
    fg: Rule,
    x: Any,
    y: Any,
    again: Replay,
    slots: Sequence[Sequence[Site]],
    *,
    at_output: AtOutput | None = None,
    on_parameters: OnParameter | None = None,
    members: Mapping[int, Sequence[nn.Parameter]] = MappingProxyType({}),
) -> Measured:
    """The derivative of the target along each site's tangent: one tangent for each slot, which may serve several sites.

    A target is read where its losses are: at the heads, from the tangents of a block's output, and at the network's output.
    """
    slopes: dict[Site, Tensor] = {}
    at_once = len(slots) if fg.passes == "one" else _AT_ONCE
    chunks = [slots[start : start + at_once] for start in range(0, len(slots), max(1, at_once))]
    loss, output = torch.empty(0), None
    padding: dict[nn.Parameter, int] = {}
    for index, chunk in enumerate(chunks):
        tangents = Tangents(len(chunk), through_gradients=True)
        one = _Pass(fg, y, chunk, tangents, slopes, at_output, on_parameters, members)
        # The only pass of a network without cuts is the one that moves its running statistics.
        running = again if not fg.cuts and index == len(chunks) - 1 else again.frozen()
        with running, without_graph(fg), tangents, cut_graph(fg.model, fg.cuts, one.deliver):
            one.enter(min(members, default=0))
            output = call(fg.model, x)
            loss = one.read(len(fg.cuts), fg.loss, output) if fg.ends_here else leaves(output)[0].new_zeros(())
        padding |= tangents.padding_rows() if not fg.cuts else {}  # of the parameters that have a tangent in this pass
    for site in {site for slot in slots for site in slot if site.parameter is None} - slopes.keys():
        raise UsageError(
            f"no tangent reached the target's loss from cut {fg.cuts[site.block]!r}: something after it is invisible to "
            "forward mode, such as .detach(), NumPy, or a custom operation: replace it, or leave out the cuts before it"
        )
    return Measured(slopes, loss, output, padding)


class _Pass:
    """One pass, in which each of some slots has its tangent; what it reads is added to ``slopes``."""

    def __init__(
        self,
        fg: Rule,
        y: Any,
        slots: Sequence[Sequence[Site]],
        tangents: Tangents,
        slopes: dict[Site, Tensor],
        at_output: AtOutput | None,
        on_parameters: OnParameter | None,
        members: Mapping[int, Sequence[nn.Parameter]],
    ) -> None:
        self.fg, self.y, self.slots, self.tangents, self.slopes = fg, y, slots, tangents, slopes
        self.at_output, self.on_parameters, self.members = at_output, on_parameters, members
        self.sites: dict[int, dict[int, Site]] = {}  # of each block, by slot
        for j, slot in enumerate(slots):
            for site in slot:
                self.sites.setdefault(site.block, {})[j] = site
        self.shapes: dict[int, torch.Size] = {}

    @cached_property
    def names(self) -> ParameterNames:
        return ParameterNames(self.fg.model)

    def enter(self, k: int) -> None:
        """Give the parameters of block k their tangents."""
        if self.on_parameters is None or k not in self.members:
            return
        for p in self.members[k]:
            sites = [[s for s in slot if s.block == k and s.parameter == self.names[p]][:1] for slot in self.slots]
            if any(sites) and self.fg.kept is None:
                self.tangents.set(p, *self.tangents_of(p, sites))
            elif any(sites):
                self.tangents.set_drawn(p, partial(self.tangents_of, p, sites))

    def tangents_of(self, p: nn.Parameter, sites: Sequence[Sequence[Site]]) -> list[Tensor]:
        """What a parameter's tangent is for each slot, by its site there, if it has one."""
        assert self.on_parameters is not None
        return [self.on_parameters(site[0]) if site else torch.zeros_like(p) for site in sites]

    def deliver(self, k: int, h: Tensor) -> Tensor:
        """At the output of block k: let its tangents enter, read the losses of heads, hand on to the next block."""
        for p in self.members.get(k, ()):
            self.tangents.clear(p)
        self.shapes[k] = h.shape
        moved = [self.tangents.get(h, j) for j in range(len(self.slots))]
        if self.fg.target == "above" and k > 0:
            self.at_head(k, h, moved)
        ours = [False] * len(moved)
        if self.at_output is not None and (wanted := self.sites.get(k)):
            with self.tangents.aside():
                entering = self.at_output(h, list(wanted.values()))
            with self.tangents.unseen(h):
                for j, u in zip(wanted, entering, strict=True):
                    arrived = moved[j]
                    moved[j], ours[j] = u.clone() if arrived is None else arrived + u, True
        if self.fg.target in ("local", "sum"):
            self.at_head(k, h, moved)
        with self.tangents.unseen(h):
            passed_on = h.detach()
            if self.fg.target != "local":
                self.give(passed_on, moved, ours)
        self.enter(k + 1)
        return passed_on

    def at_head(self, k: int, h: Tensor, moved: Sequence[Tensor | None]) -> None:
        """Run the head of block k on its output, with these tangents."""
        assert self.fg.heads is not None
        probe = without_padding(h.detach(), self.fg.real[k])
        self.give(probe, [None if t is None else without_padding(t, self.fg.real[k]) for t in moved], [False] * len(moved))
        with self.fg.heads.randomness(k, self.fg.mask_seed, self.fg.step):
            pieces = self.fg.pieces(k)
            parts = None if pieces is None else pieces.parts(probe)
            output = self.fg.heads[k](probe) if pieces is None or parts is None else parts.sum(1) + pieces.classify.bias
            self.read(k, self.fg.loss, output, parts)

    def give(self, tensor: Tensor, moved: Sequence[Tensor | None], ours: Sequence[bool]) -> None:
        """Let a tensor have these tangents, those that are ours as they are."""
        if any(t is not None for t in moved):
            found = zip(moved, ours, strict=True)
            given = [torch.zeros_like(tensor) if t is None else t if mine else t.clone() for t, mine in found]
            self.tangents.set(tensor, *given)

    def read(self, point: int, criterion: Loss, output: Any, parts: Tensor | None = None) -> Tensor:
        """The loss of an output; its derivative along each slot's tangent counts for the sites whose target it is part of.

        ``parts`` (N x M x C) add up to an output that is taken in pieces: each then has a derivative of its own, (N, M).
        """
        fg = self.fg
        with self.tangents.aside():
            found = output_error(criterion, output, self.y, lambda value: self.tangents.get(value) is not None)
        for j, slot in enumerate(self.slots):
            pairs = zip(found.at, found.e, strict=True)
            moved = [(e, t) for z, e in pairs if (t := self.tangents.get(z, j)) is not None]
            if not moved:
                continue
            along = None if parts is None else self.tangents.get(parts, j)
            if along is not None:
                slope = (found.e[0].to(along.dtype).unsqueeze(1) * along).sum(2)
            else:
                slope = _slope(moved, by_sample=slot[0].parameter is None)
            for site in slot:
                if _reads(fg.target, site.block, point, len(fg.cuts)):
                    if site.parameter is None and site.block in self.shapes:  # a cut that did not run is told of later
                        check_samples(fg.cuts[site.block], self.shapes[site.block], len(slope), "a forward gradient")
                    self.slopes[site] = self.slopes[site] + slope if site in self.slopes else slope
        return found.loss


def _slope(moved: Sequence[tuple[Tensor, Tensor]], *, by_sample: bool) -> Tensor:
    """A loss's derivative along a tangent, from its gradient and the tangent at each output: each sample's, or the sum."""
    if by_sample:
        return dots(as_rows([e for e, _ in moved]), as_rows([t.to(e.dtype) for e, t in moved]))
    parts = [(e * t).sum() if e.dim() == 0 else dots(as_rows(e), as_rows(t.to(e.dtype))).sum() for e, t in moved]
    return torch.stack(parts).sum().view(1)


def _reads(target: str, block: int, point: int, last: int) -> bool:
    """Whether the target of a block contains the loss at a point: the head of that number, or the output (the last)."""
    match target:
        case "global":
            return point == last
        case "local":
            return point == block
        case "above":
            return point == block + 1
        case _:
            return point >= block
