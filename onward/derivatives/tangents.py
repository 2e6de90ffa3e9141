"""Forward mode beside an ordinary forward pass: tangents that travel with the tensors, and never build a graph.

:class:`Tangents` listens below autograd, where every network is made of the same few hundred operations, and carries a
tangent through each of them by the rules of :mod:`onward.derivatives.rules`. The primal pass is untouched: the same numbers,
the same graph if gradients are enabled, running statistics and dropout masks drawn once. So one forward pass can carry both
what a block needs to differentiate itself and the directional derivatives that direct feedback and forward gradients need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from onward.derivatives import shortcuts
from onward.derivatives.fallback import by_forward_ad
from onward.derivatives.graph import is_traced
from onward.derivatives.held import (
    KEY,
    UNKNOWN,
    address,
    contains,
    gradients_are_off,
    held_by,
    is_continuous,
    like,
    pick,
    place,
    same_view,
)
from onward.derivatives.operations import Operation, operation_of, out_of_place
from onward.derivatives.rules import constant
from onward.errors import UsageError
from onward.phases import during, phase

# In-place operations that overwrite: with values that depend on no tangent, and with their argument.
_OVERWRITES = {"zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
_COPIES = {"copy_", "fill_"}


class Tangents(TorchDispatchMode):
    """Carry tangents through everything computed inside the ``with`` block.

    For y = f(x) and a tangent t set on x, ``get(y)`` is the Jacobian-vector product J_f(x) t, with the shape, strides and
    dtype of y, or None where y does not depend on x. ``directions`` tangents travel side by side, in one primal pass.
    Tensors keep their autograd graph if gradients are enabled; tangents never have one. What stops a gradient stops a
    tangent: ``.detach()``, and ``torch.no_grad()`` inside the ``with`` block (around it, it does not, as in PyTorch's own
    forward mode). Running statistics are updated once. A :class:`torch.autograd.Function` is differentiated through its
    forward.

    What autograd saves for a backward pass keeps no tangent, which would last as long as the graph. With ``through_gradients``
    it does, so that tangents go through gradients that the network takes inside its forward (``torch.autograd.grad`` with
    ``create_graph=True``); for passes that build no other graph.

    Raises :class:`onward.UsageError` naming the operation, where one has no forward derivative; and in ``get``, where a tensor
    comes from such a gradient, and tangents do not go through it.

    >>> import torch, onward
    >>> x = torch.tensor([0.0, 1.0])
    >>> with onward.derivatives.tangents.Tangents() as tangents:
    ...     tangents.set(x, torch.tensor([1.0, 0.0]))
    ...     y = x.sin() * 2
    >>> tangents.get(y)
    tensor([2., 0.])
    """

    def __init__(self, directions: int = 1, *, through_gradients: bool = False) -> None:
        super().__init__()
        self.directions = directions
        self.through_gradients = through_gradients
        self.parameters: list[Tensor] = []
        self.latest: dict[int, Any] | None = None  # the tangents of the latest operation's outputs, by where these lie
        self.unpacked: dict[Any, tuple[Tensor, Any]] = {}  # of a backward pass inside: saved tensors and their tangents
        self.uses: dict[torch.nn.Parameter, set[int | None]] = {}
        self._following = self.takes_shortcuts = False
        self._unpacking = False
        self._aside = False

    def set(self, tensor: Tensor, *tangents: Tensor) -> None:
        """Give ``tensor`` its tangents, one for each direction; they become ours (in-place operations may write to them)."""
        if len(tangents) != self.directions:
            raise UsageError(f"{len(tangents)} tangents for {self.directions} directions: give one for each")
        shape = tensor.shape
        for tangent in tangents:
            if tangent.shape != shape:
                raise UsageError(f"a tangent of shape {tuple(tangent.shape)} for a tensor of shape {tuple(shape)}")
        self._attach(tensor, [like(tensor, tangent) for tangent in tangents])

    def set_drawn(self, tensor: Tensor, draw: Callable[[], Sequence[Tensor]]) -> None:
        """As :meth:`set`, with tangents that ``draw()`` makes, the same each time an operation needs them: none is kept."""
        self._attach(tensor, ())
        tensor.__dict__[KEY] = (self, lambda: tuple(like(tensor, tangent) for tangent in draw()))

    def clear(self, tensor: Tensor) -> None:
        """Take away the tangents that ``tensor`` was given."""
        tensor.__dict__.pop(KEY, None)

    def get(self, tensor: Tensor, direction: int = 0) -> Tensor | None:
        """The tangent of ``tensor`` in one direction, or None where it does not depend on any tensor that was given one."""
        held = self.held(tensor)
        if held is UNKNOWN:
            raise UsageError(
                "a gradient is taken inside the network's forward (torch.autograd.grad), and no tangent goes through it while "
                "blocks keep their graphs: use low_memory=True, an estimator that needs no forward mode (DFA, DKP, LocalLoss, "
                "ForwardGradient with engine='reverse'), or cut the network so that this lies in its first block"
            )
        return None if held is None else held[direction]

    def unseen(self, tensor: Tensor) -> AbstractContextManager[object]:
        """Around what is done to a tensor, but not to what has tangents: nobody but a tracer, or who else listens, follows."""
        return torch._C._DisableTorchDispatch() if self._alone and type(tensor) is Tensor else nullcontext()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block nothing carries a tangent, and gradients may be taken."""
        self._following = False
        try:
            with _disable_current_modes():
                yield
        finally:
            self._following = True

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the block gradients may be taken of what has no tangents, such as a head's loss, also while it is traced."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    def __enter__(self) -> Tangents:
        # A rule may need autograd's forward mode for one operation: remember how dispatch looks outside of this mode.
        self._outside = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())
        self._settings = (torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation for a whole encoder layer
        torch.set_autocast_cache_enabled(False)  # a cached cast of a weight has no tangent
        # A tracer does not see what goes through these hooks; what they free, a trace has no need of.
        self._is_traced = is_traced()
        self._alone = torch._C._len_torch_dispatch_stack() == 0
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._saving = nullcontext() if self._is_traced else hooks
        self._uncompiled = torch.compiler.set_stance("force_eager")  # else what is compiled would compile this mode with it
        self._uncompiled.__enter__()
        self._saving.__enter__()
        self.stops = torch.is_grad_enabled()
        self._following = self.takes_shortcuts = True
        shortcuts.install()
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        shortcuts.remove()
        self._following = self.takes_shortcuts = False
        self._saving.__exit__(*failure)
        self._uncompiled.__exit__(*failure)
        torch.backends.mha.set_fastpath_enabled(self._settings[0])
        torch.set_autocast_cache_enabled(self._settings[1])
        # Parameters outlive the pass; a tangent left on one would be taken for this pass's own.
        for parameter in self.parameters:
            parameter.__dict__.pop(KEY, None)
        self.parameters.clear()
        self.unpacked.clear()
        self.latest = None
        del self._saving  # which refers to this mode
        if isinstance(failure[1], RuntimeError) and "saved tensor hooks" in str(failure[1]):
            raise UsageError(
                "forward mode cannot follow torch.func transforms (grad, vjp, jacrev, ...) inside a network's forward: use "
                "torch.autograd.grad there with an estimator that needs no forward mode (DFA, DKP, LocalLoss, engine='reverse')"
            ) from failure[1]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would wrap this method in what keeps it from being compiled, and nothing is compiled here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Nine of ten operations of a network are small: what is asked here of each has to take next to no time.
        if self._is_traced and not self._aside and torch._C._current_graph_task_id() != -1:
            raise RuntimeError("a gradient is taken inside the network's forward, which a trace cannot follow")
        self.latest = None
        if self._unpacking:
            self._unpacking = False
            if func.overloadpacket is torch.ops.aten.detach:  # by autograd, of what it has just unpacked
                return func(*args, **(kwargs or {}))
        if self.stops and not torch.is_grad_enabled() and gradients_are_off():
            return self._stopped(func, args, kwargs or {})
        held: list[Any] | None = None
        for index, argument in enumerate(args):
            if isinstance(argument, Tensor):
                if not (KEY in argument.__dict__ or argument._base is not None or self.unpacked):
                    continue
                found = self.held(argument)
            elif isinstance(argument, (list, tuple)):
                found = held_by(self, argument)
            else:
                continue
            if found is not None:
                if held is None:
                    held = [None] * len(args)
                held[index] = found
        if kwargs:
            return self._with_keywords(func, types, args, kwargs, held)
        return func(*args) if held is None else self._follow(func, types, args, {}, held)

    def _with_keywords(
        self, func: Any, types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any], held: list[Any] | None
    ) -> Any:
        named = [name for name, value in kwargs.items() if held_by(self, value) is not None]
        if any(held_by(self, kwargs[name]) is UNKNOWN for name in named):
            return self._unfollowed(func, args, kwargs)
        if named and not operation_of(func).has_out and not any(entry is UNKNOWN for entry in held or ()):
            raise UsageError(
                f"forward mode does not follow {func} with respect to its argument {named[0]}: where that is a mask that "
                "learns, run the step within torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            )
        if held is None and not named:
            return func(*args, **kwargs)
        return self._follow(func, types, args, kwargs, held or [None] * len(args))

    def _follow(self, func: Any, types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any], held: list[Any]) -> Any:
        """Run an operation on what has tangents, and give its result those that it has then."""
        if any(entry is UNKNOWN for entry in held):
            return self._unfollowed(func, args, kwargs)
        operation = operation_of(func)
        if operation.has_out:
            return self._into_out(func, types, args, kwargs)
        if self.parameters:
            self._note_uses(func, args, kwargs)
        if operation.writes:
            return self._in_place(func, args, kwargs, held)
        generator_state = torch.get_rng_state() if operation.draws else None
        out = func(*args, **kwargs)
        self._carry(operation, args, kwargs, out, held, generator_state)
        return out

    def padding_rows(self) -> dict[torch.nn.Parameter, int]:
        """The row of each parameter with a tangent that is taken for a constant wherever the parameter is used: padding."""
        return {p: row for p, (row, *others) in self.uses.items() if row is not None and not others}

    def _note_uses(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        for argument in args:
            if isinstance(argument, torch.nn.Parameter):
                row = args[2] if len(args) > 2 else kwargs.get("padding_idx", -1)
                padded = func.overloadpacket is torch.ops.aten.embedding and row >= 0
                self.uses.setdefault(argument, set()).add(row if padded else None)

    def _stopped(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operation for which gradients are off: for what comes after, its result is a constant."""
        out = func(*args, **kwargs)
        if func.is_view:  # which would else be taken for a part of what carries a tangent
            for part in out if isinstance(out, (list, tuple)) else [out]:
                part.__dict__[KEY] = (self, None)
        return out

    def _unfollowed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operation on what has a tangent that nobody knows: so has its result, unless it depends on no tangent."""
        out = func(*args, **kwargs)
        if operation_of(func).rule is not constant:
            for part in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(part, Tensor) and is_continuous(part):
                    part.__dict__[KEY] = (self, UNKNOWN)
        return out

    @during("tangent")
    def _carry(
        self,
        operation: Operation,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: Any,
        held: list[Any],
        generator_state: Tensor | None,
    ) -> None:
        """Give the outcome of an operation its tangents."""
        directions = range(self.directions)
        picked = [[None if entry is None else pick(entry, direction) for entry in held] for direction in directions]
        results = [self._tangent(operation, args, kwargs, out, tangents, generator_state) for tangents in picked]
        if isinstance(out, Tensor):
            self._give(out, results, picked, operation.is_view)
            if operation.rule is constant and operation.is_view:  # .detach(), whose memory may be known to have a tangent
                out.__dict__[KEY] = (self, None)
        elif isinstance(out, (tuple, list)):  # and not a Python number, which depends on no tangent
            for index, part in enumerate(out):
                if isinstance(part, Tensor):
                    self._give(part, [None if t is None else t[index] for t in results], picked, operation.is_view)

    def _tangent(
        self,
        operation: Operation,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: Any,
        tangents: list[Any],
        generator_state: Tensor | None = None,
    ) -> Any:
        """The tangent of ``out`` in one direction, from those of the arguments."""
        if not [t for t in tangents if t is not None]:
            return None
        if operation.rule is not None:
            return operation.rule(operation.func, args, kwargs, out, tangents)
        after = torch.get_rng_state() if generator_state is not None else None
        if generator_state is not None:
            torch.set_rng_state(generator_state)
        with torch._C._ForceDispatchKeyGuard(*self._outside), torch.no_grad():
            tangent = by_forward_ad(operation.func, args, kwargs, out, tangents)
        if after is not None:
            torch.set_rng_state(after)
        return tangent

    def _give(self, out: Tensor, tangents: Sequence[Tensor | None], picked: Sequence[Sequence[Any]], is_view: bool) -> None:
        if not is_continuous(out):
            return
        fitted, found = [], False
        for tangent, given in zip(tangents, picked, strict=True):
            if tangent is not None:
                # A tangent mirrors its tensor's layout, so that every view of the one is a view of the other; and no two
                # tensors share one unless they share memory, so that in-place operations may write to it.
                fit = like(out, tangent)
                if fit is tangent and not is_view and [one for one in given if contains(one, tangent)]:
                    fit = tangent.clone()
                tangent, found = fit, True
            fitted.append(tangent)
        if found:
            self._attach(out, fitted)
            if self.latest is None:
                self.latest = {}
            self.latest[address(out)] = fitted

    def _into_out(self, func: Any, types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Compute without ``out=``, then write value and tangent into it."""
        out = kwargs.get("out")
        value = self.__torch_dispatch__(out_of_place(func), types, args, {n: a for n, a in kwargs.items() if n != "out"})
        if not isinstance(out, Tensor) or not isinstance(value, Tensor) or out.shape != value.shape:
            raise _writes(func)
        out.copy_(value)
        self._write(out, self.held(value) or [None] * self.directions)
        return out

    def _in_place(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], held: list[Any]) -> Any:
        """Compute out of place, then write value and tangent into the tensor."""
        name = func.overloadpacket.__name__
        target = args[0]
        if name in _OVERWRITES:
            func(*args, **kwargs)
            self._write(target, [None] * self.directions)
            return target
        if name in _COPIES:
            func(*args, **kwargs)
            self._write(target, [pick(held[1], direction) for direction in range(self.directions)])
            return target
        if torch.Tag.inplace_view in func.tags:
            func(*args, **kwargs)
            self._attach(target, [None if t is None else func(t.detach(), *args[1:], **kwargs) for t in held[0]])
            return target
        if not name.endswith("_") or not isinstance(target, Tensor):
            raise _writes(func)
        functional = out_of_place(func)
        value = functional(*args, **kwargs)
        with phase("tangent"):
            picked = [[pick(entry, direction) for entry in held] for direction in range(self.directions)]
            tangents = [self._tangent(operation_of(functional), args, kwargs, value, each) for each in picked]
        target.copy_(value)
        self._write(target, tangents)
        return target

    def _write(self, target: Tensor, tangents: Sequence[Tensor | None]) -> None:
        if not is_continuous(target):
            return
        owner = target._base if target._base is not None else target
        if callable((owner.__dict__.get(KEY) or (None, None))[1]):  # what is written has to be kept
            self._attach(owner, self.held(owner))
        if self.held(target) is None:
            self._attach(owner, [torch.zeros_like(owner) for _ in range(self.directions)])
        held = self.held(target)
        assert held is not None
        for old, new in zip(held, tangents, strict=True):
            if old is None:
                if new is not None:
                    raise UsageError("an in-place operation mixes directions of which only some have a tangent")
            elif new is None:
                old.zero_()
            else:
                old.copy_(new)

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int, Any]:
        """What autograd saves in place of a tensor: the same memory without the tangent, which so dies with the tensor itself.

        An operation's own output comes here as another tensor with the same memory.
        """
        held = None
        if self._following:
            carried = tensor.__dict__.get(KEY)
            if carried is not None and carried[0] is self and carried[1] and not self.through_gradients:
                held = UNKNOWN
            elif carried is not None or self.latest or self.unpacked or tensor._base is not None:
                held = self.held(tensor) or (self.latest and self.latest.get(address(tensor)))
                held = held and (held if self.through_gradients else UNKNOWN)
        if held is None and tensor.requires_grad and tensor.grad_fn is None:  # a weight, which nobody forgets
            return tensor, tensor._version, None
        with torch._C._DisableTorchDispatch():
            return tensor.detach(), tensor._version, held

    def _unpack(self, saved: tuple[Tensor, int, Any]) -> Tensor:
        tensor, version, held = saved
        if tensor._version != version:  # autograd's own check does not see through hooks
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs has been modified by an in-place "
                "operation"
            )
        if held is not None and self._following:  # autograd makes a tensor of its own of it, which has no attribute of ours
            self.unpacked[place(tensor)] = (tensor, held)
            self.takes_shortcuts = False  # for where it came from, an operation's arguments have to be looked at
            self._unpacking = True
        return tensor

    def _attach(self, tensor: Tensor, tangents: Sequence[Tensor | None]) -> None:
        tensor.__dict__[KEY] = (self, tuple(tangents))
        if type(tensor) is not Tensor and isinstance(tensor, torch.nn.Parameter):
            self.parameters.append(tensor)

    def held(self, tensor: Tensor) -> Any:
        """The tangents that a tensor carries, None, or UNKNOWN."""
        carried = tensor.__dict__.get(KEY)
        if carried is not None:
            if carried[0] is not self:
                return None
            return carried[1]() if callable(carried[1]) else carried[1]
        base = tensor._base
        if base is not None:  # a view: its base may have been given a tangent after the view was taken
            carried = base.__dict__.get(KEY)
            if carried is not None and carried[0] is self:
                if carried[1] is None or carried[1] is UNKNOWN:
                    return carried[1]
                whole = carried[1]() if callable(carried[1]) else carried[1]
                return tuple(None if t is None else same_view(tensor, base, t) for t in whole)
        if self.unpacked and (known := self.unpacked.get(place(tensor))) is not None:
            return known[1]
        return None


def _writes(func: Any) -> UsageError:
    return UsageError(f"forward mode cannot follow {func}, which writes to an argument: use the form that returns its result")
