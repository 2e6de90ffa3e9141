"""Look at a network before it is trained: are rows samples, and do forward mode and the backward pass agree?

An estimator does so on its first batch, on copies of the buffers and with the generators put back. No gradient crosses a cut.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onward.derivatives.directions import draw
from onward.derivatives.tangents import Tangents
from onward.errors import UsageError
from onward.network.cuts import cut_graph
from onward.network.replay import Replay, uncompiled
from onward.network.run import batch_statistics, call, device_of, leaves, replaced, samples_of, without_graph


class Mixing(NamedTuple):
    """The rows of a module's output that changed though only other samples were changed."""

    module: str
    rows: int
    """How many of them did."""
    transposed: bool
    """Whether it is its second dimension that counts samples."""


mixing_seen: WeakKeyDictionary[nn.Module, list[Mixing]] = WeakKeyDictionary()
"""What the first batch of a network has shown, for :func:`onward.validate`."""


def mixing(model: nn.Module, names: Sequence[str], x: Any) -> list[Mixing]:
    """The named modules whose output rows depend on other samples, found by changing half of a batch, then the other half.

    Batch norm's own statistics are left out: it works in eval mode here. Costs three forward passes, or four.

    >>> class Mean(nn.Module):
    ...     def forward(self, x):
    ...         return x - x.mean(0)
    >>> [found.module for found in mixing(nn.Sequential(nn.Linear(2, 2), Mean()), ["0", "1"], torch.randn(4, 2))]
    ['1']
    """
    again = Replay(model)
    first = _signatures(model, names, x, again)
    samples = len(first[""]) if "" in first else samples_of(x)
    # Neighbours, and partners in two halves of a batch, are in different halves here: their numbers have bits more or less.
    odd = torch.tensor([n.bit_count() % 2 == 1 for n in range(samples)])
    found: list[Mixing] = []
    for rows in (torch.where(odd)[0], torch.where(~odd)[0]):
        changed = _changed(x, samples, rows)
        if changed is None or found:
            continue
        second = _signatures(model, names, changed, again, samples)
        found = [seen for name in names if (seen := _compare(name, first.get(name), second.get(name), rows, samples))]
    if found:
        third = _signatures(model, names, x, again, samples)
        if any(not torch.allclose(first[seen.module], third[seen.module], rtol=1e-4) for seen in found):
            return []  # it is not the samples that make the difference: the network does not run twice alike
    return found


def some_samples(x: Any, count: int) -> Any:
    """So many samples of a batch, from all over it."""
    samples = samples_of(x)
    if samples <= count:
        return x
    rows = torch.linspace(0, samples - 1, count).long()
    return replaced(x, lambda leaf: leaf[rows.to(leaf.device)] if _is_of_samples(leaf, samples) else leaf, integers=True)


def _is_of_samples(leaf: Tensor, samples: int) -> bool:
    return leaf.dim() > 0 and leaf.shape[0] == samples and leaf.layout is torch.strided


def _changed(x: Any, samples: int, rows: Tensor) -> Any:
    """The batch with those samples replaced by the ones after them; None where nothing changes."""
    source = torch.arange(samples)
    source[rows] = (rows + 1) % samples
    changes = False

    def change(leaf: Tensor) -> Tensor:
        nonlocal changes
        if not _is_of_samples(leaf, samples):
            return leaf
        changed = leaf.detach()[source.to(leaf.device)]
        changes = changes or not torch.equal(changed, leaf)
        return changed

    changed = replaced(x, change, integers=True)
    return changed if changes else None


def _signatures(model: nn.Module, names: Sequence[str], x: Any, again: Replay, samples: int | None = None) -> dict[str, Tensor]:
    """For each named module a number for every row of its output, or for every row and place of a second dimension, if one of
    the two is as long as there are samples (as many as rows in the network's output, if not given).

    The name of the network itself is empty. Graphs end at the named modules.
    """
    outputs: dict[str, Tensor] = {}

    def note(k: int, h: Tensor) -> Tensor:
        outputs[inner[k]] = h.detach()
        return h.detach()

    inner = [name for name in names if name]
    looking, cutting = again.untouched(noise=_NOISE), cut_graph(model, inner, note)
    with looking, uncompiled(), _running_statistics(model), batch_statistics(), torch.enable_grad(), cutting:
        outputs[""] = leaves(call(model, x))[0].detach()
    samples = samples or (len(outputs[""]) if outputs[""].dim() else samples_of(x))
    found: dict[str, Tensor] = {}
    for name, h in outputs.items():
        if name in names and h.is_floating_point() and samples in h.shape[: max(1, h.dim() - 1)][:2]:
            kept = 2 if h.dim() > 2 and h.shape[1] == samples else 1
            flat = h.flatten(kept) if h.dim() > 1 else h.unsqueeze(1)
            flat = flat if flat.dtype == torch.float64 else flat.float()
            found[name] = flat @ torch.arange(flat.shape[-1], device=h.device).to(flat.dtype).cos()
    return found


def _compare(name: str, first: Tensor | None, second: Tensor | None, rows: Tensor, samples: int) -> Mixing | None:
    if first is None or second is None or first.shape != second.shape:
        return None
    change = (second - first).abs()
    least = max(1e-3 * change.max().item(), 1e-4 * first.abs().max().item())
    moved = change > least
    kept = torch.ones(samples, dtype=torch.bool, device=moved.device)
    kept[rows.to(moved.device)] = False
    transposed = moved.dim() == 2 and moved.any() and not moved[:, kept].any()
    if len(moved) != samples:
        return Mixing(name, int(moved.any(1).sum()), True) if transposed else None  # else its rows are something else
    others = moved[kept] if moved.dim() == 1 else moved[kept].any(1)
    return Mixing(name, int(others.sum()), bool(transposed)) if others.any() else None


@contextmanager
def _running_statistics(model: nn.Module) -> Iterator[None]:
    """Within the block batch norm normalises by its running statistics."""
    training = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training and layer.running_mean is not None
    ]
    for layer in training:
        layer.training = False
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


class Disagreement(NamedTuple):
    """Where forward mode and the backward pass give different derivatives, and both."""

    module: str
    forward: float
    reverse: float


def disagreement(
    model: nn.Module, names: Sequence[str], x: Any, parameters: Collection[str] = (), arriving: set[str] | None = None
) -> Disagreement | None:
    """The first of the named modules, in the order in which they run, up to which the two derivatives of a network differ.

    With J the Jacobian of a block, u random tangents of what enters it and w a random signal at its output, forward mode
    gives ``<w, J u>`` and the backward pass ``<J^T w, u>``, which are equal wherever a layer's backward is the derivative of
    its forward, and forward mode follows it. Forward mode must give the same where nothing asks for a gradient, as behind a
    cut. The network is cut at the named modules: each block is compared by itself. Tangents enter there, and on the
    ``parameters`` of those names; ``arriving`` takes the names of those at which a gradient arrives. Batch norm runs in eval
    mode: where its statistics are of several processes, neither number is the whole here.
    """
    directions = {name: _direction(model.get_parameter(name), name) for name in parameters}
    half = (torch.float16, torch.bfloat16)
    coarse = torch.is_autocast_enabled(device_of(model).type) or any(p.dtype in half for p in model.parameters())
    found: list[Disagreement] = []
    seen: dict[str, tuple[float, float]] = {}  # at each module the slope, and the output itself, along w

    def differentiated(
        name: str, tangents: Tangents, entered: Sequence[tuple[Tensor, Tensor]], outputs: Sequence[Tensor]
    ) -> None:
        ends = [h for h in outputs if h.requires_grad]
        if (found and arriving is None) or not entered or not ends:
            return
        moved = [tangents.get(h) for h in ends]
        with tangents.paused():
            w = [_direction(h, f"w{i}") for i, h in enumerate(ends)]
            arrived = torch.autograd.grad(ends, [leaf for leaf, _ in entered], w, retain_graph=True, allow_unused=True)
            reverse = _along(arrived, [u for _, u in entered])
            forward = _along(moved, w)
            seen[name] = forward, _along(ends, w)
        if arriving is not None:
            arriving.update(name for name, g in zip(parameters, arrived, strict=False) if g is not None)
        if _differ(forward, reverse, moved, ends, coarse):
            found.append(Disagreement(name, forward, reverse))

    def measured(name: str, tangents: Tangents, entered: Any, outputs: Sequence[Tensor]) -> None:
        moved = [tangents.get(h) for h in outputs]
        with tangents.paused():
            w = [_direction(h, f"w{i}") for i, h in enumerate(outputs)]
            slope, value = _along(moved, w), _along(outputs, w)
        if name not in seen or found:
            return
        if _differ(value, seen[name][1], outputs, outputs, coarse):
            seen.clear()  # it does not run twice alike, so nothing can be compared
        elif _differ(slope, seen[name][0], moved, outputs, coarse):
            found.append(Disagreement(name, slope, seen[name][0]))

    _run_apart(model, names, x, directions, differentiated, builds_graph=True)
    if not found:
        _run_apart(model, names, x, directions, measured, builds_graph=False)
    return found[0] if found else None


_NOISE = 0.1
"""How far the parameters are off in a look, relative to their size: branches that start at zero show."""
_SAMPLES = 8
"""Samples that are looked at where each could be looked at by itself."""


def _along(tensors: Sequence[Tensor | None], directions: Sequence[Tensor]) -> float:
    """The inner product of tensors, of which some may be missing, with directions."""
    total = 0.0
    for t, u in zip(tensors, directions, strict=True):
        if t is not None:
            dense = t.detach().to_dense() if t.is_sparse else t.detach()
            total += torch.linalg.vecdot(dense.flatten().to(torch.float64), u.flatten().to(torch.float64)).item()
    return total


def _differ(one: float, other: float, tangents: Sequence[Tensor | None], outputs: Sequence[Tensor], coarse: bool) -> bool:
    """Whether two inner products differ by more than rounding can make of tangents, or of what they are tangents of.

    ``coarse``: somewhere numbers are of half precision, whatever the outputs are.
    """
    size = max([abs(one), abs(other), *(t.detach().norm().item() for t in tangents if t is not None)])
    least = 1e3 * torch.finfo(outputs[0].dtype).eps * max(h.detach().norm().item() for h in outputs)
    return abs(one - other) > (0.1 if coarse else _tolerance(outputs[0])) * size + least


def _run_apart(
    model: nn.Module,
    names: Sequence[str],
    x: Any,
    directions: Mapping[str, Tensor],
    compare: Callable[..., None],
    *,
    builds_graph: bool,
) -> None:
    """Run the network cut at the named modules, with tangents of the parameters and at every cut, and look at each output."""
    tangents = Tangents(through_gradients=True)
    entered: list[tuple[Tensor, Tensor]] = []  # with its tangent

    def deliver(k: int, h: Tensor) -> Tensor:
        if not h.is_floating_point():
            return h
        compare(names[k], tangents, entered, [h])
        with tangents.paused():
            leaf = h.detach().requires_grad_(builds_graph)
            u = _direction(leaf, f"u{k}")
        tangents.set(leaf, u.clone())
        entered.append((leaf, u))
        with torch.enable_grad():  # a frozen block may run without gradients; what follows it does not
            return leaf.clone() if builds_graph else leaf  # what follows may overwrite it

    graph = torch.enable_grad() if builds_graph else without_graph(model)
    looking = Replay(model).untouched(noise=_NOISE)
    with looking, uncompiled(), graph, _running_statistics(model), tangents:
        for name, u in directions.items():
            p = model.get_parameter(name)
            tangents.set(p, u.clone())
            entered.append((p, u))
        with cut_graph(model, names, deliver):
            output = call(model, x)
        compare("", tangents, entered, leaves(output))


def _direction(like: Tensor, name: str) -> Tensor:
    return draw(like.shape, seed=0, step=0, block=f"probe {name}", dtype=like.dtype, device=like.device)


def _tolerance(h: Tensor) -> float:
    """What rounding may do to an inner product, relative to the lengths of what it is made of."""
    if h.dtype == torch.float64:
        return 1e-6
    return (1e-3 if h.device.type == "cpu" else 1e-2) if h.dtype == torch.float32 else 0.1


def once_in_order(model: nn.Module, x: Any) -> list[str]:
    """The modules of a network that run once, where they can be cut, and return a tensor, in the order in which they end."""
    order: list[str] = []
    runs: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            runs[name] += 1
            transformed = torch._C._functorch.peek_interpreter_stack() is not None
            if isinstance(output, Tensor) and output.is_floating_point() and torch.is_grad_enabled() and not transformed:
                order.append(name)

        return hook

    scripted = torch.jit.ScriptModule  # which takes no hooks
    named = [(name, module) for name, module in model.named_modules() if name and not isinstance(module, scripted)]
    handles = [module.register_forward_hook(note(name)) for name, module in named]
    try:
        with Replay(model).untouched(), uncompiled(), without_graph(model), _running_statistics(model):
            call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in order if runs[name] == 1]


def refuse_disagreement(
    model: nn.Module, cuts: Sequence[str], x: Any, *, parameters: bool, where_gradients_arrive: bool, who: str
) -> None:
    """Raise a :class:`onward.UsageError` where forward mode and the backward pass disagree, naming the module.

    With ``parameters`` these carry tangents, with ``where_gradients_arrive`` only those that have a gradient: directions are
    gradients then. Some samples of a large batch are enough. A network without cuts is cut at every module, so that no graph is
    larger than a module's; or nowhere, if it takes gradients across modules.
    """
    on = trained(model) if parameters else []
    arriving: set[str] = set()
    for apart, batch in itertools.product((True, False) if not cuts else (True,), (some_samples(x, _SAMPLES), x)):
        try:
            names = cuts or (once_in_order(model, batch) if apart else ())
            found = disagreement(model, names, batch, on, arriving if where_gradients_arrive else None)
            if found and where_gradients_arrive:
                found = disagreement(model, names, batch, [name for name in on if name in arriving])
            break
        except Exception:  # it does not run on fewer samples, or it takes a gradient across a module's end
            if batch is x and (cuts or not apart):
                raise
    if found is not None:
        raise UsageError(
            f"forward mode and the backward pass disagree in {_place(model, cuts, found, batch, on)}, by {found.forward:.4g} "
            f"against {found.reverse:.4g}: its backward is not the derivative of its forward (a straight-through estimator, "
            "scaled or masked gradients), it computes otherwise where its input needs no gradient, or forward mode cannot "
            f"follow it (NumPy, a custom operation). {who} would learn from another derivative than backpropagation's: use an "
            "estimator without forward mode (DFA, DKP, LocalLoss, engine='reverse'), or check=False if that is what you want"
        )


def _place(model: nn.Module, cuts: Sequence[str], found: Disagreement, x: Any, on: Sequence[str]) -> str:
    """Where a disagreement was found, to the module if that can be had."""
    if cuts:
        try:
            found = disagreement(model, once_in_order(model, x), x, on) or found
        except Exception:  # there are modules that cannot be cut by themselves
            return f"the block that ends at {f'cut {found.module!r}' if found.module else 'the output'}"
    if not found.module:
        return "what comes after its last module"
    return f"module {found.module!r} ({type(model.get_submodule(found.module)).__name__})"


def trained(model: nn.Module) -> list[str]:
    """The names of the parameters that train and may carry tangents."""
    return [name for name, p in model.named_parameters() if p.requires_grad and not is_lazy(p) and p.is_floating_point()]
