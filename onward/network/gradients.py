"""Filling ``.grad`` without a backward pass over the whole network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onward.derivatives.graph import is_traced
from onward.errors import UsageError
from onward.network.parts import modules_of, parameters_of


class ParameterNames(dict[nn.Parameter, str]):
    """The names of a network's parameters, which directions are drawn by."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__((p, name) for name, p in model.named_parameters())

    def __missing__(self, p: nn.Parameter) -> str:
        raise UsageError(
            f"the network uses a parameter of shape {tuple(p.shape)} that it does not list, such as that of a layer in a plain "
            "list: keep layers in torch.nn.ModuleList or ModuleDict, and parameters in ParameterList"
        )


@torch.no_grad()
def accumulate(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor | None]) -> None:
    """Add each gradient to its parameter's ``.grad``, as a backward pass would; the gradients become ours."""
    taken: set[int] = set()
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            _add(p, gradient, taken)
            for hook in list((p._post_accumulate_grad_hooks or {}).values()):
                hook(p)


def _add(p: nn.Parameter, gradient: Tensor, taken: set[int]) -> None:
    if p.grad is not None:
        p.grad.add_(gradient.to_sparse(1) if p.grad.is_sparse and not gradient.is_sparse else gradient)
        return
    p.grad = gradient.to(p.dtype)
    if gradient.layout is not torch.strided:
        return
    # autograd.grad gives several parameters the same memory where their gradients are equal, or repeats one element.
    memory = p.grad.untyped_storage().data_ptr()
    if memory in taken or 0 in p.grad.stride():
        p.grad = torch.empty_like(p).copy_(gradient)
    taken.add(memory)


def with_sparse_gradients(module: nn.Module) -> set[nn.Parameter]:
    """The parameters of layers that ask for sparse gradients, such as ``nn.Embedding(sparse=True)``."""
    return {p for part in modules_of(module) if _asks_for_sparse(part) for p in part.parameters()}


def _asks_for_sparse(part: nn.Module) -> bool:
    return vars(part).get("sparse", False) is True or getattr(type(part), "sparse", False) is True


def as_asked(module: nn.Module) -> None:
    """Make gradients sparse that were made of directions, or sample by sample, where the layer asks for sparse ones."""
    for p in with_sparse_gradients(module):
        if p.grad is not None and not p.grad.is_sparse:
            p.grad = p.grad.to_sparse(1)


def allocate_gradients(module: nn.Module) -> list[nn.Parameter]:
    """Give parameters that have no ``.grad`` zeros as theirs; returns these parameters.

    What outlives a pass comes first, so that it does not lie scattered among what the blocks allocate and free. Gradients that
    will be sparse are left to autograd, and small ones, which lie anywhere.
    """
    if is_traced():
        return []  # what is traced allocates when it is replayed
    fresh = [p for p in parameters_of(module) if p.requires_grad and p.grad is None and not is_lazy(p) and p.numel() > _SMALL]
    if fresh:
        sparse = with_sparse_gradients(module)
        fresh = [p for p in fresh if p not in sparse]
    for p in fresh:
        p.grad = torch.zeros_like(p)
    return fresh


_SMALL = 1 << 10  # numbers in a gradient that takes longer to allocate and add to than to be made


def forget_unused(fresh: Iterable[nn.Parameter]) -> None:
    """Take away those zeros that nobody has written to: the pass did not use these parameters."""
    for p in fresh:
        if p.grad is not None and p.grad._version == 0:
            p.grad = None
