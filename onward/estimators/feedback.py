"""Direct feedback: the error signal of a hidden block is the output error times a matrix, ``delta_k = e B_k``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from onward.derivatives.directions import NOISES, seed_of
from onward.errors import UsageError, unknown
from onward.estimators.signals import OutputError, SignalEstimator
from onward.network.cuts import cut_graph
from onward.network.replay import Replay, understudy
from onward.network.run import Loss, as_rows, call, check_samples


class Feedback(nn.ParameterList):
    """One matrix B_k (C x d_k: outputs by features of the block's output) for each cut; ``signal`` is ``e B_k``.

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

    def signal(self, k: int, h: Tensor, error: OutputError) -> Tensor:
        """``e B_k``, in the shape of h."""
        matrix = self.sized(k, h, error.e)
        return (error.e.to(matrix.dtype) @ matrix).view(h.shape)

    def learn(self, k: int, h: Tensor, error: OutputError) -> None:
        """Add to B_k's ``.grad`` what it learns from this step."""
        if self.learns:
            matrix = self.sized(k, h, error.e)
            if matrix.grad is None:
                matrix.grad = torch.zeros_like(matrix)
            self.differentiate(k, h, error, matrix.grad)

    def initial(self, k: int, matrix: Tensor) -> None:
        """Fill B_k for the first time; zero unless a rule says otherwise."""
        matrix.zero_()

    def differentiate(self, k: int, h: Tensor, error: OutputError, gradient: Tensor) -> None:
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


class RandomFeedback(Feedback):
    """B_k random and fixed, U(-sqrt(6/d_k), sqrt(6/d_k))."""

    learns = False

    def initial(self, k: int, matrix: Tensor) -> None:
        generator = torch.Generator(device=matrix.device).manual_seed(seed_of(self.seed, "feedback", k))
        bound = math.sqrt(6 / matrix.shape[1])
        matrix.uniform_(-bound, bound, generator=generator)


class KolenPollackFeedback(Feedback):
    """``grad B_k = e^T h_k``: the forward weights and the feedback learn from the same products and so grow alike."""

    reads_outputs = True

    def differentiate(self, k: int, h: Tensor, error: OutputError, gradient: Tensor) -> None:
        gradient.addmm_(error.e.to(gradient.dtype).T, h.flatten(1).to(gradient.dtype))


class ForwardFeedback(Feedback):
    """``grad B_k = B_k - (1/N) ydot^T u_k``: B_k follows the Jacobian of the logits, as forward mode measures it."""

    directions = 1

    def differentiate(self, k: int, h: Tensor, error: OutputError, gradient: Tensor) -> None:
        gradient.add_(self[k], alpha=error.share)
        scale = -error.share / (error.e.shape[0] * self.directions)
        for tangent, u in zip(error.tangents, error.directions(k, h), strict=True):
            gradient.addmm_(tangent.to(gradient.dtype).T, u.flatten(1).to(gradient.dtype), alpha=scale)


FEEDBACK: dict[str, Callable[[nn.Module, Sequence[str], int], Feedback]] = {
    "dfa": RandomFeedback,
    "dkp": KolenPollackFeedback,
    "fdfa": ForwardFeedback,
}


class DirectFeedback(SignalEstimator):
    """delta_k = e B_k, by one of the rules in ``FEEDBACK``; the matrices are ``feedback``, in the order of ``cuts``.

    They have no size before the first ``estimate``. What needs one earlier (counting parameters, an optimizer such as Adagrad
    that allocates at once) comes after :meth:`initialize`.
    """

    engine = "feedback"
    rule: str

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        loss: Loss = F.cross_entropy,
        low_memory: bool = False,
        seed: int = 0,
        check: bool = True,
        allow_bypass: bool = False,
    ) -> None:
        super().__init__(model, cuts, loss=loss, low_memory=low_memory, seed=seed, check=check, allow_bypass=allow_bypass)
        self.feedback = FEEDBACK[self.rule](model, self.cuts, seed)
        self.directions, self.noise = self.feedback.directions, self.feedback.noise
        self.reads_outputs = self.feedback.reads_outputs
        self.tangents_on = "outputs" if self.directions else None

    def initialize(self, x: Any) -> None:
        """Size the feedback matrices by one forward pass over a batch, which changes nothing else."""
        shapes: list[tuple[int, Tensor]] = []

        def note(k: int, h: Tensor) -> Tensor:
            shapes.append((k, h))
            return h

        tried = understudy(self.model)
        with Replay(tried).untouched(), torch.no_grad(), cut_graph(tried, self.cuts, note):
            output = call(tried, x)
        if not isinstance(output, Tensor):
            raise UsageError(
                f"the network returns a {type(output).__name__}, and only its loss tells which of it has errors: call estimate "
                "for a first batch instead of initialize, or let the network return one tensor"
            )
        for k, h in shapes:
            self.feedback.sized(k, h, as_rows(output))

    def signal(self, k: int, h: Tensor, error: OutputError) -> Tensor:
        delta = self.feedback.signal(k, h, error)
        self.feedback.learn(k, h, error)
        return delta

    def set_extra_state(self, state: Tensor | Mapping[str, int]) -> None:
        super().set_extra_state(state)
        self.feedback.seed = self.seed

    def _roles(self) -> dict[str, list[nn.Parameter]]:
        return {**super()._roles(), "feedback": list(self.feedback) if self.feedback.learns else []}


class DFA(DirectFeedback):
    """Direct feedback alignment: ``delta_k = e B_k`` with B_k random and fixed, U(-sqrt(6/d_k), sqrt(6/d_k)).

    Nokland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", 2016.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = DFA(model)
    >>> step = estimator.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> estimator.feedback[0].shape, model[0].weight.grad.shape
    (torch.Size([2, 8]), torch.Size([8, 4]))
    """

    rule = "dfa"


class DKP(DirectFeedback):
    """Direct Kolen-Pollack: ``delta_k = e B_k``, with ``grad B_k = e^T h_k`` (C x d_k) and B_k = 0 at first.

    The forward weights and the feedback learn from the same products and so grow alike; a small weight decay on both (1e-6)
    helps. Webster, Choi and Ahn, "Learning the Connections in Direct Feedback Alignment", 2021.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = DKP(model)
    >>> step = estimator.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> estimator.feedback[0].grad.shape
    torch.Size([2, 8])
    """

    rule = "dkp"


class FDFA(DirectFeedback):
    """Forward direct feedback alignment: B_k learns the Jacobian of the logits from forward-mode directional derivatives.

    One forward pass carries a tangent ``u_k ~ N(0, I)`` added at the output of every hidden block; with ydot (N x C) the
    tangent of the logits, E[ydot_n^T u_{k,n}] is the Jacobian dz_n/dh_{k,n}, and

        grad B_k = B_k - (1/N) ydot^T u_k        (C x d_k),  averaged over ``directions`` tangents,  B_k = 0 at first.

    With SGD at rate alpha on the feedback this is the moving average of Bacho & Chu, "Low-Variance Forward Gradients using
    Direct Feedback Alignment and Momentum", Neural Networks 2024, equation 13; Adam works as well.

    The matrices follow a Jacobian, which knows nothing of the loss. So a loss that is scaled (``torch.amp.GradScaler``, or
    ``loss / k`` over k accumulated batches), and whose scale is taken back on every ``.grad``, leaves grad B_k too small by
    the scaler's factor, or too large by k. Give the matrices an optimizer of their own, without the scaler, and divide their
    ``.grad`` by k (Adam does not mind either). ``DKP`` learns from e, and follows the loss's scale as the network does.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = FDFA(model)
    >>> optimizer = torch.optim.Adam(estimator.parameter_groups(network={"lr": 1e-3}, feedback={"lr": 1e-3}))
    >>> step = estimator.estimate(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> estimator.feedback[0].grad.shape
    torch.Size([2, 8])
    """

    engine = "feedback, forward"
    rule = "fdfa"

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        directions: int = 1,
        noise: str = "gaussian",
        **options: Any,
    ) -> None:
        super().__init__(model, cuts, **options)
        if noise not in NOISES:
            raise unknown("noise", noise, NOISES)
        if directions < 1:
            raise UsageError(f"directions={directions}: FDFA learns from at least 1")
        self.directions = self.feedback.directions = directions
        self.noise = noise
