"""Heads: small auxiliary networks that give a hidden block a loss of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.derivatives.directions import seed_of
from onward.derivatives.graph import grad
from onward.errors import UsageError, unknown
from onward.network.cuts import check_names
from onward.network.gradients import accumulate
from onward.network.labels import logits_of
from onward.network.later import auglocal
from onward.network.padding import without_padding
from onward.network.parts import parameters_of
from onward.network.pieces import Pieces
from onward.network.run import Loss, as_rows, check_samples, compute_loss, detached, device_of
from onward.network.shapes import outputs_at
from onward.network.suggest import default_cuts


def make_heads(
    model: nn.Module,
    x: Any,
    kind: str = "cnn",
    *,
    cuts: Sequence[str] | None = None,
    width: int | None = None,
    depth: int | None = None,
    groups: int | None = None,
    patches: int | None = None,
) -> dict[str, nn.Module]:
    """One head for each cut, by cut name: a module from the block's output h to as many outputs as the network has.

    Sizes are those of one forward pass over the batch ``x``, which changes neither the network nor its running statistics.
    Image outputs are (N, C, H, W), flat ones (N, d), and of sequences (N, T, d) the mean over T is used. Where the network's
    output is (N, T, V), numbers for each position, so is that of a ``linear`` head, from that position alone: layer norm and a
    linear layer, shared by the positions. ``width`` is the number of hidden channels or features (default: 32 for ``cnn``,
    1024 for ``mlp``, half of it beyond 8 cuts), ``depth`` that of copied blocks in the first ``auglocal`` head (default: 2),
    ``groups`` of channels and ``patches`` along each side are those of ``pieces`` (default: 1). Initial weights come from
    PyTorch's global generator.

    Raises :class:`onward.UsageError` for an unknown kind, or one that does not fit a block's output, and where the network
    cannot run on that batch.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> heads = make_heads(model, torch.zeros(2, 1, 8, 8), "linear")
    >>> {cut: head(torch.zeros(2, 4, 6, 6)).shape for cut, head in heads.items()}
    {'1': torch.Size([2, 10])}
    """
    if kind not in HEADS:
        raise unknown("head", kind, HEADS)
    _check_sizes(kind, width=width, depth=depth, groups=groups, patches=patches)
    cuts = default_cuts(model) if cuts is None else check_names(model, cuts)
    device = device_of(model)
    outputs, output = outputs_at(model, x, cuts)
    output = logits_of(output)
    if not isinstance(output, Tensor):
        raise UsageError(
            f"the network returns a {type(output).__name__}, and heads are made for one tensor of outputs: give heads of your "
            "own that return what the loss takes, {cut: module}"
        )
    samples, classes = as_rows(output).shape
    own = next((p for p in model.parameters() if p.is_floating_point()), None)
    made = {}
    for k, (name, h) in enumerate(zip(cuts, outputs, strict=True)):
        if not h.is_floating_point():
            raise UsageError(f"the output of cut {name!r} is {h.dtype}: a head needs floating-point numbers")
        check_samples(name, h.shape, samples, "a head")
        # Under autocast a block's output has less precision than what is to be trained.
        dtype = own.dtype if own is not None and torch.is_autocast_enabled(device.type) else h.dtype
        try:
            if kind == "auglocal":
                head = auglocal(model, cuts, outputs, k, depth or 2)
            elif kind != "cnn" and h.dim() == output.dim() == 3 and h.shape[:2] == output.shape[:2]:
                head = _of_positions(kind, h, output)
            else:
                sizes = (groups or 1, patches or 1) if kind == "pieces" else (width or default_width(kind, len(cuts)) or 1,)
                head = _shaped(HEADS[kind](h, classes, *sizes), output)
            made[name] = head.to(device, dtype)
        except UsageError as error:
            raise UsageError(f"a {kind} head at cut {name!r}: {error}") from None
    return made


def _check_sizes(kind: str, **sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UsageError(f"heads of {name} {size}: use at least 1")
        if size is not None and name != "width" and kind != _OWNERS[name]:
            raise UsageError(f"heads of {name} {size}: {kind} heads have none, it is for kind={_OWNERS[name]!r}")


def _of_positions(kind: str, h: Tensor, output: Tensor) -> nn.Module:
    """A head that reads one position of (N, T, d) at a time: one that saw them all would see what it is to predict."""
    if kind != "linear":
        raise UsageError(
            f"the network returns numbers for each position, {tuple(output.shape)}, and this head reads all positions at once, "
            "among them what it is to predict: use kind='linear'"
        )
    return nn.Sequential(nn.LayerNorm(h.shape[2]), nn.Linear(h.shape[2], output.shape[2]))


def _shaped(head: nn.Module, output: Tensor) -> nn.Module:
    """A head whose rows have the shape of the network's."""
    if output.dim() == 2:
        return head
    if hasattr(head, "local_loss") or isinstance(head, Pieces):
        raise UsageError(
            f"the network's output has shape {tuple(output.shape)}, and this head is for classes of whole samples: use another "
            "kind of head"
        )
    return nn.Sequential(head, nn.Flatten(0) if output.dim() == 1 else nn.Unflatten(1, output.shape[1:]))


def cnn(h: Tensor, classes: int, width: int) -> nn.Module:
    """A 1x1 convolution, three 3x3 ones of stride 2, each with batch norm and ReLU, a 2x2 average pool, a linear layer."""
    if h.dim() != 4:
        raise UsageError(f"the output has shape {tuple(h.shape)}, not (N, C, H, W): use kind='mlp' or 'linear'")
    convolutions = [nn.Conv2d(h.shape[1], width, 1, bias=False)]  # batch norm would take a bias away again
    convolutions += [nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False) for _ in range(3)]
    layers = [layer for convolution in convolutions for layer in (convolution, nn.BatchNorm2d(width), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes))


def mlp(h: Tensor, classes: int, width: int) -> nn.Module:
    """A 2x2 average pool, three linear layers with batch norm and ReLU, a linear layer."""
    pool, features = _pool(h)
    layers = [*pool]
    for size in (features, width, width):
        layers += [nn.Linear(size, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def linear(h: Tensor, classes: int, width: int) -> nn.Module:
    """Batch norm, a 2x2 average pool, a linear layer."""
    pool, features = _pool(h)
    if h.dim() == 4:
        return nn.Sequential(nn.BatchNorm2d(h.shape[1]), *pool, nn.Linear(features, classes))
    return nn.Sequential(*pool, nn.BatchNorm1d(features), nn.Linear(features, classes))


FEATURES = 2048
"""The most features that the classifier of a predsim head looks at."""


class PredSim(nn.Module):
    """A linear classifier, and a projection whose similarities between samples are to match those between labels.

    The local loss is ``0.99 |S(f(h)) - S(y)|^2 / N^2 + 0.01 loss(classifier(h), y)``: S is the N x N matrix of cosines between
    samples, each sample's features centred by their own mean. f is a 3x3 convolution whose output is reduced to each
    channel's standard deviation over the image, or a linear layer; y is one-hot for labels of classes. The classifier of an
    image is linear, behind an average pool to at most 2,048 features.

    Nokland and Eidnes, "Training Neural Networks with Local Error Signals", 2019.
    """

    def __init__(self, h: Tensor, classes: int, width: int) -> None:
        super().__init__()
        pool, features = _pool_to(FEATURES, h) if h.dim() == 4 else _pool(h)
        self.classify = nn.Sequential(*pool, nn.Linear(features, classes))
        channels = h.shape[1] if h.dim() == 4 else h.shape[-1]
        self.project = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) if h.dim() == 4 else nn.Linear(channels, channels)
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.classify(h)

    def local_loss(self, h: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """The loss of the block whose output is h, and the classifier's output."""
        z = self.classify(h)
        f = self.project(h)
        f = f.flatten(2).std(2) if f.dim() == 4 and f[0, 0].numel() > 1 else f.flatten(1)
        if not isinstance(y, Tensor) or (not y.is_floating_point() and y.min() < 0):
            raise UsageError("a predsim head compares the labels of samples: give class numbers from 0 on, or one-hot rows")
        labels = y if y.is_floating_point() else F.one_hot(y, z.shape[-1])
        wanted = _similarities(labels.flatten(1).to(f.dtype))
        return 0.99 * F.mse_loss(_similarities(f), wanted) + 0.01 * compute_loss(loss, z, y), z


HEADS: dict[str, Callable[..., nn.Module]] = {
    "cnn": cnn,
    "mlp": mlp,
    "linear": linear,
    "predsim": PredSim,
    "auglocal": auglocal,
    "pieces": Pieces,
}
_OWNERS = {"depth": "auglocal", "groups": "pieces", "patches": "pieces"}
"""The kind of head that a size is for."""
_WIDTHS = {"cnn": 32, "mlp": 1024}


def default_width(kind: str, cuts: int) -> int | None:
    """Hidden channels or features of a head of that kind, half of them beyond 8 cuts; None where it has no width.

    >>> default_width("cnn", 8), default_width("cnn", 16), default_width("linear", 8)
    (32, 16, None)
    """
    return _WIDTHS[kind] // (1 if cuts <= 8 else 2) if kind in _WIDTHS else None


def local_loss(head: nn.Module, h: Tensor, y: Any, loss: Loss) -> tuple[Tensor, Tensor]:
    """A head's loss at the output h of its block, and the head's output.

    ``loss(head(h), y)``, unless the head has a ``local_loss(h, y, loss)`` method of its own.
    """
    if hasattr(head, "local_loss"):
        return head.local_loss(h, y, loss)  # type: ignore[operator]
    z = head(h)
    return compute_loss(loss, z, y), z


class Heads(nn.Module):
    """The heads of a network's cuts; frozen ones keep the weights that they were given, or draw them afresh for every batch."""

    def __init__(self, cuts: Sequence[str], heads: Mapping[str, nn.Module], *, frozen: bool = False) -> None:
        super().__init__()
        for name in heads:
            if name not in cuts:
                raise unknown("cut of a head", name, cuts)
        for name in cuts:
            if name not in heads:
                raise UsageError(f"cut {name!r} has no head: give heads= one for each cut (onward.make_heads)")
        self.by_cut = nn.ModuleList(copy.deepcopy(heads[name]) if frozen else heads[name] for name in cuts)
        if frozen:
            self.requires_grad_(False)

    def __getitem__(self, k: int) -> nn.Module:
        head = self.by_cut._modules[str(k)]
        assert head is not None
        return head

    def differentiate(
        self, k: int, h: Tensor, y: Any, loss: Loss, seed: int, step: int, *, learn: bool, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """d l_k / d h_k, the loss l_k of head k at the output h of its block, and the head's output, without a graph.

        With ``learn`` the head's own exact gradient is added to its ``.grad``. Where positions are not ``real`` (N x T), the
        head sees zeros, and nothing comes back.
        """
        leaf = without_padding(h.detach(), real).requires_grad_()
        head = self[k]
        parameters = [p for p in parameters_of(head) if p.requires_grad] if learn else []
        with torch.enable_grad(), self.randomness(k, seed, step):
            value, z = local_loss(head, leaf, y, loss)
            signal, *gradients = grad(value, [leaf, *parameters], torch.ones_like(value), allow_unused=True)
        accumulate(parameters, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)])
        signal = torch.zeros_like(leaf) if signal is None else signal
        return without_padding(signal, real), value.detach(), detached(z)

    def randomness(self, k: int, seed: int, step: int) -> _Seeded:
        """Within the block head k draws its own masks, the same each time, and leaves the network's generator alone."""
        return _Seeded(self[k], seed_of(seed, step, "masks of the head", k))

    def redraw(self, k: int, seed: int, step: int) -> None:
        """Fresh initial weights for head k, a function of (seed, step, k): by the ``reset_parameters`` of the head, or else of
        its parts."""
        with torch.no_grad(), _Seeded(self[k], seed_of(seed, step, "weights of the head", k)):
            _reset(self[k])


def _reset(module: nn.Module) -> None:
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()
        return
    if any(True for _ in module.parameters(recurse=False)):
        raise UsageError(
            f"guess='ntk' draws the head's weights afresh for every batch, and {type(module).__name__} has no "
            "reset_parameters method to do it: give it one, or use guess='fixed-ntk'"
        )
    for child in module.children():
        _reset(child)


class _Seeded:
    """Within the block, what is drawn where a module is, or on the CPU, is a function of the seed; then nothing has been drawn.

    It is so much cheaper than :func:`torch.random.fork_rng` that heads which draw nothing may run in it too.
    """

    __slots__ = ("_generators", "_seed", "_states")

    def __init__(self, module: nn.Module, seed: int) -> None:
        self._seed = seed
        self._generators = [torch.default_generator]
        device = next((p.device for p in parameters_of(module)), None)
        if device is not None and device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index])

    def __enter__(self) -> None:
        self._states = [generator.get_state() for generator in self._generators]
        for generator in self._generators:
            generator.manual_seed(self._seed)

    def __exit__(self, *failure: Any) -> None:
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)


def _pool(h: Tensor) -> tuple[list[nn.Module], int]:
    """The modules that turn a block's output into N x features, and the number of features."""
    if h.dim() == 4:
        return [nn.AdaptiveAvgPool2d(2), nn.Flatten()], 4 * h.shape[1]
    if h.dim() == 3:
        return [_Mean()], h.shape[2]
    return ([] if h.dim() == 2 else [nn.Flatten()]), h[0].numel()


def _pool_to(features: int, h: Tensor) -> tuple[list[nn.Module], int]:
    """As `_pool`, of images to at most that many features: their height and width are halved in turn until they fit."""
    channels, size, turn = h.shape[1], list(h.shape[2:]), 0
    while channels * size[0] * size[1] > features and max(size) > 1:
        size[turn] = -(-size[turn] // 2)
        turn = 1 - turn
    return [nn.AdaptiveAvgPool2d((size[0], size[1])), nn.Flatten()], channels * size[0] * size[1]


class _Mean(nn.Module):
    """The mean over a sequence."""

    def forward(self, h: Tensor) -> Tensor:
        return h.mean(1)


def _similarities(features: Tensor) -> Tensor:
    centred = features - features.mean(1, keepdim=True)
    unit = centred / (torch.linalg.vector_norm(centred, dim=1, keepdim=True) + 1e-8)  # with a derivative at zero
    return unit @ unit.T
