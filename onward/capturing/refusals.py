"""What cannot be captured, and the sentence that says so."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from onward.capturing.watch import HOOKS
from onward.estimators.base import Estimator


class Untraceable(Exception):
    """A step cannot be captured; the message says why."""


def check(estimator: Estimator) -> None:
    """Raise :class:`Untraceable` for what a traced step would leave out."""
    if estimator.observe is not None:
        raise Untraceable("somebody observes its error signals")
    if estimator.kept is not None:
        raise Untraceable("its estimate is kept as numbers, which onward.Lean follows")
    for name, module in estimator.named_modules():
        if any(vars(module)[hooks] for hooks in HOOKS):
            raise Untraceable(f"{called(name, module)} has hooks, which a traced step would not run")
    for name, p in estimator.named_parameters():
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise Untraceable(f"the parameter {name} has hooks, which a traced step would not run")
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise Untraceable(f"the gradient of {name} is sparse")


@contextmanager
def silent(estimator: Estimator) -> Iterator[None]:
    """Within the block the estimator's part of a batch raises :class:`Untraceable` where it would ask other processes."""
    shard = estimator.shard
    if shard.share == 1.0:
        yield
        return

    def ask(*_: Any, **__: Any) -> Any:
        raise Untraceable("it exchanges numbers with other processes inside a step")

    asking = ("mean", "gather", "gather_rows", "sum")
    vars(shard).update(dict.fromkeys(asking, ask))
    try:
        yield
    finally:
        for name in asking:
            del vars(shard)[name]


def check_graph(graph: GraphModule) -> None:
    """Raise :class:`Untraceable` where it reads a tensor that is no input, whose numbers may change."""
    for node in graph.graph.find_nodes(op="get_attr"):
        held = getattr(graph, str(node.target))
        literal = all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)  # torch.tensor(0.5)
        if isinstance(held, Tensor) and (held.numel() > 1 or not literal):
            raise Untraceable(f"it reads a tensor of shape {tuple(held.shape)} that is made outside of what is traced")


def check_masks(graph: GraphModule, examples: Sequence[Tensor], start: Tensor, end: Tensor) -> None:
    """Raise :class:`Untraceable` where masks are drawn that the eager step draws twice, or from a seed of its own.

    The graph draws one after the other. Whether the step did too is seen by where it left the generator.
    """
    drawing = next((node for node in graph.graph.nodes if _draws(node)), None)
    if drawing is None:
        return
    device = next((t.device for t in examples if t.device.type == "cuda"), torch.device("cpu"))
    set_state(device, start)
    with torch.no_grad():
        graph(*(t.detach().clone() for t in examples))
    if not torch.equal(get_state(device), end):
        raise Untraceable(f"it runs parts of the network twice, or has heads, and {drawing.target} draws random numbers")


def get_state(device: torch.device) -> Tensor:
    """The state of PyTorch's own generator for a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_state(device: torch.device, state: Tensor) -> None:
    """Put :func:`get_state` back."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _draws(node: Node) -> bool:
    """Whether an operation draws random numbers; attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return bool(given.get("dropout_p", "dropout_p" not in names))


def called(name: str, module: nn.Module) -> str:
    """A module, in a message."""
    return f"{name.removeprefix('model.') or 'the network'} ({type(module).__name__})"


def reason(estimator: Estimator, error: Exception) -> str:
    """Why a step cannot be traced, with the module whose code it is."""
    if isinstance(error, Untraceable):
        return str(error)
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = {module: name for name, module in estimator.model.named_modules()}
    inside = [module for module in frames if isinstance(module, nn.Module) and module in names]
    where = f"in {called(names[inside[-1]], inside[-1])}: " if inside else ""
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    if "_local_scalar_dense" in said or "data-dependent" in said:
        said = "what runs depends on numbers in tensors (.item(), an if on a tensor)"
    return f"{where}{said}"
