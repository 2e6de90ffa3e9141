"""What only a run tells of a network's parameters: which rows of embeddings it leaves out, and the sizes of lazy layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from onward.network.run import call


def padding_rows_in(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """By a parameter's name, the row that its gradient leaves out: ``padding_idx`` of an embedding.

    None of a parameter that ``run()``, a run of the network, uses in any other way too, through which that row learns. The
    network is run only if it has such a layer.
    """
    if not any(getattr(module, "padding_idx", None) is not None for module in model.modules()):
        return {}
    with _Uses() as seen:
        run()
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: row for p, (row, *others) in seen.uses.items() if p in names and row is not None and not others}


class _Uses(TorchDispatchMode):
    """For each parameter, the rows that operations leave out of its gradient; None for those that leave out none."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[nn.Parameter, set[int | None]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for argument in args:
            if isinstance(argument, nn.Parameter):
                row = args[2] if len(args) > 2 else (kwargs or {}).get("padding_idx", -1)
                padded = func.overloadpacket is torch.ops.aten.embedding and row >= 0
                self.uses.setdefault(argument, set()).add(row if padded else None)
        return func(*args, **(kwargs or {}))


def settle(model: nn.Module, x: Any) -> None:
    """Give lazy layers, if there are any, their sizes: by a run in eval mode, which moves no statistics."""
    if not any(is_lazy(tensor) for tensor in chain(model.parameters(), model.buffers())):
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            call(model, x, any_output=True)
    finally:
        for module, training in modes:
            module.training = training
