"""Feedback that positions share (tokens, pixels), against explicit loops over them, and its expectation against Jacobians."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import DIRECT, normal
from reference import close
from torch import Tensor, nn

from onward import DFA, DRTP, FDFA, Known, UsageError, alignment, capture

SAMPLES, TOKENS, CLASSES, SEED = 3, 4, 5, 11


class Mix(nn.Module):
    """Each token sees the real tokens before it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, h: Tensor, real: Tensor) -> Tensor:
        h = self.linear(h)
        return torch.tanh(h + 0.4 * (h * real).cumsum(1))


class Text(nn.Module):
    def __init__(self, pooled: bool = False, parts: bool = False) -> None:
        super().__init__()
        self.embedding, self.pooled, self.parts = nn.Embedding(7, 4), pooled, parts
        self.layers = nn.ModuleList([Mix(4, 6), Mix(6, 3)])
        self.head = nn.Linear(3, CLASSES)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Any:
        real = torch.ones_like(tokens) if attention_mask is None else attention_mask
        h = self.embedding(tokens)
        for layer in self.layers:
            h = layer(h, real.unsqueeze(2))
        if self.pooled:
            h = (h * real.unsqueeze(2)).sum(1) / real.sum(1, keepdim=True)
        z = self.head(h)
        return {"logits": z[..., :3], "more": z[..., 3:]} if self.parts else z


def of_tokens(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def maps(pooled: bool) -> nn.Module:
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES)] if pooled else [nn.Conv2d(3, CLASSES, 3, padding=1)]
    first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh())
    return nn.Sequential(first, nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Tanh()), nn.Sequential(*end))


class Sites(NamedTuple):
    """A network whose blocks have positions, and how to look at one: `laid` gives N x P x features."""

    make: Callable[[], nn.Module]
    cuts: tuple[str, ...]
    loss: Callable[..., Tensor]
    positions: str
    padded: bool
    pooled: bool

    def build(self) -> tuple[nn.Module, Any, Tensor, Tensor]:
        """The network, a batch, targets of which some are ignored, and the mask of real positions."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = self.make().double()
            count = TOKENS if self.padded else 4
            real = torch.ones(SAMPLES, count, dtype=torch.bool)
            if not self.padded:
                y = torch.randint(CLASSES, (SAMPLES,) if self.pooled else (SAMPLES, 2, 2))
                if not self.pooled:
                    y[0, 1, 0] = -100
                return model, normal(SAMPLES, 2, 2, 2), y, real
            real[1, 2:], real[2, :1] = False, False
            y = torch.randint(CLASSES, (SAMPLES,) if self.pooled else (SAMPLES, TOKENS))
            if not self.pooled:
                y[~real], y[0, 1] = -100, -100
            tokens = torch.randint(7, (SAMPLES, TOKENS))
            return model, {"tokens": tokens, "attention_mask": real.long()}, y, real

    def laid(self, t: Tensor) -> Tensor:
        return t if t.dim() < 3 or self.padded else t.flatten(2).transpose(1, 2)

    def back(self, t: Tensor, like: Tensor) -> Tensor:
        return t if self.padded else t.transpose(1, 2).reshape(like.shape)


LAYERS, BLOCKS = ("layers.0", "layers.1"), ("0", "1")
SITES = {
    "tokens": Sites(Text, LAYERS, of_tokens, "auto", True, False),
    "segmentation": Sites(lambda: maps(False), BLOCKS, F.cross_entropy, "auto", False, False),
    "pooled tokens": Sites(lambda: Text(pooled=True), LAYERS, F.cross_entropy, "shared", True, True),
    "pooled maps": Sites(lambda: maps(True), BLOCKS, F.cross_entropy, "shared", False, True),
}


def build(sites: Sites, kind: str, **options: Any) -> tuple[Any, Any, Tensor, Tensor]:
    """An estimator with matrices of no special value, and a batch."""
    model, x, y, real = sites.build()
    estimator = DIRECT[kind](model, sites.cuts, loss=sites.loss, positions=sites.positions, seed=SEED, **options)
    estimator.initialize(x, y)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for matrix in estimator.feedback:
            matrix.copy_(torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype))
    return estimator, x, y, real


@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low-memory"])
@pytest.mark.parametrize("kind", DIRECT)
@pytest.mark.parametrize("name", SITES)
def test_loops_over_positions(name: str, kind: str, low_memory: bool) -> None:
    sites = SITES[name]
    estimator, x, y, real = build(sites, kind, low_memory=low_memory)
    model, cuts = copy.deepcopy(estimator.model), sites.cuts
    before = [matrix.detach().clone() for matrix in estimator.feedback]
    estimator.estimate(x, y)

    z, hidden, jacobians = reference.full_jacobians(model, x, cuts)
    e = sites.laid(reference.output_error(z, y, sites.loss))
    counted = real if sites.pooled else real & (y != -100).view(real.shape)
    count = SAMPLES if sites.pooled else int(counted.sum())
    sent = e
    if kind == "drtp":
        sent = -F.one_hot(y.clamp(min=0), CLASSES).to(e.dtype).view(e.shape) / count
        sent = sent if sites.pooled else sent * counted.unsqueeze(2)
    errors = [sites.back(reference.token_signal(sent, b, real), h) for b, h in zip(before, hidden, strict=True)]
    for parameter, gradient in reference.delivered(model, x, y, cuts, sites.loss, errors).items():
        close(estimator.model.get_parameter(parameter).grad, gradient, parameter)

    us = reference.block_directions(hidden, SEED, 0, 0)
    if sites.padded:
        us = [u * real.unsqueeze(2) for u in us]
    moved = [(j * u).flatten(z.dim()).sum(-1) for j, u in zip(jacobians, us, strict=True)]
    ydot = sites.laid(torch.stack(moved).sum(0))
    for k, (matrix, b) in enumerate(zip(estimator.feedback, before, strict=True)):
        assert tuple(b.shape) == (CLASSES, sites.laid(hidden[k]).shape[2])
        if kind == "dkp":
            h = sites.laid(hidden[k])
            h = h / real.sum(1).view(-1, 1, 1) if sites.pooled else h
            close(matrix.grad, reference.token_products(e, h, real, mean=False), f"feedback {k}")
        elif kind in ("fdfa", "grape"):
            measured = reference.token_products(ydot, sites.laid(us[k]), counted, mean=True)
            close(matrix.grad, b - measured if kind == "fdfa" else reference.turned(b, measured), f"feedback {k}")


@pytest.mark.parametrize("name", SITES)
def test_fdfa_learns_the_mean_jacobian_of_positions(name: str) -> None:
    """E[B - grad B]: of tokens the mean same-position Jacobian; of pooled outputs T times the mean over positions."""
    sites = SITES[name]
    model, x, y, real = sites.build()
    estimator = FDFA(model, sites.cuts, loss=sites.loss, positions=sites.positions, directions=8)
    _, hidden, jacobians = reference.full_jacobians(model, x, sites.cuts)
    counted = real if sites.pooled else real & (y != -100).view(real.shape)
    expected = []
    for h, jacobian in zip(hidden, jacobians, strict=True):
        total = torch.zeros(CLASSES, sites.laid(h).shape[2], dtype=h.dtype)
        for n, t in counted.nonzero().tolist():
            for c in range(CLASSES):
                index = [n, c] if sites.pooled else [n, t, c] if sites.padded else [n, c, t // 2, t % 2]
                total[c] += sites.laid(jacobian[tuple(index)])[n, t]
        expected.append(total / (SAMPLES if sites.pooled else int(counted.sum())))
    draws: list[list[Tensor]] = [[] for _ in hidden]
    for _ in range(60):
        estimator.zero_grad()
        estimator.estimate(x, y)
        for kept, matrix in zip(draws, estimator.feedback, strict=True):
            kept.append(-matrix.grad)
    for kept, jacobian in zip(draws, expected, strict=True):
        reference.assert_mean(torch.stack(kept), jacobian, power=0.9)


@pytest.mark.parametrize("kind", DIRECT)
def test_one_position_shares_as_it_owns(kind: str) -> None:
    """At T = 1 a shared matrix is the same as one of its own."""
    found = []
    for positions in ("shared", "own"):
        torch.manual_seed(0)
        model, x = Text().double(), torch.randint(7, (6, 1))
        estimator = DIRECT[kind](model, LAYERS, loss=of_tokens, positions=positions)
        for _ in range(2):
            estimator.estimate(x, x % CLASSES)
        found.append([p.grad for p in estimator.parameters()])
    for shared, own in zip(*found, strict=True):
        close(shared, own)


@pytest.mark.parametrize("kind", DIRECT)
def test_several_outputs_at_the_same_positions(kind: str) -> None:
    """Side by side at each position, as one output of all of them would be."""

    def joined(z: Any) -> Tensor:
        return torch.cat([z["logits"], z["more"]], 2) if isinstance(z, dict) else z

    found = []
    for parts in (False, True):
        torch.manual_seed(0)
        model, x = Text(parts=parts).double(), torch.randint(7, (SAMPLES, TOKENS))
        estimator = DIRECT[kind](model, LAYERS, loss=lambda z, y: of_tokens(joined(z), y), seed=SEED)
        for _ in range(2):
            estimator.estimate(x, x % CLASSES)
        found.append([p.grad for p in estimator.parameters()])
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_padding_changes_nothing() -> None:
    """Other tokens at padded places, and more of them, leave every gradient as it is."""
    for name in ("tokens", "pooled tokens"):
        for kind in ("dfa", "dkp", "drtp", "fdfa"):
            found = []
            for token in (0, 5):
                estimator, x, y, real = build(SITES[name], kind)
                estimator.estimate({**x, "tokens": x["tokens"].masked_fill(~real, token)}, y)
                found.append({n: p.grad for n, p in estimator.named_parameters()})
            for n, gradient in found[0].items():
                if gradient is not None:
                    close(gradient, found[1][n], f"{kind} {n}")
    # In a longer batch: the directions of the samples' first tokens are others, so dkp.
    longer = []
    for more in (0, 2):
        estimator, x, y, _ = build(SITES["tokens"], "dkp")
        x = {key: F.pad(value, (0, more)) for key, value in x.items()}
        estimator.estimate(x, F.pad(y, (0, more), value=-100))
        longer.append([p.grad for p in estimator.parameters()])
    for short, long in zip(*longer, strict=True):
        close(short, long)


def test_own_is_what_it_was_and_a_language_model_needs_no_more_than_v_by_d() -> None:
    model = Text().double()
    x = torch.randint(7, (SAMPLES, TOKENS))
    own = FDFA(model, LAYERS, loss=of_tokens, positions="own")
    own.estimate(x, x % CLASSES)
    assert [tuple(matrix.shape) for matrix in own.feedback] == [(20, 24), (20, 12)]
    known = Known(torch.empty(2, 1024, 50257, device="meta"), [], lambda k, h: [], y=None, loss=torch.zeros(()))
    auto = DFA(model, LAYERS)
    assert auto.feedback.layout(0, torch.empty(2, 1024, 768, device="meta"), known).size == (50257, 768)
    auto.feedback.positions = "own"
    huge = auto.feedback.layout(0, torch.empty(2, 1024, 768, device="meta"), known)
    with pytest.raises(UsageError, match=r"51463168 x 786432 numbers .* use positions='shared', cut where"):
        auto.feedback.sized(0, huge)


def test_refusals() -> None:
    x, y = normal(SAMPLES, 2, 4, 4), torch.randint(CLASSES, (SAMPLES, 4, 4))
    down = nn.Sequential(nn.Conv2d(2, 3, 3, 2, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(3, CLASSES, 1)).double()
    with pytest.raises(UsageError, match="are not all at the same positions: cut where they are, or use positions='own'"):
        DFA(down, ["0"], positions="shared").estimate(x, y)
    estimator = DFA(down, ["0", "1"])
    estimator.estimate(x, y)
    assert [tuple(matrix.shape) for matrix in estimator.feedback] == [(80, 12), (5, 3)]
    squeezed = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, CLASSES, 1)).double()
    estimator = FDFA(squeezed, ["0"], positions="shared")  # outputs at one position have none
    estimator.estimate(x, y[:, :1, :1])
    assert tuple(estimator.feedback[0].shape) == (CLASSES, 3)
    with pytest.raises(UsageError, match="unknown positions 'mine'"):
        DFA(down, positions="mine")

    def shifted(z: Tensor, y: Tensor) -> Tensor:
        return of_tokens(z[:, :-1], y[:, 1:])

    tokens = torch.randint(CLASSES, (SAMPLES, TOKENS))
    DFA(Text(), LAYERS, loss=shifted).estimate(tokens, tokens)
    with pytest.raises(UsageError, match="a target where the loss does not depend on the output"):
        DRTP(Text(), LAYERS, loss=shifted).estimate(tokens, tokens)


def test_replay_and_resume() -> None:
    """A captured step is bit for bit the eager one; a resumed estimator goes on with the same numbers."""
    for kind in ("drtp", "grape"):
        found = []
        for how in ("eager", "replay", "resumed"):
            estimator, x, y, _ = build(SITES["tokens"], kind)
            if how == "replay":
                capture(estimator, backend="replay")
            optimizer = torch.optim.SGD(estimator.parameters(), lr=0.1)
            for step in range(4):
                if how == "resumed" and step == 2:
                    state = copy.deepcopy(estimator.state_dict())
                    model = Text().double()
                    estimator = DIRECT[kind](model, LAYERS, loss=of_tokens)
                    estimator.load_state_dict(state)
                    optimizer = torch.optim.SGD(estimator.parameters(), lr=0.1)
                optimizer.zero_grad()
                estimator.estimate(x, y)
                optimizer.step()
            assert ("replayed" in estimator.engine) == (how == "replay")
            found.append([p.detach() for p in estimator.parameters()])
        for eager, replayed, resumed in zip(*found, strict=True):
            assert torch.equal(eager, replayed)
            assert torch.equal(eager, resumed)


def test_align_compares_with_the_mean_jacobian_of_positions() -> None:
    """Exactly, where positions do not influence one another; the ignored one does not count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    x, y = normal(SAMPLES, TOKENS, 3), torch.randint(CLASSES, (SAMPLES, TOKENS))
    y[0, 1] = -100
    estimator = DFA(model, ["1", "3"], loss=of_tokens)
    found = alignment.measure(estimator, x, y)
    estimator.initialize(x, y)
    h = torch.tanh(model[0](x))
    second = model[2].weight * (1 - torch.tanh(model[2](h)).square()).unsqueeze(3)  # dh_2/dh_1 at each position
    exact = [(model[4].weight @ second)[y != -100].mean(0), model[4].weight]
    for name, b, jacobian in zip(("1", "3"), estimator.feedback, exact, strict=True):
        agreement = found[name].feedback
        assert agreement is not None
        assert agreement.cosine == pytest.approx(F.cosine_similarity(b.flatten(), jacobian.flatten(), dim=0).item())
        assert agreement.norm_ratio == pytest.approx((b.norm() / jacobian.norm()).item())
