"""A step, traced by ``make_fx`` into a flat list of ATen operations: a function of parameters, buffers, batch, directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_unflatten

from onward.capturing import refusals
from onward.capturing.optimizers import Updates
from onward.capturing.refusals import Untraceable
from onward.capturing.requests import Directions, Request, replaced
from onward.capturing.watch import Watch
from onward.estimators.base import Estimator, Step
from onward.network.replay import Replay


class Traced(NamedTuple):
    """A step as a graph, and how its inputs are made and its outputs read."""

    graph: GraphModule
    examples: list[Tensor]
    directions: Directions
    rebuild: Callable[[Sequence[Any]], Step]
    trained: list[nn.Parameter]
    """The parameters whose gradients are the first outputs; not those that optimizers move in the graph."""
    state: list[Tensor]
    watch: Watch
    updates: Updates | None
    """The optimizers' step, where it is in the graph."""

    def inputs(self, batch: Sequence[Tensor], step: int) -> list[Tensor]:
        """The inputs of a step."""
        made = [*self.state, *batch, *self.directions.draw(step)]
        return made + self.updates.inputs() if self.updates is not None else made

    def same(self) -> bool:
        """Whether the step would be traced as it was."""
        return self.watch.same() and (self.updates is None or self.updates.same())


def trace(
    estimator: Estimator, leaves: Sequence[Any], structure: Any, requests: Sequence[Request], updates: Updates | None = None
) -> Traced:
    """Trace the step of a batch, given as leaves and structure; with ``updates`` the optimizers' step follows in the graph.

    Raises :class:`Untraceable`, or whatever PyTorch's tracer raises, where that cannot be.
    """
    refusals.check(estimator)
    parameters = [p for p in estimator.parameters() if not is_lazy(p)]
    held = [*parameters, *estimator.buffers()]
    moved = updates.moved if updates is not None else set()
    trained = [p for p in parameters if p.requires_grad and p not in moved]
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    directions = Directions(requests)
    shape: list[Any] = []

    def step(*flat: Tensor) -> list[Any]:
        given = iter(flat)
        mine = {tensor: next(given) for tensor in held}
        whole = list(leaves)
        for i in at:
            whole[i] = next(given)
        rest = list(given)
        with _swapped(estimator, mine), replaced(estimator, directions.of(rest[: directions.count])):
            done = estimator._estimate(*tree_unflatten(whole, structure))
        gradients = [mine[p].grad for p in trained]
        if updates is not None:
            updates.follow(mine, rest[directions.count :])
        seen, spec = tree_flatten((done.loss, done.output, dict(done.heads)))
        shape[:] = [spec]
        return [*gradients, *seen]

    inputs: list[Tensor] = [nn.Parameter(p.detach().clone(), p.requires_grad) for p in parameters]
    inputs += [b.clone() for b in held[len(parameters) :]]
    inputs += [leaves[i].detach() for i in at] + directions.draw(estimator.step)
    if updates is not None:
        inputs += [t.clone() for t in updates.inputs()]
    watch = Watch(estimator, held)
    graph = _traced(estimator, step, inputs, watch)

    def rebuild(outputs: Sequence[Any]) -> Step:
        return Step(*tree_unflatten(list(outputs), shape[0]))

    examples = [t.detach() for t in inputs]
    return Traced(graph, examples, directions, rebuild, trained, held, watch, updates)


def _traced(estimator: Estimator, step: Callable[..., Any], inputs: Sequence[Tensor], watch: Watch) -> GraphModule:
    """The graph of a step, that leaves no trace of having been run: no number drawn, nothing counted."""
    again = Replay(estimator.model)
    device = next((t.device for t in inputs if t.device.type == "cuda"), torch.device("cpu"))
    start = refusals.get_state(device)
    try:
        with refusals.silent(estimator):
            graph = make_fx(step, tracing_mode="real")(*inputs)
        if again.moved():
            raise Untraceable("it draws random numbers from a generator that is not PyTorch's global one")
        if not watch.same():
            raise Untraceable("a module changes an attribute of its own in every step")
        refusals.check_graph(graph)
        _simplify(graph)
        refusals.check_masks(graph, inputs, start, refusals.get_state(device))
    finally:
        again.__enter__()
        refusals.set_state(device, start)
        watch.put_back()
    return graph


@contextmanager
def _swapped(estimator: Estimator, by: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within the block other tensors are in the places of parameters and buffers, wherever these are named."""
    everywhere: list[dict[str, Any]] = [d for module in estimator.modules() for d in (module._parameters, module._buffers)]
    places = [(held, name, tensor) for held in everywhere for name, tensor in held.items() if tensor in by]
    for held, name, tensor in places:
        held[name] = by[tensor]
    try:
        yield
    finally:
        for held, name, tensor in places:
            held[name] = tensor


_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
"""Operations that are their argument, where no graph is built."""


def _simplify(graph: GraphModule) -> None:
    """Take out operations whose result nobody reads, and those that do nothing."""
    for node in list(graph.graph.nodes):
        if node.target in _SAME:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
