"""Per-sample gradients of every layer that has a rule, in all forms, against autograd with a copy of the weights per sample."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from family_reference import with_own_copies
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from onward import ForwardGradient, UsageError
from onward.derivatives import layers, per_sample

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)
FORMS = (None, True, False)  # of the inner products: the cheaper one, Gram, direct
PAIRS = [(0, 0), (0, 1), (1, 2), (2, 0)]
SAMPLES = st.integers(1, 4)
small = st.integers(1, 3)


def explicit(layer: nn.Module, x: Tensor, errors: list[Tensor]) -> dict[str, list[Tensor]]:
    """By parameter, for each signal: the gradients of all samples, (N, *shape)."""
    layer = copy.deepcopy(layer)
    named = {name: p for name, p in layer._parameters.items() if p is not None}
    own = {name: p.detach().repeat(len(x), *[1] * p.dim()).requires_grad_() for name, p in named.items()}
    own = {name: copies.view(len(x), *named[name].shape) for name, copies in own.items()}
    y = with_own_copies(layer, list(own.values()))(x)
    found = [torch.autograd.grad(y, list(own.values()), e, retain_graph=True) for e in errors]
    return {name: [gradients[i] for gradients in found] for i, name in enumerate(own)}


def check(layer: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64, tolerance: float = 1e-10) -> None:
    """Rows, inner products, Gram matrices and weighted sums; of one chunk and of several."""
    layer = layer.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    generator = torch.Generator().manual_seed(0)
    shape = copy.deepcopy(layer)(x).shape
    errors = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]
    weights = torch.randn(len(x), generator=generator, dtype=dtype)
    expected = explicit(layer, x, errors)

    def close(actual: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(actual.to(dtype), wanted, rtol=tolerance, atol=tolerance * (1 + wanted.abs().max().item()))

    for chunk in (per_sample._CHUNK, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(per_sample, "_CHUNK", chunk)
            found = layers.RULES[type(layer)](layer, x, errors)
            assert set(expected) <= set(found)
            for name, wanted in expected.items():
                gradients = found[name]
                for form in FORMS if isinstance(gradients, per_sample.Outer) else (None,):
                    if form is not None:
                        gradients.gram_form = form
                    for product, (i, j) in zip(gradients.inner(PAIRS), PAIRS, strict=True):
                        close(product, (wanted[i] * wanted[j]).flatten(1).sum(1))
                assert gradients.samples == len(x)
                assert gradients.shape == wanted[0].shape[1:]
                for i in range(3):
                    close(gradients.rows(i, slice(0, 2)), wanted[i][:2])
                    close(gradients.total(i, weights), torch.tensordot(weights, wanted[i], 1))
                close(gradients.gram(1, 2), wanted[1].flatten(1) @ wanted[2].flatten(1).T)


def noise(data: st.DataObject, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))


@EXAMPLES
@given(st.data(), SAMPLES, st.lists(small, max_size=2), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_linear(data: st.DataObject, samples: int, extra: list[int], inputs: int, outputs: int, bias: bool) -> None:
    check(nn.Linear(inputs, outputs, bias=bias), noise(data, samples, *extra, inputs))


@st.composite
def convolutions(draw: st.DrawFn, dims: int) -> tuple[nn.Module, list[int]]:
    """A convolution, and the size of an image that is large enough for it."""
    groups = draw(small)
    numbers = st.tuples(*[small] * dims)
    kernel, dilation, stride = draw(numbers), draw(numbers), draw(numbers)
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "numbers":
        padding = draw(st.tuples(*[st.integers(0, 2)] * dims))
    elif padding == "same":
        stride = (1,) * dims
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    size = [r + draw(st.integers(1, 3)) + 2 * (mode != "zeros") for r in reach]
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel, stride, padding, dilation, groups, draw(st.booleans()), mode,
    )  # fmt: skip
    return layer, size


# An image backend warns that "same" padding with an even kernel may copy the input.
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dims", [1, 2, 3])
@EXAMPLES
@given(st.data(), SAMPLES)
def test_convolution(dims: int, data: st.DataObject, samples: int) -> None:
    layer, size = data.draw(convolutions(dims))
    check(layer, noise(data, samples, layer.in_channels, *size))


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@EXAMPLES
@given(st.data(), st.integers(2, 4), small, st.booleans(), st.booleans())
def test_batch_norm(dims: int, data: st.DataObject, samples: int, channels: int, train: bool, track: bool) -> None:
    kinds = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    layer = kinds[dims](channels, track_running_stats=track)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(generator=torch.Generator().manual_seed(1))
        if track:
            layer.running_mean.normal_(generator=torch.Generator().manual_seed(2))
            layer.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(3))
    check(layer.train(train), noise(data, samples, channels, *data.draw(st.tuples(*[small] * dims))))


@EXAMPLES
@given(st.data(), SAMPLES, st.lists(small, max_size=2), st.lists(st.integers(2, 4), min_size=1, max_size=2), st.booleans())
def test_layer_norm(data: st.DataObject, samples: int, extra: list[int], normalized: list[int], bias: bool) -> None:
    check(nn.LayerNorm(normalized, bias=bias), noise(data, samples, *extra, *normalized))


@EXAMPLES
@given(st.data(), SAMPLES, small, st.integers(1, 2), st.lists(st.integers(2, 3), min_size=1, max_size=3))
def test_group_norm(data: st.DataObject, samples: int, groups: int, each: int, size: list[int]) -> None:
    layer = nn.GroupNorm(groups, groups * each, eps=0.1)  # groups of one number have no variance
    check(layer, noise(data, samples, groups * each, *size))


@EXAMPLES
@given(st.data(), SAMPLES, st.lists(small, max_size=2), st.integers(1, 5), small, st.booleans())
def test_embedding(data: st.DataObject, samples: int, extra: list[int], words: int, width: int, padding: bool) -> None:
    layer = nn.Embedding(words, width, padding_idx=data.draw(st.integers(0, words - 1)) if padding else None)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    check(layer, torch.randint(words, (samples, *extra), generator=generator))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(20, 30), torch.randn(8, 5, 20)),
        (nn.Conv2d(4, 8, 3, padding=1), torch.randn(8, 4, 9, 9)),
        (nn.BatchNorm2d(4), 50 + torch.randn(8, 4, 9, 9)),
        (nn.LayerNorm(20), 50 + torch.randn(8, 20)),
        (nn.GroupNorm(2, 4), 50 + torch.randn(8, 4, 9, 9)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_single_precision(layer: nn.Module, x: Tensor) -> None:
    """Also where the mean is much larger than the deviation."""
    torch.manual_seed(0)
    check(layer, x, torch.float32, 1e-4)


def block_gradients(model: nn.Module, x: Any, signals: list[Tensor]) -> dict[str, per_sample.PerSample]:
    """The library's per-sample gradients of one block, by parameter name."""
    with layers.record_uses(model) as uses:
        h = model(x)
    arrived = [torch.autograd.grad(h, [use.output for use in uses], s, retain_graph=True, allow_unused=True) for s in signals]
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: found for p, found in layers.per_sample_gradients(h, uses, signals, arrived)}


class Shared(nn.Module):
    """Layers used twice (once by keyword), also as a bare weight, without samples, and for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.also, self.table = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(3, 4, bias=False)
        self.merged, self.nowhere, self.scale = nn.Linear(2, 2), nn.Linear(4, 4), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        self.nowhere(x)
        h = self.twice(self.twice(input=x).tanh())
        h = h + self.also(x) @ self.also.weight + self.table(torch.ones(5, 3, dtype=x.dtype)).mean(0)
        return self.merged(h.reshape(-1, 2)).view(len(x), 4).tanh() * self.scale


@pytest.mark.parametrize("samples", [3, 5])  # 5: as many as the rows of a table
def test_a_block_of_layers_used_in_other_ways(samples: int) -> None:
    """Nothing mixes samples here: a sample's gradient is that of its own row of the signal."""
    torch.manual_seed(0)
    model, x = Shared().double(), torch.randn(samples, 4, dtype=torch.float64)
    signals = [torch.randn(samples, 4, dtype=torch.float64) for _ in range(2)]
    found = block_gradients(model, x, signals)
    assert set(found) == {name for name, _ in model.named_parameters() if not name.startswith("nowhere")}
    weights = torch.randn(samples, dtype=torch.float64)
    for name, gradients in found.items():
        wanted = []
        for signal in signals:
            rows = [signal * (torch.arange(samples) == n).unsqueeze(1) for n in range(samples)]
            wanted.append(torch.stack([torch.autograd.grad(model(x), model.get_parameter(name), row)[0] for row in rows]))
        torch.testing.assert_close(gradients.rows(0, slice(None)), wanted[0])
        (product,) = gradients.inner([(0, 1)])
        torch.testing.assert_close(product, (wanted[0] * wanted[1]).reshape(samples, -1).sum(1))
        torch.testing.assert_close(gradients.gram(0, 1), wanted[0].reshape(samples, -1) @ wanted[1].reshape(samples, -1).T)
        torch.testing.assert_close(gradients.total(1, weights), torch.tensordot(weights, wanted[1], 1))


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"padding_idx": 1, "max_norm": 0.5}], ids=str)
def test_embeddings_with_gradients_of_their_own(options: dict[str, Any]) -> None:
    """Counted by how often a word occurs in the batch, or after the table has been renormalised: as autograd has it."""
    torch.manual_seed(0)
    model, x = nn.Embedding(4, 2, **options).double(), torch.tensor([[0, 1, 1], [1, 2, 2]])
    signal = torch.randn(2, 3, 2, dtype=torch.float64)
    (found,) = block_gradients(model, x, [signal, signal]).values()
    for n in range(2):
        row = signal * (torch.arange(2) == n).view(2, 1, 1)
        torch.testing.assert_close(found.rows(0, slice(0, 2))[n], torch.autograd.grad(model(x), model.weight, row)[0])


def test_an_input_that_is_overwritten() -> None:
    """A gradient that needs it is refused, as autograd itself refuses."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y = self.second(h)
            h += 1
            return y

    with pytest.raises((UsageError, RuntimeError), match=r"in place|inplace"):
        block_gradients(Overwrites(), torch.randn(2, 3), [torch.ones(2, 3)] * 2)


def test_nothing_waits_for_the_garbage_collector() -> None:
    """No reference cycles: a layer's inputs and errors are gone when its gradients are."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4))
    signals = [torch.randn(3, 4) for _ in range(2)]
    gc.collect()
    gc.disable()
    try:
        seen = []
        for gradients in block_gradients(model, torch.randn(3, 2, 3, 3), signals).values():
            for product in gradients.inner([(0, 1)]):
                gradients.total(0, product)
            gradients.gram(0, 1)
            seen.append(weakref.ref(gradients))
        del gradients
        assert len(seen) == 8
        assert all(one() is None for one in seen)
    finally:
        gc.enable()


def test_one_layer_at_a_time() -> None:
    """The generator forms nothing ahead: what it yields for one layer can be gone before the next is formed."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    with layers.record_uses(model) as uses:
        h = model(torch.randn(2, 4))
    signals = [torch.randn(2, 4)]
    arrived = [torch.autograd.grad(h, [use.output for use in uses], signals[0], retain_graph=True)]
    found = layers.per_sample_gradients(h, uses, signals, arrived)
    parameter, _ = next(iter(found))
    assert parameter is model[0].weight
    assert not any(module._forward_hooks for module in model.modules())


class Positions(nn.Module):
    """Words and their positions: one row of positions for all samples, or one for each sample."""

    def __init__(self, expand: bool, norm: bool = False) -> None:
        super().__init__()
        self.words, self.positions, self.mix, self.expand = nn.Embedding(7, 4), nn.Embedding(6, 4), nn.Linear(4, 4), expand
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()

    def forward(self, words: Tensor) -> Tensor:
        places = torch.arange(words.shape[1])
        h = self.words(words) + self.positions(places.expand_as(words) if self.expand else places)
        return self.norm(self.mix(h).tanh().transpose(1, 2)).flatten(1)


@pytest.mark.parametrize("length", [5, 4])
@pytest.mark.parametrize(
    "options",
    [
        *({"space": space} for space in ("weight", "sign-weight", "f-weight", "span-weight", "activation-2")),
        {"space": "weight", "guess": "random"},
        {"space": "activation-2", "engine": "forward"},
        {"space": "random-sign-weight", "engine": "forward"},
    ],
    ids=str,
)
def test_as_many_positions_as_samples(options: dict[str, Any], length: int) -> None:
    """A row of a layer is a sample only where a sample's signal arrives in it; on later batches too, and of other sizes."""
    words = torch.randint(7, (5, length), generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 1, 0])
    gradients = []
    for expand in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Positions(expand), nn.Linear(4 * length, 3)).double()
        heads = {"0": nn.Linear(4 * length, 3).double()}
        options = {"guess": "local", "engine": "reverse", "heads": heads, **options}
        estimator = ForwardGradient(model, ["0"], **options)
        state = torch.get_rng_state()
        for samples in (5, 5, 4):
            estimator.estimate(words[:samples], y[:samples])
        assert torch.equal(torch.get_rng_state(), state)
        gradients.append([p.grad for p in model.parameters()])
    for p, q in zip(*gradients, strict=True):
        torch.testing.assert_close(p, q)


def test_layers_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one more backward pass on a layer's first batch; not if that is one sample, nor if nothing arrives at the layer."""
    model, asked, linspace = Positions(True).double(), [], torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **kwargs: asked.append(1) or linspace(*args, **kwargs))
    words = torch.randint(7, (4, 6))
    for samples, alive, total in ((1, True, 0), (4, False, 1), (4, True, 2), (3, True, 2)):
        with torch.no_grad():
            model.mix.weight.fill_(1.0 if alive else 0.0)
        block_gradients(model, words[:samples], [torch.randn(samples, 24, dtype=torch.float64)])
        assert len(asked) == total
    asked.clear()
    shared = Shared().double()  # with a layer that nothing ever arrives at
    for _ in range(2):
        block_gradients(shared, torch.randn(3, 4, dtype=torch.float64), [torch.randn(3, 4, dtype=torch.float64)])
    assert len(asked) == 1


class Routed(nn.Module):
    """Hands each of two rows a sample has to one of two experts: one of them gets as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        rows, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        for number, expert in enumerate(self.experts):
            (chosen,) = torch.where((rows[:, 0] > 0) == number)
            out = out.index_add(0, chosen, expert(rows[chosen]))
        return out.view(x.shape).tanh()


@pytest.mark.parametrize("first", [0b00001111, 0b10010110, 0b11001100, 0b10101010])
def test_experts_that_get_as_many_rows_as_there_are_samples(first: int) -> None:
    """Of other samples, or in another order; and in the next batch other ones."""
    torch.manual_seed(0)
    model = nn.Sequential(Routed(), nn.Sequential(nn.Flatten(), nn.Linear(6, 2))).double()
    y = torch.tensor([0, 1, 1, 0])
    for step, bits in enumerate((first, 0b01100110, 0b11110001)):
        x = torch.randn(4, 2, 3, dtype=torch.float64)
        x[..., 0] = x[..., 0].abs() * torch.tensor([1.0 if bits >> i & 1 else -1.0 for i in range(8)]).view(4, 2)
        model.zero_grad()
        estimator = ForwardGradient(model, ["0"], space="weight", engine="reverse", check=False)
        estimator.step = step
        estimator.estimate(x, y)
        found = {name: p.grad for name, p in model[0].named_parameters()}
        estimator.step = step
        for name, p in model[0].named_parameters():
            rows = [
                torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) / 4, p, allow_unused=True)[0]
                for n in range(4)
            ]
            drawn = estimator.drawn_rows(f"0.{name}", p, 0, 0, slice(0, 4))
            wanted = sum((g * v).sum() * v for g, v in zip(rows, drawn, strict=True) if g is not None)
            torch.testing.assert_close(found[name], wanted, msg=name)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("samples", [2, 3])
def test_rows_that_are_positions_of_which_one_is_read(samples: int, position: int) -> None:
    """With as many positions as samples, and whatever the position."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.transpose(0, 1)).tanh()[position % samples]

    model = Last().double()
    x, signal = torch.randn(samples, samples, 4, dtype=torch.float64), torch.randn(samples, 5, dtype=torch.float64)
    squares = block_gradients(model, x, [signal])["linear.weight"].inner([(0, 0)])[0]
    for n in range(samples):
        (wanted,) = torch.autograd.grad(model(x)[n], model.linear.weight, signal[n])
        torch.testing.assert_close(squares[n], wanted.square().sum())


def test_behind_batch_statistics_rows_are_taken_for_samples() -> None:
    """There every sample's signal arrives everywhere, and a sample's gradient is defined by the layer's own rows."""
    torch.manual_seed(0)
    model, words = Positions(True, norm=True).double(), torch.randint(7, (4, 6))
    signal = torch.randn(4, 24, dtype=torch.float64)
    with layers.record_uses(model) as uses:
        h = model(words)
    arrived = torch.autograd.grad(h, [use.output for use in uses], signal, retain_graph=True)
    found = dict(layers.per_sample_gradients(h, uses, [signal], [arrived]))
    (at_mix,) = (b for use, b in zip(uses, arrived, strict=True) if use.layer is model.mix)
    torch.testing.assert_close(found[model.mix.bias].rows(0, slice(0, 4)), at_mix.sum(1))
    assert isinstance(found[model.mix.weight], per_sample.Outer)


@pytest.mark.parametrize("engine", ["reverse", "forward"])
@pytest.mark.parametrize("space", ["avg-weight", "activation-2", "random-sign-weight"])
def test_a_sparse_embedding_gets_the_gradient_of_a_dense_one(space: str, engine: str) -> None:
    gradients = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Tanh()), nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        ).double()
        heads = {"0": nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()}
        estimator = ForwardGradient(model, ["0"], guess="local", space=space, engine=engine, heads=heads)
        estimator.estimate(torch.randint(7, (5, 3)), torch.randint(3, (5,)))
        gradients.append(model[0][0].weight.grad)
    assert gradients[1].is_sparse
    torch.testing.assert_close(gradients[1].to_dense(), gradients[0])


def _scaled(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output * 3)
    return layer


def _added(layer: nn.Linear) -> nn.Module:
    """A low-rank adapter that a library has put over the layer's forward."""
    plain, low = layer.forward, nn.Linear(layer.in_features, layer.out_features, bias=False).double()
    layer.low = low
    layer.forward = lambda x: plain(x.tanh()) * 2 + low(x)
    return layer


def _before(layer: nn.Linear) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, args: (args[0] ** 2,))
    return layer


def _quantised(layer: nn.Linear) -> nn.Module:
    """A hook that rounds and lets gradients through."""
    layer.register_forward_hook(lambda module, args, output: output + ((output * 2).round() / 2 - output).detach())
    return layer


def _masked(layer: nn.Linear) -> nn.Module:
    layer.weight.register_hook(lambda gradient: gradient * (torch.arange(gradient.shape[1]) > 1))
    return layer


def _pruned(layer: nn.Linear) -> nn.Module:
    return nn.utils.prune.random_unstructured(layer, "weight", amount=3)


def _normed(layer: nn.Linear) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)


class _Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


def _subclassed(layer: nn.Linear) -> nn.Module:
    return _Subclass(layer.in_features, layer.out_features).double()


@pytest.mark.parametrize(
    "change",
    [_scaled, _added, _before, _quantised, _masked, _pruned, _normed, _subclassed],
    ids=lambda change: change.__name__[1:],
)
def test_layers_whose_output_is_not_their_own(change: Callable[[nn.Linear], nn.Module]) -> None:
    """Sum_n <G_n, V_n> V_n in the space of each sample's gradients, with G_n by one backward pass for each sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(change(nn.Linear(4, 6).double()), nn.Tanh()), nn.Linear(6, 3).double())
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    estimator = ForwardGradient(model, space="weight", engine="reverse")
    estimator.estimate(x, y)
    found = {name: p.grad for name, p in model[0].named_parameters()}
    for name, p in model[0].named_parameters():
        rows = [torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) / 5, p)[0] for n in range(5)]
        estimator.step = 0
        drawn = estimator.drawn_rows(f"0.{name}", p, 0, 0, slice(0, 5))
        wanted = sum((g * v).sum() * v for g, v in zip(rows, drawn, strict=True))
        torch.testing.assert_close(found[name], wanted, msg=name)
