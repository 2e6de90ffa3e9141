"""Forward mode beside an ordinary forward pass: tangents that travel with the tensors, and never build a graph.

:class:`Tangents` listens below autograd, where every network is made of the same few hundred operations, and carries a
tangent through each of them by the rules of :mod:`onward.derivatives.rules`. The primal pass is untouched: the same numbers,
the same graph if gradients are enabled, running statistics and dropout masks drawn once. So one forward pass can carry both
what a block needs to differentiate itself and the directional derivatives that direct feedback and forward gradients need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from onward.derivatives.fallback import by_forward_ad
from onward.derivatives.graph import is_traced
from onward.derivatives.operations import has_out, is_random, out_of_place
from onward.derivatives.rules import RULES, Rule, constant
from onward.errors import UsageError
from onward.phases import during

_KEY = "_onward_tangents"  # the attribute under which a tensor carries (mode, tangents)
_UNKNOWN: Any = object()  # stands for a tangent that is there, but was not followed

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
        self._parameters: list[Tensor] = []
        self._latest: dict[int, Any] = {}  # the tangents of the latest operation's outputs, by where these lie
        self._unpacked: dict[Any, tuple[Tensor, Any]] = {}  # of a backward pass inside: saved tensors and their tangents
        self._uses: dict[torch.nn.Parameter, set[int | None]] = {}
        self._following = False
        self._unpacking = False
        self._aside = False

    def set(self, tensor: Tensor, *tangents: Tensor) -> None:
        """Give ``tensor`` its tangents, one for each direction; they become ours (in-place operations may write to them)."""
        if len(tangents) != self.directions:
            raise UsageError(f"{len(tangents)} tangents for {self.directions} directions: give one for each")
        for tangent in tangents:
            if tangent.shape != tensor.shape:
                raise UsageError(f"a tangent of shape {tuple(tangent.shape)} for a tensor of shape {tuple(tensor.shape)}")
        self._attach(tensor, [_like(tensor, tangent) for tangent in tangents])

    def set_drawn(self, tensor: Tensor, draw: Callable[[], Sequence[Tensor]]) -> None:
        """As :meth:`set`, with tangents that ``draw()`` makes, the same each time an operation needs them: none is kept."""
        self._attach(tensor, ())
        tensor.__dict__[_KEY] = (self, lambda: tuple(_like(tensor, tangent) for tangent in draw()))

    def clear(self, tensor: Tensor) -> None:
        """Take away the tangents that ``tensor`` was given."""
        tensor.__dict__.pop(_KEY, None)

    def get(self, tensor: Tensor, direction: int = 0) -> Tensor | None:
        """The tangent of ``tensor`` in one direction, or None where it does not depend on any tensor that was given one."""
        held = self._held(tensor)
        if held is _UNKNOWN:
            raise UsageError(
                "a gradient is taken inside the network's forward (torch.autograd.grad), and no tangent goes through it while "
                "blocks keep their graphs: use low_memory=True, an estimator that needs no forward mode (DFA, DKP, LocalLoss, "
                "ForwardGradient with engine='reverse'), or cut the network so that this lies in its first block"
            )
        return None if held is None else held[direction]

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
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._saving = nullcontext() if self._is_traced else hooks
        self._saving.__enter__()
        self._stops = torch.is_grad_enabled()
        self._following = True
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self._following = False
        self._saving.__exit__(*failure)
        torch.backends.mha.set_fastpath_enabled(self._settings[0])
        torch.set_autocast_cache_enabled(self._settings[1])
        # Parameters outlive the pass; a tangent left on one would be taken for this pass's own.
        for parameter in self._parameters:
            parameter.__dict__.pop(_KEY, None)
        self._parameters.clear()
        self._unpacked.clear()
        self._latest = {}
        del self._saving  # which refers to this mode
        if isinstance(failure[1], RuntimeError) and "saved tensor hooks" in str(failure[1]):
            raise UsageError(
                "forward mode cannot follow torch.func transforms (grad, vjp, jacrev, ...) inside a network's forward: use "
                "torch.autograd.grad there with an estimator that needs no forward mode (DFA, DKP, LocalLoss, engine='reverse')"
            ) from failure[1]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_traced and not self._aside and torch._C._current_graph_task_id() != -1:
            raise RuntimeError("a gradient is taken inside the network's forward, which a trace cannot follow")
        self._latest = {}
        unpacking, self._unpacking = self._unpacking, False
        if unpacking and func.overloadpacket is torch.ops.aten.detach:  # by autograd, of what it has just unpacked
            return func(*args, **(kwargs or {}))
        if self._stops and _gradients_are_off():
            return self._stopped(func, args, kwargs)
        held = [self._held_by(argument) for argument in args]
        named = [name for name, value in kwargs.items() if self._held_by(value) is not None]
        if any(entry is _UNKNOWN for entry in held) or any(self._held_by(kwargs[name]) is _UNKNOWN for name in named):
            return self._unfollowed(func, args, kwargs)
        if (named or any(held)) and has_out(func):
            return self._into_out(func, types, args, kwargs)
        if named:
            raise UsageError(
                f"forward mode does not follow {func} with respect to its argument {named[0]}: where that is a mask that "
                "learns, run the step within torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            )
        if not any(held):
            return func(*args, **kwargs)
        if self._parameters:
            self._note_uses(func, args, kwargs)
        rule = RULES.get(func.overloadpacket)
        if rule is None and func.is_view:
            rule = _view
        if rule is None and func._schema.is_mutable:
            return self._in_place(func, args, kwargs, held)
        generator_state = torch.get_rng_state() if rule is None and is_random(func) else None
        out = func(*args, **kwargs)
        tangents = self._apply(rule, func, args, kwargs, out, held, generator_state)
        if isinstance(out, Tensor):
            self._give(out, tangents, func, held)
            if rule is constant and func.is_view:  # .detach(), whose memory may be known to have a tangent
                out.__dict__[_KEY] = (self, None)
        elif isinstance(out, (tuple, list)):  # and not a Python number, which depends on no tangent
            for index, part in enumerate(out):
                if isinstance(part, Tensor):
                    self._give(part, [None if t is None else t[index] for t in tangents], func, held)
        return out

    def padding_rows(self) -> dict[torch.nn.Parameter, int]:
        """The row of each parameter with a tangent that is taken for a constant wherever the parameter is used: padding."""
        return {p: row for p, (row, *others) in self._uses.items() if row is not None and not others}

    def _note_uses(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        for argument in args:
            if isinstance(argument, torch.nn.Parameter):
                row = args[2] if len(args) > 2 else kwargs.get("padding_idx", -1)
                padded = func.overloadpacket is torch.ops.aten.embedding and row >= 0
                self._uses.setdefault(argument, set()).add(row if padded else None)

    def _stopped(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operation for which gradients are off: for what comes after, its result is a constant."""
        out = func(*args, **kwargs)
        if func.is_view:  # which would else be taken for a part of what carries a tangent
            for part in out if isinstance(out, (list, tuple)) else [out]:
                part.__dict__[_KEY] = (self, None)
        return out

    def _unfollowed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operation on what has a tangent that nobody knows: so has its result, unless it depends on no tangent."""
        out = func(*args, **kwargs)
        if RULES.get(func.overloadpacket) is not constant:
            for part in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(part, Tensor) and _is_continuous(part):
                    part.__dict__[_KEY] = (self, _UNKNOWN)
        return out

    @during("tangent")
    def _apply(
        self,
        rule: Rule | None,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: Any,
        held: list[Any],
        generator_state: Tensor | None = None,
    ) -> list[Any]:
        """The tangent of ``out`` in each direction."""
        results: list[Any] = []
        for direction in range(self.directions):
            tangents = [_pick(entry, direction) for entry in held]
            if all(t is None for t in tangents):
                results.append(None)
            elif rule is not None:
                results.append(rule(func, args, kwargs, out, tangents))
            else:
                after = torch.get_rng_state() if generator_state is not None else None
                if generator_state is not None:
                    torch.set_rng_state(generator_state)
                with torch._C._ForceDispatchKeyGuard(*self._outside), torch.no_grad():
                    results.append(by_forward_ad(func, args, kwargs, out, tangents))
                if after is not None:
                    torch.set_rng_state(after)
        return results

    @during("tangent")
    def _give(self, out: Tensor, tangents: Sequence[Tensor | None], func: Any, held: list[Any]) -> None:
        if not _is_continuous(out) or all(t is None for t in tangents):
            return
        fitted = []
        for direction, tangent in enumerate(tangents):
            if tangent is not None:
                # A tangent mirrors its tensor's layout, so that every view of the one is a view of the other; and no two
                # tensors share one unless they share memory, so that in-place operations may write to it.
                fit = _like(out, tangent)
                if fit is tangent and not func.is_view and any(_contains(_pick(entry, direction), tangent) for entry in held):
                    fit = tangent.clone()
                tangent = fit
            fitted.append(tangent)
        self._attach(out, fitted)
        self._latest[_address(out)] = fitted

    def _into_out(self, func: Any, types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Compute without ``out=``, then write value and tangent into it."""
        out = kwargs.get("out")
        value = self.__torch_dispatch__(out_of_place(func), types, args, {n: a for n, a in kwargs.items() if n != "out"})
        if not isinstance(out, Tensor) or not isinstance(value, Tensor) or out.shape != value.shape:
            raise _writes(func)
        out.copy_(value)
        self._write(out, self._held(value) or [None] * self.directions)
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
            self._write(target, [_pick(held[1], direction) for direction in range(self.directions)])
            return target
        if torch.Tag.inplace_view in func.tags:
            func(*args, **kwargs)
            self._attach(target, [None if t is None else func(t.detach(), *args[1:], **kwargs) for t in held[0]])
            return target
        if not name.endswith("_") or not isinstance(target, Tensor):
            raise _writes(func)
        functional = out_of_place(func)
        value = functional(*args, **kwargs)
        rule = RULES.get(functional.overloadpacket)
        tangents = self._apply(rule, functional, args, kwargs, value, held)
        target.copy_(value)
        self._write(target, tangents)
        return target

    def _write(self, target: Tensor, tangents: Sequence[Tensor | None]) -> None:
        if not _is_continuous(target):
            return
        owner = target._base if target._base is not None else target
        if callable((owner.__dict__.get(_KEY) or (None, None))[1]):  # what is written has to be kept
            self._attach(owner, self._held(owner))
        if self._held(target) is None:
            self._attach(owner, [torch.zeros_like(owner) for _ in range(self.directions)])
        held = self._held(target)
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
            held = self._held(tensor) or self._latest.get(_address(tensor))
            held = held and (held if self.through_gradients else _UNKNOWN)
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
            self._unpacked[_place(tensor)] = (tensor, held)
            self._unpacking = True
        return tensor

    def _attach(self, tensor: Tensor, tangents: Sequence[Tensor | None]) -> None:
        tensor.__dict__[_KEY] = (self, tuple(tangents))
        if isinstance(tensor, torch.nn.Parameter):
            self._parameters.append(tensor)

    def _held(self, tensor: Tensor) -> Any:
        """The tangents that a tensor carries, None, or _UNKNOWN."""
        carried = tensor.__dict__.get(_KEY)
        if carried is not None:
            if carried[0] is not self:
                return None
            return carried[1]() if callable(carried[1]) else carried[1]
        base = tensor._base
        if base is not None:  # a view: its base may have been given a tangent after the view was taken
            carried = base.__dict__.get(_KEY)
            if carried is not None and carried[0] is self:
                if carried[1] is None or carried[1] is _UNKNOWN:
                    return carried[1]
                whole = carried[1]() if callable(carried[1]) else carried[1]
                return tuple(None if t is None else _same_view(tensor, base, t) for t in whole)
        if self._unpacked and (known := self._unpacked.get(_place(tensor))) is not None:
            return known[1]
        return None

    def _held_by(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self._held(argument)
        if isinstance(argument, (list, tuple)) and argument and any(isinstance(a, Tensor) for a in argument):
            held = [self._held(a) if isinstance(a, Tensor) else None for a in argument]
            if any(entry is _UNKNOWN for entry in held):
                return _UNKNOWN
            return held if any(entry is not None for entry in held) else None
        return None


def _pick(held: Any, direction: int) -> Any:
    """One direction out of what an argument holds: a tangent, None, or a list of these for a list of tensors."""
    if isinstance(held, list):
        picked = [None if entry is None else entry[direction] for entry in held]
        return None if all(p is None for p in picked) else picked
    return None if held is None else held[direction]


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _contains(tangents: Any, tangent: Tensor) -> bool:
    return tangents is tangent or (isinstance(tangents, list) and any(t is tangent for t in tangents))


def _address(tensor: Tensor) -> int:
    """Where a tensor lies, as far as that can be said."""
    return tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """A key that only the same part of the same memory has, while that is kept."""
    return _address(tensor), tensor.shape, tensor.stride() if tensor.layout is torch.strided else None


def _gradients_are_off() -> bool:
    """Whether the network itself has turned gradients off here; a Function's forward, where PyTorch does, does not count."""
    return not torch.is_grad_enabled() and (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def _like(tensor: Tensor, tangent: Tensor) -> Tensor:
    """The tangent in the tensor's own shape (a rule may leave it to be broadcast), layout and dtype."""
    if tangent.shape == tensor.shape and tangent.stride() == tensor.stride() and tangent.dtype == tensor.dtype:
        return tangent
    return torch.empty_like(tensor).copy_(tangent)


def _writes(func: Any) -> UsageError:
    return UsageError(f"forward mode cannot follow {func}, which writes to an argument: use the form that returns its result")


def _same_view(view: Tensor, base: Tensor, tangent: Tensor) -> Tensor:
    offset = view.storage_offset() - base.storage_offset() + tangent.storage_offset()
    return tangent.as_strided(view.shape, view.stride(), offset)


def _view(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, t: list[Any]) -> Any:
    return func(t[0], *args[1:], **kwargs)
