"""Look at a network before it is trained: are rows samples, and do forward mode and the backward pass agree?

An estimator does so on its first batch, on copies of the buffers and with the generators put back. No gradient crosses a cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from onward.cuts import cut_graph
from onward.directions import draw
from onward.errors import UsageError
from onward.forward_mode import Tangents
from onward.replay import Replay
from onward.run import Loss, batch_statistics, call, compute_loss, device_of, leaves, output_error, samples_of, without_graph


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
    """The named modules whose output rows depend on other samples, found by changing every second sample of a batch.

    Batch norm's own statistics are left out: it works in eval mode here. Costs two passes without a graph, or three.

    >>> class Mean(nn.Module):
    ...     def forward(self, x):
    ...         return x - x.mean(0)
    >>> [found.module for found in mixing(nn.Sequential(nn.Linear(2, 2), Mean()), ["0", "1"], torch.randn(4, 2))]
    ['1']
    """
    samples = samples_of(x)
    changed = _every_second_changed(x, samples)
    if changed is None:
        return []
    again = Replay(model)
    first, second = (_signatures(model, names, batch, samples, again) for batch in (x, changed))
    found = [seen for name in names if (seen := _compare(name, first.get(name), second.get(name))) is not None]
    if found:
        third = _signatures(model, names, x, samples, again)
        if any(not torch.allclose(first[seen.module], third[seen.module], rtol=1e-4) for seen in found):
            return []  # it is not the samples that make the difference: the network does not run twice alike
    return found


def _every_second_changed(x: Any, samples: int) -> Any:
    """The batch with each odd sample replaced by the next one; None where nothing changes."""
    rows = torch.arange(samples)
    rows[1::2] = (rows[1::2] + 1) % samples
    changes = False

    def change(leaf: Any) -> Any:
        nonlocal changes
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != samples or leaf.layout is not torch.strided:
            return leaf
        changed = leaf.detach()[rows.to(leaf.device)]
        changes = changes or not torch.equal(changed, leaf)
        return changed

    changed = tree_map(change, dict(x) if isinstance(x, Mapping) else x)
    return changed if changes else None


def _signatures(model: nn.Module, names: Sequence[str], x: Any, samples: int, again: Replay) -> dict[str, Tensor]:
    """For each named module a number for every sample of its output, or for every sample and place of a second such dimension.

    The name of the network itself is empty.
    """
    found: dict[str, Tensor] = {}

    def note(name: str, h: Tensor) -> Tensor:
        if h.is_floating_point() and h.dim() > 1 and h.shape[0] == samples:
            kept = 2 if h.dim() > 2 and h.shape[1] == samples else 1
            flat = h.detach().flatten(kept)
            flat = flat if flat.dtype == torch.float64 else flat.float()
            found[name] = flat @ torch.arange(flat.shape[-1], device=h.device).to(flat.dtype).cos()
        return h

    inner = [name for name in names if name]
    with again.unseen(), torch.no_grad(), _running_statistics(model), batch_statistics():
        with cut_graph(model, inner, lambda k, h: note(inner[k], h)):
            output = call(model, x)
        note("", leaves(output)[0])
    return found


def _compare(name: str, first: Tensor | None, second: Tensor | None) -> Mixing | None:
    if first is None or second is None or first.shape != second.shape:
        return None
    change = (second - first).abs()
    least = max(1e-3 * change.max().item(), 1e-4 * first.abs().max().item())
    moved = change > least
    others = moved[::2]
    if not others.any():
        return None
    transposed = moved.dim() == 2 and not moved[:, ::2].any()
    of_rows = others if others.dim() == 1 else others.any(1)
    return Mixing(name, int(of_rows.sum()), bool(transposed))


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
    its forward, and forward mode follows it. (Batch norm runs in eval mode, as where its statistics are of several processes
    neither is the whole.) Tangents enter at the outputs of the named modules, and on the parameters of
    those names; ``arriving`` takes the names of those at which a gradient arrives. The network is cut there: each block is
    compared by itself.
    """
    tangents = Tangents(through_gradients=True)
    entered: list[tuple[Tensor, Tensor]] = []  # with its tangent
    found: list[Disagreement] = []

    def compare(name: str, outputs: Sequence[Tensor]) -> None:
        ends = [h for h in outputs if h.requires_grad]
        if (found and arriving is None) or not entered or not ends:
            return
        moved = [tangents.get(h) for h in ends]
        with tangents.paused():
            w = [_direction(h, f"w{i}") for i, h in enumerate(ends)]
            at = [leaf for leaf, _ in entered]
            arrived = torch.autograd.grad(ends, at, w, retain_graph=True, allow_unused=True)
            reverse = sum(_inner(g, u) for g, (_, u) in zip(arrived, entered, strict=True) if g is not None)
            forward = sum(_inner(one, t) for one, t in zip(w, moved, strict=True) if t is not None)
            size = max([abs(reverse), abs(forward), *(t.norm().item() for t in moved if t is not None)])
        if arriving is not None:
            arriving.update(name for name, g in zip(parameters, arrived, strict=False) if g is not None)
        if abs(forward - reverse) > _tolerance(ends[0]) * size:
            found.append(Disagreement(name, forward, reverse))

    def deliver(k: int, h: Tensor) -> Tensor:
        if not h.is_floating_point():
            return h
        compare(names[k], [h])
        with tangents.paused():
            leaf = h.detach().requires_grad_()
            entered.append((leaf, _direction(leaf, f"u{k}")))
        tangents.set(leaf, entered[-1][1].clone())
        return leaf.clone()  # what follows may overwrite it

    again = Replay(model)
    with again.unseen(), torch.enable_grad(), _without_backward_hooks(model), _running_statistics(model), tangents:
        for name in parameters:
            p = model.get_parameter(name)
            entered.append((p, _direction(p, name)))
            tangents.set(p, entered[-1][1].clone())
        with cut_graph(model, names, deliver):
            output = call(model, x)
        compare("", leaves(output))
    return found[0] if found else None


def _direction(like: Tensor, name: str) -> Tensor:
    return draw(like.shape, seed=0, step=0, block=f"probe {name}", dtype=like.dtype, device=like.device)


def _inner(left: Tensor, right: Tensor) -> float:
    left = left.to_dense() if left.is_sparse else left
    return torch.linalg.vecdot(left.flatten().to(torch.float64), right.flatten().to(torch.float64)).item()


def _tolerance(h: Tensor) -> float:
    """What rounding may do to an inner product, relative to the lengths of what it is made of."""
    if h.dtype == torch.float64:
        return 1e-6
    return (1e-3 if h.device.type == "cpu" else 1e-2) if h.dtype == torch.float32 else 0.1


@contextmanager
def _without_backward_hooks(model: nn.Module) -> Iterator[None]:
    """Within the block, hooks of the user's see no gradient: those here are of random signals."""
    held: list[tuple[Any, dict[Any, Any]]] = []
    owners: list[Any] = [*model.modules(), *model.parameters()]
    for owner in owners:
        for hooks in (owner._backward_hooks, getattr(owner, "_backward_pre_hooks", None)):
            if hooks:
                held.append((hooks, dict(hooks)))
                hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)


def once_in_order(model: nn.Module, x: Any) -> list[str]:
    """The modules of a network that run once, with gradients on, and return a tensor, in the order in which they end."""
    order: list[str] = []
    runs: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            runs[name] += 1
            if isinstance(output, Tensor) and output.is_floating_point() and torch.is_grad_enabled():
                order.append(name)

        return hook

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(note(name)) for name, module in named]
    try:
        with Replay(model).unseen(), torch.enable_grad(), batch_statistics():
            call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in order if runs[name] == 1]


def slope_is_wrong(model: nn.Module, x: Any, y: Any, loss: Loss) -> tuple[float, float] | None:
    """The derivative of the loss along a random direction of the parameters as forward mode measures it, and as two finite
    differences do, where the two are clearly not the same.

    Costs a pass with tangents and six without; builds no graph.
    """
    named = {name: model.get_parameter(name) for name in trained(model)}
    coarse_dtype = any(p.dtype in (torch.float16, torch.bfloat16) for p in named.values())
    if not named or coarse_dtype or torch.is_autocast_enabled(device_of(model).type):
        return None  # differences would be all rounding
    again = Replay(model)

    def difference(step: float) -> float:
        return (shifted(step) - shifted(-step)) / (2 * step)

    def shifted(step: float) -> float:
        with _moved(named, along, step), again.unseen(), torch.no_grad(), batch_statistics():
            return compute_loss(loss, call(model, x), y).item()

    along = {name: _direction(p, name) for name, p in named.items()}
    for name, rows in padding_rows(model).items():
        for row in rows - {None} if name in along else ():
            along[name][row] = 0  # forward mode takes it for a constant, and differences do not
    tangents = Tangents(through_gradients=True)
    with again.unseen(), without_graph(model), batch_statistics(), tangents:
        for name, p in named.items():
            tangents.set(p, along[name].clone())
        output = call(model, x)
        found = output_error(loss, output, y)
        slope = sum(_inner(e, t) for z, e in zip(found.at, found.e, strict=True) if (t := tangents.get(z)) is not None)
    first = next(iter(named.values()))
    size = sum(p.detach().square().sum().item() for p in named.values()) / sum(p.numel() for p in named.values())
    step = (1e-4 if first.dtype == torch.float64 else 1e-2) * (size**0.5 or 1.0)
    coarse, middle, fine = (difference(step / divisor) for divisor in (1, 2, 4))
    rounding = 32 * torch.finfo(first.dtype).eps * abs(found.loss.item()) / step
    # Where the loss bends within a step, finite differences differ from one another, and say nothing.
    alike = (1e-3 if first.dtype == torch.float64 else 0.02) * max(abs(slope), abs(fine)) + rounding
    if max(abs(coarse - middle), abs(middle - fine)) > alike:
        return None
    return (slope, fine) if abs(slope - fine) > 10 * alike else None


@contextmanager
def _moved(named: Mapping[str, nn.Parameter], along: Mapping[str, Tensor], step: float) -> Iterator[None]:
    """Within the block the parameters are a step further along their directions.

    In place: ``torch.func.functional_call`` does not put back the parameters of a module that the network has under two names.
    """
    before = {name: p.detach().clone() for name, p in named.items()}
    with torch.no_grad():
        try:
            for name, p in named.items():
                p.add_(along[name], alpha=step)
            yield
        finally:
            for name, p in named.items():
                p.copy_(before[name])


def refuse_disagreement(
    model: nn.Module, cuts: Sequence[str], x: Any, *, parameters: bool, where_gradients_arrive: bool, who: str
) -> None:
    """Raise a :class:`onward.UsageError` where forward mode and the backward pass disagree, naming the module.

    With ``parameters`` these carry tangents, with ``where_gradients_arrive`` only those that have a gradient: directions are
    gradients then.
    """
    on = trained(model) if parameters else []
    arriving: set[str] = set()
    found = disagreement(model, cuts, x, on, arriving if where_gradients_arrive else None)
    if found and where_gradients_arrive:
        on = [name for name in on if name in arriving]
        found = disagreement(model, cuts, x, on)
    if found is None:
        return
    where = f"the block that ends at {f'cut {found.module!r}' if found.module else 'the output'}"
    try:
        closer = disagreement(model, once_in_order(model, x), x, on)
    except UsageError:  # a module that cannot be cut by itself
        closer = None
    if closer is not None and closer.module:
        where = f"module {closer.module!r} ({type(model.get_submodule(closer.module)).__name__})"
    raise UsageError(
        f"forward mode and the backward pass disagree in {where}, by {found.forward:.4g} against {found.reverse:.4g}: its "
        "backward is not the derivative of its forward (a straight-through estimator, scaled or masked gradients), or forward "
        f"mode cannot follow it (NumPy, a custom operation). {who} would learn from another derivative than backpropagation's: "
        "use an estimator without forward mode (DFA, DKP, LocalLoss, engine='reverse'), or check=False if that is what you want"
    )


def trained(model: nn.Module) -> list[str]:
    """The names of the parameters that train and may carry tangents."""
    return [name for name, p in model.named_parameters() if p.requires_grad and not is_lazy(p) and p.is_floating_point()]


def padding_rows(model: nn.Module) -> dict[str, set[int | None]]:
    """The row of each weight that its modules leave out of its gradient (``padding_idx`` of an embedding), or None for none."""
    names = {id(p): name for name, p in model.named_parameters()}
    rows: dict[str, set[int | None]] = {}
    for module in model.modules():
        padding = getattr(module, "padding_idx", None)
        for name, p in module.named_parameters(recurse=False):
            rows.setdefault(names[id(p)], set()).add(padding if name == "weight" and isinstance(padding, int) else None)
    return rows
