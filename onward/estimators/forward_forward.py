"""Forward-Forward: every block learns to tell right labels from wrong ones by how active it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.derivatives.directions import seed_of
from onward.derivatives.graph import backward, is_traced
from onward.errors import UsageError
from onward.estimators.base import Estimator, Step
from onward.estimators.settings import AtLeast
from onward.network.cuts import cut_graph
from onward.network.gradients import allocate_gradients, forget_unused
from onward.network.replay import frozen_statistics
from onward.network.run import call, check_samples, leaves
from onward.network.shapes import outputs_at


class ForwardForward(Estimator, name="ff"):
    """Forward-Forward: block k's own loss is ``softplus(theta - g)`` of right labels and ``softplus(g - theta)`` of wrong ones.

    The label is written into the input, in the place of its first C numbers: ``amplitude`` at the label, 0 elsewhere. A step
    runs each sample with its label and with a wrong one, drawn uniformly, as one batch of 2N. g is the goodness of a block's
    output h, its mean square for each sample; the loss of a block is the mean over the 2N. The next block is given h divided by
    its root mean square, so that goodness is not handed on. A block's graph is gone before the next block runs.

    Calling the estimator gives every label's goodness (N x C): the sum over all hidden blocks but the first, or that of the
    first if it is the only one; the label of most goodness is the prediction. What follows the last cut has no goodness, and
    does not learn. The step's loss is the sum of the blocks' losses, and its output (N x 2) the goodness of the right and the
    wrong label. The gradients are not estimates of a gradient of the network's loss, which is only tested with.

    Settings:
        threshold: theta, the goodness that tells right from wrong.
        amplitude: what is written into the input for the label.

    Hinton, "The Forward-Forward Algorithm: Some Preliminary Investigations", 2022. Raises :class:`onward.UsageError` for
    inputs that are not one tensor of real numbers, at least C for each sample, and targets that are no class numbers.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> estimator = ForwardForward(model)
    >>> x = torch.randn(3, 4)
    >>> step = estimator.estimate(x, torch.tensor([0, 1, 1]))
    >>> step.output.shape, estimator(x).shape
    (torch.Size([3, 2]), torch.Size([3, 2]))
    """

    engine = "goodness of blocks, labels in the inputs"
    reads_rows = True

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | None = None,
        *,
        threshold: Annotated[float, AtLeast(0)] = 2.0,
        amplitude: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, cuts, **options)
        self.threshold, self.amplitude = threshold, amplitude
        self._classes: int | None = None

    def _estimate(self, x: Any, y: Any) -> Step:
        classes = self.classes(x)
        wrong = self._wrong(x, y, classes)
        both = torch.cat([self.labelled(x, y, classes), self.labelled(x, wrong, classes)])
        side = torch.ones(len(both), dtype=both.dtype, device=both.device)
        side[: len(x)] = -1  # what more goodness adds to the loss
        fresh = allocate_gradients(self)
        losses: list[Tensor] = []
        found: list[Tensor] = []

        def deliver(k: int, h: Tensor) -> Tensor:
            check(k, h)
            g = self._goodness(k, h, len(both))
            loss = F.softplus(side * (g - self.threshold)).mean()
            if h.requires_grad:
                backward(loss)
            losses.append(loss.detach())
            found.append(g.detach())
            return even(h.detach())

        with self.separation() as check, cut_graph(self.model, self.cuts, deliver):
            output = call(self.model, both)
            check(len(self.cuts), *leaves(output))
        forget_unused(fresh)
        right, of_wrong = _summed(found).split(len(x))
        return Step(torch.stack(losses).sum(), torch.stack([right, of_wrong], 1))

    def forward(self, x: Any) -> Tensor:
        """The goodness of every label (N x C): a pass for each; the largest is the prediction."""
        classes = self.classes(x)
        columns = []
        for label in range(classes):
            found: list[Tensor] = []

            def keep(k: int, h: Tensor, found: list[Tensor] = found) -> Tensor:
                found.append(self._goodness(k, h, len(x)))
                return even(h)

            labels = torch.full((len(x),), label, device=x.device)
            with torch.no_grad(), frozen_statistics(self.model), cut_graph(self.model, self.cuts, keep):
                call(self.model, self.labelled(x, labels, classes))
            columns.append(_summed(found))
        return torch.stack(columns, 1)

    def classes(self, x: Any) -> int:
        """How many labels there are: as many as the network has outputs."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise UsageError(
                "ff writes labels into the input, which has to be one tensor of real numbers: use another algorithm"
            )
        if self._classes is None:
            _, output = outputs_at(self.model, x, self.cuts)
            if not isinstance(output, Tensor) or output.dim() != 2:
                raise UsageError("ff tells the classes of samples apart: the network has to return one tensor, N x classes")
            self._classes = output.shape[1]
        if x[0].numel() < self._classes:
            raise UsageError(
                f"an input of {x[0].numel()} numbers has no room for one of {self._classes} labels, which ff writes into it: "
                "use another algorithm"
            )
        return self._classes

    def labelled(self, x: Tensor, y: Tensor, classes: int) -> Tensor:
        """The inputs with these labels in the place of their first numbers."""
        rows = x.flatten(1).clone()
        rows[:, :classes] = x.new_zeros(len(x), classes).scatter(1, y.long().unsqueeze(1), self.amplitude)
        return rows.view(x.shape)

    def _wrong(self, x: Tensor, y: Any, classes: int) -> Tensor:
        """A wrong label for each sample, uniform among them: a function of the seed, the step, and the sample."""
        if not isinstance(y, Tensor) or y.is_floating_point() or y.shape != (len(x),) or classes < 2:
            raise UsageError("ff tells right labels from wrong ones: give class numbers (N,), of at least 2 classes")
        if not is_traced() and (int(y.max()) >= classes or int(y.min()) < 0):
            raise UsageError(
                f"the targets run from {int(y.min())} to {int(y.max())}, and the network has {classes} outputs: give class "
                f"numbers from 0 to {classes - 1}"
            )
        seed = seed_of(self.seed, "wrong labels")
        drawn = self.drawn((len(x), classes - 1), 0, x, seed=seed, offset=self.shard.first)
        return (y + 1 + drawn.argmax(1)) % classes

    def _goodness(self, k: int, h: Tensor, samples: int) -> Tensor:
        check_samples(self.cuts[k], h.shape, samples, "goodness")
        return h.flatten(1).square().mean(1)


def even(h: Tensor) -> Tensor:
    """Each sample's activations divided by their root mean square.

    >>> even(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.8485, 1.1314],
            [0.0000, 0.0000]])
    """
    size = h.flatten(1).square().mean(1).sqrt().clamp_min(torch.finfo(h.dtype).eps)
    return h / size.view(-1, *[1] * (h.dim() - 1))


def _summed(goodness: Sequence[Tensor]) -> Tensor:
    """Over all hidden blocks but the first, if there are others."""
    return torch.stack(list(goodness[1:] or goodness)).sum(0)
