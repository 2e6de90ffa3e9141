"""How a traced step is run: as it is, compiled, or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from onward.errors import UsageError, unknown

BACKENDS = {
    "auto": "the fastest of running eagerly, replay and inductor, found by trying",
    "replay": "the traced operations, one after the other: bit for bit what the eager step computes",
    "inductor": "the traced operations, compiled by PyTorch's inductor: equal up to rounding",
    "cudagraphs": "as inductor, and the kernels are launched together as a CUDA graph",
}
ENGINES = {"replay": "replayed", "inductor": "compiled", "cudagraphs": "compiled, CUDA graph"}
"""What is added to an estimator's ``engine``."""
_SMALL = 512  # multiplications of a matrix product that is worth less than the call of a library

Run = Callable[..., Sequence[Any]]


def check(backend: str) -> None:
    """Raise :class:`onward.UsageError` for a backend that is unknown, or that is not for this machine."""
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if backend == "cudagraphs" and not torch.cuda.is_available():
        raise UsageError("backend='cudagraphs' needs a CUDA device, and PyTorch sees none: use 'inductor', or 'replay'")


def made(backend: str, graph: GraphModule, examples: Sequence[Tensor]) -> Run:
    """A function that runs the graph; the examples are what its inputs look like."""
    if backend == "replay":
        return graph.forward
    compiled = _compiled(graph, examples, cuda_graph=backend == "cudagraphs")
    if backend == "inductor":
        return compiled

    def run(*inputs: Tensor) -> list[Any]:
        torch.compiler.cudagraph_mark_step_begin()
        return [out.clone() if isinstance(out, Tensor) else out for out in compiled(*inputs)]  # the next run overwrites them

    return run


def _compiled(graph: GraphModule, examples: Sequence[Tensor], *, cuda_graph: bool) -> Run:
    """The graph, compiled by inductor; random operations draw as ever."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    graph = GraphModule(graph, graph.graph.__deepcopy__({}))
    _write_out_small_products(graph)
    with config.patch({"fallback_random": True, "triton.cudagraphs": cuda_graph}), torch.no_grad():
        compiled: Any = compile_fx(graph, list(examples))
    return compiled


def _write_out_small_products(graph: GraphModule) -> None:
    """Make tiny matrix products on a processor sums of products, which the compiler can fuse with what is around them.

    The call of a library for one takes longer than the product.
    """
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default) or not _is_small(*node.args[-2:]):
            continue
        if node.kwargs:  # of addmm, other factors than 1
            continue
        a, b = node.args[-2:]
        with graph.graph.inserting_before(node):
            rows = graph.graph.call_function(aten.unsqueeze.default, (a, 2))
            columns = graph.graph.call_function(aten.unsqueeze.default, (b, 0))
            products = graph.graph.call_function(aten.mul.Tensor, (rows, columns))
            found = graph.graph.call_function(aten.sum.dim_IntList, (products, [1]))
            if node.target is aten.addmm.default:
                found = graph.graph.call_function(aten.add.Tensor, (found, node.args[0]))
        node.replace_all_uses_with(found)
        graph.graph.erase_node(node)
    graph.recompile()


def _is_small(a: Node, b: Node) -> bool:
    left, right = a.meta["val"], b.meta["val"]
    exact = left.device.type == "cpu" and left.dtype in (torch.float32, torch.float64)
    return bool(exact and left.shape[0] * left.shape[1] * right.shape[1] <= _SMALL)
