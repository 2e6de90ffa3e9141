"""Before training: which modules forward mode cannot differentiate or must run uncompiled, and which mix samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class Problem(NamedTuple):
    """One module, what is the matter with it, and what to do."""

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


def validate(model: nn.Module) -> list[Problem]:
    """Name each module that forward mode cannot differentiate or that mixes samples, with a remedy.

    An empty list says that no known problem was found. Backprop, DFA and DKP need no forward mode and are not concerned by
    the first kind.

    >>> from torch import nn
    >>> for problem in validate(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))):
    ...     print(problem.module, problem.problem)
    1 normalises with the statistics of the batch, so samples influence one another's losses
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
    return found
