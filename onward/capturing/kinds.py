"""The kinds of steps that an estimator makes: each is traced once, and run by the backend that is asked for, or is fastest."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten

from onward.capturing import backends, refusals
from onward.capturing.backends import ENGINES, Run
from onward.capturing.optimizers import Updates
from onward.capturing.requests import Request, noting
from onward.capturing.trace import Traced, trace
from onward.estimators.base import Estimator, Step
from onward.network.replay import Replay
from onward.network.shard import Shard

EAGER = "eager"
KINDS = 16  # kinds of batches that are traced; with more of them, tracing would cost more than it saves
_TRIED = 3  # runs by which a backend is judged, after one that is not timed
_PLAIN = (Tensor, bool, int, float, str, type(None))
_log = logging.getLogger("onward")


class Kind:
    """One kind of step: what it draws, how it can be run, and how long that took."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.met = False
        self.runs: dict[str, tuple[Traced, Run] | None] = {}
        """By backend; none for running eagerly."""
        self.seconds: dict[str, list[float]] = {}

    @property
    def decided(self) -> bool:
        """Whether it is run in one way from now on."""
        return len(self.runs) == 1

    def turn(self) -> str:
        """The backend that is to be run next: the one that is chosen, or tried least."""
        return min(self.runs, key=lambda name: len(self.seconds.get(name, ())))

    def took(self, name: str, seconds: float) -> None:
        """Note what a run took, and choose when all have been tried."""
        self.seconds.setdefault(name, []).append(seconds)
        if all(len(self.seconds.get(each, ())) > _TRIED for each in self.runs):
            fastest = min(self.runs, key=lambda each: min(self.seconds[each][1:]))
            self.runs = {fastest: self.runs[fastest]}


class Capture:
    """The traced steps of one estimator, by kind of batch; with optimizers, their steps too."""

    def __init__(self, estimator: Estimator, backend: str, optimizers: Sequence[Optimizer] = ()) -> None:
        self.estimator, self.backend, self.optimizers = estimator, backend, optimizers
        self.engine = estimator.engine
        for name in ("engine", "captured", "_draws"):  # attributes of its own from now on, not of its class
            setattr(estimator, name, getattr(estimator, name))
        self.kinds: dict[Any, Kind] = {}
        self.told: set[str] = set()
        self.followed = False
        """Whether the optimizers have made their step, in the call that was the last."""

    @property
    def settled(self) -> bool:
        """Whether every kind of step that was met is traced, and its backend chosen."""
        return all(kind.decided for kind in self.kinds.values())

    def __call__(self, x: Any, y: Any) -> Step:
        """What ``estimator._estimate(x, y)`` does, and what the optimizers do then."""
        leaves, structure = tree_flatten((x, y))
        key = self._key(leaves, structure)
        kind = self.kinds.get(key)
        if kind is None:
            if len(self.kinds) >= KINDS or not all(isinstance(leaf, _PLAIN) for leaf in leaves):
                self._tell(
                    "runs eagerly on batches that hold more than tensors and plain values, or that are of another kind than "
                    f"the first {KINDS}: keep their shapes (drop_last=True, padding)"
                )
                return self._eagerly(x, y)
            kind = self.kinds[key] = Kind()
        if not kind.met:
            kind.met = True
            with noting(self.estimator, kind.requests):
                return self._eagerly(x, y)
        if not kind.runs:
            self._prepare(kind, leaves, structure)
        return self._run(key, kind, x, y, leaves)

    def _key(self, leaves: Sequence[Any], structure: Any) -> Any:
        """What tells one kind of step from another."""
        kinds = tuple(
            (leaf.shape, leaf.dtype, leaf.device, leaf.stride()) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        )
        kind = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        shard = self.estimator.shard
        return kinds, str(structure), autocast, torch.is_inference_mode_enabled(), shard.first, shard.share

    def _tell(self, what: str) -> None:
        """Warn of what is not captured, once."""
        if what not in self.told:
            self.told.add(what)
            warnings.warn(f"{type(self.estimator).__name__} {what}", stacklevel=6)

    def _prepare(self, kind: Kind, leaves: Sequence[Any], structure: Any) -> None:
        """Trace the step and make what runs it; where that cannot be, it is run eagerly from now on."""
        started = time.perf_counter()
        name = type(self.estimator).__name__
        asked = ("replay", "inductor") if self.backend == "auto" else (self.backend,)
        traced: dict[bool, Traced] = {}
        for backend in asked:
            try:
                updates = self._updates() if backend != "replay" else None
                if (joined := updates is not None) not in traced:
                    _log.info("tracing a step of %s", name)
                    traced[joined] = trace(self.estimator, leaves, structure, kind.requests, updates)
                found = traced[joined]
                if backend != "replay":
                    _log.info("compiling a step of %s: %d operations", name, len(found.graph.graph.nodes))
                kind.runs[backend] = found, backends.made(backend, found.graph, found.examples)
            except Exception as error:  # PyTorch's tracer and compilers raise anything
                if traced and self.backend == "auto":
                    self._tell(f"is not {ENGINES[backend]}: {str(error).strip().partition(chr(10))[0]}")
                    continue
                self._tell(f"cannot be captured and runs eagerly: {refusals.reason(self.estimator, error)}")
                kind.runs = {}
                break
        if self.backend == "auto" or not kind.runs:
            kind.runs[EAGER] = None
        for found in traced.values():
            found.examples.clear()
        _log.info("%s: captured in %.1f s", name, time.perf_counter() - started)

    def _updates(self) -> Updates | None:
        """The step of the optimizers, if there are some and it can be part of a graph."""
        if not self._alone:
            return None
        updates = Updates(self.optimizers, self.estimator)
        if updates.refused is not None:
            self._tell(f"is captured without its optimizers' step, which runs eagerly: {updates.refused}")
            return None
        return updates

    @property
    def _alone(self) -> bool:
        """Whether there are optimizers that need not wait for other processes' gradients."""
        return bool(self.optimizers) and type(self.estimator.shard) is Shard

    def _run(self, key: Any, kind: Kind, x: Any, y: Any, leaves: Sequence[Any]) -> Step:
        name, tried = kind.turn(), not kind.decided
        run = kind.runs[name]
        if run is not None and not run[0].same():
            del self.kinds[key]
            return self(x, y)
        started = time.perf_counter()
        step = self._eagerly(x, y) if run is None else self._replayed(*run, x, y, leaves)
        if tried:
            if step.loss.device.type == "cuda":
                torch.cuda.synchronize(step.loss.device)
            kind.took(name, time.perf_counter() - started)
        self.estimator.engine = f"{self.engine}, {ENGINES[name]}" if name in ENGINES else self.engine
        return step

    def _eagerly(self, x: Any, y: Any) -> Step:
        step = self.estimator._estimate(x, y)
        self._follow()
        return step

    def _replayed(self, traced: Traced, run: Run, x: Any, y: Any, leaves: Sequence[Any]) -> Step:
        batch = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = traced.inputs(batch, self.estimator.step)
        with torch.no_grad():
            try:
                found = run(*inputs)
            except (RuntimeError, IndexError):  # of a label, for example, which the eager step names
                with torch.enable_grad(), Replay(self.estimator.model).unseen():
                    self.estimator._estimate(x, y)
                raise
            count = len(traced.trained)
            for p, gradient in zip(traced.trained, found, strict=False):
                if gradient is not None:
                    p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        if traced.updates is not None:
            traced.updates.applied()
            self.followed = True
        else:
            self._follow()
        return traced.rebuild(found[count:])

    def _follow(self) -> None:
        if self._alone:
            for optimizer in self.optimizers:
                optimizer.step()
            self.followed = True
