"""Run a network: call it, compute the loss of what it returns, and find the loss's gradient there."""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from onward.derivatives.graph import backward, grad, nodes_behind
from onward.errors import UsageError
from onward.network.labels import inputs_of, without_cache
from onward.network.parts import parameters_of
from onward.phases import phase

Loss = Callable[[Any, Any], Tensor]
"""``loss(output, y)``: a scalar, the mean over samples, of all that the network returned."""


def call(model: Callable[..., Any], x: Any, *, any_output: bool = False) -> Any:
    """The network's output for one input, a tuple of positional inputs, or a dict of keyword inputs.

    Raises :class:`onward.UsageError` where that holds no tensor of floating-point numbers, unless ``any_output`` will do.
    """
    x = inputs_of(model, x)
    with phase("primal"), without_cache(model, x):
        if isinstance(x, tuple):
            output = model(*x)
        elif isinstance(x, Mapping):
            output = model(**x)
        else:
            output = model(x)
    if not any_output and not leaves(output):
        raise UsageError(
            f"the network returned a {type(output).__name__} without a tensor of floating-point numbers: return what the loss "
            "is computed from, a tensor, or a tuple, dict or dataclass of tensors"
        )
    return output


def samples_of(x: Any) -> int:
    """How many samples an input has: the first dimension of its first tensor."""
    if isinstance(x, Mapping):
        x = dict(x)  # PyTorch takes other mappings for one thing
    return next((leaf.shape[0] for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def leaves(output: Any) -> list[Tensor]:
    """The tensors of floating-point numbers in a network's output, be it one, or a tuple, dict or dataclass of several.

    >>> [leaf.shape for leaf in leaves({"logits": torch.zeros(2, 3), "labels": torch.tensor([0, 1])})]
    [torch.Size([2, 3])]
    """
    if isinstance(output, Tensor):
        return [output] if _is_continuous(output) else []
    return [leaf for leaf in _flatten(output)[0] if _is_continuous(leaf)]


def replaced(output: Any, change: Callable[[Tensor], Tensor], *, integers: bool = False) -> Any:
    """The output with ``change`` applied to each of its :func:`leaves`, and to tensors of integers if these count too."""

    def new(part: Any) -> Any:
        return change(part) if _is_continuous(part) or (integers and isinstance(part, Tensor)) else part

    if isinstance(output, Tensor):
        return new(output)
    if isinstance(output, Mapping) and not isinstance(output, dict):  # PyTorch takes other mappings for one thing
        return {name: replaced(part, change, integers=integers) for name, part in output.items()}
    parts, rebuild = _flatten(output)
    return rebuild([new(part) for part in parts])


def detached(output: Any) -> Any:
    """The output without a graph behind it."""
    return replaced(output, Tensor.detach)


def _is_continuous(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _flatten(output: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """What an output is made of, and how it is made of such parts; dataclasses are opened where PyTorch does not."""
    parts, structure = tree_flatten(output)
    if not any(_is_record(part) for part in parts):
        return parts, lambda changed: tree_unflatten(changed, structure)
    opened = [_open(part) if _is_record(part) else ([part], lambda changed: changed[0]) for part in parts]

    def rebuild(changed: list[Any]) -> Any:
        rest = iter(changed)
        return tree_unflatten([make([next(rest) for _ in held]) for held, make in opened], structure)

    return [part for held, _ in opened for part in held], rebuild


def _is_record(part: Any) -> bool:
    return dataclasses.is_dataclass(part) and not isinstance(part, type)


def _open(record: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    names = [field.name for field in dataclasses.fields(record) if field.init]
    parts, rebuild = _flatten({name: getattr(record, name) for name in names})
    return parts, lambda changed: dataclasses.replace(record, **rebuild(changed))


def compute_loss(loss: Loss, output: Any, y: Any) -> Tensor:
    """``loss(output, y)``, checked: a scalar, of targets that exist; in float32 at least, whatever autocast says."""
    value = _value_of(loss, output, y)
    if not isinstance(value, Tensor):
        raise UsageError(f"the loss returned a {type(value).__name__}: it must return a tensor, a scalar with a graph")
    return _scalar(value)


def compute_number(loss: Callable[[Any, Any], Any], output: Any, y: Any) -> Tensor:
    """As :func:`compute_loss`, for a loss that may be any number: a tensor of any type, or a number of Python's or NumPy's.

    It is in float64, without a graph.
    """
    value = _value_of(loss, output, y)
    if isinstance(value, Tensor):
        return _scalar(value).detach().double()
    if not isinstance(value, Real):
        raise UsageError(f"the loss returned a {type(value).__name__}: it must return a number, or a tensor that is a scalar")
    found = leaves(output)
    return torch.tensor(float(value), dtype=torch.float64, device=found[0].device if found else None)


def in_full(device: str) -> AbstractContextManager[object]:
    """Within the block operations keep the precision that their arguments have, whatever autocast says."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _scalar(value: Tensor) -> Tensor:
    if value.dim() != 0:
        raise UsageError(f"the loss has shape {tuple(value.shape)}: it must return a scalar, the mean over samples")
    return value


def _value_of(loss: Callable[[Any, Any], Any], output: Any, y: Any) -> Any:
    """What the loss returns, with PyTorch's complaints about targets put into words."""
    output = replaced(output, lambda z: z.float() if z.dtype in (torch.float16, torch.bfloat16) else z)
    found = leaves(output)
    try:
        with in_full(found[0].device.type if found else "cpu"):
            return loss(output, y)
    except ValueError as error:
        if "batch_size" not in str(error) and "batch size" not in str(error):
            raise
        raise UsageError(
            f"the loss got other numbers of samples from the network and in the targets ({error}) What it is given, be it the "
            "network's output or that of a head at a cut, has to have the samples first, as the targets do"
        ) from error
    except TypeError as error:
        if isinstance(output, Tensor):
            raise
        raise UsageError(
            f"the loss cannot take the {type(output).__name__} that the network returns ({error}): give one that picks what it "
            "needs, such as loss=lambda output, y: F.cross_entropy(output['logits'], y)"
        ) from error
    except IndexError as error:
        if not _is_of_labels(error, output, y):
            raise
        classes = _classes(output, y)
        known = f"The network has {classes} outputs, so labels run from 0 to {classes - 1}: check" if classes else "Check"
        raise UsageError(
            f"the loss refused the targets: {error} {known} the labels, or give the network as many outputs as there are "
            "classes"
        ) from error


def _classes(output: Any, y: Any) -> int | None:
    """How many classes there are in an output, where that can be told: its second dimension, or its last one."""
    if not isinstance(output, Tensor) or output.dim() == 0:
        return None
    if output.dim() <= 2:
        return output.shape[-1]
    if isinstance(y, Tensor) and y.shape == (output.shape[0], *output.shape[2:]):
        return output.shape[1]
    return output.shape[-1] if isinstance(y, Tensor) and y.shape == output.shape[:-1] else None


def _is_of_labels(error: IndexError, output: Any, y: Any) -> bool:
    """Whether an error is PyTorch's own of a label out of range, and not of another index in the loss."""
    if re.search(r"Target -?\d+ is out of bounds", str(error)):
        return True
    size = re.search(r"index -?\d+ is out of bounds for dimension \d+ with size (\d+)", str(error))
    return size is not None and int(size[1]) == _classes(output, y)


class LossGradient(NamedTuple):
    """The loss of a network's output, and its gradient at each of those tensors of the output that it depends on.

    ``which`` of the output's :func:`leaves` these are.
    """

    loss: Tensor
    at: list[Tensor]
    e: list[Tensor]
    which: list[int]

    def backward(self, output: Any = None) -> None:
        """Differentiate what is behind the output, or behind that of another run of the same step."""
        ends = self.at if output is None else [leaves(output)[i] for i in self.which]
        backward(ends, [e.to(z.dtype) for z, e in zip(ends, self.e, strict=True)])


def output_error(loss: Loss, output: Any, y: Any, moves: Callable[[Tensor], bool] = lambda value: False) -> LossGradient:
    """``loss(output, y)`` and its gradient with respect to the output; in float32 at least, whatever autocast says.

    ``moves`` tells of a loss whether it has a tangent, though the output is given to it without one.

    Raises :class:`onward.UsageError` where it depends on more than the output, or not on the output.
    """
    known: list[Tensor] = []
    behind: list[Tensor] = []

    def start(z: Tensor) -> Tensor:
        known.append(z)
        z = z.detach()
        behind.append((z.float() if z.dtype in (torch.float16, torch.bfloat16) else z).requires_grad_())
        return behind[-1]

    started = replaced(output, start)
    with torch.enable_grad():
        value = compute_loss(loss, started, y)
        if moves(value):
            raise _reads_more("something that carries a tangent")
        _check_behind(value, behind)
        found: Sequence[Tensor | None] = [None] * len(behind)
        if value.requires_grad:
            found = grad(value, behind, torch.ones_like(value), allow_unused=True)
    which = [i for i, e in enumerate(found) if e is not None]
    if not which:
        raise UsageError("the loss does not depend on the network's output: compute it from what the network returns")
    return LossGradient(value.detach(), [known[i] for i in which], [e for e in found if e is not None], which)


def _check_behind(value: Tensor, output: Sequence[Tensor]) -> None:
    """Raise a :class:`onward.UsageError` where a loss depends on more than the network's output."""
    known = {id(z) for z in output}
    for node in nodes_behind([value.grad_fn]):
        if (leaf := getattr(node, "variable", None)) is not None and id(leaf) not in known:
            raise _reads_more(f"a tensor of shape {tuple(leaf.shape)} that requires a gradient")


def _reads_more(what: str) -> UsageError:
    return UsageError(
        f"the loss depends on more than the network's output: on {what}, such as a weight that it penalises, or what a block "
        "has kept of its pass. Give a penalty to the optimizer (weight_decay), let the network return what the loss reads, or "
        "use Backprop"
    )


def as_rows(output: Tensor | Sequence[Tensor]) -> Tensor:
    """The network's output as a matrix, one row per sample; several tensors side by side.

    Raises :class:`onward.UsageError` where it has no samples: a single number.
    """
    parts = [output] if isinstance(output, Tensor) else output
    if any(part.dim() == 0 for part in parts):
        raise UsageError(
            "the network's output is a single number, such as its loss, and what is needed here is one row for each sample: "
            "let the network return what the loss is computed from, and give the estimator loss="
        )
    rows = [part.flatten(1) if part.dim() > 1 else part.unsqueeze(1) for part in parts]
    if len({len(part) for part in rows}) > 1:
        raise UsageError(
            f"the loss depends on outputs of shapes {', '.join(str(tuple(part.shape)) for part in parts)}, whose first "
            "dimensions differ: what is needed here is one row for each sample in each"
        )
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def from_rows(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What :func:`as_rows` made of tensors in the shapes and precision of ``like``."""
    widths = [z.numel() // max(1, len(z)) for z in like]
    return [part.reshape(z.shape).to(z.dtype) for part, z in zip(rows.split(widths, 1), like, strict=True)]


def check_samples(cut: str, shape: Sequence[int], samples: int, what: str) -> None:
    """Raise a :class:`onward.UsageError` if the rows of a cut's output are not the samples, which ``what`` needs."""
    if len(shape) == 0 or shape[0] != samples:
        raise UsageError(
            f"the output of cut {cut!r} has shape {tuple(shape)} for {samples} samples: {what} needs the sample dimension "
            "first at every cut and at the output (batch_first=True in recurrent and attention layers; outputs as (N, C, T))"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the network's first parameter lives."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def batch_statistics(owner: nn.Module | None = None) -> Iterator[None]:
    """Within the block, batch norm's refusal of a batch of one sample says whose it is: the network's, or a head's."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        norms = [one for one in frames if isinstance(one, nn.modules.batchnorm._BatchNorm)]
        named = owner.named_modules() if owner is not None and norms else ()
        name = next((name for name, module in named if module is norms[-1]), "")
        if name.startswith(("heads.", "frozen_heads.")):
            whose, also = "the heads have batch norm", "give it heads without (onward.make_heads makes such of kind='predsim')"
        else:
            whose, also = "this network has batch norm", "put it in eval mode"
        raise UsageError(
            f"a batch of one sample has no batch statistics: {whose}, so train with batches of at least 2 samples "
            f"(drop_last=True in the data loader), or {also}"
        ) from error


@contextmanager
def without_graph(model: nn.Module) -> Iterator[None]:
    """Within the block nothing of the network asks for a gradient, so no graph is built though gradients are on.

    This is :func:`torch.no_grad` for a pass whose tangents are to stop where the network itself says ``torch.no_grad()``.
    """
    trained = [p for p in parameters_of(model) if p.requires_grad and not is_lazy(p)]
    for p in trained:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    except RuntimeError as error:
        if not re.search("requires_grad|require gradient|require grad", str(error)):
            raise
        raise UsageError(
            f"the network needs a graph in its forward ({str(error).splitlines()[0]}), and the pass that measures builds none: "
            "let it ask requires_grad first, or use an estimator that runs it once (DFA, DKP and FDFA without low_memory, "
            "LocalLoss, engine='reverse')"
        ) from error
    finally:
        for p in trained:
            p.requires_grad_(True)
