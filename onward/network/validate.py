"""Before training: which modules forward mode cannot differentiate or must run uncompiled, and which mix samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onward.errors import UsageError
from onward.network.probe import Mixing, disagreement, mixing, mixing_seen, once_in_order, trained
from onward.network.replay import Replay, understudy
from onward.network.run import batch_statistics, call, leaves


class Problem(NamedTuple):
    """One module, what is the matter with it, and what to do.

    >>> print(Problem("block1.pool", "it has no forward derivative", "replace it"))
    block1.pool: it has no forward derivative; replace it
    """

    module: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.module or 'the network itself'}: {self.problem}; {self.remedy}"


_MIXES_SAMPLES = (
    "normalises with the statistics of the batch, so samples influence one another's losses",
    "per-sample derivatives leave that influence out: expect it, or use group or layer norm, or put it in eval mode",
)
_UNCOMPILED = (
    "is compiled, and runs uncompiled while a forward pass carries tangents",
    "expect no gain from compiling it, except in evaluation and with estimators that carry none (Backprop, DFA, DKP): for "
    "those, compile the blocks and not the whole network, which would be one graph with nothing to cut",
)
_NO_RULE = "has no forward derivative in PyTorch"

_PROBLEMS: dict[type, tuple[str, str]] = {
    nn.EmbeddingBag: (_NO_RULE, "use nn.Embedding and sum or average over the bag"),
    nn.CTCLoss: (_NO_RULE, "give it to the estimator as loss=, where it is differentiated in reverse"),
}


def validate(model: nn.Module, x: Any = None) -> list[Problem]:
    """Name each module that forward mode cannot differentiate or that mixes samples, with a remedy.

    Without a batch, by the modules' types, and by what the first batch of an estimator has shown. With a batch ``x`` (as
    ``estimate`` takes it) the network is tried, which costs a few steps and changes nothing: half of the samples are
    changed, to see which modules' other rows change; each module that runs once is differentiated by itself in forward mode and
    in reverse, which must agree; and its second run must give the output of the first.

    An empty list says that no problem was found. Backprop, DFA and DKP need no forward mode, and are concerned by modules that
    mix samples alone.

    Raises :class:`onward.UsageError` where the network cannot run on the batch.

    >>> from torch import nn
    >>> for problem in validate(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))):
    ...     print(problem.module, problem.problem)
    1 normalises with the statistics of the batch, so samples influence one another's losses
    >>> class Mean(nn.Module):
    ...     def forward(self, x):
    ...         return x - x.mean(0)
    >>> [problem.module for problem in validate(nn.Sequential(nn.Linear(2, 2), Mean()), torch.randn(4, 2))]
    ['1']
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule) or module._compiled_call_impl is not None:
            found.append(Problem(name, *_UNCOMPILED))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            found.append(Problem(name, *_MIXES_SAMPLES))
        for kind, problem in _PROBLEMS.items():
            if isinstance(module, kind):
                found.append(Problem(name, *problem))
    if x is None:
        return found + [_mixed(seen) for seen in mixing_seen.get(model, [])[:1]]
    return found + _tried(understudy(model), x)


def _tried(model: nn.Module, x: Any) -> list[Problem]:
    """What running the network on a batch shows."""
    found = []
    first, second = (_outputs(model, x) for _ in range(2))
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True) for a, b in zip(first, second, strict=True)):
        found.append(
            Problem(
                "",
                "gives another output when it runs a second time on the same batch, with the same random numbers",
                "forms that run it twice will refuse it (low_memory=True, the forward engine): let it draw from torch's "
                "generators, or from one that a module keeps as an attribute, and keep in buffers what it counts",
            )
        )
    names = once_in_order(model, x)
    found += [_mixed(seen) for seen in mixing(model, [*names, ""], x)[:1]]
    try:
        odd = disagreement(model, names, x, trained(model))
    except UsageError as error:  # forward mode names what it cannot do
        found.append(Problem("", str(error), "or use an estimator that needs no forward mode (DFA, DKP, LocalLoss)"))
        return found
    if odd is not None:
        found.append(
            Problem(
                odd.module,
                f"has a derivative of {odd.forward:.4g} in forward mode and of {odd.reverse:.4g} in the backward pass, along "
                "one random direction",
                "its backward leaves something out on purpose (a straight-through estimator, masked or scaled gradients), or "
                "forward mode does not see what it does (NumPy, a custom operation): use an estimator without forward mode",
            )
        )
    return found


def _outputs(model: nn.Module, x: Any) -> list[Tensor]:
    with Replay(model).untouched(), torch.no_grad(), batch_statistics():
        return [leaf.clone() for leaf in leaves(call(model, x))]


def _mixed(seen: Mixing) -> Problem:
    if seen.transposed:
        return Problem(
            seen.module,
            "has the samples in the second dimension of its output",
            "let it compute with samples first (batch_first=True)",
        )
    return Problem(
        seen.module,
        f"or something before it lets samples influence one another: changing half of a batch changes {seen.rows} other rows",
        "per-sample derivatives leave that influence out: use engine='reverse' for forward gradients, and expect direct "
        "feedback to hand each row its own output error alone",
    )
