"""Where a network is cut by default, and what is proposed: by its source, by a trace, and by a run over a batch."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import onward
from onward import DFA, DKP, FDFA, Backprop, ForwardGradient, UsageError
from onward.network import source
from onward.network.trial import traced

Linear, Sequential = nn.Linear, nn.Sequential
X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])


def block(*extra: nn.Module) -> nn.Module:
    return Sequential(Linear(3, 3), nn.Tanh(), *extra)


class Take(nn.Module):
    """The first of several values."""

    def forward(self, values: Any) -> Tensor:
        return values[0]


def one_relu() -> nn.Module:
    relu = nn.ReLU()
    return Sequential(Linear(3, 3), relu, Linear(3, 3), relu, Linear(3, 3))


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "cuts"),
    [
        (lambda: Sequential(block(), block(), Linear(3, 3)), ("0", "1")),
        (lambda: Sequential(block(), block(), block()), ("0", "1")),
        (lambda: Sequential(OrderedDict(stem=block(), body=block(), head=Linear(3, 3))), ("stem", "body")),
        (lambda: Sequential(Linear(3, 3), nn.ReLU(), Linear(3, 3), nn.GELU(), Linear(3, 3)), ("1", "3")),
        (lambda: Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), Linear(8, 3)), ("2",)),
        (lambda: Sequential(Linear(3, 3), nn.ReLU(), Linear(3, 3), nn.LogSoftmax(1)), ("1",)),
        (lambda: Sequential(Linear(3, 3), nn.Tanh(), Linear(3, 1), nn.Sigmoid()), ("1",)),
        (lambda: Sequential(OrderedDict(a=Linear(3, 3), act=nn.SiLU(), out=Linear(3, 3))), ("act",)),
        (
            lambda: Sequential(nn.Flatten(), Linear(3, 3), nn.ReLU(), nn.Dropout(), Linear(3, 3), nn.ReLU(), Linear(3, 3)),
            ("2", "5"),
        ),
        (lambda: Sequential(frozen(block()), block(), block(), frozen(Linear(3, 3))), ("1",)),
        (lambda: frozen(Sequential(block(), block(), Linear(3, 3))), ("0", "1")),
        (lambda: Sequential(nn.LSTM(3, 3), Take(), block(), Linear(3, 3)), ("1", "2")),
    ],
)
def test_default_cuts(model: Callable[[], nn.Module], cuts: tuple[str, ...]) -> None:
    assert onward.default_cuts(model()) == cuts
    assert DFA(model()).cuts == cuts


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage = block(), nn.ModuleList([block(), block()])
        self.head = Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stage:
            x = stage(x)
        return self.head(x)


@pytest.mark.parametrize("estimator", [DFA, DKP, FDFA, ForwardGradient])
def test_other_modules_must_say_and_are_told_how(estimator: type) -> None:
    with pytest.raises(
        UsageError, match=r"Custom has no default cuts: name .* for example cuts=(\[.*\]) \(of onward"
    ) as raised:
        estimator(Custom())
    assert str(["stem", "stage.0", "stage.1"]) in str(raised.value)
    estimator(Custom(), ["stem", "stage.0", "stage.1"]).estimate(X, Y)


def test_nothing_to_cut() -> None:
    model = Linear(3, 3)
    assert onward.suggest_cuts(model) == onward.suggest_cuts(model, X) == ()
    with pytest.raises(UsageError, match=r"Linear has no module that ends with something to train .* use plain Backprop"):
        DFA(model)
    Backprop(model).estimate(X, Y)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("given", [False, True], ids=["", "batch"])
def test_what_is_proposed_for_each_network_works(case: Case, given: bool) -> None:
    model, x, y, cuts, loss = case.build()
    proposed = onward.suggest_cuts(model, x if given else None)
    if case.name not in ("tuple-of-inputs", "in-place"):
        assert proposed == cuts
    DFA(model, proposed, loss=loss).estimate(x, y)


class Functional(nn.Module):
    """The network of PyTorch's tutorials: non-linearities are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.output = Linear(3, 3), Linear(3, 3), Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.second(self.first(x).relu()).relu())


class OneRelu(nn.Module):
    """One module for all its non-linearities, which a cut may not be."""

    def __init__(self) -> None:
        super().__init__()
        self.output, self.first, self.relu, self.second = Linear(3, 3), Linear(3, 3), nn.ReLU(), Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.relu(self.second(self.relu(self.first(x)))))


class Lists(nn.Module):
    """Layers in a list and in a dict, which are never called themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.mid, self.layers = nn.ModuleDict({"a": block(), "b": block()}), nn.ModuleList([Linear(3, 3) for _ in range(3)])
        self.out = Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.out(self.mid["b"](self.mid["a"](x)))


class Tagger(nn.Module):
    """Recurrent layers, whose outputs are tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.drop = nn.Embedding(9, 4), nn.LSTM(4, 4, batch_first=True), nn.Dropout(0.1)
        self.second, self.out = nn.GRU(4, 4, batch_first=True), Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        h, _ = self.first(self.embed(words))
        h, _ = self.second(self.drop(h))
        return self.out(h[:, -1])


class Deep(nn.Module):
    """Recurrent layers in a list, and what follows each in another, without anything to train."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(3, 3, batch_first=True) for _ in range(3)])
        self.drops, self.head = nn.ModuleList([nn.Dropout(0.1) for _ in range(3)]), Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer, drop in zip(self.layers, self.drops, strict=True):
            x = drop(layer(x)[0])
        return self.head(x)


class Thawed(Custom):
    """All but the middle is frozen."""

    def __init__(self, head: bool = False) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.stage.requires_grad_()
        self.head.requires_grad_(head)


class Adapter(nn.Module):
    """A frozen layer with a trained one of low rank beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = frozen(Linear(3, 3)), Linear(3, 1), Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.base(x) + self.up(self.down(x))).tanh()


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers, self.head = frozen(block()), nn.ModuleList([Adapter() for _ in range(3)]), frozen(Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Skip(nn.Module):
    """h = stem(x); head(body(h) + h)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = Linear(3, 3), block(), Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(self.body(h) + h)


class UNet(nn.Module):
    """As it is often written: lists in another order than they run, and a size to check that no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList([nn.ConvTranspose2d(4, 4, 2, 2), self.convolved(6, 4)])
        self.downs, self.pool = nn.ModuleList([self.convolved(1, 2)]), nn.MaxPool2d(2)
        self.bottleneck, self.final = self.convolved(2, 4), nn.Conv2d(4, 3, 1)

    def convolved(self, inputs: int, outputs: int) -> nn.Module:
        return Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)
        for i in range(0, len(self.ups), 2):
            x = self.ups[i](x)
            if x.shape != skips[-1].shape:
                x = F.interpolate(x, skips[-1].shape[2:])
            x = self.ups[i + 1](torch.cat([x, skips.pop()], 1))
        return self.final(x).mean((2, 3))


class Denoiser(nn.Module):
    """Blocks down return skips as well; a code of the time goes into all blocks."""

    class Down(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.time = Linear(3, 3), Linear(2, 3)

        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            x = (self.layer(x) + self.time(t)).relu()
            return x, (x,)

    class Up(Down):
        def forward(self, x: Tensor, t: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
            return (self.layer(x + skip) + self.time(t)).relu()

    def __init__(self) -> None:
        super().__init__()
        self.time = Sequential(Linear(1, 2), nn.SiLU())
        self.downs, self.ups = nn.ModuleList([self.Down(), self.Down()]), nn.ModuleList([self.Up(), self.Up()])
        self.mid, self.out = block(), Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        code, skips = self.time(t), ()
        for down in self.downs:
            x, more = down(x, code)
            skips += more
        x = self.mid(x)
        for up in self.ups:
            x = up(x, code, skips[-1])
            skips = skips[:-1]
        return self.out(x)


class Translator(nn.Module):
    """The norm behind the encoder goes into every layer of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.transformer, self.out = nn.Transformer(4, 2, 2, 2, 6, dropout=0.0, batch_first=True), Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(self.transformer(self.source(x), self.target(y))[:, -1])


class Stage(nn.Module):
    """A class of its own around a list of blocks, which adds its own input: it is cut as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for each in self.blocks:
            h = each(h)
        return x + h


class Staged(nn.Module):
    """In the manner of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stages, self.norm, self.head = Linear(3, 3), Sequential(Stage(), Stage()), nn.LayerNorm(3), Linear(3, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stages(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


class Again(nn.Module):
    """One block three times, one never, one twice by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.core, self.unused, self.tail, self.head = block(), block(), block(), block(), Linear(3, 3)
        self.alias = self.tail

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.core(x)
        return self.head(self.alias(self.tail(x)))


class Grouped(nn.Module):
    """One group of layers, run by a number that is computed, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.groups, self.head = block(), nn.ModuleList([block()]), Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 0:
            return x
        x = self.stem(x)
        for i in range(2):
            index = int(i / 2)
            x = self.groups[index](x)
        return self.head(x)


class Answer(OrderedDict):
    """As in transformers."""


class Encoder(nn.Module):
    """Returns more than a tensor; its layers do, or do not."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.widen = Linear(3, 3), Linear(3, 3)
            self.output = Encoder.Output()

        def forward(self, h: Tensor, everything: bool = False) -> tuple[Tensor, ...]:
            h = h + self.attend(h)
            outputs = (self.output(self.widen(h), h),)
            if everything:
                outputs += (h,)
            return outputs

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.norm = Linear(3, 3), nn.LayerNorm(3)

        def forward(self, h: Tensor, beside: Tensor) -> Tensor:
            return self.norm(self.dense(h) + beside)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Layer(), self.Layer()])

    def forward(self, h: Tensor) -> Answer:
        for layer in self.layers:
            h = layer(h)[0]
        return Answer(last=h)


class Encoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder, self.pooler, self.head = block(), Encoder(), block(), Linear(3, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.embed(x)
        if (h == 0).all():
            return h
        return self.head(self.pooler(self.encoder(h)["last"]))


class Wrapper(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *x: Any) -> Tensor:
        return self.inside(*x)


WORDS = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))
PROPOSED: dict[str, tuple[Callable[[], nn.Module], Any, tuple[str, ...]]] = {
    "functions": (Functional, X, ("first", "second")),
    "one module for all non-linearities": (OneRelu, X, ("first", "second")),
    "the same in a Sequential": (one_relu, X, ("0", "2")),
    "lists": (Lists, X, ("layers.0", "layers.1", "layers.2", "mid.a", "mid.b")),
    "recurrent": (Tagger, WORDS, ("embed", "drop")),
    "recurrent, in a list": (Deep, X, ("drops.0", "drops.1", "drops.2")),
    "frozen around": (Thawed, X, ("stage.0",)),
    "frozen before": (lambda: Thawed(head=True), X, ("stage.0", "stage.1")),
    "adapters": (Adapted, X, ("layers.0", "layers.1")),
    "a skip": (Skip, X, ("stem", "body.0")),
    "U-Net": (UNet, torch.randn(4, 1, 4, 4), ("downs.0", "bottleneck", "ups.1")),
    "denoiser": (Denoiser, (X, X[:, :1]), ("time", "ups.1")),
    "encoder and decoder": (
        Translator,
        (WORDS, WORDS[:, :3]),
        (
            "transformer.encoder.layers.0",
            "transformer.encoder.norm",
            "transformer.decoder.layers.0",
            "transformer.decoder.layers.1",
        ),
    ),
    "stages": (Staged, X, ("stages.0", "stages.1")),
    "again": (Again, X, ("first",)),
    "groups": (Grouped, X, ("stem",)),
    "several values": (Encoded, X, ("embed", "encoder.layers.0", "encoder.layers.1", "pooler")),
    "wrapped": (lambda: Wrapper(Custom()), X, ("inside.stem", "inside.stage.0", "inside.stage.1")),
    "wrapped twice": (lambda: Wrapper(Wrapper(Functional())), X, ("inside.inside.first", "inside.inside.second")),
    "in a list of its own": (lambda: Sequential(Custom()), X, ("0.stem", "0.stage.0", "0.stage.1")),
    "lazy": (lambda: Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(3)), X, ("1",)),
    "parametrised": (lambda: Sequential(weight_norm(Linear(3, 3)), nn.ReLU(), Linear(3, 3)), X, ("1",)),
    "compiled blocks": (
        lambda: Sequential(torch.compile(block(), backend="eager"), torch.compile(block(), backend="eager"), Linear(3, 3)),
        X,
        ("0", "1"),
    ),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of the compiler's own, which it hides where it can
@pytest.mark.parametrize("name", PROPOSED)
@pytest.mark.parametrize("given", [False, True], ids=["", "batch"])
def test_proposed(name: str, given: bool) -> None:
    """And what is proposed works."""
    make, x, cuts = PROPOSED[name]
    model = make()
    assert onward.suggest_cuts(model, x if given else None) == cuts
    DFA(model, cuts).estimate(x, Y)


def test_which_of_them_can_be_traced() -> None:
    """So that the table above tests what is read as well as what is traced."""
    of_source = {name for name, (make, _, cuts) in PROPOSED.items() if traced(make(), cuts) is None}
    assert of_source == {"U-Net", "encoder and decoder", "groups", "several values", "wrapped", "wrapped twice"}


def test_a_proposal_changes_nothing() -> None:
    class Noted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Sequential(Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()) for _ in range(2)])
            self.head, self.seen, self.calls = spectral_norm(Linear(3, 3)), None, []
            self.register_buffer("total", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(1)
            for layer in self.layers:
                x = layer(x)
            self.total += x.detach().sum(0)
            return self.head(x * torch.rand(()))

    model, before = Noted(), torch.get_rng_state()
    state = copy.deepcopy(model.state_dict())
    assert onward.suggest_cuts(model) == ("layers.0", "layers.1")
    assert model.calls == []  # a trace runs a copy
    assert onward.suggest_cuts(model, X) == ("layers.0", "layers.1")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_batch_tells_what_the_source_does_not() -> None:
    """Which branch is taken, and that a hook keeps what goes around a cut."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third, self.head = block(), block(), block(), Linear(3, 3)
            self.kept: list[Tensor] = []
            self.first.register_forward_hook(lambda module, args, output: self.kept.append(output))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = self.second(h) if len(x) > 9 else h
            return self.head(self.third(h + self.kept.pop()))

    model = Hidden()
    assert onward.suggest_cuts(model) == ("first", "second", "third")
    assert onward.suggest_cuts(model, X) == ("third",)
    DFA(model, ["third"]).estimate(X, Y)


def test_samples_that_are_not_first() -> None:
    """Of sequence-first layers only what turns them back can be cut."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third, self.head = block(), block(), block(), Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.second(self.first(torch.stack([x] * 5)))
            return self.head(self.third(h.mean(0)))

    assert onward.suggest_cuts(TimeFirst(), X) == ("third",)
    DFA(TimeFirst(), ["third"]).estimate(X, Y)


def test_a_network_that_differentiates_inside() -> None:
    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy, self.body, self.head = block(), block(), Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            slopes = torch.func.vmap(torch.func.grad(lambda one: self.energy(one).sum()))(x)
            return self.head(self.body(slopes))

    assert onward.suggest_cuts(Forces(), X) == ("body",)
    DFA(Forces(), ["body"]).estimate(X, Y)


def test_a_list_stands_for_its_layers() -> None:
    model = Lists()
    assert DFA(model, ["mid", "layers"]).cuts == ("layers.0", "layers.1", "layers.2", "mid.a", "mid.b")
    assert DFA(model, ["layers", "mid.a"]).cuts == ("layers.0", "layers.1", "layers.2", "mid.a")
    DFA(model, ["mid", "layers"]).estimate(X, Y)
    with pytest.raises(UsageError, match=r"'layers.1'.*same module"):
        DFA(model, ["layers", "layers.1"])


class Several(nn.Module):
    """Returns what `kind` says, in the ways that people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.recurrent = Linear(3, 3), nn.GRU(3, 3)

    def both(self, x: Tensor) -> Any:
        return x, x


class ByName(Several):
    def forward(self, x: Tensor) -> Any:
        outputs = (x,)
        if len(x):
            outputs += (self.linear(x),)
        return outputs


class ByClass(Several):
    def forward(self, x: Tensor) -> Any:
        if x.sum() > 0:
            return Answer(x=x)
        return self.linear(x)


class ByChild(Several):
    def forward(self, x: Tensor) -> Any:
        return self.recurrent(x)


class ByMethod(Several):
    def forward(self, x: Tensor) -> Any:
        return self.both(x)


class ByAddition(Several):
    def forward(self, x: Tensor) -> Any:
        found: Any = self.both(x)
        found += (x,)
        return found


class First(Several):
    def forward(self, x: Tensor) -> Any:
        h, _ = self.recurrent(x)
        outputs = self.both(h)
        outputs = outputs[0]
        return outputs + self.linear(x)


def test_what_a_module_returns_is_read() -> None:
    assert not any(source.returns_tensor(kind()) for kind in (ByName, ByClass, ByChild, ByMethod, ByAddition))
    assert source.returns_tensor(First())
    assert source.returns_tensor(Custom())
    assert not source.returns_tensor(Sequential(Linear(3, 3), nn.LSTM(3, 3)))
    assert source.returns_tensor(Sequential())


def test_a_module_without_source_is_taken_for_one_that_returns_a_tensor() -> None:
    names: dict[str, Any] = {"nn": nn}
    exec("class Unseen(nn.Module):\n    def forward(self, x):\n        return x, x\n", names)
    assert source.returns_tensor(names["Unseen"]())
    assert source.children(names["Unseen"]()) == []
