"""Direct feedback: the error signal of a hidden block is the output error times a matrix, ``delta_k = e B_k``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from onward.errors import UsageError
from onward.estimators.signals import Known, SignalEstimator
from onward.network.run import as_rows, check_samples
from onward.network.shapes import outputs_at


class Feedback(nn.ParameterList):
    """One matrix B_k (C x d_k: outputs by features of the block's output) for each cut.

    The matrices are parameters with a ``.grad`` of their own. Their sizes are those of the first batch; until then they are
    :class:`torch.nn.UninitializedParameter`, which most optimizers accept. A child class says how they start and what they
    learn.
    """

    learns = True
    directions = 0  # tangents that learning needs
    noise = "gaussian"
    reads_outputs = False  # whether learning needs the values of the block's output

    def __init__(self, model: nn.Module, cuts: Sequence[str], seed: int) -> None:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        super().__init__(
            UninitializedParameter(self.learns, device=like.device, dtype=like.dtype)  # type: ignore[call-arg, arg-type]
            for _ in cuts
        )
        self.cuts, self.seed = tuple(cuts), seed

    def carry(self, k: int, h: Tensor, rows: Tensor) -> Tensor:
        """``rows B_k``, in the shape of h: what each sample's row (N x C) is at the output of block k."""
        matrix = self.sized(k, h, rows)
        return (rows.to(matrix.dtype) @ matrix).view(h.shape)

    def learn(self, k: int, h: Tensor, known: Known) -> None:
        """Add to B_k's ``.grad`` what it learns from this step."""
        if self.learns:
            matrix = self.sized(k, h, known.e)
            if matrix.grad is None:
                matrix.grad = torch.zeros_like(matrix)
            self.differentiate(k, h, known, matrix.grad)

    def initial(self, k: int, matrix: Tensor) -> None:
        """Fill B_k for the first time; zero unless a rule says otherwise."""
        matrix.zero_()

    def differentiate(self, k: int, h: Tensor, known: Known, gradient: Tensor) -> None:
        """Add what B_k learns from this step to ``gradient``."""
        raise NotImplementedError

    def sized(self, k: int, h: Tensor, e: Tensor) -> nn.Parameter:
        """B_k, made on first use; raises :class:`onward.UsageError` where it does not fit this batch."""
        check_samples(self.cuts[k], h.shape, e.shape[0], "feedback")
        shape = (e.shape[1], h[0].numel())
        matrix = self[k]
        if is_lazy(matrix):
            try:
                matrix.materialize(shape)
            except RuntimeError as error:  # the allocator's
                raise UsageError(
                    f"the feedback matrix of cut {self.cuts[k]!r} would have {shape[0]} x {shape[1]} numbers (outputs x "
                    "features), which there is no memory for: cut where outputs are smaller, or use heads (LocalLoss)"
                ) from error
            with torch.no_grad():
                self.initial(k, matrix)
        if tuple(matrix.shape) != shape:
            raise UsageError(
                f"the feedback matrix of cut {self.cuts[k]!r} is {matrix.shape[0]} x {matrix.shape[1]} and this batch needs "
                f"{shape[0]} x {shape[1]} (outputs x features): feedback needs inputs of one size"
            )
        return matrix

    # Matrices that have no size yet are not saved, and take the size of what is loaded into them.
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for k, matrix in enumerate(self):
            if not is_lazy(matrix):
                destination[f"{prefix}{k}"] = matrix if keep_vars else matrix.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        for k, matrix in enumerate(self):
            saved = state_dict.get(f"{prefix}{k}")
            if saved is not None and is_lazy(matrix):
                matrix.materialize(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        lazy = {f"{prefix}{k}" for k, matrix in enumerate(self) if is_lazy(matrix)}
        missing[:] = [key for key in missing if key not in lazy]


class DirectFeedback(SignalEstimator):
    """Direct feedback, ``delta_k = e B_k``; a child class says what kind of ``matrices`` the B_k are.

    They are ``feedback``, in the order of ``cuts``, and have no size before the first ``estimate``. What needs one earlier
    (counting parameters, an optimizer such as Adagrad that allocates at once) comes after :meth:`initialize`.

    >>> import onward
    >>> estimator = onward.DFA(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> estimator.initialize(torch.zeros(3, 4))
    >>> estimator.feedback[0].shape
    torch.Size([2, 8])
    """

    engine = "feedback"
    matrices: type[Feedback]

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, cuts, **options)
        self.feedback = self.matrices(model, self.cuts, self.seed)
        self.directions, self.noise = self.feedback.directions, self.feedback.noise
        self.reads_outputs = self.feedback.reads_outputs

    @classmethod
    def learns_feedback(cls, **settings: Any) -> bool:
        return cls.matrices.learns

    def initialize(self, x: Any) -> None:
        """Size the feedback matrices by one forward pass over a batch, which changes nothing else."""
        shapes, output = outputs_at(self.model, x, self.cuts)
        if not isinstance(output, Tensor):
            raise UsageError(
                f"the network returns a {type(output).__name__}, and only its loss tells which of it has errors: call estimate "
                "for a first batch instead of initialize, or let the network return one tensor"
            )
        for k, h in enumerate(shapes):
            self.feedback.sized(k, h, as_rows(output))

    def signal(self, k: int, h: Tensor, known: Known) -> Tensor:
        delta = self.feedback.carry(k, h, known.e)
        self.feedback.learn(k, h, known)
        return delta

    def set_extra_state(self, state: Tensor | Mapping[str, int]) -> None:
        super().set_extra_state(state)
        self.feedback.seed = self.seed

    def _roles(self) -> dict[str, list[nn.Parameter]]:
        return {**super()._roles(), "feedback": list(self.feedback) if self.feedback.learns else []}
