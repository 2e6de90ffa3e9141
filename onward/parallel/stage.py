"""Block pipelines: contiguous groups of blocks in different processes; activations go forward, and no gradient comes back.

Each process updates its blocks as soon as its own signal is there: at once for local losses, when the output error has come
back from the last process for direct feedback.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from onward.derivatives.directions import seed_of
from onward.errors import UsageError
from onward.estimators.base import Estimator, Step
from onward.estimators.feedback import DirectFeedback
from onward.estimators.forward_gradient.estimator import ForwardGradient
from onward.estimators.local import LocalLoss
from onward.estimators.signals import Known, Passed, SignalEstimator
from onward.network.cuts import Elsewhere
from onward.network.heads import Heads
from onward.network.padding import IGNORED
from onward.network.positions import feature_axis
from onward.network.run import batch_statistics, device_of, output_error
from onward.network.shard import Shard
from onward.parallel.messages import Mark, Messages


class Stage:
    """The part of a network that this process of a pipeline has, and one step of its training.

    Every process runs the same script: it builds the whole network and its estimator from the same seed, and makes a stage of
    it. From then on the estimator, its network included, holds this process's blocks alone; its names stay those of the whole.
    ``estimate(x, y)`` is called by every process with the same batches in the same order (x is read by the first process; y by
    the last, and by heads) and fills ``.grad`` of this process's parameters, for an optimizer of its own.

    For :class:`onward.LocalLoss`, and :class:`onward.ForwardGradient` with ``target="local"`` and a guess that is known in the
    block: every process hands on its output and learns, waiting for nothing. For every :class:`onward.SignalEstimator`, such
    as :class:`onward.DFA` and rules of the user's own: activations (and tangents) go forward; the last process sends the output
    error (and the tangents of the output) to all others; all learn at the same time. ``microbatches`` divides a batch so that
    its forward passes overlap: with as many as there are processes nobody waits. ``staleness=s`` instead lets the processes
    before the last apply the signal of the batch s steps ago to the graph and weights of that batch. Estimates are those of
    one process, but for staleness, batch norm (which sees microbatches) and dropout masks.

    ``parts`` says how many blocks each process has, in order; the default is as equal as possible, larger ones last. Messages
    go through gloo, in ``group``.

    Raises :class:`onward.UsageError` for estimators that need the blocks of others, networks that are no Sequential cut at
    its own children, and processes that see different batches; :class:`onward.ProcessLost` where another process is gone or
    does not answer within the group's timeout.

    >>> import onward
    >>> import tempfile
    >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = onward.DFA(model)
    >>> stage = Stage(estimator)
    >>> optimizer = torch.optim.Adam(estimator.parameters())
    >>> step = stage.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> optimizer.step()
    >>> stage.flush()
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        estimator: Estimator,
        parts: Sequence[int] | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        staleness: int = 0,
        microbatches: int = 1,
    ) -> None:
        _check(estimator, staleness, microbatches)
        blocks = _blocks(estimator)
        self.estimator = estimator
        self.staleness, self.microbatches = staleness, microbatches
        self.group, self.rank, self.processes = group, dist.get_rank(group), dist.get_world_size(group)
        parts = _equal_parts(len(blocks), self.processes) if parts is None else list(parts)
        if len(parts) != self.processes or sum(parts) != len(blocks) or min(parts) < 1:
            raise UsageError(
                f"parts={parts} for {self.processes} processes and {len(blocks)} blocks: give each process at least one block, "
                "and every block a process"
            )
        first = sum(parts[: self.rank])
        self.blocks = range(first, first + parts[self.rank])
        self._exit = estimator.model.get_submodule(blocks[self.blocks[-1]][-1])
        self._device = device_of(estimator.model)
        _keep(estimator, blocks, self.blocks)
        self._messages = Messages(group, batches=staleness + 2)
        self._waiting: deque[list[Passed]] = deque()

    def estimate(self, x: Any, y: Any) -> Step | None:
        """Add the estimate for this process's parameters to their ``.grad``; None while ``staleness`` leaves nothing to apply.

        The step's loss and output are the network's in the last process. In the others: with local losses, those of the last
        head there; with direct feedback, the network's loss on the batch that was learned from, and no output (0 x C).
        """
        with self._own_randomness(), batch_statistics(self.estimator):
            step = self._direct(x, y) if isinstance(self.estimator, SignalEstimator) else self._local(x, y)
        self._messages.end_of_batch()
        return step

    def flush(self) -> Step | None:
        """Learn from the oldest batch whose signal is under way; None once there is none and all that was sent has arrived.

        At the end of training, in every process: ``while stage.flush(): optimizer.step(); optimizer.zero_grad()``.
        """
        if self._waiting:
            return self._learn(self._waiting.popleft())
        self._messages.settle()
        return None

    @torch.no_grad()
    def __call__(self, x: Any) -> Tensor | None:
        """The network's output for a batch, in the last process, and None in the others; every process has to call it."""
        with self._own_randomness():
            (entered,) = self._entering(x, None, 1)
            output = self.estimator.model(entered.h)
        if self.estimator.ends_here:
            return output
        self._messages.send(self.rank + 1, [output], entered.mark)
        self._messages.end_of_batch()
        return None

    def full_state_dict(self) -> dict[str, Any] | None:
        """The state of the whole estimator, in the first process, and None in the others; every process has to call it.

        ``load_state_dict`` of an estimator takes it before a stage is made of it.
        """
        parts: list[Any] | None = [None] * self.processes if self.rank == 0 else None
        dist.gather_object(self.estimator.state_dict(), parts, group_dst=0, group=self.group)
        return None if parts is None else {name: value for part in parts for name, value in part.items()}

    def _local(self, x: Any, y: Any) -> Step:
        estimator = self.estimator
        (entered,) = self._entering(x, y, 1)
        if estimator.ends_here:
            return estimator.estimate(entered.h, y)

        def hand_on(module: nn.Module, args: Any, output: Tensor) -> None:
            handle.remove()  # an estimate may take several passes
            self._messages.send(self.rank + 1, [output], entered.mark)

        # Before the block learns, so that the next process need not wait for it.
        handle = self._exit.register_forward_hook(hand_on)
        try:
            heads = estimator.estimate(entered.h, y).heads
        finally:
            handle.remove()
        return Step(*heads[estimator.cuts[self.blocks[-1]]], heads)

    def _direct(self, x: Any, y: Any) -> Step | None:
        estimator = self.estimator
        assert isinstance(estimator, SignalEstimator)
        last = estimator.ends_here
        # The optimizer will have changed the parameters by the time that a stale signal arrives.
        stale = self.staleness > 0 and not last
        weights = {name: p.clone() for name, p in estimator.model.named_parameters()} if stale else None
        batch: list[Passed] = []
        signals: list[_Signal] = []
        first = 0
        for h, tangents, mark in self._entering(x, y, self.microbatches):
            estimator.shard = _samples_from(first)
            passed = estimator.pass_forward(h, tangents, weights)._replace(y=self._targets(y, first, len(h), mark))
            estimator.shard = Shard()
            batch.append(passed)
            if last:
                signals.append(self._signal(passed, y, whole=mark.left == first == 0))
            else:
                self._messages.send(self.rank + 1, [passed.output, *_of_output(passed)], mark)
            first += len(h)
        estimator.step += 1
        if last:
            return self._learn(batch, signals)
        self._waiting.append(batch)
        return self._learn(self._waiting.popleft()) if len(self._waiting) > self.staleness else None

    def _targets(self, y: Any, first: int, samples: int, mark: Mark) -> Any:
        """The targets of that many samples of a batch, from the first one on."""
        if y is None or mark.left == first == 0:  # the whole batch
            return y
        if not isinstance(y, Tensor):
            raise UsageError(f"microbatches={self.microbatches} divides y, a {type(y).__name__}: give a tensor, samples first")
        return y[first : first + samples]

    def _signal(self, passed: Passed, y: Any, whole: bool) -> _Signal:
        """In the last process: the output error of some samples of a batch, for everybody."""
        if not isinstance(passed.output, Tensor):
            raise UsageError(f"the network returns a {type(passed.output).__name__}: in a pipeline let it return one tensor")
        share = 1.0 if whole else len(passed.output) / len(y)
        if not whole and isinstance(y, Tensor) and not y.is_floating_point():
            counted, all_counted = (int((part != IGNORED).sum()) for part in (passed.y, y))
            if counted * len(y) != all_counted * len(passed.output):
                raise UsageError(
                    f"microbatches={self.microbatches}: {counted} of the {all_counted} targets that are not {IGNORED} "
                    f"are in {len(passed.output)} of {len(y)} samples, and a mean over targets is not the mean of its parts' "
                    "means then: use microbatches=1, or batches whose samples have as many targets each"
                )
        found = output_error(self.estimator.loss, passed.output, passed.y)
        axis = feature_axis([found.e[0].shape], passed.y, self.estimator.loss)
        signal = _Signal(found.loss * share, found.e[0] * share, _of_output(passed), axis)
        for rank in range(self.rank):
            loss = torch.stack([signal.loss, signal.loss.new_tensor(signal.axis)])
            self._messages.send(rank, [loss, signal.e, *signal.tangents])
        return signal

    def _learn(self, batch: list[Passed], signals: Sequence[_Signal] | None = None) -> Step:
        """Apply the output error to each part of a batch, as it comes in unless it is known."""
        estimator = self.estimator
        assert isinstance(estimator, SignalEstimator)
        samples = sum(len(passed.output) for passed in batch)
        losses, logits = [], []
        for i, passed in enumerate(batch):
            loss, e, tangents, axis = self._receive_signal() if signals is None else signals[i]
            share = len(passed.output) / samples
            known = Known(e, tangents, passed.directions, y=passed.y, loss=loss, share=share, axis=axis)
            estimator.learn(passed, known, [passed.output])
            losses.append(loss)
            logits.append(passed.output.detach() if estimator.ends_here else known.e[:0])
        return Step(torch.stack(losses).sum(), torch.cat(logits))

    def _receive_signal(self) -> _Signal:
        ((loss, axis), e, *tangents), _ = self._messages.receive(self.processes - 1, self._device)
        return _Signal(loss, e, tangents, int(axis))

    def _entering(self, x: Any, y: Any, microbatches: int) -> Iterator[_Entered]:
        """What enters the first block here, a microbatch at a time: out of x, or from the process before."""
        labels = _fingerprint(y)
        if self.rank == 0:
            pieces = [x] if microbatches == 1 else x.split(-(-len(x) // microbatches))
            for index, h in enumerate(pieces):
                yield _Entered(h, [], Mark(self.estimator.step, labels, len(pieces) - 1 - index))
            return
        left = 1
        while left:
            (h, *tangents), mark = self._messages.receive(self.rank - 1, self._device)
            self._check_mark(mark, labels)
            yield _Entered(h, tangents, mark)
            left = mark.left

    def _check_mark(self, mark: Mark, labels: int) -> None:
        if mark.step != self.estimator.step:
            raise UsageError(
                f"process {self.rank} is at step {self.estimator.step} and was handed step {mark.step} by process "
                f"{self.rank - 1}: every process has to call estimate for every batch, and the stage for every evaluation"
            )
        if labels and mark.labels and mark.labels != labels:
            raise UsageError(
                f"process {self.rank} has other labels in step {mark.step} than the processes before it: every process has to "
                "go through the same batches in the same order (give the data loader a generator of the same seed everywhere)"
            )

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Dropout masks that differ between processes, and a global generator that does not: data loaders draw from it."""
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(seed_of(self.estimator.seed, self.estimator.step, "masks of the stage", self.rank))
            yield


def _of_output(passed: Passed) -> list[Tensor]:
    """The tangents of what leaves this process, in each direction."""
    return [moved for (moved,) in passed.tangents([passed.output])]


class _Entered(NamedTuple):
    """What the process before handed on: an activation, and its tangents."""

    h: Any
    tangents: list[Tensor]
    mark: Mark


class _Signal(NamedTuple):
    """What the last process sends back, of some samples: their part of the loss, its gradient, the output's tangents.

    And which dimension of the output has the features, which the targets tell.
    """

    loss: Tensor
    e: Tensor
    tangents: list[Tensor]
    axis: int


def _check(estimator: Estimator, staleness: int, microbatches: int) -> None:
    """Raise where this estimator cannot be divided among processes."""
    if not dist.is_initialized():
        raise UsageError(
            "there is no process group: start the script with torchrun and call "
            'torch.distributed.init_process_group("gloo") first'
        )
    if type(estimator.shard) is not Shard:
        raise UsageError("this estimator is distributed over shards of the batch: use either that or a pipeline")
    if staleness < 0 or microbatches < 1:
        raise UsageError(f"staleness={staleness}, microbatches={microbatches}: use at least 0 and 1")
    match estimator:
        case SignalEstimator():
            if estimator.low_memory:
                raise UsageError("low_memory=True runs the network twice, which no stage can do by itself: leave it out")
            if estimator.in_one_piece:
                raise UsageError(
                    f"{estimator.engine}: this needs the whole network in one process, so leave it out of a pipeline"
                )
        case LocalLoss() | ForwardGradient():
            if isinstance(estimator, ForwardGradient):
                for what, name, known in (("target", estimator.target, _LOCAL[:1]), ("guess", estimator.guess, _LOCAL)):
                    if name not in known:
                        raise UsageError(
                            f"{what}={name!r} needs the blocks of other processes: in a pipeline use {what}="
                            f"{' or '.join(map(repr, known))}, or DFA, DKP or FDFA"
                        )
            if staleness or microbatches > 1:
                raise UsageError(
                    f"staleness={staleness}, microbatches={microbatches}: {type(estimator).__name__} waits for no other "
                    "process, so neither gains anything: leave them out"
                )
        case _:
            raise UsageError(
                f"{type(estimator).__name__} has a backward lock (a block waits for the gradient of the next one): use "
                "LocalLoss, DFA, DKP, FDFA, or ForwardGradient with target='local'"
            )


_LOCAL = ("local", "random", "ntk", "fixed-ntk")
"""Guesses that are known in the block; the first is the only such target."""


def _blocks(estimator: Estimator) -> list[list[str]]:
    """The children of the network in each block."""
    model, cuts = estimator.model, estimator.cuts
    children = dict(model.named_children())
    if type(model).forward is not nn.Sequential.forward:
        raise UsageError(
            f"{type(model).__name__} is not a Sequential: only the network knows what happens between its blocks. Make it an "
            "nn.Sequential of blocks"
        )
    for name in cuts:
        if name not in children:
            raise UsageError(f"cut {name!r} lies inside a child of the Sequential: cut a pipeline at the children themselves")
    blocks: list[list[str]] = [[]]
    for name in children:
        blocks[-1].append(name)
        if name in cuts:
            blocks.append([])
    owner: dict[nn.Parameter, int] = {}
    for k, names in enumerate(blocks):
        for name in names:
            for p in children[name].parameters():
                if owner.setdefault(p, k) != k:
                    raise UsageError(
                        f"{name!r} shares a parameter with the block of {blocks[owner[p]][-1]!r}: processes learn apart, so "
                        "give each block parameters of its own"
                    )
    return blocks


def _equal_parts(blocks: int, processes: int) -> list[int]:
    """As many blocks for each process, or one more for the last ones.

    >>> _equal_parts(5, 2), _equal_parts(4, 3)
    ([2, 3], [1, 1, 2])
    """
    if blocks < processes:
        raise UsageError(f"{processes} processes for {blocks} blocks: use at most {blocks}, or cut the network in more places")
    return [(r + 1) * blocks // processes - r * blocks // processes for r in range(processes)]


def _keep(estimator: Estimator, blocks: Sequence[Sequence[str]], here: range) -> None:
    """Leave an estimator some of its blocks, with their heads and feedback matrices."""
    estimator.ends_here = here[-1] == len(blocks) - 1
    for k, names in enumerate(blocks):
        if k in here:
            continue
        for name in names:
            setattr(estimator.model, name, Elsewhere())
        if k == len(blocks) - 1:
            continue
        for heads in (module for module in estimator.children() if isinstance(module, Heads)):
            heads.by_cut[k] = Elsewhere()
        if isinstance(estimator, DirectFeedback) and not is_lazy(matrix := estimator.feedback[k]):
            empty = UninitializedParameter(matrix.requires_grad, matrix.device, matrix.dtype)  # type: ignore[call-arg]
            estimator.feedback[k] = empty


def _samples_from(first: int) -> Shard:
    """The samples of a batch from a number on, for the directions drawn for them."""
    shard = Shard()
    shard.first = first
    return shard


def _fingerprint(y: Any) -> int:
    """A number by which to tell one batch's labels from another's; 0 where there are none to tell.

    >>> _fingerprint(torch.tensor([1, 0])) == _fingerprint(torch.tensor([0, 1])), _fingerprint(None)
    (False, 0)
    """
    if not isinstance(y, Tensor):
        return 0
    octets = y.detach().reshape(-1)[:1024].cpu().contiguous().view(torch.uint8).long()
    return 1 + int(octets @ torch.arange(1, 1 + len(octets)))
