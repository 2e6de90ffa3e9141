"""Find the layers in the graph of a pass, and let other weights carry the error back through them.

A layer is a matrix product or a convolution with a parameter. Autograd keeps the parameter, or a view of it, for the gradient
of the layer's other operand: that is what carries the error back, and is given something else in its place. The forward pass,
and the parameter's own gradient, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from onward.derivatives.graph import nodes_behind
from onward.errors import UsageError

Carry = Callable[[int, Tensor], Tensor]
"""``carry(index, weight)``: what carries the error back in the place of a weight, of its shape."""
_PRODUCTS: dict[str, tuple[tuple[str, int, int], ...]] = {
    "Mm": (("self", 0, 1), ("mat2", 1, 0)),
    "Addmm": (("mat1", 1, 2), ("mat2", 2, 1)),
    "Bmm": (("self", 0, 1), ("mat2", 1, 0)),
    "Baddbmm": (("batch1", 1, 2), ("batch2", 2, 1)),
    "Addbmm": (("batch1", 1, 2), ("batch2", 2, 1)),
    "Mv": (("self", 0, 1), ("vec", 1, 0)),
    "Addmv": (("mat", 1, 2), ("vec", 2, 1)),
    "Dot": (("self", 0, 1), ("tensor", 1, 0)),
    "Linear": (("weight", 1, 0),),
    "Convolution": (("weight", 1, 0),),
    "ConvolutionOverrideable": (("weight", 1, 0),),
}
"""By operation, what it keeps of each operand, the operand's place, and the place of the one whose gradient that is for."""
_VIEWS = {
    *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand", "Unsqueeze", "Squeeze", "Alias", "ToCopy"),
    *("Select", "Slice", "Split", "SplitWithSizes", "UnsafeSplit", "Unbind", "AsStrided", "Diagonal", "Detach"),
}
_LOOKUPS = {"Embedding", "EmbeddingBag", "Index", "IndexSelect", "Gather", "IndexPut"}
"""Operations on one parameter whose result depends on data."""
_HIDDEN = ("Rnn", "Trilinear", "MultiHead")
"""Parts of the names of operations that carry an error through a weight and keep it where it cannot be replaced."""
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_TABLES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
"""Whose parameters multiply no matrix."""


class Saved(NamedTuple):
    """Where what autograd has kept lies in a weight."""

    which: int
    size: Sequence[int]
    stride: Sequence[int]
    offset: int | torch.SymInt
    dtype: torch.dtype


class Carriers:
    """The weights of a network that carry errors back: parameters of two or more dimensions, but for those of lookups and
    normalisation.

    Raises :class:`onward.UsageError` where a layer computes its weight from other parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        names: dict[nn.Parameter, str] = {}
        self._of_layers: set[str] = set()
        for path, module in model.named_modules():
            layer = isinstance(module, _LAYERS)
            if layer and (parametrize.is_parametrized(module) or "weight_g" in module._parameters):
                raise UsageError(
                    f"the weight of {path or 'the network'} ({type(module).__name__}) is computed from other parameters "
                    "(weight_norm, spectral_norm, a parametrization), so there is none to carry an error beside: remove that "
                    "(torch.nn.utils.parametrize.remove_parametrizations), or use Backprop"
                )
            for own, p in module._parameters.items():
                if p is not None and not isinstance(module, _TABLES) and (nn.parameter.is_lazy(p) or p.dim() > 1):
                    name = names.setdefault(p, f"{path}.{own}" if path else own)
                    self._of_layers |= {name} if layer else set()
        listed = {p: name for name, p in model.named_parameters()}  # tied ones by the name that the network lists
        self._of_layers = {listed[p] for p, name in names.items() if name in self._of_layers}
        self.names = tuple(name for p, name in listed.items() if p in names)

    def replace(self, model: nn.Module, outputs: Iterable[Tensor], carry: Carry) -> None:
        """In the graph behind the outputs, let what ``carry`` says take the place of every weight that carries an error.

        Raises :class:`onward.UsageError` where a weight cannot be replaced, naming it.
        """
        named = dict(model.named_parameters())
        found = _Pass(named, self.names, self._of_layers, carry)
        for node in nodes_behind(output.grad_fn for output in outputs):
            operands = _PRODUCTS.get(kind(node))
            if operands is None:
                found.check(node)
            else:
                for kept, at, other in operands:
                    found.replace(node, kept, at, other)


class _Pass:
    """The weights of one pass."""

    def __init__(self, named: dict[str, nn.Parameter], names: Sequence[str], of_layers: set[str], carry: Carry) -> None:
        self.names, self.of_layers, self.carry = names, of_layers, carry
        self.weights = [named[name] for name in names]
        self.index = {p: i for i, p in enumerate(self.weights)}
        self.called = {p: name for name, p in named.items()}
        self.frozen = [i for i, p in enumerate(self.weights) if not p.requires_grad]
        if self.frozen and torch.is_autocast_enabled(self.weights[0].device.type):
            raise UsageError(
                f"{names[self.frozen[0]]} is frozen, and under autocast its copy of less precision cannot be told from data: "
                "unfreeze it, or leave out autocast"
            )

    def replace(self, node: Any, kept: str, at: int, other: int) -> None:
        """Replace what a product keeps of one operand for the gradient of the other, if the operand is a weight."""
        beside, operand = node.next_functions[other][0], node.next_functions[at][0]
        if beside is None:
            return  # nothing is carried back
        if operand is None:
            if self.frozen:
                self._hook(node, kept, None)
            return
        p = self._parameter(operand)
        if p is None:
            return
        if p not in self.index:
            if p.dim() < 2:
                return
            raise UsageError(
                f"{self._called(p)} is a table's (an embedding, normalisation), and is multiplied with as a matrix: tie it to "
                "the weight of an nn.Linear, which has its own to carry the error back"
            )
        if self._called(p) in self.of_layers or self._parameter(beside) is None:
            self._hook(node, kept, p)

    def check(self, node: Any) -> None:
        """Raise where an operation that is no product carries an error through a weight, or computes one."""
        if kind(node) in _VIEWS or hasattr(node, "variable"):
            return
        for following, _ in node.next_functions:
            p = self._parameter(following, views=True)
            if p is None or p not in self.index:
                continue
            name = self._called(p)
            if isinstance(node, torch.autograd.function.BackwardCFunction) or any(part in kind(node) for part in _HIDDEN):
                raise UsageError(
                    f"{name} is used by {node.name()}, which carries the error back by itself: compute with nn.Linear, or a "
                    "convolution, or use Backprop"
                )
            if name in self.of_layers and kind(node) not in _LOOKUPS:
                raise UsageError(
                    f"the layer's weight {name} is computed with ({node.name()}) before it is multiplied with, so there is "
                    "none to carry an error beside: use it as it is, or use Backprop"
                )

    def _hook(self, node: Any, kept: str, p: nn.Parameter | None) -> None:
        try:
            getattr(node, f"_raw_saved_{kept}").register_hooks(lambda t: self._pack(t, p), self._unpack)
        except RuntimeError as error:
            name = self._called(p) if p is not None else "a layer of a network with frozen ones"
            raise UsageError(
                f"{name} runs where what autograd keeps is kept elsewhere, by activation checkpointing or saved tensor hooks "
                f"({str(error).splitlines()[0]}): leave that out"
            ) from error

    def _pack(self, t: Tensor, p: nn.Parameter | None) -> Saved | tuple[Tensor, int]:
        memory = t.untyped_storage().data_ptr()
        if p is None:  # a constant, which may be a frozen weight
            i = next((i for i in self.frozen if self.weights[i].untyped_storage().data_ptr() == memory), None)
            if i is None:
                return t, t._version
        else:
            i = self.index[p]
        w = self.weights[i]
        same = w.untyped_storage().data_ptr() == memory
        if not same and t.dtype == w.dtype:
            raise UsageError(
                f"{self.names[i]} is copied or computed with before it is multiplied with, so there is none to carry an error "
                "beside: use the parameter itself or a view of it, or Backprop"
            )
        offset = t.storage_offset() - (w.storage_offset() if same else 0)
        return Saved(i, t.size(), t.stride(), offset, t.dtype)

    def _unpack(self, kept: Saved | tuple[Tensor, int]) -> Tensor:
        if not isinstance(kept, Saved):
            if kept[0]._version != kept[1]:
                raise UsageError("what a layer multiplies with has been overwritten in place since: use the form that is not")
            return kept[0]
        w = self.weights[kept.which]
        b = self.carry(kept.which, w).to(kept.dtype)
        if b.stride() != w.stride():
            b = torch.empty_strided(w.size(), w.stride(), dtype=b.dtype, device=b.device).copy_(b)
        return b.as_strided(kept.size, kept.stride, kept.offset)

    def _parameter(self, node: Any, *, views: bool = False) -> nn.Parameter | None:
        """The parameter that an operand is, or is computed from and from nothing else; ``views``: or is a view of."""
        while node is not None and not hasattr(node, "variable"):
            if len(node.next_functions) != 1 or kind(node) in _LOOKUPS or (views and kind(node) not in _VIEWS):
                return None
            node = node.next_functions[0][0]
        p = getattr(node, "variable", None)
        return p if p in self.called else None

    def _called(self, p: nn.Parameter) -> str:
        return self.called[p]


def kind(node: Any) -> str:
    """The operation that a node of the graph differentiates, such as Addmm."""
    return str(node.name()).partition("Backward")[0]
