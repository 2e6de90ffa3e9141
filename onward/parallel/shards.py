"""Data parallelism: each process estimates from its shard of the batch; means over samples become means over all shards.

Estimators say where such means are taken (``shard.mean``); on one process that is the identity, so there is one code path.
"""

from __future__ import annotations

import atexit
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from threading import Event, Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onward.derivatives.per_sample import PerSample, Rows
from onward.errors import UsageError, unknown
from onward.estimators.base import Estimator
from onward.estimators.forward_gradient.rule import Rule
from onward.network.run import samples_of
from onward.network.shard import Shard
from onward.parallel.batch_norm import synchronise

STATISTICS = {
    "averaged": "each process normalises by its own shard; running statistics are averaged after every step",
    "local": "each process normalises by its own shard and keeps its own running statistics",
    "synchronised": "batch norm normalises by the statistics of all shards",
}
_BUCKET = 25 << 20  # bytes in one message
_NAMING = 4  # seconds for finding out who is gone


class ProcessLost(RuntimeError):
    """A process of the group has failed, or has stopped answering."""


class ProcessShard(Shard):
    """The shard of one process among several.

    ``sent`` counts the bytes that this process has handed to collective operations.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, statistics: str) -> None:
        self.group, self.device, self.statistics = group, device, statistics
        _hearts(group or dist.group.WORLD)
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)
        self.sizes = [1] * self.processes
        self.sent = 0

    @contextmanager
    def averaging(
        self, x: Any, estimator: nn.Module, *, sums_samples: bool, weight: Callable[[], float | None] | None = None
    ) -> Iterator[None]:
        self._split(x, weight and weight())
        parameters = [p for p in estimator.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            yield
        except BaseException:  # what was there before is not lost with the step
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = gradient
            raise
        if sums_samples:
            self._average_gradients(parameters)
        for p, gradient in zip(parameters, before, strict=True):
            if gradient is not None:
                dense_first = p.grad is not None and gradient.is_sparse and not p.grad.is_sparse
                p.grad = gradient if p.grad is None else p.grad.add_(gradient) if dense_first else gradient.add_(p.grad)
        if self.statistics == "averaged":
            self._average(running_statistics(estimator))

    @torch.no_grad()
    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        means = list(tensors)
        for indices in _buckets(means):
            flat = torch.cat([means[i].detach().reshape(-1) for i in indices]).mul_(self.share)
            self.sum(flat)
            for i, part in zip(indices, flat.split([means[i].numel() for i in indices]), strict=True):
                means[i] = part.view(means[i].shape)
        return means

    def gather(self, rows: Tensor) -> Tensor:
        padded = rows.new_zeros(max(self.sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in self.sizes]
        self.sent += padded.nbytes
        with answering(self.group):
            dist.all_gather(everyone, padded, group=self.group)
        return torch.cat([theirs[:size] for theirs, size in zip(everyone, self.sizes, strict=True)])

    def gather_rows(self, gradients: PerSample, guesses: int) -> PerSample:
        target, *others = (gradients.rows(i, slice(0, gradients.samples)) for i in range(1 + guesses))
        return Rows([self.gather(target * self.share), *map(self.gather, others)])

    def __deepcopy__(self, memo: object) -> Shard:
        return Shard()  # a copy of an estimator works by itself

    def _split(self, x: Any, weight: float | None) -> None:
        """Find out how the batch is divided: samples, and shares of the mean loss, by weights where these are not samples."""
        self.sizes = self._everyones(samples_of(x))
        for rank, size in enumerate(self.sizes):
            if size == 0:
                raise UsageError(
                    f"process {rank} of {self.processes} has no sample of this batch: give every process at least one"
                )
        self.first, self.share = sum(self.sizes[: self.rank]), self.sizes[self.rank] / sum(self.sizes)
        if weight is not None:
            weights = self._everyones(int(weight))
            if 0 in weights:
                raise UsageError(
                    f"process {weights.index(0)} of {self.processes} has no label in this batch that counts, and so no loss: "
                    "give every process at least one"
                )
            self.share = weights[self.rank] / sum(weights)

    def _everyones(self, number: int) -> list[int]:
        """That number in each process."""
        mine = torch.tensor([number], dtype=torch.int64, device=self.device)
        theirs = [torch.empty_like(mine) for _ in range(self.processes)]
        self.sent += mine.nbytes
        with answering(self.group):
            dist.all_gather(theirs, mine, group=self.group)
        return [int(one) for one in theirs]

    def _average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average ``.grad``; a process that did not use a parameter contributes zeros if another did."""
        kinds = [[p.grad is not None and not p.grad.is_sparse, p.grad is not None and p.grad.is_sparse] for p in parameters]
        used = torch.tensor(kinds, dtype=torch.uint8, device=self.device)
        self.sum(used)
        dense: list[Tensor] = []
        for p, (somewhere_dense, somewhere_sparse) in zip(parameters, used.tolist(), strict=True):
            if somewhere_dense:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
                dense.append(p.grad)
            elif somewhere_sparse:
                p.grad = self._mean_of_rows(p)
        self._average(dense)

    def _mean_of_rows(self, p: nn.Parameter) -> Tensor:
        """The mean of sparse gradients: the rows that any process has."""
        mine = torch.zeros_like(p).to_sparse(1) if p.grad is None else p.grad
        mine = mine.coalesce()
        counts = self._everyones(mine.values().shape[0])
        gathered = []
        for part in (mine.indices()[0], mine.values() * self.share):
            padded = part.new_zeros(max(counts), *part.shape[1:])
            padded[: len(part)] = part
            everyone = [torch.empty_like(padded) for _ in counts]
            self.sent += padded.nbytes
            with answering(self.group):
                dist.all_gather(everyone, padded, group=self.group)
            gathered.append(torch.cat([theirs[:count] for theirs, count in zip(everyone, counts, strict=True)]))
        return torch.sparse_coo_tensor(gathered[0].unsqueeze(0), gathered[1], p.shape).coalesce()

    def _average(self, tensors: Sequence[Tensor]) -> None:
        """Put means in the place of the tensors."""
        for indices in _buckets(tensors):
            bucket = [tensors[i] for i in indices]
            for tensor, mean in zip(bucket, self.mean(bucket), strict=True):
                tensor.copy_(mean)

    def sum(self, tensor: Tensor) -> Tensor:
        """Put the sum over all processes in the place of a tensor, and return it."""
        self.sent += tensor.nbytes
        with answering(self.group):
            dist.all_reduce(tensor, group=self.group)
        return tensor


@contextmanager
def answering(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Around an exchange: if it fails, a :class:`ProcessLost` names the process that has failed, or that has stopped.

    Every process has a heart: a thread that counts seconds in the store that all share, whatever its other threads wait for.
    The first process that finds a heart which has stopped writes whose it is into the store, for all.
    """
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(_missing(group, error)) from error


def _missing(group: dist.ProcessGroup | None, error: RuntimeError) -> str:
    hearts, count = _hearts(group or dist.group.WORLD), dist.get_world_size(group)
    alone = f"process {dist.get_rank(group)} of {count} can no longer exchange with the others"

    def beats() -> list[bytes]:
        return hearts.multi_get([str(rank) for rank in range(count)])

    try:
        if not hearts.check(["verdict"]):
            before = beats()
            time.sleep(_NAMING)
            missing = [f"process {rank}" for rank, beat in enumerate(beats()) if beat == before[rank]]
            said = f"{' and '.join(missing)} of {count} failed or no longer answers" if missing else ""
            hearts.compare_set("verdict", "", said)
        return hearts.get("verdict").decode() or f"{alone} ({str(error).splitlines()[0]})"
    except RuntimeError:
        return f"{alone}, nor reach where they met (process 0, or torchrun)"


@cache
def _hearts(group: Any) -> Any:
    """Where the processes of a group count seconds; this one begins to."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    store, rank, stopping = PrefixStore("onward hearts", group.get_group_store()), str(dist.get_rank(group)), Event()

    def beat() -> None:
        beats = 0
        with suppress(RuntimeError):  # the store is gone, and so is the run
            while not stopping.wait(1):
                beats += 1
                store.set(rank, str(beats))

    store.set(rank, "0")
    thread = Thread(target=beat, name="onward-heart", daemon=True)
    thread.start()
    atexit.register(thread.join, 2)  # not in the middle of a message while Python ends
    atexit.register(stopping.set)  # which comes first
    return store


E_ = TypeVar("E_", bound=Estimator)


def distribute(estimator: E_, group: dist.ProcessGroup | None = None, *, statistics: str = "averaged") -> E_:
    """Make an estimator work on its process's shard of every batch, together with those of a process group.

    Afterwards ``estimate(x, y)``, called by every process with its own samples, leaves in every ``.grad`` of every process the
    estimate for all their samples as one batch (sample order: by rank; shards may differ in size), and the mean loss over it;
    ``output`` is that of the own samples. Parameters, buffers, seed and step are taken from the group's first process.
    Optimizers need nothing: equal gradients keep equal weights.

    Gradients, heads' and feedback matrices' too, are averaged in buckets. Where an estimate needs means over the batch before
    it can be made (``avg-weight``, ``f-*``, ``span-*``), these are exchanged instead. Forward gradients with random guesses in
    ``space="avg-weight"`` without cuts exchange only the measured derivatives: every process draws the same directions.
    What mixes samples works on the shard: the similarities of a predsim head, and batch norm, unless ``statistics`` says
    otherwise (:data:`STATISTICS`).

    Raises :class:`onward.UsageError` where processes do not have the same network, or there is no process group, and
    :class:`ProcessLost` from ``estimate``, where one no longer answers within the group's timeout.

    >>> import onward
    >>> import tempfile
    >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = distribute(onward.FDFA(model))
    >>> step = estimator.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> dist.destroy_process_group()
    """
    if statistics not in STATISTICS:
        raise unknown("handling of batch norm's statistics", statistics, STATISTICS)
    if statistics == "synchronised" and isinstance(estimator, Rule) and estimator.comparison.in_samples:
        raise UsageError(
            f"statistics='synchronised' with space={estimator.space!r}, which takes each sample's gradient by itself: use "
            "statistics='averaged', or space='activation' or 'avg-weight'"
        )
    if not dist.is_initialized():
        raise UsageError(
            "there is no process group: start the script with torchrun and call torch.distributed.init_process_group() first"
        )
    device = next((p.device for p in estimator.parameters()), torch.device("cpu"))
    shard = ProcessShard(group, device, statistics)
    state = {name: t for name, t in [*estimator.named_parameters(), *estimator.named_buffers()] if not is_lazy(t)}
    described = repr([(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in state.items()])
    digest = int.from_bytes(hashlib.blake2b(described.encode(), digest_size=7).digest(), "little")
    digests = shard._everyones(digest)
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise UsageError(
                f"process {rank} has other parameters or buffers (names, shapes, types, which are trained) than process 0: "
                "build the same network and estimator in every process"
            )
    numbers = torch.tensor([estimator.step, estimator.seed], dtype=torch.int64, device=device)
    source = 0 if group is None else dist.get_global_rank(group, 0)
    with torch.no_grad(), answering(group):
        for tensor in [*state.values(), numbers]:
            held = tensor.detach().contiguous()
            dist.broadcast(held, source, group=group)
            if held.data_ptr() != tensor.data_ptr():
                tensor.copy_(held)
    estimator.set_extra_state(numbers)
    estimator.shard = shard
    if statistics == "synchronised":
        synchronise(estimator, shard)
    return estimator


def running_statistics(module: nn.Module) -> list[Tensor]:
    """The running means and variances of a network's normalisation layers."""
    return [
        statistic
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase)
        for statistic in (layer.running_mean, layer.running_var)
        if statistic is not None and not is_lazy(statistic)
    ]


def _buckets(tensors: Sequence[Tensor]) -> Iterable[list[int]]:
    """Which tensors share a message: those of one type, up to a size."""
    by_type: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_type.setdefault((tensor.dtype, tensor.device), []).append(i)
    for indices in by_type.values():
        bucket: list[int] = []
        size = 0
        for i in indices:
            if bucket and size + tensors[i].nbytes > _BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(i)
            size += tensors[i].nbytes
        yield bucket
