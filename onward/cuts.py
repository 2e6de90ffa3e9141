"""Run a network with its graph cut at the outputs of named modules.

What lies between two cuts is a block. A cut hands on its block's output without the graph behind it, so that no gradient
crosses it: blocks learn from error signals delivered to their outputs, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from onward.errors import UsageError, unknown

Deliver = Callable[[int, Tensor], Tensor]
"""``deliver(k, h) -> onward``: takes the output of block k, with its graph, and returns what the next block is given."""

_NON_LINEARITIES = tuple(
    getattr(nn, name)
    for name in nn.modules.activation.__all__
    if name not in ("MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax")
)


def default_cuts(model: nn.Module) -> tuple[str, ...]:
    """Where a network is cut if its user does not say.

    Of an :class:`torch.nn.Sequential` of blocks: after every child with parameters but the last; of a flat one: after every
    non-linearity but those of the output block (the layers from the last one with parameters on).

    Raises :class:`onward.UsageError` for any other module, with a proposal if there is one.

    >>> from torch import nn
    >>> default_cuts(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)))
    ('1', '3')
    """
    cuts = _sequential_cuts(model) if isinstance(model, nn.Sequential) else ()
    if cuts:
        return cuts
    proposed = list(suggest_cuts(model))
    if not proposed:
        raise UsageError(
            f"{type(model).__name__} has no module with parameters but its last, so there is nothing to cut: use plain Backprop"
        )
    raise UsageError(
        f"{type(model).__name__} has no default cuts: name the modules whose outputs end a block, "
        f"for example cuts={proposed} (onward.suggest_cuts)"
    )


def suggest_cuts(model: nn.Module) -> tuple[str, ...]:
    """Propose cuts for a network: its blocks, or else its non-linearities, or else its layers, but the last with parameters.

    A proposal only: whether each cut really is the only way forward is checked when the network first runs.

    >>> from torch import nn
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.stages = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
    ...         self.head = nn.Linear(4, 2)
    >>> suggest_cuts(Net())
    ('stages.0', 'stages.1')
    """
    if isinstance(model, nn.Sequential) and (cuts := _sequential_cuts(model)):
        return cuts
    named = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    blocks = _trained_blocks(model)
    if len(blocks) > 1:
        last = [name for name, module in named if _has_parameters(module)][-1]
        return tuple(blocks[:-1] if last.startswith(f"{blocks[-1]}.") else blocks)
    return _after_non_linearities(named) or tuple(name for name, module in named if name and _has_parameters(module))[:-1]


def _sequential_cuts(model: nn.Sequential) -> tuple[str, ...]:
    children = list(model.named_children())
    if any(_is_block(child) for _, child in children):
        return tuple(name for name, child in children if _has_parameters(child))[:-1]
    return _after_non_linearities(children)


def _after_non_linearities(named: Sequence[tuple[str, nn.Module]]) -> tuple[str, ...]:
    last = max((i for i, (_, module) in enumerate(named) if _has_parameters(module)), default=0)
    cuts, anything_to_train = [], False
    for name, module in named[:last]:
        if isinstance(module, _NON_LINEARITIES) and (anything_to_train or _has_parameters(module)):
            cuts.append(name)
            anything_to_train = False
        else:
            anything_to_train = anything_to_train or _has_parameters(module)
    return tuple(cuts)


def _trained_blocks(model: nn.Module, prefix: str = "") -> list[str]:
    """The blocks with parameters; where there is but one, those that it is made of, if they are several."""
    blocks = [name for name, module in _blocks(model, prefix) if _has_parameters(module)]
    if len(blocks) == 1:
        inside = _trained_blocks(model.get_submodule(blocks[0].removeprefix(prefix)), f"{blocks[0]}.")
        return inside if len(inside) > 1 else blocks
    return blocks


def _blocks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and any(_is_block(c) for c in child.children()):
            yield from _blocks(child, f"{prefix}{name}.")
        elif _is_block(child):
            yield prefix + name, child


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and not isinstance(module, nn.MultiheadAttention)


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


class Elsewhere(nn.Identity):
    """In the place of a block that another process has (:class:`onward.Stage`)."""


def check_names(model: nn.Module, cuts: Sequence[str]) -> tuple[str, ...]:
    """The cuts as a tuple, each the name of a different module of ``model``.

    Raises :class:`onward.UsageError` naming an unknown cut and the nearest module name, or two names of one module.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    seen: dict[int, str] = {}
    for name in cuts:
        if name not in modules:
            raise unknown("cut", name, modules)
        twin = seen.setdefault(id(modules[name]), name)
        if twin != name or list(cuts).count(name) > 1:
            raise UsageError(f"cuts {twin!r} and {name!r} are the same module: name each module once")
    return tuple(cuts)


@contextmanager
def cut_graph(model: nn.Module, cuts: Sequence[str], deliver: Deliver) -> Iterator[None]:
    """Within the block, ``deliver(k, h)`` takes the output h of the k-th named module, and its result goes on in its place.

    Modules that are :class:`Elsewhere` are passed over.

    Raises :class:`onward.UsageError` where a cut's output is not a tensor, or a cut module runs more than once, in another
    order than the cuts were named in, or not at all.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> with cut_graph(model, ["0"], lambda k, h: h.detach()):
    ...     model(torch.ones(1, 2)).sum().backward()
    >>> model[0].weight.grad is None
    True
    """
    here = {name: k for k, name in enumerate(cuts) if not isinstance(model.get_submodule(name), Elsewhere)}
    order, done = list(here), list[str]()

    def hook(k: int, name: str) -> Callable[..., Tensor]:
        def deliver_output(module: nn.Module, args: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                raise UsageError(
                    f"the output of cut {name!r} ({type(module).__name__}) is a {type(output).__name__}, not a tensor: "
                    "cut at a module that returns one tensor"
                )
            if name in done:
                raise UsageError(
                    f"cut {name!r} ({type(module).__name__}) runs more than once in a forward pass: cut at a module that "
                    "runs once, or give each use a module of its own"
                )
            if name != order[len(done)]:
                raise UsageError(
                    f"cut {name!r} ran before cut {order[len(done)]!r}: name the cuts in the order in which they run"
                )
            done.append(name)
            return deliver(k, output)

        return deliver_output

    handles = [model.get_submodule(name).register_forward_hook(hook(k, name)) for name, k in here.items()]
    try:
        yield
        if len(done) < len(order):
            raise UsageError(
                f"cut {order[len(done)]!r} did not run in this forward pass: cut at a module that the network calls "
                "(calling a module's .forward() directly, or only its weight, does not count)"
            )
    finally:
        for handle in handles:
            handle.remove()


class BypassCheck:
    """Find out, from the graphs of one pass, whether every cut is the only way forward.

    A graph node that is not a parameter and is reached from more than one block carries gradient around the cut between
    them. (A tied weight is reached from several blocks by right.) So does the output of an earlier block, where that was
    passed on with a graph (:func:`enter`).
    """

    def __init__(self, model: nn.Module, cuts: Sequence[str], remedy: str = "") -> None:
        self._model, self._cuts, self._remedy = model, cuts, remedy
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._owner: dict[Any, int] = {}

    def visit(self, k: int, output: Tensor) -> None:
        """Take in block k through its output, before the graph is freed; raise where it reaches into an earlier block."""
        shared: dict[int, Any] = {}
        pending, mine = [output.grad_fn], set()
        while pending:
            node = pending.pop()
            if node is None or node in mine or hasattr(node, "variable"):
                continue
            mine.add(node)
            earlier = self._owner.setdefault(node, k)
            if earlier != k:
                shared.setdefault(earlier, node)
                continue
            pending.extend(following for following, _ in node.next_functions)
        for earlier, node in sorted(shared.items()):
            reached = self._modules_behind(node)
            if not reached and node.name() == _ENTERED:
                raise UsageError(
                    f"cut {self._cuts[earlier]!r} is bypassed: what comes after it also uses the output of cut "
                    f"{self._cuts[earlier - 1]!r} by another path (a skip connection?), and a sweep from block to block would "
                    "miss that path. Cut where everything passes, such as at the end of the residual block, or use "
                    "engine='forward'"
                )
            if not reached:  # computed from no parameter: nothing to leak
                continue
            compiled = any(isinstance(m, torch._dynamo.eval_frame.OptimizedModule) for m in self._model.modules())
            after = f"cut {self._cuts[k]!r}" if k < len(self._cuts) else "the output"
            raise UsageError(
                f"cut {self._cuts[earlier]!r} is bypassed: {', '.join(reached)} "
                f"{'is' if len(reached) == 1 else 'are'} also reached from {after} by another path (a skip connection?), so "
                "gradients would be backpropagated around the cut. Cut where everything passes, such as at the end of the "
                f"residual block{self._remedy}"
                + (". What is compiled as a whole has one graph: compile its blocks instead" if compiled else "")
            )

    def _modules_behind(self, node: Any) -> list[str]:
        found, pending, seen = [], [node], set()
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                name = self._names.get(id(node.variable))
                found += [] if name is None else [name.rpartition(".")[0] or name]
            pending.extend(following for following, _ in node.next_functions)
        return sorted(set(found))


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, h: Tensor) -> Tensor:
        return h.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None


_ENTERED = "_EnterBackward"


def enter(h: Tensor) -> Tensor:
    """The same memory as a block's output with a fresh graph: not a leaf, so what follows may overwrite it in place."""
    start = torch.zeros((), requires_grad=True)
    return _Enter.apply(start, h.detach())


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Within the block the network works on copies of its buffers: a second pass that must not move running statistics.

    >>> import torch
    >>> norm = torch.nn.BatchNorm1d(2)
    >>> with frozen_statistics(norm):
    ...     _ = norm(torch.randn(4, 2))
    >>> int(norm.num_batches_tracked)
    0
    """
    held = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    for module, buffers in held:
        for name, buffer in buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, buffers in held:
            module._buffers.update(buffers)


class same_randomness:
    """Let several passes draw the same random numbers (dropout masks): each ``with`` block starts from the state at creation.

    >>> import torch
    >>> again = same_randomness(torch.device("cpu"))
    >>> with again:
    ...     first = torch.rand(2)
    >>> with again:
    ...     second = torch.rand(2)
    >>> torch.equal(first, second)
    True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if self._device else self._cpu

    def __enter__(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._device:
            torch.cuda.set_rng_state(self._cuda, self._device)

    def __exit__(self, *failure: Any) -> None:
        pass
