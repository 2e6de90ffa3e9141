"""Run a network with its graph cut at the outputs of named modules.

What lies between two cuts is a block. A cut hands on its block's output without the graph behind it, so that no gradient
crosses it: blocks learn from error signals delivered to their outputs, and from nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.hooks import BackwardHook

from onward.errors import UsageError, unknown
from onward.network import source
from onward.network.hidden import hidden_state, walled
from onward.network.parts import submodule
from onward.phases import phase

Deliver = Callable[[int, Tensor], Tensor]
"""``deliver(k, h) -> onward``: takes the output of block k, with its graph, and returns what the next block is given."""


class Elsewhere(nn.Identity):
    """In the place of a block that another process has (:class:`onward.Stage`)."""


def check_names(model: nn.Module, cuts: Sequence[str]) -> tuple[str, ...]:
    """The cuts as a tuple, each the name of a different module of ``model``.

    The name of a list that is not called itself, such as an ModuleList, stands for all of its modules; the cuts are then
    ordered as the network's source mentions them.

    Raises :class:`onward.UsageError` naming an unknown cut and the nearest module name, or two names of one module.

    >>> model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.Linear(2, 2))
    >>> check_names(model, ["0"])
    ('0.0', '0.1')
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    seen: dict[int, str] = {}
    for name in cuts:
        if name not in modules:
            raise unknown("cut", name, modules)
        if isinstance(modules[name], torch.jit.ScriptModule):
            raise UsageError(f"cut {name!r} is compiled by torch.jit, which takes no hooks: cut at a module around it")
    named, cuts = cuts, [one for name in cuts for one in _layers(name, modules[name])]
    if len(cuts) != len(named) or set(cuts) != set(named):
        order = source.order(model)
        cuts.sort(key=order.index)
    for name in cuts:
        twin = seen.setdefault(id(modules[name]), name)
        if twin != name or list(cuts).count(name) > 1:
            raise UsageError(f"cuts {twin!r} and {name!r} are the same module: name each module once")
    return tuple(cuts)


def _layers(name: str, module: nn.Module) -> list[str]:
    """A module by its name, or those in it if it is a list that is not called itself."""
    if source.has_forward(module):
        return [name]
    return [one for inside, child in module.named_children() for one in _layers(f"{name}.{inside}", child)]


@contextmanager
def cut_graph(model: nn.Module, cuts: Sequence[str], deliver: Deliver, *, entered: bool = False) -> Iterator[None]:
    """Within the block, ``deliver(k, h)`` takes the output h of the k-th named module, and its result goes on in its place.

    Modules that are :class:`Elsewhere` are passed over. A block that runs again because a backward pass recomputes it
    (activation checkpointing) is left alone. Full backward hooks of a cut module see the error signal that is delivered to h;
    or what arrives at ``deliver``'s result, where that has a graph (``entered``).

    Of a module that returns more than one tensor the hidden state is cut (:mod:`onward.network.hidden`). The rest goes on, but
    no gradient comes back through it to something that trains.

    Raises :class:`onward.UsageError` where a cut's output has no hidden state, where it runs hidden from autograd, or where a
    cut module runs more than once, in another order than the cuts were named in, or not at all.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> with cut_graph(model, ["0"], lambda k, h: h.detach()):
    ...     model(torch.ones(1, 2)).sum().backward()
    >>> model[0].weight.grad is None
    True
    """
    here = {name: (k, module) for k, name in enumerate(cuts) if not isinstance(module := submodule(model, name), Elsewhere)}
    order, done = list(here), list[str]()
    with_gradients = torch.is_grad_enabled()
    removes: list[Callable[[], object]] = []
    watching: dict[str, BackwardHook] = {}

    def hook(k: int, name: str) -> Callable[..., Any]:
        def deliver_output(module: nn.Module, args: Any, output: Any) -> Any:
            if torch._C._current_graph_task_id() != -1:  # a backward pass recomputes the block
                return None
            h, replace = _checked(name, module, output, with_gradients)
            if len(done) == len(order) or order[len(done)] != name:
                raise _out_of_turn(name, module, order, done)
            done.append(name)
            watched = watching.pop(name, None) if watching else None
            h = h if watched is None or not h.requires_grad else watched.setup_output_hook(h)
            passed_on = _unsaved(deliver, k, h)
            return passed_on if h is output or isinstance(output, Tensor) else walled(model, name, replace(passed_on))

        return deliver_output

    def watch(name: str) -> Callable[..., Any]:
        """PyTorch binds a module's full backward hooks to what the module returns, which is cut off: bind them to h."""

        def bind(module: nn.Module, args: Any) -> Any:
            if not with_gradients or torch._C._current_graph_task_id() != -1:
                return None
            watching[name] = BackwardHook(module, module._get_backward_hooks()[0], module._get_backward_pre_hooks())
            return watching[name].setup_input_hook(args)

        return bind

    for name, (k, module) in here.items():
        if not entered and (module._backward_pre_hooks or (module._backward_hooks and module._is_full_backward_hook)):
            removes.append(_hooked(module._forward_pre_hooks, watch(name)))
        removes.append(_hooked(module._forward_hooks, hook(k, name)))
    try:
        with _cuttable():
            yield
    except RuntimeError as error:
        if not re.search("appears to not have been used in the graph|does not require grad and does not have", str(error)):
            raise
        raise UsageError(
            f"the network takes a gradient inside its forward that finds no way ({str(error).splitlines()[0]}): it would have "
            "to cross a cut, so cut where it stays inside one block; or the pass builds no graph, so use an estimator without "
            "forward mode in its plain form, or ask for the gradient under torch.enable_grad"
        ) from error
    else:
        if len(done) < len(order):
            raise UsageError(
                f"cut {order[len(done)]!r} did not run in this forward pass: cut at a module that the network calls "
                "(calling a module's .forward() directly, or only its weight, does not count)"
            )
    finally:
        for remove in removes:
            remove()


def _hooked(hooks: dict[Any, Any], function: Callable[..., Any]) -> Callable[[], object]:
    """Register a hook; returns what takes it away.

    PyTorch's handle takes longer to make than a small layer takes to run.
    """
    key = object()
    hooks[key] = function
    return partial(hooks.pop, key, None)


def _unsaved(deliver: Deliver, k: int, h: Tensor) -> Tensor:
    """What ``deliver`` returns, where autograd saves tensors as they are.

    Where the block runs under checkpointing, what is done about its output does not.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        with phase("other"):
            return deliver(k, h)
    torch._C._autograd._push_saved_tensors_default_hooks(_itself, _itself)
    try:
        with phase("other"):
            return deliver(k, h)
    finally:
        torch._C._autograd._pop_saved_tensors_default_hooks()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _out_of_turn(name: str, module: nn.Module, order: Sequence[str], done: Sequence[str]) -> UsageError:
    """Where a cut has run already, or runs before those that were named before it."""
    if name in done:
        return UsageError(
            f"cut {name!r} ({type(module).__name__}) runs more than once in a forward pass: cut at a module that "
            "runs once, or give each use a module of its own"
        )
    return UsageError(f"cut {name!r} ran before cut {order[len(done)]!r}: name the cuts in the order in which they run")


def _checked(name: str, module: nn.Module, output: Any, with_gradients: bool) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The :func:`hidden_state` of a cut's output; raise a :class:`onward.UsageError` where it cannot be cut, or not there."""
    seen = not with_gradients or torch.is_grad_enabled()
    if seen and isinstance(output, Tensor) and torch._C._functorch.peek_interpreter_stack() is None:
        return output, _itself
    where = f"cut {name!r} ({type(module).__name__})"
    h, put = hidden_state(output)
    if h is None:
        raise UsageError(
            f"the output of {where} is a {type(output).__name__} that does not begin with a tensor: cut at a module that "
            "returns a tensor, alone or first (onward.suggest_cuts(model, x) finds some)"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UsageError(
            f"{where} runs inside a torch.func transform (grad, jvp, vmap, ...), where its graph belongs to the transform and "
            "cannot be cut: cut outside of it, or use Backprop"
        )
    if seen:
        return h, put
    if not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled():  # so it is inside a Function's forward
        raise UsageError(
            f"{where} runs inside a torch.autograd.Function, which hides its graph and would backpropagate across the cut: if "
            "this is activation checkpointing, choose use_reentrant=False (in transformers "
            'gradient_checkpointing_kwargs={"use_reentrant": False}) or leave it out; else cut outside of the function'
        )
    if any(p.requires_grad for p in module.parameters()):
        raise UsageError(
            f"{where} has parameters to train and runs with gradients off (torch.no_grad, torch.inference_mode), so none would "
            "reach them: take it out of that, or freeze it by requires_grad_(False) and leave out the cut"
        )
    return h, put


class _OpenCheckpoint:
    """In the place of ``torch.utils.checkpoint.CheckpointFunction``, which hides the graph of what it runs."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


_group_norm = torch.group_norm


def _contiguous_group_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In the place of ``torch.group_norm``, whose backward kernel ends the process.

    aten::native_group_norm_backward on a CPU, channels last, writes the gradient of its input even where none was asked for
    (PyTorch 2.13; the kernels of the other layers, in every layout and with every gradient left out, do not). A network that
    is trained by backpropagation asks for it everywhere but at its own input; behind a cut nobody does, and a sweep that wants
    some gradients of a block need not either. Contiguous inputs have another kernel.
    """
    return _group_norm(x.contiguous() if x.device.type == "cpu" else x, *args, **kwargs)


@contextmanager
def _cuttable() -> Iterator[None]:
    """Within the block PyTorch works in ways that can be cut.

    Reentrant activation checkpointing works as the one that is not: the same numbers, in the same memory, from a graph that
    can be seen. Group norm does not crash. Attention has no fast path for inference, whose outputs may be nested tensors.
    """
    hiding, fast = torch.utils.checkpoint.CheckpointFunction, torch.backends.mha.get_fastpath_enabled()
    torch.utils.checkpoint.CheckpointFunction = _OpenCheckpoint  # type: ignore[misc, assignment]
    torch.group_norm = _contiguous_group_norm  # type: ignore[assignment]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = hiding  # type: ignore[misc]
        torch.group_norm = _group_norm
        torch.backends.mha.set_fastpath_enabled(fast)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, h: Tensor) -> Tensor:
        return h.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None


def enter(h: Tensor) -> Tensor:
    """The same memory as a block's output with a fresh graph: not a leaf, so what follows may overwrite it in place."""
    with torch.enable_grad():  # a frozen block may run without gradients; what follows it does not
        return _Enter.apply(torch.zeros((), requires_grad=True), h.detach())
