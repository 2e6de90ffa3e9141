"""What all gradient estimators share: they own a network, fill ``.grad``, and return the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onward.cuts import BypassCheck, check_names, default_cuts
from onward.directions import seed_of
from onward.distributed import Shard
from onward.errors import UsageError, unknown

Loss = Callable[[Tensor, Any], Tensor]
ROLES = ("network", "heads", "feedback")


class Step(NamedTuple):
    """What one call of ``estimate`` saw: the batch loss (a scalar) and the network's output, without a graph.

    ``heads``: the same two of the head at each cut, by its name, where there are heads.
    """

    loss: Tensor
    logits: Tensor
    heads: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({})


class Estimator(nn.Module):
    """A network with a rule that estimates the gradient of its loss.

    ``estimate(x, y)`` adds the estimate to ``.grad`` of every parameter, as ``loss.backward()`` would; calling the estimator
    runs the plain network. ``x`` is one tensor, a tuple of positional inputs, or a dict of keyword inputs, samples first.
    ``loss(output, y)`` returns a scalar, the mean over samples of a per-sample loss.
    """

    engine: str
    """How the estimate is measured, to be printed beside every result."""
    observe: Callable[[int, Tensor], None] | None = None
    """Called with each k and the error signal that block k differentiates itself with, where somebody wants to see it."""
    ends_here = True
    """Whether the network's last block is in this process (:class:`onward.Stage` divides blocks among processes)."""
    sums_samples = True
    """Whether ``.grad`` is a mean of what this process's samples contribute, which other processes' samples change."""

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        loss: Loss = F.cross_entropy,
        seed: int = 0,
        uncut: bool = False,
    ) -> None:
        super().__init__()
        self.cuts = default_cuts(model) if cuts is None else check_names(model, cuts)
        if self.cuts and isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            raise UsageError(
                f"cuts={list(self.cuts)} in a network that is compiled as a whole, which is one graph with nothing to cut: "
                "compile its blocks instead, such as model.block1 = torch.compile(model.block1)"
            )
        if not self.cuts and not uncut:
            raise UsageError(
                f"cuts={cuts!r}: without a cut, {type(self).__name__} would be backpropagation. Name the modules whose outputs "
                "end a block (onward.suggest_cuts proposes some)"
            )
        if isinstance(loss, nn.Module) and (trained := [name for name, p in loss.named_parameters() if p.requires_grad]):
            raise UsageError(
                f"the loss {type(loss).__name__} has parameters to train ({', '.join(trained)}), which no estimator does: make "
                "them part of the network's last block, or freeze them"
            )
        self.model = model
        self.loss = loss
        self.seed = int(seed)
        self.step = 0
        self.shard = Shard()
        self._separated_for: list[bool] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def estimate(self, x: Any, y: Any) -> Step:
        """Add an estimate of the gradient of ``loss(model(x), y)`` to every ``.grad``; return the loss and the output.

        Raises :class:`onward.UsageError` where the network, its cuts, or the batch make an estimate impossible.
        """
        if not torch.is_grad_enabled() and self.sums_samples:
            raise UsageError(
                f"{type(self).__name__} differentiates inside the blocks, and gradients are off here: call estimate outside of "
                "torch.no_grad() and torch.inference_mode()"
            )
        with batch_statistics(), self.shard.averaging(x, self):
            step = self._estimate(x, y)
        self.step += 1
        loss, *of_heads = self.shard.mean([step.loss, *(value for value, _ in step.heads.values())])
        heads = {cut: (value, z) for (cut, (_, z)), value in zip(step.heads.items(), of_heads, strict=True)}
        return Step(loss, step.logits, heads)

    def _estimate(self, x: Any, y: Any) -> Step:
        raise NotImplementedError

    @contextmanager
    def separation(self, remedy: str = "") -> Iterator[Callable[[int, Tensor], None]]:
        """A function that takes each block's output, in order, and raises where a cut is not the only way forward.

        It looks on the first batch, and again when other parameters are to be trained than then.
        """
        trained = [p.requires_grad for p in self.model.parameters()]
        if trained == self._separated_for:
            yield lambda k, output: None
            return
        yield BypassCheck(self.model, self.cuts, remedy).visit
        self._separated_for = trained

    def learn_last(self, output: Tensor, y: Any) -> Tensor:
        """Give the last block the exact gradient of the loss; returns the loss, 0 where that block is in another process."""
        if not self.ends_here:
            return output.new_zeros(())
        check_last_block(self.cuts, output.requires_grad)
        loss, e = output_error(self.loss, output, y)
        torch.autograd.backward(output, e.to(output.dtype))
        return loss

    def observed(self, k: int, delta: Tensor) -> Tensor:
        """The error signal of block k, shown to ``observe``."""
        if self.observe is not None:
            self.observe(k, delta)
        return delta

    @property
    def mask_seed(self) -> int:
        """Of the dropout masks in heads, which differ between the shards of a batch."""
        return seed_of(self.seed, "shard", self.shard.first) if self.shard.first else self.seed

    def parameter_groups(self, **options: dict[str, Any]) -> list[dict[str, Any]]:
        """The parameters by role, as groups for an optimizer, with the options of each role.

        Roles are ``network``, ``heads`` and ``feedback``; a role that this estimator does not have is left out.

        >>> import onward
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> groups = onward.FDFA(model).parameter_groups(network={"lr": 1e-4}, feedback={"lr": 1e-3})
        >>> [(group["role"], group["lr"]) for group in groups]
        [('network', 0.0001), ('feedback', 0.001)]
        """
        for role in options:
            if role not in ROLES:
                raise unknown("parameter role", role, ROLES)
        groups = [{"params": params, "role": role, **options.get(role, {})} for role, params in self._roles().items()]
        return [group for group in groups if group["params"]]

    def _roles(self) -> dict[str, list[nn.Parameter]]:
        return {"network": list(self.model.parameters())}

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step, "seed": self.seed}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step, self.seed = state["step"], state["seed"]


@contextmanager
def batch_statistics() -> Iterator[None]:
    """Within the block, batch norm's refusal of a batch of one sample comes with the remedy."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UsageError(
            "a batch of one sample has no batch statistics: this network has batch norm, so train it with batches of at "
            "least 2 samples (drop_last=True in the data loader), or in eval mode"
        ) from error


def call(model: Callable[..., Any], x: Any) -> Tensor:
    """The network's output for one input, a tuple of positional inputs, or a dict of keyword inputs."""
    match x:
        case Mapping():
            out = model(**x)
        case tuple() | list():
            out = model(*x)
        case _:
            out = model(x)
    if not isinstance(out, Tensor):
        raise UsageError(
            f"the network returned a {type(out).__name__}, not a tensor: wrap it in a module that returns the tensor that "
            "the loss needs"
        )
    return out


def compute_loss(loss: Loss, output: Tensor, y: Any) -> Tensor:
    """``loss(output, y)``, checked: a scalar, of targets that exist; in float32 at least, whatever autocast says."""
    if output.dtype in (torch.float16, torch.bfloat16):
        output = output.float()
    try:
        with torch.autocast(output.device.type, enabled=False):
            value = loss(output, y)
    except IndexError as error:
        raise UsageError(
            f"the loss refused the targets: {error} The network has {output.shape[-1]} outputs, so labels run from 0 to "
            f"{output.shape[-1] - 1}: check the labels, or give the network as many outputs as there are classes"
        ) from error
    if value.dim() != 0:
        raise UsageError(f"the loss has shape {tuple(value.shape)}: it must return a scalar, the mean over samples")
    return value


def check_last_block(cuts: Sequence[str], trains: bool) -> None:
    """Raise a :class:`onward.UsageError` if the network's last block has nothing to train."""
    if not trains:
        where = f"after the cut {cuts[-1]!r} " if cuts else ""
        raise UsageError(
            f"the last block has no parameters to train: nothing {where}requires a gradient. Leave out that cut, or "
            "unfreeze the output layer"
        )


def check_samples(cut: str, shape: Sequence[int], samples: int, what: str) -> None:
    """Raise a :class:`onward.UsageError` if the rows of a cut's output are not the samples, which ``what`` needs."""
    if shape[0] != samples:
        raise UsageError(
            f"the output of cut {cut!r} has shape {tuple(shape)} for {samples} samples: {what} needs the sample dimension "
            "first at every cut and at the output (batch_first=True in recurrent and attention layers; outputs as (N, C, T))"
        )


def output_error(loss: Loss, output: Tensor, y: Any) -> tuple[Tensor, Tensor]:
    """``loss(output, y)`` and its gradient with respect to the output; in float32 at least, whatever autocast says."""
    z = output.detach()
    if z.dtype in (torch.float16, torch.bfloat16):
        z = z.float()
    z.requires_grad_()
    with torch.enable_grad():
        value = compute_loss(loss, z, y)
        (e,) = torch.autograd.grad(value, z)
    return value.detach(), e


def device_of(model: nn.Module) -> torch.device:
    """Where the network's first parameter lives."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def as_rows(output: Tensor) -> Tensor:
    """The network's output as a matrix, one row per sample."""
    return output.flatten(1) if output.dim() > 1 else output.unsqueeze(1)


@torch.no_grad()
def accumulate(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor | None]) -> None:
    """Add each gradient to its parameter's ``.grad``, as a backward pass would; the gradients become ours."""
    taken: set[int] = set()
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if p.grad is not None:
            p.grad.add_(gradient)
            continue
        p.grad = gradient.to(p.dtype)
        if gradient.layout is not torch.strided:
            continue
        # autograd.grad gives several parameters the same memory where their gradients are equal, or repeats one element.
        memory = p.grad.untyped_storage().data_ptr()
        if memory in taken or 0 in p.grad.stride():
            p.grad = torch.empty_like(p).copy_(gradient)
        taken.add(memory)


def allocate_gradients(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Zeros as ``.grad`` of those that have none; returns them.

    What outlives a pass comes first, so that it does not lie scattered among what the blocks allocate and free.
    """
    fresh = [p for p in parameters if p.requires_grad and not is_lazy(p) and p.grad is None]
    for p in fresh:
        p.grad = torch.zeros_like(p)
    return fresh


def forget_unused(fresh: Iterable[nn.Parameter]) -> None:
    """Take away those zeros that nobody has written to: the pass did not use these parameters."""
    for p in fresh:
        if p.grad is not None and p.grad._version == 0:
            p.grad = None
