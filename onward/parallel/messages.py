"""Tensors from one process to another, each after a header that says what it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from onward.errors import UsageError
from onward.parallel.shards import ProcessLost

_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
_HEADER = 16  # integers: how many tensors follow, type, dimensions, mark, shape


class Mark(NamedTuple):
    """What a message belongs to: a step, the labels of its batch, and how many more messages of this step follow."""

    step: int = 0
    labels: int = 0
    left: int = 0


class Messages:
    """Send without waiting, as long as no more than that many batches are under way; receive whatever comes.

    A header goes before every tensor, so that shapes may change from batch to batch. Raises :class:`onward.ProcessLost` where
    the other process is gone, or does not answer within the group's timeout.
    """

    def __init__(self, group: dist.ProcessGroup | None, batches: int) -> None:
        if "gloo" not in str(dist.get_backend_config(group)):
            raise UsageError(
                f"messages between processes go through gloo, and this group is for {dist.get_backend(group)}: give "
                'group=torch.distributed.new_group(backend="gloo")'
            )
        self.group, self.batches = group, batches
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)
        # The tensors are kept until they have arrived: the messages are sent from their memory.
        self._sent: list[tuple[int, dist.Work, Tensor]] = []
        self._under_way: deque[list[tuple[int, dist.Work, Tensor]]] = deque()

    def send(self, to: int, tensors: Sequence[Tensor], mark: Mark = Mark()) -> None:  # noqa: B008 (an immutable default)
        """Send tensors to a process; they must not be changed before the batch has arrived."""
        for left, tensor in zip(reversed(range(len(tensors))), tensors, strict=True):
            payload = tensor.detach().cpu().contiguous()
            described = [left, _TYPES.index(payload.dtype), payload.dim(), *mark, *payload.shape]
            header = torch.tensor(described + [0] * (_HEADER - len(described)))
            for message in (header, payload):
                with self._peer(to):
                    work = dist.isend(message, group=self.group, group_dst=to)
                assert work is not None
                self._sent.append((to, work, message))

    def receive(self, source: int, device: torch.device) -> tuple[list[Tensor], Mark]:
        """Wait for the next tensors from a process."""
        tensors: list[Tensor] = []
        header = torch.empty(_HEADER, dtype=torch.int64)
        while True:
            self._receive(header, source)
            left, kind, dimensions, *rest = header.tolist()
            tensor = torch.empty(rest[3 : 3 + dimensions], dtype=_TYPES[kind])
            self._receive(tensor, source)
            tensors.append(tensor.to(device))
            if left == 0:
                return tensors, Mark(*rest[:3])

    def end_of_batch(self) -> None:
        """What was sent so far belongs to one batch; wait until no more than the allowed number is under way."""
        self._under_way.append(self._sent)
        self._sent = []
        self._settle(self.batches)

    def settle(self) -> None:
        """Wait until everything has arrived."""
        self.end_of_batch()
        self._settle(0)

    def _settle(self, batches: int) -> None:
        while len(self._under_way) > batches:
            for to, work, _ in self._under_way.popleft():
                with self._peer(to):
                    work.wait()

    def _receive(self, tensor: Tensor, source: int) -> None:
        with self._peer(source):
            dist.recv(tensor, group=self.group, group_src=source)

    @contextmanager
    def _peer(self, other: int) -> Iterator[None]:
        """Name the process that does not answer."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessLost(
                f"process {other} of {self.processes} failed or no longer answers, process {self.rank} noticed"
            ) from error
