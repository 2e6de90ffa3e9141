"""The hidden state in what a module returns: what is cut where that is more than one tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onward.derivatives.graph import parameters_behind
from onward.errors import UsageError
from onward.network.run import replaced

_NAMES = ("last_hidden_state", "hidden_states")


def hidden_state(output: Any) -> tuple[Tensor | None, Callable[[Tensor], Any]]:
    """The hidden state in a module's output, and a function that puts another tensor in its place.

    It is the output itself if that is a tensor; the first of a tuple or list; of a dict or dataclass what is named
    ``last_hidden_state`` or ``hidden_states``, or else the first. None where that is no tensor.

    >>> import torch
    >>> h, put = hidden_state((torch.zeros(2), "the rest"))
    >>> put(h + 1)
    (tensor([1., 1.]), 'the rest')
    """
    if isinstance(output, Tensor):
        return output, lambda h: h
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        made = getattr(type(output), "_make", type(output))  # a named tuple is made otherwise
        return output[0], lambda h: made([h, *output[1:]])
    if isinstance(output, Mapping):
        if (name := _named(output)) is None:
            return None, lambda h: output
        return output[name], lambda h: _with(output, name, h)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        held = {field.name: getattr(output, field.name) for field in dataclasses.fields(output) if field.init}
        if (name := _named(held)) is not None:
            return held[name], lambda h: dataclasses.replace(output, **{name: h})
    return None, lambda h: output


def _named(held: Mapping[str, Any]) -> str | None:
    """The name of the hidden state, if it is a tensor."""
    given = [name for name, value in held.items() if value is not None]
    name = next((name for name in _NAMES if isinstance(held.get(name), Tensor)), given[0] if given else None)
    return name if name is not None and isinstance(held[name], Tensor) else None


def _with(output: Mapping[str, Any], name: str, h: Tensor) -> Any:
    """A mapping of the same kind with h under that name."""
    if type(output) is dict:
        return {**output, name: h}
    changed = type(output)(**output)  # of transformers: a dataclass that is an ordered dict, too
    changed[name] = h  # type: ignore[index]
    return changed


class Wall(torch.autograd.Function):
    """Lets nothing back: what a cut module returns beside its hidden state, where something to train is behind it."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, text: str) -> Tensor:
        ctx.text = text
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UsageError(ctx.text)


def walled(model: nn.Module, name: str, output: Any) -> Any:
    """What a cut module returns, its hidden state cut: no gradient gets back through the rest to a parameter."""
    if not torch.is_grad_enabled():
        return output
    h, _ = hidden_state(output)

    def wall(part: Tensor) -> Tensor:
        if part is h or not part.requires_grad or not (behind := parameters_behind(part)):
            return part
        names = [n for n, p in model.named_parameters() if p in behind]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        kind = type(model.get_submodule(name)).__name__
        return Wall.apply(
            part,
            f"cut {name!r} ({kind}) returns more than its hidden state, and what follows uses it: a gradient for {shown} would "
            "cross the cut. Freeze that (requires_grad_(False)), switch off what returns it (output_attentions=False), or cut "
            "elsewhere (onward.suggest_cuts(model, x) finds where)",
        )

    return replaced(output, wall)
