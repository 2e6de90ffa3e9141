"""Where a network can be cut: the default of a Sequential, and a proposal for any other network.

Whether a module can be cut is found out in three ways. A batch shows it. Without one, a symbolic trace shows it, of a network
that can be traced. Of all others only the source is read (:mod:`onward.network.source`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from onward.errors import UsageError
from onward.network import source
from onward.network.trial import Pass, separating, traced, trial

_NON_LINEARITIES = tuple(
    getattr(nn, name)
    for name in nn.modules.activation.__all__
    if name not in ("MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax")
)


def default_cuts(model: nn.Module) -> tuple[str, ...]:
    """Where a network is cut if its user does not say.

    Of an :class:`torch.nn.Sequential` of blocks: after every child that trains but the last; of a flat one: after every
    non-linearity but those of the output block (the layers from the last one that trains on).

    Raises :class:`onward.UsageError` for any other module, with a proposal if there is one.

    >>> from torch import nn
    >>> default_cuts(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)))
    ('1', '3')
    """
    with _something_trains(model):
        cuts = _sequential_cuts(model) if isinstance(model, nn.Sequential) else []
    if cuts:
        return tuple(cuts)
    proposed = list(suggest_cuts(model))
    if not proposed:
        raise UsageError(
            f"{type(model).__name__} has no module that ends with something to train both before and behind it, so there is "
            "nothing to cut: unfreeze its output layer if that is frozen, or use plain Backprop"
        )
    raise UsageError(
        f"{type(model).__name__} has no default cuts: name the modules whose outputs end a block, for example cuts={proposed} "
        "(of onward.suggest_cuts, which makes sure if you give it a batch)"
    )


def suggest_cuts(model: nn.Module, x: Any = None) -> tuple[str, ...]:
    """Propose cuts for a network: after its blocks, or else its non-linearities, or else its layers, but not after the last.

    Blocks are the layers in its lists, and modules that are made of several. Proposed is what can be cut: a module that runs
    once, returns one tensor, or is a layer in a list that returns it first, and is the only way forward, with something to
    train before it and behind it.

    With a batch ``x`` (one tensor, a tuple of positional inputs, or a dict of keyword inputs) that is certain, by a trial run
    that changes nothing but the sizes of lazy layers. Without one it is certain of networks that :mod:`torch.fx` can trace. Of
    others it is what the source of their classes says, which shows neither every skip connection nor which modules run on a
    batch.

    >>> import torch
    >>> from torch import nn
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.stages = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
    ...         self.head = nn.Linear(4, 2)
    ...     def forward(self, x):
    ...         for stage in self.stages:
    ...             x = stage(x)
    ...         return self.head(x)
    >>> suggest_cuts(Net())
    ('stages.0', 'stages.1')
    >>> suggest_cuts(Net(), torch.zeros(2, 4))
    ('stages.0', 'stages.1')
    """
    with _something_trains(model):
        seen = None if x is None else trial(model, x)
        for proposed in _proposals(model, seen):
            known = seen or traced(model, proposed.possible)
            if cuts := proposed.likely if known is None else separating(proposed.possible, known):
                return tuple(cuts)
    return ()


@contextmanager
def _something_trains(model: nn.Module) -> Iterator[None]:
    """Within the block a network that is frozen as a whole, so as to be thawed later, is one that trains as a whole."""
    thawed = [] if _trains(model) else [p for p in model.parameters() if p.is_floating_point()]
    for p in thawed:
        p.requires_grad_()
    try:
        yield
    finally:
        for p in thawed:
            p.requires_grad_(False)


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


# What a network is made of, and which of that is proposed before it is known whether it can be cut.


class _Part(NamedTuple):
    """A module that is not taken apart; or, without a module, the parameters of its own that a module has which is."""

    name: str
    module: nn.Module | None = None
    is_block: bool = False
    ends: bool = False
    """Whether it returns a tensor, or is a layer that returns several."""
    likely: bool = False
    """Whether it can be cut, as far as that can be read."""

    @property
    def trains(self) -> bool:
        return self.module is None or _trains(self.module)


class _Proposal(NamedTuple):
    possible: list[str]
    """Where to cut, if a run or a trace confirms it."""
    likely: list[str]
    """Where to cut, if there is neither."""


def _proposals(model: nn.Module, seen: Pass | None) -> Iterator[_Proposal]:
    """The best first."""
    if isinstance(model, nn.Sequential) and (cuts := _sequential_cuts(model)):
        yield _Proposal(cuts, cuts)
    opened: list[nn.Module] = []
    closed: list[_Part] = []
    parts = list(_parts(model, "", opened, seen))
    while (inside := _single_block(parts)) is not None:
        opened.append(inside)
        closed, parts = parts, list(_parts(model, "", opened, seen))
    yield _proposal(_with_norms(parts), lambda part: part.is_block)
    layers = [_proposal(parts, _is_non_linearity), _proposal(parts, lambda part: True)]
    if all(source.is_chain(module) for module in opened):
        yield from layers
        return
    # Inside the only block there may be a residual branch, which no cut may be in.
    yield from (_Proposal(possible, []) for possible, _ in layers)
    yield _proposal(closed, lambda part: part.is_block)
    yield from layers


def _single_block(parts: Sequence[_Part]) -> nn.Module | None:
    """The only block that trains, if it can be taken apart."""
    blocks = [part.module for part in parts if part.is_block and part.trains]
    return blocks[0] if len(blocks) == 1 and blocks[0] is not None and _has_parts(blocks[0]) else None


def _proposal(parts: Sequence[_Part], wanted: Callable[[_Part], bool]) -> _Proposal:
    return _Proposal(
        [part.name for part in parts if part.ends and wanted(part)],
        _after(parts, lambda part: part.likely and wanted(part)),
    )


def _sequential_cuts(model: nn.Sequential) -> list[str]:
    parts = []
    for name, child, once in source.children(model):
        ends = source.returns_tensor(child)
        parts.append(_Part(name, child, _is_block(child), ends, ends and once))
    blocks = any(part.is_block for part in parts)
    return _after(parts, lambda part: part.likely and (blocks or _is_non_linearity(part)))


def _after(parts: Sequence[_Part], wanted: Callable[[_Part], bool]) -> list[str]:
    """The names of those parts that have something to train since the one before, and something behind them."""
    last = max((i for i, part in enumerate(parts) if part.trains), default=0)
    cuts, trains = [], False
    for part in parts[:last]:
        trains = trains or part.trains
        if trains and wanted(part):
            cuts.append(part.name)
            trains = False
    return cuts


def _parts(
    module: nn.Module, prefix: str, opened: Sequence[nn.Module], seen: Pass | None, *, within_layer: bool = False
) -> Iterator[_Part]:
    """A module taken apart into blocks and layers, in the order in which they run."""
    if any(p.requires_grad for p in module.parameters(recurse=False)):
        yield _Part(prefix)
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
    same = isinstance(module, nn.ModuleList) and _are_layers(module)
    for name, child, once in source.children(module):
        name = prefix + name
        alone = source.returns_tensor(child) if seen is None else name in seen.ends and name not in seen.several
        # Of what a layer in a list returns, the first is handed to the next layer.
        ends = alone or (isinstance(module, nn.ModuleList) and _has_parts(child) and (seen is None or name in seen.ends))
        if not _is_open(child, ends, opened, is_list, within_layer):
            yield _Part(name, child, same or _is_block(child), ends, ends and once)
            continue
        is_layer = is_list and not ends and source.has_forward(child) and not source.is_chain(child) and not _lists(child)
        parts = _parts(child, f"{name}.", opened, seen, within_layer=is_layer)
        unlikely = _hands_on_positions(child, name) if once and _trains(child) else (f"{name}.",)
        yield from (part._replace(likely=False) if f"{part.name}.".startswith(unlikely) else part for part in parts)


def _is_open(child: nn.Module, ends: bool, opened: Sequence[nn.Module], in_list: bool, in_layer: bool) -> bool:
    """Whether a module is taken apart: a list always, others if they are no block, and have something to train."""
    if child in opened or not source.has_forward(child):
        return True
    if not _has_parts(child) or not _trains(child):
        return False
    if source.is_chain(child):
        return any(_is_block(inside) for inside in child.children())
    if in_layer:  # such as attention, which is beside a residual connection
        return False
    return not ends or (not in_list and source.runs_in_turn(child))


def _has_parts(module: nn.Module) -> bool:
    """Whether a module can be taken apart: attention uses its parts' weights alone, and what is compiled is one."""
    if isinstance(module, nn.MultiheadAttention) or _is_compiled(module):
        return False
    return any(name != "parametrizations" for name, _ in module.named_children())


def _is_block(module: nn.Module) -> bool:
    return _has_parts(module) or _is_compiled(module)


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules


def _are_layers(modules: nn.ModuleList) -> bool:
    """Whether a list is of layers of one class, such as Linear: not of tables, which are beside one another, or of norms."""
    (kind, *others) = {type(layer) for layer in modules} or {nn.Embedding}
    has_weights = len(modules) > 1 and all(layer._parameters for layer in modules)
    return has_weights and not others and not issubclass(kind, nn.Embedding) and not _is_norm(modules[0])


def _is_norm(module: nn.Module | None) -> bool:
    return "Norm" in type(module).__name__


def _is_non_linearity(part: _Part) -> bool:
    return isinstance(part.module, _NON_LINEARITIES)


def _lists(module: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The lists of layers of one class that a module has."""
    return [
        (name, child)
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len({type(layer) for layer in child}) == 1 and _has_parts(child[0])
    ]


def _hands_on_positions(stack: nn.Module, name: str) -> tuple[str, ...]:
    """The names of layers whose output is not all that goes on: values from a table of relative positions do so too.

    T5 has the table in its first layer, MPNet, DeBERTa and BEiT beside their layers; all layers get values from it.
    """
    trained = [p for p, weight in stack.named_parameters() if weight.requires_grad]
    tables = [p for p in trained if any(re.match(r"rel(?!u)", part) for part in p.split("."))]
    found: list[str] = []
    for inside, layers in _lists(stack):
        owners = {p.split(".")[1] for p in tables if p.startswith(f"{inside}.")}
        if tables and len(owners) < len(layers):
            found += [f"{name}.{inside}.{i}." for i in range(len(layers) - 1)]
    return tuple(found)


def _with_norms(parts: Sequence[_Part]) -> list[_Part]:
    """The parts, but a norm behind a list of layers takes the place of the last layer, if more blocks follow.

    Its output is handed to all of these, as an encoder's is to every layer of the decoder.
    """
    moved = list(parts)
    blocks = [i for i, part in enumerate(parts) if part.is_block]
    for i, part in enumerate(parts):
        before = [j for j in blocks if j < i]
        if not before or not part.ends or not part.trains or not _is_norm(part.module):
            continue
        owner = part.name.rpartition(".")[0]
        block = parts[before[-1]]
        inside = block.name.removeprefix(f"{owner}." if owner else "")
        in_list = block.name.startswith(owner) and "." in inside
        if in_list and (blocks[-1] > i or not block.likely):
            moved[before[-1]] = block._replace(is_block=False)
            moved[i] = part._replace(is_block=True)
    return moved
