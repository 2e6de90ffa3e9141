"""A step that is traced once and replayed: where Python and dispatch are the cost, they are paid once.

The first step of each kind runs as ever. The second is traced into one flat list of ATen operations, hooks, cuts, tangents and
the blocks' own backward passes included. From then on that list is run, as it is or compiled, with the parameters, buffers,
batch and random directions of the moment as its inputs.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_unflatten

from onward.derivatives.directions import draw
from onward.errors import unknown
from onward.estimators.backprop import Backprop
from onward.estimators.base import Estimator, Step
from onward.estimators.feedback_alignment import FeedbackAlignment
from onward.estimators.local import LocalLoss
from onward.estimators.settings import OneOf
from onward.estimators.signals import SignalEstimator
from onward.network.replay import Replay

BACKENDS = {
    "auto": "the fastest of running eagerly, replay and inductor, found by trying",
    "replay": "the traced operations, one after the other: bit for bit what the eager step computes",
    "inductor": "the traced operations, compiled by PyTorch's inductor: equal up to rounding",
}
_TRIED = 3  # runs by which a backend is judged
_KINDS = 16  # kinds of batches that are traced; with more of them, tracing would cost more than it saves
_PLAIN = (Tensor, bool, int, float, str, type(None))

E_ = TypeVar("E_", bound=Estimator)


def capture(estimator: E_, backend: Annotated[str, OneOf(BACKENDS)] = "auto") -> E_:
    """Make an estimator trace its step once for each kind of batch, and replay it from then on; returns the estimator.

    Its interface stays: ``estimate(x, y)``, ``.grad``, parameters, state. ``engine`` says what runs. A kind of batch is its
    shapes and types. A step is traced anew when that changes, or train and eval mode, what requires gradients, autocast, or an
    attribute of a module. Random directions stay functions of (seed, step, block) and are drawn outside; running statistics
    and feedback learn as ever; dropout draws the same masks as the eager step.

    What cannot be traced runs eagerly, and says so once: control flow that depends on numbers, hooks, random masks in an
    estimate that runs the network twice or has heads, sparse gradients, a callback in ``observe``.

    Raises :class:`onward.UsageError` for an unknown backend.

    >>> import onward
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = capture(onward.FDFA(model), "replay")
    >>> x, y = torch.randn(3, 4), torch.tensor([0, 1, 1])
    >>> for _ in range(3):
    ...     step = estimator.estimate(x, y)
    >>> estimator.engine
    'feedback, forward, replayed'
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    estimator.captured = Capture(estimator, backend)
    return estimator


class Untraceable(Exception):
    """A step cannot be captured; the message says why."""


class Request(NamedTuple):
    """A direction that the step draws: all that it is a function of, but for the step."""

    shape: tuple[int, ...]
    block: int | str
    direction: int
    seed: int
    offset: int
    noise: str
    dtype: torch.dtype
    device: torch.device


class Watched(NamedTuple):
    """A dictionary of a module, and what was in it."""

    held: dict[str, Any]
    size: int
    pairs: list[tuple[str, Any]]


class Traced(NamedTuple):
    """A step as a function of flat inputs, and how to make these."""

    run: Callable[..., Sequence[Any]]
    requests: list[Request]
    rebuild: Callable[[Sequence[Any]], Step]
    trained: list[nn.Parameter]
    state: list[Tensor]
    watched: list[Watched]
    trains: list[tuple[nn.Parameter, bool]]


class Capture:
    """The traced steps of one estimator, by kind of batch."""

    def __init__(self, estimator: Estimator, backend: str) -> None:
        self.estimator, self.backend = estimator, backend
        self.engine = estimator.engine
        self.told = False
        self.traced: dict[Any, Traced | None] = {}
        self.seen: dict[Any, tuple[list[Request], list[float]]] = {}

    def __call__(self, x: Any, y: Any) -> Step:
        """What ``estimator._estimate(x, y)`` does."""
        leaves, structure = tree_flatten((x, y))
        key = self._key(leaves, structure)
        if not all(isinstance(leaf, _PLAIN) for leaf in leaves) or (key not in self.traced and len(self.traced) >= _KINDS):
            return self._eagerly(x, y)
        if key in self.traced:
            traced = self.traced[key]
            if traced is None:
                return self.estimator._estimate(x, y)
            if _unchanged(traced):
                return self._replay(traced, leaves)
            del self.traced[key]
            self.seen.pop(key, None)
        requests, seconds = self.seen.setdefault(key, ([], []))
        if len(seconds) < (_TRIED if self.backend == "auto" else 1):
            with self._noting(requests):
                start = time.perf_counter()
                step = self.estimator._estimate(x, y)
                seconds.append(time.perf_counter() - start)
            return step
        self.traced[key] = self._traced(leaves, structure, requests, min(seconds))
        return self(x, y)

    def _eagerly(self, x: Any, y: Any) -> Step:
        """A step that is not captured because of its batch, which is said once."""
        if not self.told:
            self.told = True
            warnings.warn(
                f"{type(self.estimator).__name__} runs eagerly on batches that hold more than tensors and plain values, or "
                f"that are of another kind than the first {_KINDS}: keep their shapes (drop_last=True, padding)",
                stacklevel=6,
            )
        return self.estimator._estimate(x, y)

    def _key(self, leaves: Sequence[Any], structure: Any) -> Any:
        """What tells one kind of step from another."""
        kinds = tuple(
            (leaf.shape, leaf.dtype, leaf.device, leaf.stride()) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        )
        kind = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        shard = self.estimator.shard
        return kinds, str(structure), autocast, torch.is_inference_mode_enabled(), shard.first, shard.share

    @contextmanager
    def _noting(self, requests: list[Request]) -> Iterator[None]:
        """Within the block, the estimator's directions are noted."""
        estimator = self.estimator
        requests.clear()

        def drawn(*, step: int, **given: Any) -> Tensor:
            request = Request(**given)
            if request not in requests:
                requests.append(request)
            return _draw(request, step)

        with _replaced(estimator, drawn):
            yield

    def _traced(self, leaves: Sequence[Any], structure: Any, requests: list[Request], eager: float) -> Traced | None:
        try:
            return self._trace(leaves, structure, requests, eager)
        except Exception as error:  # PyTorch's tracer raises anything
            self.estimator.engine = self.engine
            reason = str(error) if isinstance(error, Untraceable) else _reason(self.estimator, error)
            warnings.warn(f"{type(self.estimator).__name__} cannot be captured and runs eagerly: {reason}", stacklevel=6)
            return None

    def _trace(self, leaves: Sequence[Any], structure: Any, requests: list[Request], eager: float) -> Traced | None:
        estimator = self.estimator
        _check(estimator)
        parameters = [p for p in estimator.parameters() if not is_lazy(p)]
        held = [*parameters, *estimator.buffers()]
        trained = [p for p in parameters if p.requires_grad]
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        shape: list[Any] = []

        def step(*flat: Tensor) -> list[Any]:
            state, batch = flat[: len(states)], flat[len(states) : len(states) + len(at)]
            given = dict(zip(requests, flat[len(states) + len(at) :], strict=True))
            whole = list(leaves)
            for i, tensor in zip(at, batch, strict=True):
                whole[i] = tensor

            def drawn(*, step: int, **asked: Any) -> Tensor:
                return given[Request(**asked)]

            mine = dict(zip(held, state, strict=True))
            with _swapped(estimator, mine), _replaced(estimator, drawn):
                done = estimator._estimate(*tree_unflatten(whole, structure))
            gradients = [mine[p].grad for p in trained]
            seen, spec = tree_flatten((done.loss, done.output, dict(done.heads)))
            shape[:] = [spec]
            return [*gradients, *seen]

        states: list[Tensor] = [nn.Parameter(p.detach().clone(), p.requires_grad) for p in parameters]
        states += [b.clone() for b in held[len(parameters) :]]
        given = [*states, *(leaves[i] for i in at), *(_draw(request, estimator.step) for request in requests)]
        again, watched = Replay(estimator.model), _watch(estimator)
        try:
            graph = make_fx(step, tracing_mode="real")(*given)
            if again.moved():
                raise Untraceable("it draws random numbers from a generator that is not PyTorch's global one")
        finally:
            again.__enter__()  # tracing has drawn what the step will draw
            same = _same(watched)
            for inside, _, pairs in watched:  # and counted what the step will count
                inside.update(pairs)
        if not same:
            raise Untraceable("a module changes an attribute of its own in every step")
        _check_graph(estimator, graph)
        _simplify(graph)

        def rebuild(outputs: Sequence[Any]) -> Step:
            return Step(*tree_unflatten(list(outputs), shape[0]))

        examples = [t.detach() for t in given]
        run = self._chosen(graph, examples, eager)
        if run is None:
            return None
        trains = [(p, p.requires_grad) for p in parameters]
        return Traced(run, requests, rebuild, trained, held, watched, trains)

    def _chosen(self, graph: GraphModule, examples: Sequence[Tensor], eager: float) -> Callable[..., Any] | None:
        """The backend that is asked for, or the fastest; None for running eagerly."""
        if self.backend == "replay":
            self.estimator.engine = f"{self.engine}, replayed"
            return graph.forward
        if self.backend == "inductor":
            self.estimator.engine = f"{self.engine}, compiled"
            return _compiled(graph, examples)
        found: dict[str, tuple[float, Callable[..., Any] | None]] = {"": (eager, None)}
        for name, make in (("replayed", lambda: graph.forward), ("compiled", lambda: _compiled(graph, examples))):
            try:
                run = make()
                found[name] = _seconds(run, examples), run
            except Exception as error:  # a compiler that is not there, or cannot take an operation
                warnings.warn(f"the captured step is not {name}: {str(error).splitlines()[0]}", stacklevel=8)
        name = min(found, key=lambda one: found[one][0])
        self.estimator.engine = f"{self.engine}, {name}" if name else self.engine
        return found[name][1]

    def _replay(self, traced: Traced, leaves: Sequence[Any]) -> Step:
        estimator = self.estimator
        batch = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        directions = [_draw(request, estimator.step) for request in traced.requests]
        with torch.no_grad():
            found = traced.run(*traced.state, *batch, *directions)
            count = len(traced.trained)
            for p, gradient in zip(traced.trained, found[:count], strict=True):
                if gradient is not None:
                    p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        return traced.rebuild(found[count:])


def _draw(request: Request, step: int) -> Tensor:
    return draw(step=step, **request._asdict())


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


@contextmanager
def _replaced(estimator: Estimator, drawn: Callable[..., Tensor]) -> Iterator[None]:
    """Within the block the estimator draws its directions by another function."""
    estimator._draws = drawn
    try:
        yield
    finally:
        estimator._draws = None


def _check(estimator: Estimator) -> None:
    """Raise :class:`Untraceable` for what a traced step would leave out."""
    if estimator.observe is not None:
        raise Untraceable("somebody observes its error signals")
    shard = estimator.shard
    if shard.share != 1.0 and not isinstance(estimator, (SignalEstimator, Backprop, FeedbackAlignment, LocalLoss)):
        raise Untraceable("it exchanges numbers with other processes inside a step")
    for name, module in estimator.named_modules():
        if any(vars(module)[hooks] for hooks in _HOOKS):
            raise Untraceable(f"{_called(name, module)} has hooks, which a traced step would not run")
    for name, p in estimator.named_parameters():
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise Untraceable(f"the parameter {name} has hooks, which a traced step would not run")
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise Untraceable(f"the gradient of {name} is sparse")


def _check_graph(estimator: Estimator, graph: GraphModule) -> None:
    """Raise :class:`Untraceable` where masks are drawn that the eager step would draw again, or from a seed of its own."""
    for node in graph.graph.find_nodes(op="get_attr"):
        held = getattr(graph, str(node.target))
        literal = all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)  # torch.tensor(0.5)
        if isinstance(held, Tensor) and (held.numel() > 1 or not literal):
            raise Untraceable(f"it reads a tensor of shape {tuple(held.shape)} that is made outside of what is traced")
    swept = type(estimator) is Backprop or isinstance(estimator, FeedbackAlignment)
    once = swept or (isinstance(estimator, SignalEstimator) and not estimator.low_memory)
    for node in graph.graph.nodes:
        if not once and _draws(node):
            raise Untraceable(f"it runs parts of the network twice, or has heads, and {node.target} draws random numbers")


def _draws(node: torch.fx.Node) -> bool:
    """Whether an operation draws random numbers; attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return bool(given.get("dropout_p", "dropout_p" not in names))


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


def _compiled(graph: GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
    """The graph, compiled by inductor; random operations draw as ever."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(fallback_random=True), torch.no_grad():
        compiled: Any = compile_fx(graph, list(examples))
    return compiled


def _seconds(run: Callable[..., Any], examples: Sequence[Tensor]) -> float:
    """How long one run takes at best, on copies of its inputs."""
    times = []
    with torch.no_grad():
        for _ in range(1 + _TRIED):
            inputs = [t.clone() for t in examples]
            start = time.perf_counter()
            run(*inputs)
            times.append(time.perf_counter() - start)
    return min(times[1:])


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _watch(estimator: Estimator) -> list[Watched]:
    """What decides which code the modules run: what they are made of, and their attributes that are plain values."""
    found = []
    for module in estimator.modules():
        held = vars(module)
        for inside in (held["_modules"], held["_parameters"], held["_buffers"], *(held[name] for name in _HOOKS)):
            found.append(Watched(inside, len(inside), list(inside.items())))
        plain = [(name, value) for name, value in held.items() if isinstance(value, (bool, int, float, str, type(None), tuple))]
        counted = [pair for pair in plain if pair[0] not in _COUNTED]
        found.append(Watched(held, len(held), counted))
    loss = vars(estimator).get("loss")  # a function; a module is watched as one
    return [*found, Watched(vars(estimator), len(vars(estimator)), [("loss", loss)] if loss is not None else [])]


_COUNTED = ("step", "engine", "_looked", "_separated_for", "_draws")
"""Attributes of an estimator that change from step to step, or by a look, and decide nothing."""


def _unchanged(traced: Traced) -> bool:
    """Whether the modules and parameters are as they were when the step was traced."""
    return _same(traced.watched) and not any(
        p.requires_grad is not trains or p._post_accumulate_grad_hooks or p._backward_hooks for p, trains in traced.trains
    )


def _same(watched: Sequence[Watched]) -> bool:
    """Whether what is watched is as it was."""
    for held, size, pairs in watched:
        if len(held) != size:
            return False
        for name, value in pairs:
            now = held.get(name, Traced)
            if now is not value and (isinstance(value, (Tensor, nn.Module)) or now != value):
                return False
    return True


def _called(name: str, module: nn.Module) -> str:
    return f"{name.removeprefix('model.') or 'the network'} ({type(module).__name__})"


def _reason(estimator: Estimator, error: Exception) -> str:
    """Why a step cannot be traced, with the module whose code it is."""
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = {module: name for name, module in estimator.model.named_modules()}
    inside = [module for module in frames if isinstance(module, nn.Module) and module in names]
    where = f"in {_called(names[inside[-1]], inside[-1])}: " if inside else ""
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    if "_local_scalar_dense" in said or "data-dependent" in said:
        said = "what runs depends on numbers in tensors (.item(), an if on a tensor)"
    return f"{where}{said}"
