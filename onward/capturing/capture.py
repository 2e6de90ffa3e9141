"""A step that is traced once and replayed: where Python and dispatch are the cost, they are paid once.

The first step of each kind runs as ever. The second is traced into one flat list of ATen operations, hooks, cuts, tangents and
the blocks' own backward passes included. From then on that list is run, as it is or compiled, with the parameters, buffers,
batch and random directions of the moment as its inputs.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, overload

from torch.optim import Optimizer

from onward.capturing import backends
from onward.capturing.backends import BACKENDS
from onward.capturing.kinds import Capture
from onward.errors import UsageError
from onward.estimators.base import Estimator, Step
from onward.estimators.settings import OneOf

E_ = TypeVar("E_", bound=Estimator)


@overload
def capture(estimator: E_, *, backend: str = "auto") -> E_: ...


@overload
def capture(estimator: Estimator, *optimizers: Optimizer, backend: str = "auto") -> TrainingStep: ...


def capture(estimator: Any, *optimizers: Optimizer, backend: Annotated[str, OneOf(BACKENDS)] = "auto") -> Any:
    """Make an estimator trace its step once for each kind of batch, and replay it from then on; returns the estimator.

    Its interface stays: ``estimate(x, y)``, ``.grad``, parameters, state. ``engine`` says what runs. A kind of batch is its
    shapes and types. A step is traced anew when that changes, or train and eval mode, what requires gradients, autocast, or an
    attribute of a module. Random directions stay functions of (seed, step, block) and are drawn outside; running statistics
    and feedback learn as ever; dropout draws the same masks as the eager step.

    With ``optimizers`` a whole step of training becomes one call: the returned :class:`TrainingStep`, ``step(x, y)``, clears
    gradients, estimates, and lets the optimizers follow. The estimator itself stays as it was.

    What cannot be traced runs eagerly, and says so once: control flow that depends on numbers, hooks, random masks in an
    estimate that runs the network twice or has heads, sparse gradients, a callback in ``observe``. Tracing and compiling tell
    the logger ``"onward"`` what they are at (level INFO).

    Raises :class:`onward.UsageError` for an unknown backend, or one that this machine has no device for.

    >>> import onward
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = capture(onward.FDFA(model), backend="replay")
    >>> x, y = torch.randn(3, 4), torch.tensor([0, 1, 1])
    >>> for _ in range(3):
    ...     done = estimator.estimate(x, y)
    >>> estimator.engine
    'feedback, forward, replayed'
    """
    backends.check(backend)
    for other in optimizers:
        if not isinstance(other, Optimizer):
            raise UsageError(
                f"capture(..., {other!r}): after the estimator come optimizers; name a backend as backend='replay'"
            )
    if optimizers:
        return TrainingStep(estimator, optimizers, backend)
    estimator.captured = Capture(estimator, backend)
    return estimator


class TrainingStep:
    """A whole step of training as one call: ``zero_grad``, ``estimate`` and the optimizers' ``step``.

    Compiled by inductor, the steps of SGD, Adam and AdamW are operations of the same graph, so no gradient has to leave it;
    with ``replay``, and for other optimizers, they run after it. Either way the optimizers keep their state where they always
    do: ``state_dict`` holds it, ``load_state_dict`` sets it, and learning rates are read anew in every step, so that schedules
    work. Afterwards ``.grad`` of what the optimizers move is None. What has to see or change gradients in between (clipping, a
    scaler, adding up several batches) needs ``estimate`` and the optimizers by themselves.

    >>> import onward
    >>> import torch
    >>> from torch import nn
    >>> estimator = onward.DFA(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> optimizer = torch.optim.SGD(estimator.parameters(), lr=0.1)
    >>> step = onward.capture(estimator, optimizer, backend="replay")
    >>> x, y = torch.randn(3, 4), torch.tensor([0, 1, 1])
    >>> losses = [float(step(x, y).loss) for _ in range(5)]
    >>> losses[4] < losses[0], estimator.engine
    (True, 'feedback, replayed')
    """

    def __init__(self, estimator: Estimator, optimizers: tuple[Optimizer, ...], backend: str) -> None:
        self.estimator, self.optimizers = estimator, optimizers
        self._capture = Capture(estimator, backend, optimizers)

    def __call__(self, x: Any, y: Any) -> Step:
        """Make a step of training on a batch; returns what ``estimate`` returns.

        Raises :class:`onward.UsageError` as ``estimate`` does.
        """
        self._clear()
        before, self.estimator.captured = self.estimator.captured, self._capture
        self._capture.followed = False
        try:
            done = self.estimator.estimate(x, y)
        finally:
            self.estimator.captured = before
        if not self._capture.followed:  # it had to wait for other processes
            for optimizer in self.optimizers:
                optimizer.step()
        self._clear()
        return done

    @property
    def settled(self) -> bool:
        """Whether every kind of step that was met is traced, and its backend chosen."""
        return self._capture.settled

    def _clear(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad = None
