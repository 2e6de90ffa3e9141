"""Backpropagation, and backpropagation with activation checkpointing: what every other estimator is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint, set_checkpoint_early_stop

from onward.derivatives.graph import backward
from onward.errors import UsageError
from onward.estimators.base import Estimator, Step
from onward.network.cuts import check_names
from onward.network.replay import Replay, check_same_output
from onward.network.run import Loss, call, compute_loss, detached


class Backprop(Estimator, name="bp"):
    """Backpropagation: the exact gradient, by ``loss.backward()``.

    With ``checkpoint=True`` only the outputs of the blocks are kept and each block is run a second time when the backward
    pass reaches it: the memory that a method without backpropagation has to beat. Running statistics move once and dropout
    masks are the same in both runs. Blocks are what lies between ``cuts`` if those are children of a Sequential, else the
    named modules themselves; without ``checkpoint`` cuts have no effect.

    Settings:
        checkpoint: keep no activations inside a block, and run it again in the backward sweep.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> step = Backprop(model).estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> model[0].weight.grad.shape
    torch.Size([8, 4])
    """

    may_be_wrapped = True

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        loss: Loss | None = None,
        checkpoint: bool = False,
        seed: int = 0,
        check: bool = True,
    ) -> None:
        cuts = cuts if checkpoint else check_names(model, cuts or ())[:0]
        super().__init__(model, cuts, loss=loss, seed=seed, check=check, uncut=True)
        self.checkpoint = checkpoint
        self.engine = "reverse, checkpointed" if checkpoint else "reverse"

    def _estimate(self, x: Any, y: Any) -> Step:
        with _checkpointed(self.model, self.cuts) if self.checkpoint else nullcontext():
            output = call(self.model, x)
        loss = compute_loss(self.loss, output, y)
        if not loss.requires_grad:
            raise UsageError("nothing that the loss depends on requires a gradient: unfreeze what is to be trained")
        try:
            backward(loss)
        except CheckpointError as error:
            raise _second_run_differs(error) from error
        except RuntimeError as error:
            if not self.checkpoint or "inplace operation" not in str(error):
                raise
            raise UsageError(
                "a block overwrites its input in place, so it cannot run a second time: use the form of its first module that "
                "is not in place, or leave out checkpointing"
            ) from error
        return Step(loss.detach(), detached(output))


def _second_run_differs(error: Exception) -> UsageError:
    return UsageError(
        f"a block did not run a second time as it ran the first ({str(error).strip().splitlines()[0]}): what it reads, such as "
        "a cache of keys and values, has changed in between. Switch that off (use_cache=False among the network's inputs), or "
        "leave out checkpointing"
    )


@contextmanager
def _second_run(again: Replay) -> Iterator[None]:
    """Around a block's second run: if it fails, though the first did not, the error says that the two runs differ."""
    try:
        with again.unseen():
            yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if type(error).__module__ == CheckpointError.__module__:  # which PyTorch stops a second run by, once it has enough
            raise
        raise _second_run_differs(error) from error


def _recomputed(block: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``run`` returns. The backward pass will run it again on these arguments, from the block's buffers of now.

    It does so several times where the block takes gradients inside.
    """
    seen: list[tuple[Tensor, int]] = []

    def observed(*args: Any, **kwargs: Any) -> Any:
        output = run(*args, **kwargs)
        if isinstance(output, Tensor) and output.is_floating_point():
            if not seen:
                seen.append((output.detach(), output._version))
            elif seen[0][0]._version == seen[0][1]:  # and nothing that came after the block has overwritten it
                check_same_output([seen[0][0]], [output], "leave out checkpointing")
        return output

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        again = Replay(block, start_of_buffers=True)
        return nullcontext(), _EachTime(lambda: _second_run(again))

    try:
        with set_checkpoint_early_stop(False):  # so that a second run comes to its output
            return checkpoint(observed, *args, use_reentrant=False, context_fn=contexts, **kwargs)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        raise UsageError(
            "a block uses torch.func (grad, vjp, jacrev, ...), which PyTorch's activation checkpointing does not let it: take "
            "gradients by torch.autograd.grad there, or leave out checkpointing"
        ) from error


class _EachTime:
    """A context manager that may be entered several times: each time it makes another one."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(self._make())
        self._entered[-1].__enter__()

    def __exit__(self, *failure: Any) -> Any:
        return self._entered.pop().__exit__(*failure)


@contextmanager
def _checkpointed(model: nn.Module, cuts: Sequence[str]) -> Iterator[None]:
    """Within the block, the network's forward keeps only the outputs of its blocks."""
    children = dict(model.named_children())
    if _is_chain(model) and set(cuts) <= set(children):

        def forward(h: Tensor) -> Tensor:
            """The chain, one segment after the other."""
            segment: list[nn.Module] = []
            for name, child in children.items():
                segment.append(child)
                if name in cuts:
                    before, version = h, h._version
                    h = _recomputed(block := nn.Sequential(*segment), block, h)
                    if before._version != version:
                        raise UsageError(
                            f"the block that ends at {name!r} overwrites its input in place, so it cannot run a second time: "
                            "use the form of its first module that is not in place"
                        )
                    segment = []
            return nn.Sequential(*segment)(h)

        forwards: dict[nn.Module, Any] = {model: forward}
    else:
        modules = [model.get_submodule(name) for name in cuts]
        forwards = {module: partial(_recomputed, module, module.forward) for module in modules}
    # A module may have a forward of its own instead of its class's: a compiled one does.
    own = {module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__}
    for module, again_forward in forwards.items():
        module.forward = again_forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
            if module in own:
                module.forward = own[module]


def _is_chain(model: nn.Module) -> bool:
    """Whether the network is its children, one after the other."""
    return type(model).forward is nn.Sequential.forward and "forward" not in model.__dict__
