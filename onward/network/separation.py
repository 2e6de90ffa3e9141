"""Find out, from one pass over a cut network, whether every cut is the only way forward, and nothing hides its graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from onward.derivatives.graph import nodes_behind
from onward.errors import UsageError
from onward.network.hidden import Wall


class Separation(TorchDispatchMode):
    """Look at the graph of every block of one pass, which runs within the ``with`` block.

    A graph node that is not a parameter and is reached from more than one block carries gradient around the cut between
    them. (A tied weight is reached from several blocks by right.)

    A parameter that is used inside a :class:`torch.autograd.Function`, and is none of the function's arguments, is hidden from
    the block: reentrant activation checkpointing and reversible layers run their modules there, and differentiate them in a
    backward pass of their own, which the block has no graph for.
    """

    def __init__(self, model: nn.Module, cuts: Sequence[str], remedy: str = "") -> None:
        super().__init__()
        self._model, self._cuts, self._remedy = model, cuts, remedy
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._owner: dict[Any, int] = {}
        self._hidden: dict[int, str] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled blocks are compiled under it too: PyTorch would leave them uncompiled for good."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # PyTorch turns its own forward mode off inside a Function's forward (and in inference mode), and nowhere else.
        if not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled():
            for argument in args:
                if isinstance(argument, nn.Parameter) and argument.requires_grad and id(argument) in self._names:
                    self._hidden[id(argument)] = self._names[id(argument)]
        return func(*args, **(kwargs or {}))

    def visit(self, k: int, *outputs: Tensor) -> None:
        """Take in block k through its outputs, before the graph is freed; raise where it reaches into an earlier block."""
        shared: dict[int, list[Any]] = {}
        given: set[int] = set()  # to functions, as arguments
        pending, mine = [output.grad_fn for output in outputs], set()
        while pending:
            node = pending.pop()
            if node is None or node in mine:
                continue
            mine.add(node)
            if isinstance(node, Wall._backward_cls):
                raise UsageError(getattr(node, "text"))  # noqa: B009 (an attribute that only this kind of node has)
            if hasattr(node, "variable"):
                continue
            earlier = self._owner.setdefault(node, k)
            if earlier != k:
                shared.setdefault(earlier, []).append(node)
                continue
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                given.update(id(following.variable) for following, _ in node.next_functions if hasattr(following, "variable"))
            pending.extend(following for following, _ in node.next_functions)
        for earlier, nodes in sorted(shared.items()):
            self._refuse_bypass(k, earlier, self._modules_behind(nodes))
        hidden = sorted(name for key, name in self._hidden.items() if key not in given)
        self._hidden.clear()
        if hidden:
            raise UsageError(
                f"{_listed(hidden)} {'is' if len(hidden) == 1 else 'are'} used inside a torch.autograd.Function, which hides "
                f"the graph from the block that ends at {self._end(k)}, so no gradient would arrive: if this is activation "
                "checkpointing, choose use_reentrant=False or leave it out; else give the function its parameters as arguments"
            )

    def _refuse_bypass(self, k: int, earlier: int, reached: Sequence[str]) -> None:
        if not reached:  # computed from no parameter: nothing to leak
            return
        compiled = any(isinstance(m, torch._dynamo.eval_frame.OptimizedModule) for m in self._model.modules())
        raise UsageError(
            f"cut {self._cuts[earlier]!r} is bypassed: {', '.join(reached)} "
            f"{'is' if len(reached) == 1 else 'are'} also reached from {self._end(k)} by another path (a skip connection?), so "
            "gradients would be backpropagated around the cut. Cut where everything passes, such as at the end of the "
            f"residual block{self._remedy}"
            + ("" if k < len(self._cuts) else ", or return less (output_hidden_states=False, output_attentions=False)")
            + (". What is compiled as a whole has one graph: compile its blocks instead" if compiled else "")
        )

    def _end(self, k: int) -> str:
        return f"cut {self._cuts[k]!r}" if k < len(self._cuts) else "the output"

    def _modules_behind(self, nodes: Sequence[Any]) -> list[str]:
        leaves = (node.variable for node in nodes_behind(nodes) if hasattr(node, "variable"))
        names = (self._names.get(id(leaf)) for leaf in leaves)
        return sorted({name.rpartition(".")[0] or name for name in names if name is not None})


def _listed(names: Sequence[str], most: int = 3) -> str:
    """Names in a sentence, the first few of many.

    >>> _listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
