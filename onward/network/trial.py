"""What one pass over a network shows, be it a run over a batch or a symbolic trace: which cuts would separate its blocks."""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.autograd import forward_ad

from onward.network.hidden import hidden_state
from onward.network.replay import Replay, understudy
from onward.network.run import batch_statistics, call, leaves, samples_of


class Pass(NamedTuple):
    """The graph of one pass."""

    ends: dict[str, Hashable]
    """The node behind the hidden state of each module that ran once, in the order of time."""
    several: Collection[str]
    """Those of them that return more than one tensor."""
    outputs: list[Hashable]
    behind: Callable[[Any], Iterable[Hashable]]
    """The nodes that a node was computed from."""
    is_weight: Callable[[Any], bool]
    trains: Callable[[Any], bool]
    """Whether a node is a weight to be trained, or is computed by a module that has one."""


def separating(cuts: Collection[str], seen: Pass) -> list[str]:
    """Those of the cuts that no gradient gets around, with something to train before each and behind the last."""
    wanted = set(cuts)
    found = [name for name in seen.ends if name in wanted]
    while found and (wrong := _wrong(found, seen)) is not None:
        found.remove(wrong)
    return found


def _wrong(cuts: Sequence[str], seen: Pass) -> str | None:
    """A cut that has to go."""
    owner: dict[Hashable, int] = {}
    stops = {seen.ends[name] for name in cuts}
    ended: set[Hashable] = set()
    for k in range(len(cuts) + 1):
        starts = [seen.ends[cuts[k]]] if k < len(cuts) else seen.outputs
        ahead = stops.difference(starts) | ended if k < len(cuts) else stops
        trains, shared = False, dict[int, list[Hashable]]()
        for node in _reached(starts, ahead, seen):
            trains = trains or seen.trains(node)
            earlier = k if seen.is_weight(node) else owner.setdefault(node, k)
            if earlier != k:
                shared.setdefault(earlier, []).append(node)
        for earlier in sorted(shared):
            if any(seen.trains(node) for node in _reached(shared[earlier], ahead, seen)):
                return cuts[earlier]
        if not trains:
            return cuts[min(k, len(cuts) - 1)]
        ended.update(starts)
    return None


def _reached(starts: Iterable[Hashable], stops: Collection[Hashable], seen: Pass) -> Iterator[Hashable]:
    """The nodes that others were computed from, themselves included, up to those to stop at."""
    pending, visited = [node for node in starts if node not in stops], set[Hashable]()
    while pending:
        node = pending.pop()
        if node not in visited:
            visited.add(node)
            yield node
            pending.extend(following for following in seen.behind(node) if following not in stops)


def trial(model: nn.Module, x: Any) -> Pass:
    """What a run over a batch shows, which leaves the network and all generators as they were."""
    model = understudy(model)
    samples = samples_of(x)
    ended: list[tuple[str, Hashable | None]] = []
    several: set[str] = set()

    def note(name: str) -> Callable[..., Any]:
        def end(module: nn.Module, args: Any, output: Any) -> Any:
            h, put = hidden_state(output)
            fits = h is not None and h.requires_grad and h.is_floating_point() and h.dim() > 0 and h.shape[0] == samples
            if not fits or _within_derivative():
                ended.append((name, None))
                return None
            if h is not output:
                several.add(name)
            marked = _Mark.apply(h)
            ended.append((name, (marked.grad_fn, marked.output_nr)))
            return put(marked)

        return end

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if name and "_orig_mod" not in name.split(".")
    ]
    try:
        with Replay(model).untouched(), torch.enable_grad(), batch_statistics(model):
            output = call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    return Pass(
        _once(ended),
        several,
        [(leaf.grad_fn, leaf.output_nr) for leaf in leaves(output) if leaf.grad_fn is not None],
        lambda node: [edge for edge in node[0].next_functions if edge[0] is not None],
        lambda node: hasattr(node[0], "variable"),
        lambda node: hasattr(node[0], "variable") and id(node[0].variable) in trained,
    )


def _within_derivative() -> bool:
    """Whether the network is differentiating something itself."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


class _Mark(torch.autograd.Function):
    """A node of the graph that stays the same if the output is overwritten in place, or was noted before."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients


def _once(ended: Sequence[tuple[str, Hashable | None]]) -> dict[str, Hashable]:
    runs = Counter(name for name, _ in ended)
    return {name: node for name, node in ended if runs[name] == 1 and node is not None}


class _Tracer(torch.fx.Tracer):
    """Traces what runs the modules with those names, and these modules as a whole."""

    def __init__(self, whole: Collection[str]) -> None:
        super().__init__()
        self.open = {name[:i] for name in whole for i, letter in enumerate(name) if letter == "."}
        self.ended: list[tuple[str, Any]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.open

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        self.ended.append((self.path_of_module(m), output))
        return output


def traced(model: nn.Module, cuts: Collection[str]) -> Pass | None:
    """What a symbolic trace shows; None where the network cannot be traced."""
    tracer = _Tracer(cuts)
    # The trace runs the network's own code between the modules, on a copy, in case that assigns to attributes.
    shared: list[Any] = [*model.parameters(), *(m for name, m in model.named_modules() if name and name not in tracer.open)]
    generators = Replay(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = copy.deepcopy(model, {id(one): one for one in shared})
            given = {
                name: parameter.default
                for name, parameter in inspect.signature(twin.forward).parameters.items()
                if parameter.default is not parameter.empty
            }
            graph = tracer.trace(twin, concrete_args=given)
    except Exception:  # whatever the network's code does with what is no tensor
        return None
    finally:
        with generators:
            pass
    modules, weights = dict(twin.named_modules()), dict(twin.named_parameters(remove_duplicate=False))

    def trains(node: torch.fx.Node) -> bool:
        if node.op == "get_attr":
            return str(node.target) in weights and weights[str(node.target)].requires_grad
        return node.op == "call_module" and any(p.requires_grad for p in modules[str(node.target)].parameters())

    ended = [(name, output.node if isinstance(output, torch.fx.Proxy) else None) for name, output in tracer.ended]
    several = {node.args[0] for node in graph.nodes if _takes_one(node)}
    ends = {name: node for name, node in _once(ended).items() if node not in several}
    (output,) = (node for node in graph.nodes if node.op == "output")
    return Pass(
        ends,
        (),
        list(output.all_input_nodes),
        lambda node: [] if _is_constant(node) else node.all_input_nodes,
        lambda node: node.op == "get_attr",
        trains,
    )


def _takes_one(node: torch.fx.Node) -> bool:
    """Whether a node is one of several values."""
    return node.target is operator.getitem and isinstance(node.args[1], (int, str))


def _is_constant(node: torch.fx.Node) -> bool:
    """Whether no gradient goes through a node."""
    if node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim", "data")
    return node.op == "call_method" and node.target in ("size", "dim", "numel", "detach", "argmax", "argsort")
