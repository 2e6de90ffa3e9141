"""Direct feedback: the error signal of a hidden block is the output error times a matrix, ``delta_k = e B_k``.

One matrix leads to all positions of a block's output, or is shared by them: :class:`onward.network.positions.Layout`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from onward.errors import UsageError
from onward.estimators.settings import OneOf
from onward.estimators.signals import Known, SignalEstimator, known_at
from onward.network.labels import logits_of
from onward.network.positions import FIRST, LAST, Layout, positions_of
from onward.network.run import LossGradient, check_samples
from onward.network.shapes import outputs_at

POSITIONS = {
    "auto": "shared where outputs and block have the same positions (a language model's tokens), own elsewhere",
    "shared": "one matrix, of outputs x features of one position, for all positions",
    "own": "one matrix from all outputs to all features of the block, of each position its own",
}


class Feedback(nn.ParameterList):
    """One matrix B_k (C x d_k: outputs by features of the block's output) for each cut.

    ``positions`` (:data:`POSITIONS`) says whether C and d_k are those of one position or of all.

    The matrices are parameters with a ``.grad`` of their own. Their sizes are those of the first batch; until then they are
    :class:`torch.nn.UninitializedParameter`, which most optimizers accept. A child class says how they start and what they
    learn.
    """

    learns = True
    directions = 0  # tangents that learning needs
    noise = "gaussian"
    reads_outputs = False  # whether learning needs the values of the block's output
    positions = "auto"

    def __init__(self, model: nn.Module, cuts: Sequence[str], seed: int) -> None:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        super().__init__(
            UninitializedParameter(self.learns, device=like.device, dtype=like.dtype)  # type: ignore[call-arg, arg-type]
            for _ in cuts
        )
        self.cuts, self.seed = tuple(cuts), seed
        self.axes: dict[int, int] = {}  # the dimension of features at each cut, where both could be it: as in the first batch

    def layout(self, k: int, h: Tensor, known: Known) -> Layout:
        """How B_k lies between the network's outputs and the output h of block k.

        Raises :class:`onward.UsageError` where samples are not first, or positions are to be shared that are not the same.
        """
        name, outputs = self.cuts[k], known.outputs
        check_samples(name, h.shape, outputs.shapes[0][0], "feedback")
        whole = Layout(outputs, h.shape, real=known.real(k))
        if self.positions == "own" or h.dim() < 3:
            return whole
        if positions := outputs.positions:
            axes = (outputs.axis, LAST if outputs.axis == FIRST else FIRST)
            if fits := [axis for axis in axes if positions_of(h.shape, axis) == positions]:
                axis = self.axes.setdefault(k, fits[0])
                if axis in fits:
                    return whole._replace(axis=axis)
                raise UsageError(
                    f"the output of cut {name!r} has shape {tuple(h.shape)} for outputs at {positions} positions, and in an "
                    "earlier batch its features were another dimension: feedback by position needs them in the same one"
                )
        if self.positions == "auto":
            return whole
        if any(prod(positions_of(shape, outputs.axis)) > 1 for shape in outputs.shapes):
            raise UsageError(
                f"positions='shared': the output of cut {name!r} has shape {tuple(h.shape)}, and the network's outputs "
                f"{', '.join(map(str, outputs.shapes))} are not all at the same positions: cut where they are, or use "
                "positions='own'"
            )
        return whole._replace(axis=LAST if h.dim() == 3 else FIRST, pooled=True)

    def carry(self, k: int, h: Tensor, rows: Tensor, known: Known) -> Tensor:
        """``rows B_k``, in the shape of h: what each sample's row (N x C) is at the output of block k.

        Where positions share B_k, each gets what belongs to it: its own outputs, or an equal part of the sample's.
        """
        small = self.small(k, h, rows)
        if small is not None:
            return rows @ small
        layout = self.layout(k, h, known)
        matrix = self.sized(k, layout)
        return layout.spread(layout.rows(rows).to(matrix.dtype) @ matrix)

    def small(self, k: int, h: Tensor, rows: Tensor) -> nn.Parameter | None:
        """B_k, where it is there, and rows and h are matrices that it fits as they are: there is nothing to be laid out.

        For a small layer that would take longer than the product.
        """
        matrix = self._parameters.get(str(k))
        shape, given = h.shape, rows.shape
        if len(shape) != 2 or type(matrix) is not nn.Parameter or matrix.dtype is not rows.dtype:
            return None
        return matrix if given[0] == shape[0] and matrix.shape == (given[1], shape[1]) else None

    def learn(self, k: int, h: Tensor, known: Known) -> None:
        """Add to B_k's ``.grad`` what it learns from this step."""
        if self.learns:
            matrix = self.sized(k, self.layout(k, h, known))
            if matrix.grad is None:
                matrix.grad = torch.zeros_like(matrix)
            self.differentiate(k, h, known, matrix.grad)

    def initial(self, k: int, matrix: Tensor) -> None:
        """Fill B_k for the first time; zero unless a rule says otherwise."""
        matrix.zero_()

    def differentiate(self, k: int, h: Tensor, known: Known, gradient: Tensor) -> None:
        """Add what B_k learns from this step to ``gradient``."""
        raise NotImplementedError

    def sized(self, k: int, layout: Layout) -> nn.Parameter:
        """B_k, made on first use; raises :class:`onward.UsageError` where it does not fit this batch."""
        shape, matrix = layout.size, self[k]
        kind = "outputs x features" if layout.axis is None else "outputs x features of one position"
        if is_lazy(matrix):
            try:
                matrix.materialize(shape)
            except RuntimeError as error:  # the allocator's
                remedy = "use positions='shared', " if layout.axis is None and len(layout.shape) > 2 else ""
                raise UsageError(
                    f"the feedback matrix of cut {self.cuts[k]!r} would have {shape[0]} x {shape[1]} numbers ({kind}), which "
                    f"there is no memory for: {remedy}cut where outputs are smaller, or use heads (LocalLoss)"
                ) from error
            with torch.no_grad():
                self.initial(k, matrix)
        if tuple(matrix.shape) != shape:
            raise UsageError(
                f"the feedback matrix of cut {self.cuts[k]!r} is {matrix.shape[0]} x {matrix.shape[1]} and this batch needs "
                f"{shape[0]} x {shape[1]} ({kind}): feedback needs inputs of one size"
                + (" (but for positions that share a matrix), and positions as they were" if len(layout.shape) > 2 else "")
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

    Outputs may have positions, N x T x V of a language model or N x C x H x W of a segmentation. Where a block's output has the
    same ones (N x T x d), B_k is V x d, shared by all, and ``delta_{k,n,t} = e_{n,t} B_k``. ``positions="own"`` gives each
    position its own: B_k is (T V) x (T d). Where the network's outputs have no positions and the block's has (tokens
    N x T x d, maps N x d x H x W), B_k is C x (T d), as the papers have it, or C x d with ``positions="shared"``:
    ``delta_{k,n,t} = e_n B_k / T``. Padding, of which an ``attention_mask`` in the batch tells, gets no signal, and T does not
    count it.

    Settings:
        positions: whether the positions of a block's output (tokens, pixels) share one matrix.

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
        *,
        positions: Annotated[str, OneOf(POSITIONS)] = "auto",
        **options: Any,
    ) -> None:
        super().__init__(model, cuts, **options)
        self.feedback = self.matrices(model, self.cuts, self.seed)
        self.feedback.positions = positions
        self.directions, self.noise = self.feedback.directions, self.feedback.noise
        self.reads_outputs = self.feedback.reads_outputs

    @classmethod
    def learns_feedback(cls, **settings: Any) -> bool:
        return cls.matrices.learns

    def initialize(self, x: Any, y: Any = None) -> None:
        """Size the feedback matrices by one forward pass over a batch, which changes nothing else.

        The targets ``y`` are looked at only where an output has positions: their shape says which dimension has the classes.
        """
        shapes, output = outputs_at(self.model, x, self.cuts)
        output = logits_of(output)
        if not isinstance(output, Tensor):
            raise UsageError(
                f"the network returns a {type(output).__name__}, and only its loss tells which of it has errors: call estimate "
                "for a first batch instead of initialize, or let the network return one tensor"
            )
        known = known_at(self, x, y, LossGradient(output.new_zeros(()), [output], [output], [0]))
        for k, h in enumerate(shapes):
            self.feedback.sized(k, self.feedback.layout(k, h, known))

    def signal(self, k: int, h: Tensor, known: Known) -> Tensor:
        feedback = self.feedback
        delta = feedback.carry(k, h, known.e, known)
        if feedback.learns:
            feedback.learn(k, h, known)
        return delta

    def set_extra_state(self, state: Tensor | Mapping[str, int]) -> None:
        super().set_extra_state(state)
        self.feedback.seed = self.seed

    def _roles(self) -> dict[str, list[nn.Parameter]]:
        return {**super()._roles(), "feedback": list(self.feedback) if self.feedback.learns else []}
