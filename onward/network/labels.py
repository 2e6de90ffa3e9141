"""Labels inside a batch, and the loss that a network itself would make of them, as those of transformers do.

Such a network takes its labels among its inputs and returns its loss. Here the labels leave the inputs and become the targets,
and the loss is computed from what the network returns, so that an estimator can differentiate it there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.errors import UsageError
from onward.network.padding import IGNORED

_OF_LOSS = ("start_positions", "end_positions", "num_items_in_batch")
"""What a network of transformers takes for its loss alone, beside what has "label" in its name."""
_CACHES = ("past_key_values", "cache")


def core_of(model: Any) -> nn.Module | None:
    """The network that computes a loss of its own from labels, as of transformers, itself or wrapped by peft; else None."""
    if isinstance(model, (torch._dynamo.eval_frame.OptimizedModule, nn.parallel.DistributedDataParallel)):
        model = model._orig_mod if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) else model.module
    if callable(unwrap := getattr(model, "get_base_model", None)):
        model = unwrap()
    return model if hasattr(type(model), "loss_function") and hasattr(model, "config") else None


def divided(model: nn.Module, x: Any, y: Any = None) -> tuple[Any, Any]:
    """The inputs and targets of a batch: without ``y``, the labels in x leave it and are y.

    Labels are what x holds under the name ``labels``; if that is not all that a network of transformers takes for its loss
    (a question's ``start_positions`` and ``end_positions``, ``num_items_in_batch``), they are a dict. An encoder-decoder's
    ``decoder_input_ids`` are made of the labels as it would make them itself.

    Raises :class:`onward.UsageError` where labels are given twice.

    >>> divided(nn.Linear(1, 1), {"input_ids": 1, "labels": 2})
    ({'input_ids': 1}, 2)
    """
    if not isinstance(x, Mapping):
        return x, y
    core = core_of(model)
    names = [name for name in x if isinstance(name, str) and _is_of_loss(core or model, name)]
    if names and y is not None and core is not None:
        raise UsageError(f"{names[0]!r} are in the batch and y is given too: leave one of them out")
    if names and y is None:
        y = x["labels"] if names == ["labels"] else {name: x[name] for name in names}
        x = {name: value for name, value in x.items() if name not in names}
    return _with_decoder_inputs(core, x if isinstance(x, dict) else dict(x), y), y


def inputs_of(model: Any, x: Any) -> Any:
    """What a network is called with: a batch of transformers without its labels, any other as it is."""
    return divided(model, x)[0] if isinstance(x, Mapping) and core_of(model) is not None else x


def _is_of_loss(model: nn.Module, name: str) -> bool:
    if core_of(model) is None:
        return name == "labels" and name not in _required(type(model).forward)
    return name in _OF_LOSS or "label" in name


@cache
def _required(forward: Callable[..., Any]) -> frozenset[str]:
    """What a network cannot run without, such as the labels that it is conditioned on."""
    given = inspect.signature(forward).parameters.values()
    return frozenset(p.name for p in given if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def _with_decoder_inputs(core: nn.Module | None, x: dict[Any, Any], y: Any) -> dict[Any, Any]:
    labels = y.get("labels") if isinstance(y, Mapping) else y
    make = getattr(core, "prepare_decoder_input_ids_from_labels", None)
    if make is None or not isinstance(labels, Tensor) or labels.dim() != 2 or not x.keys().isdisjoint(_DECODER):
        return x
    return {**x, "decoder_input_ids": make(labels=labels)}


_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")


# The cache of keys and values, for generating text.

_configs: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""The configurations in a network that say whether it keeps a cache."""


@contextmanager
def without_cache(model: Any, x: Any) -> Iterator[None]:
    """Within the block no network of transformers keeps the keys and values of its layers, which no training needs.

    They would hold every block's graph, and a pass that is repeated would append to them.

    Raises :class:`onward.UsageError` where a batch asks for them.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    if model not in _configs:
        found = {id(c): c for module in model.modules() if hasattr(c := getattr(module, "config", None), "use_cache")}
        _configs[model] = list(found.values())
    configs = _configs[model]
    if configs and isinstance(x, Mapping):
        for name in ("use_cache", *_CACHES):
            asked = x.get(name)
            if asked is not None and asked is not False:
                raise UsageError(
                    f"the batch has {name}={asked if asked is True else type(asked).__name__}: keys and values are kept for "
                    "generating text; in training they would hold every block's graph, and a second pass would append to them. "
                    "Leave it out"
                )
    on = [config for config in configs if config.use_cache]
    for config in on:
        config.use_cache = False
    try:
        yield
    finally:
        for config in on:
            config.use_cache = True


# Losses.


def default_loss(model: nn.Module) -> Callable[[Any, Any], Tensor]:
    """What a network is trained on if nobody says: its own loss if it has one, else the cross entropy of its logits."""
    core = core_of(model)
    return cross_entropy if core is None else OwnLoss(core)


def logits_of(output: Any) -> Any:
    """The logits in a network's output: what has that name in a dict, a dataclass or a named tuple; else the output itself.

    >>> logits_of({"logits": 1, "hidden_states": 2}), logits_of(3)
    (1, 3)
    """
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def cross_entropy(output: Any, y: Any) -> Tensor:
    """PyTorch's cross entropy of the logits in a network's output, classes in the second dimension.

    Raises :class:`onward.UsageError` where there are no targets, or where classes are last.
    """
    if y is None:
        raise UsageError("no targets: give estimate(x, y), or 'labels' in the batch; or a loss= that needs none")
    z = logits_of(output)
    if isinstance(z, Tensor) and isinstance(y, Tensor) and z.dim() == 3 and y.shape == z.shape[:2] != (z.shape[0], z.shape[2]):
        raise UsageError(
            f"the network's logits have shape {tuple(z.shape)}, with classes last, and PyTorch's cross entropy takes them "
            "second: give loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())"
        )
    return F.cross_entropy(z, y)


class OwnLoss:
    """``loss(output, y)``: what a network of transformers computes as its loss when it is given its labels, from its output.

    y is the labels, or a dict of all that it takes for its loss; label -100 is left out. With ``num_items_in_batch`` the loss
    is not a mean but a sum divided by that number, so that accumulated batches add up to the mean over all of them.
    """

    def __init__(self, core: nn.Module) -> None:
        self.core = core
        self.plain = False
        """Whether it is the cross entropy in the precision of the logits, where the functions of transformers take float32."""

    def __call__(self, output: Any, y: Any) -> Tensor:
        given = self._given(y)
        items = given.pop("num_items_in_batch", None)
        value = self._mean(output, given)
        return value if items is None else value * (self._counted(given) / items)

    def _given(self, y: Any) -> dict[str, Any]:
        if y is None:
            raise UsageError(
                f"{type(self.core).__name__} has no labels to compute its loss from: give 'labels' in the batch, or loss= of "
                "your own"
            )
        return dict(y) if isinstance(y, Mapping) else {"labels": y}

    def _mean(self, output: Any, given: Mapping[str, Any]) -> Tensor:
        own: Any = self.core.loss_function
        name = type(self.core).__name__
        if given.keys() == {"start_positions", "end_positions"}:
            return own(output["start_logits"], output["end_logits"], given["start_positions"], given["end_positions"])
        labels = given.get("labels")
        if not isinstance(labels, Tensor) or not given.keys() <= {"labels", "shift_labels"}:
            raise UsageError(f"the labels of {name} are {', '.join(given)}, of which its loss is not known here: give loss=")
        z, config = logits_of(output), self.core.config
        if not isinstance(z, Tensor):
            raise UsageError(f"{name} returns no logits: give loss=, a function of all that it returns and the labels")
        kind = getattr(self.core, "loss_type", None) or ""
        of_classes = not labels.is_floating_point() and labels.numel() == z.numel() // z.shape[-1]
        if self._of_decoder or (self.plain and of_classes):
            return F.cross_entropy(z.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
        if kind == "ForTokenClassification":
            return own(z, labels, config)
        if kind.endswith("Classification"):
            return own(labels, z, config)
        if z.dim() == 3 and labels.dim() == 2 and (more := z.shape[1] - labels.shape[1]) > 0:  # tokens of a learned prompt
            given = {**given, "labels": F.pad(labels, (more, 0), value=IGNORED)}
        if z.dim() == 3:
            return own(logits=z, vocab_size=z.shape[-1], **given)
        return F.cross_entropy(z, labels)

    @property
    def _of_decoder(self) -> bool:
        kind = getattr(self.core, "loss_type", None)
        return kind == "ForConditionalGeneration" and getattr(self.core.config, "is_encoder_decoder", False)

    def check(self, model: nn.Module, x: Any, y: Any) -> None:
        """Take the network's own precision; raise :class:`onward.UsageError` where it computes another loss from this batch."""
        given = self._given(y)
        given.pop("num_items_in_batch", None)
        name = type(self.core).__name__
        with torch.no_grad(), without_cache(model, x):
            output = model(**x, **given) if isinstance(x, Mapping) else model(*(x if isinstance(x, tuple) else (x,)), **given)
            theirs = output.get("loss") if isinstance(output, Mapping) else None
            if isinstance(output, tuple):
                raise UsageError(f"{name} returns a tuple: leave out return_dict=False, so that its loss and logits have names")
            if theirs is None:
                raise UsageError(f"{name} computes no loss from {', '.join(given)}: give loss=, a function of its output and y")
            found = {}
            try:
                for self.plain in (True, False):
                    ours = self._mean(output, given)
                    found[self.plain] = (ours.double() - theirs.double()).abs().item(), ours.item()
            except UsageError:
                raise
            except (RuntimeError, TypeError, KeyError, ValueError) as error:
                raise UsageError(
                    f"the loss of {name} is not known here ({str(error).splitlines()[0]}): give loss=, a function of all that "
                    "it returns and y"
                ) from error
        self.plain = found[True][0] < found[False][0]
        off, value = found[self.plain]
        if off > abs(theirs.item()) * (1e-6 if theirs.dtype in (torch.float32, torch.float64) else 1e-2):
            raise UsageError(
                f"{name} computes a loss of {theirs.item():.6g} from this batch, and from its logits and labels alone it is "
                f"{value:.6g}: it adds something (such as an auxiliary loss of experts: output_router_logits=False), or has a "
                "loss that is not known here. Switch that off, or give loss=, a function of all that it returns and y"
            )

    def weight(self, y: Any) -> float | None:
        """How many labels count, where the loss is the mean over these; None where it is the mean over samples.

        Raises :class:`onward.UsageError` where it is a sum that is divided by a number that was given.
        """
        given = self._given(y)
        if "num_items_in_batch" in given:
            raise UsageError(
                "num_items_in_batch divides a sum over all processes, which the mean over processes is divided by again: leave "
                "it out of the batch"
            )
        labels = given.get("labels")
        of_positions = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
        return self._counted(given) if of_positions else None

    def _counted(self, given: Mapping[str, Any]) -> float:
        """How many labels the mean is over: of classes those that count, else one for each sample."""
        labels: Tensor = given.get("shift_labels", next(iter(given.values())))
        if labels.is_floating_point():
            return float(len(labels))
        shifts = getattr(self.core, "loss_type", None) in (None, "ForCausalLM", "ForConditionalGeneration")
        if labels.dim() == 2 and shifts and not self._of_decoder and "shift_labels" not in given:
            labels = labels[:, 1:]
        return float((labels != IGNORED).sum())
