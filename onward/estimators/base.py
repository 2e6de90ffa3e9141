"""What all gradient estimators share: they own a network, fill ``.grad``, and return the loss."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from onward.derivatives.directions import draw, seed_of
from onward.derivatives.graph import parameters_behind
from onward.errors import UsageError, unknown
from onward.estimators.settings import check_settings
from onward.network.cuts import Elsewhere, check_names
from onward.network.labels import OwnLoss, default_loss, divided
from onward.network.parts import parameters_of, submodule
from onward.network.probe import Mixing, mixing, mixing_seen, refuse_disagreement
from onward.network.replay import Replay, understudy
from onward.network.run import Loss, batch_statistics, leaves, output_error
from onward.network.separation import Separation
from onward.network.shard import Shard
from onward.network.suggest import default_cuts

ROLES = ("network", "heads", "feedback")
ALGORITHMS: dict[str, type[Estimator]] = {}
"""Every algorithm that has a name, such as fdfa; defining its class enters it."""


class Step(NamedTuple):
    """What one call of ``estimate`` saw: the batch loss (a scalar) and all that the network returned, without a graph.

    ``heads``: the same two of the head at each cut, by its name, where there are heads.

    >>> import onward
    >>> step = onward.Backprop(nn.Linear(4, 2)).estimate(torch.zeros(3, 4), torch.tensor([0, 1, 1]))
    >>> step.loss.shape, step.output.shape
    (torch.Size([]), torch.Size([3, 2]))
    """

    loss: Tensor
    output: Any
    heads: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({})


class Estimator(nn.Module):
    """A network with a rule that estimates the gradient of its loss.

    ``estimate(x, y)`` adds the estimate to ``.grad`` of every parameter, as ``loss.backward()`` would; calling the estimator
    runs the plain network. ``x`` is one tensor, a tuple of positional inputs, or a dict of keyword inputs, samples first.
    Without ``y`` the ``labels`` in that dict leave it and are the targets. ``loss(output, y)`` returns a scalar, the mean over
    samples of a per-sample loss, of all that the network returns. The default is the loss that a network of transformers would
    compute itself from its labels; else the cross entropy of the network's logits.

    The first batch is looked at before it is learned from, for what an estimator takes for granted: that rows are samples, and
    that forward mode and the backward pass agree. That costs about two more steps, once, and the memory of a copy of the
    network; ``check=False`` leaves it out.
    """

    engine: str
    """How the estimate is measured, to be printed beside every result."""
    observe: Callable[[int, Tensor], None] | None = None
    """Called with each k and the error signal that block k differentiates itself with, where somebody wants to see it."""
    ends_here = True
    """Whether the network's last block is in this process (:class:`onward.Stage` divides blocks among processes)."""
    sums_samples = True
    """Whether ``.grad`` is a mean of what this process's samples contribute, which other processes' samples change."""
    may_be_wrapped = False
    """Whether the network may be wrapped in what exchanges the gradients of ``loss.backward()`` between processes."""
    reads_rows = False
    """Whether the rows of the cuts' outputs have to be samples."""
    can_be_lean = False
    """Whether the estimate is numbers times random directions of parameters, so that :class:`onward.Lean` can follow it."""
    kept: list[Any] | None = None
    """What was estimated, in the place of ``.grad``, where :class:`onward.Lean` follows it."""
    tangents_on: str | None = None
    """What carries tangents in a step: the cuts' ``"outputs"``, ``"parameters"``, those alone that have ``"gradients"``, or
    nothing (None)."""

    captured: Callable[[Any, Any], Step] | None = None
    """Runs a step in the place of ``_estimate`` (:func:`onward.capture`)."""
    _draws: Callable[..., Tensor] | None = None
    """Draws directions in the place of :func:`onward.directions.draw`."""

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        loss: Loss | None = None,
        seed: int = 0,
        check: bool = True,
        uncut: bool = False,
    ) -> None:
        super().__init__()
        if not self.may_be_wrapped:
            refuse_wrappers(model)
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
        self.loss = default_loss(model) if loss is None else loss
        if not -(2**63) <= int(seed) < 2**63:
            raise UsageError(f"seed={seed}: use a whole number that 64 bits hold, from -2**63 to 2**63 - 1")
        self.seed = int(seed)
        self.step = 0
        self.shard = Shard()
        self.check = check
        self._looked = False
        self._not_wrapped: type | None = None
        self._separated_for: list[bool] | None = None

    def __init_subclass__(cls, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name is None:
            return
        known = ALGORITHMS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UsageError(f"{cls.__name__}: an algorithm {name!r} exists ({known.__name__}): choose another name")
        ALGORITHMS[name] = cls

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        check_settings(cls, options)
        return super().__new__(cls)

    @classmethod
    def needs_heads(cls, **settings: Any) -> bool:
        """Whether, with these settings, its constructor has to be given ``heads``."""
        return False

    @classmethod
    def measures_whole(cls, **settings: Any) -> bool:
        """Whether, with these settings and no cuts, it estimates the gradient of the network as a whole."""
        return False

    @classmethod
    def learns_feedback(cls, **settings: Any) -> bool:
        """Whether, with these settings, it has feedback matrices that learn."""
        return False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @_disable_dynamo  # torch.compile(estimator.estimate) runs it as it is: it differentiates blocks, which no graph can hold
    def estimate(self, x: Any, y: Any = None) -> Step:
        """Add an estimate of the gradient of ``loss(model(x), y)`` to every ``.grad``; return the loss and the output.

        ``estimate(batch)`` takes the targets from the batch, a dict with ``labels``.

        Hooks run as ``loss.backward()`` would run them where they have something to see: those on the accumulation of a
        gradient always, full backward hooks of a cut module with the error signal that is delivered to it. Full backward hooks
        of a module see nothing where no error reaches its output, as in forward gradients of weights without cuts, and hooks
        on a parameter's gradient (``Tensor.register_hook``) nothing of gradients that are made sample by sample.

        Raises :class:`onward.UsageError` where the network, its cuts, or the batch make an estimate impossible.
        """
        if not self.may_be_wrapped and type(self.model) is not self._not_wrapped:  # it may have been wrapped since
            refuse_wrappers(self)
            self._not_wrapped = type(self.model)
        if not torch.is_grad_enabled() and self.sums_samples:
            raise UsageError(
                f"{type(self).__name__} differentiates inside the blocks, and gradients are off here: call estimate outside of "
                "torch.no_grad() and torch.inference_mode()"
            )
        x, y = divided(self.model, x, y)
        weight = self.loss.weight if isinstance(self.loss, OwnLoss) else None
        counted = weight and partial(weight, y)
        with batch_statistics(self), self.shard.averaging(x, self, sums_samples=self.sums_samples, weight=counted):
            if self.check and not self._looked:
                if isinstance(self.loss, OwnLoss):
                    with Replay(self.model).unseen():
                        self.loss.check(self.model, x, y)
                self.look(x, y)
                self._looked = True
            self._prepare()
            step = (self._estimate if self.captured is None else self.captured)(x, y)
        if not isinstance(step, Step):
            raise UsageError(f"{type(self).__name__}._estimate returned a {type(step).__name__}: return an onward.Step")
        self.step += 1
        loss, *of_heads = self.shard.mean([step.loss, *(value for value, _ in step.heads.values())])
        heads = {cut: (value, z) for (cut, (_, z)), value in zip(step.heads.items(), of_heads, strict=True)}
        return Step(loss, step.output, heads)

    def look(self, x: Any, y: Any) -> None:
        """Look at the network with its first batch, before anything is learned from it.

        Raises :class:`onward.UsageError` where the rows of a cut's output are not the samples, or forward mode is wrong.
        """
        if any(isinstance(submodule(self.model, cut), Elsewhere) for cut in self.cuts):
            return  # the other blocks are in other processes
        if not self.reads_rows and self.tangents_on is None:
            return
        model = understudy(self.model)
        if self.reads_rows:
            mixing_seen[self.model] = found = mixing(model, [*self.cuts, ""], x)
            for seen in found:
                if seen.transposed:
                    where = f"cut {seen.module!r}" if seen.module else "the network"
                    raise UsageError(
                        f"the output of {where} has the samples in its second dimension (changing a sample changes "
                        "that column, and no row alone): let the network compute with samples first (batch_first=True in "
                        "recurrent and attention layers)"
                    )
            if found:
                self.tell_mixing(found[0])
        if self.tangents_on is not None:
            refuse_disagreement(
                model,
                self.cuts,
                x,
                parameters=self.tangents_on != "outputs",
                where_gradients_arrive=self.tangents_on == "gradients",
                who=type(self).__name__,
            )

    def tell_mixing(self, seen: Mixing) -> None:
        """Say what it means for the estimate that samples influence one another, if anything."""

    def _prepare(self) -> None:
        """Before a step: draw afresh what the step only reads."""

    def _estimate(self, x: Any, y: Any) -> Step:
        raise UsageError(f"{type(self).__name__} has no rule: write its method _estimate(x, y), which returns an onward.Step")

    @contextmanager
    def separation(self, remedy: str = "") -> Iterator[Callable[..., None]]:
        """Around a pass that builds graphs: a function that takes the number of each block, in order, and its outputs.

        It raises where a cut is not the only way forward, and where something hides a block's graph. It looks on the first
        batch, and again when other parameters are to be trained than then.
        """
        trained = [p.requires_grad for p in parameters_of(self.model)]
        if trained == self._separated_for:
            yield lambda k, *outputs: None
            return
        with Separation(self.model, self.cuts, remedy) as looking:
            yield looking.visit
        self._separated_for = trained

    def learn_last(self, output: Any, y: Any) -> Tensor:
        """Give the last block the exact gradient of the loss; returns the loss, 0 where that block is in another process."""
        if not self.ends_here:
            return leaves(output)[0].new_zeros(())
        check_last_block(self.cuts, output)
        found = output_error(self.loss, output, y)
        found.backward()
        return found.loss

    def observed(self, k: int, delta: Tensor) -> Tensor:
        """The error signal of block k, shown to ``observe``."""
        if self.observe is not None:
            self.observe(k, delta)
        return delta

    def drawn(
        self,
        shape: Sequence[int],
        block: int | str,
        like: Tensor,
        index: int = 0,
        *,
        noise: str = "gaussian",
        seed: int | None = None,
        offset: int = 0,
    ) -> Tensor:
        """The index-th random direction of this step for a block, or a parameter by its name (see :mod:`onward.directions`)."""
        return (self._draws or draw)(
            shape=tuple(shape),
            seed=self.seed if seed is None else seed,
            step=self.step,
            block=block,
            offset=offset,
            direction=index,
            noise=noise,
            dtype=like.dtype,
            device=like.device,
        )

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

    def get_extra_state(self) -> Tensor:
        """The step and the seed, as a tensor, because some formats (safetensors) hold nothing else."""
        return torch.tensor([self.step, self.seed], dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor | Mapping[str, int]) -> None:
        """Take what :meth:`get_extra_state` gave, or the dict that it gave once."""
        self.step, self.seed = (state["step"], state["seed"]) if isinstance(state, Mapping) else state.tolist()


def refuse_wrappers(module: nn.Module) -> None:
    """Raise a :class:`onward.UsageError` where a wrapper would exchange gradients that ``loss.backward()`` fills.

    An estimator fills gradients block by block, in several backward passes or in none: a wrapper would wait for others,
    exchange them half done, or miss those of heads and feedback.
    """
    kinds: list[type] = [nn.parallel.DistributedDataParallel, nn.DataParallel]
    if fsdp := sys.modules.get("torch.distributed.fsdp"):  # where it was never imported, nothing is wrapped in it
        kinds += [fsdp.FullyShardedDataParallel, fsdp.FSDPModule]
    if not any(isinstance(part, tuple(kinds)) for part in module.modules()):
        return
    name, kind = next((n, kind) for n, part in module.named_modules() for kind in kinds if isinstance(part, kind))
    raise UsageError(
        f"{repr(name) if name else 'the network'} is wrapped in {kind.__name__}, which exchanges the gradients of "
        "loss.backward(), and this estimator does not call that: give it the network without the wrapper (model.module), and "
        "call onward.distribute(estimator) in every process"
    )


def check_last_block(cuts: Sequence[str], output: Any, entered: bool = False) -> None:
    """Raise a :class:`onward.UsageError` if the network's last block, whose output this is, has nothing to train.

    ``entered``: it has a graph in any case, as what was passed on to it has one.
    """
    ends = leaves(output)
    if not (parameters_behind(*ends) if entered else any(end.requires_grad for end in ends)):
        where = f"after the cut {cuts[-1]!r} " if cuts else ""
        raise UsageError(
            f"the last block has no parameters to train: nothing {where}requires a gradient. Leave out that cut, or "
            "unfreeze the output layer"
        )
