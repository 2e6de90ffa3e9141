"""Every target, guess and space of forward gradients, in both engines, against an explicit reference, on every network."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any, NamedTuple

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import CASES, SAMPLES, Built, Case, by_name
from family_reference import GUESSES, SPACES, TARGETS, WEIGHT_SPACES, Family, heads_for
from reference import close
from torch import Tensor, nn

from onward import ForwardGradient, LocalLoss, UsageError, make_heads
from onward.derivatives import per_sample
from onward.lab.networks.models import build as build_network
from onward.lab.settings import Network

SEED = 11
FROM_HEADS = {"local", "above", "sum"}  # targets and guesses through heads that are trained
FORWARD_GUESSES = ("local", "random", "ntk", "fixed-ntk", "feedback")  # those that need no reverse sweep
FORWARD_SPACES = ("activation", "activation-2", "avg-weight", "random-sign-weight", "f-activation")
ALL = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SEPARATE = pytest.mark.parametrize("case", [c for c in CASES if not c.mixes_samples], ids=lambda case: case.name)
EACH_TARGET = pytest.mark.parametrize("target", TARGETS)


class Plain(NamedTuple):
    """What an ordinary forward pass in the same mode gives and leaves behind."""

    logits: Tensor
    buffers: dict[str, Tensor]
    generator: Tensor


class Setting(NamedTuple):
    family: Family
    plain: Plain
    train: bool


def build(case: Case, train: bool) -> Built:
    built = case.build(seed=1)
    built.model.train(train)
    return built


@cache
def heads_of(case: Case, train: bool) -> dict[str, nn.Module]:
    return heads_for(case, train=train)


@cache
def setting(case: Case, train: bool = True) -> Setting:
    model, x, *_ = build(case, train)
    torch.manual_seed(reference.MASKS)
    logits = reference.call(model, x).detach()
    plain = Plain(logits, dict(model.named_buffers()), torch.get_rng_state())
    family = Family(build(case, train), heads_of(case, train), seed=SEED)
    generator = torch.Generator().manual_seed(2)
    shapes = [(logits.shape[1], h[0].numel()) for h in family.hidden]
    family.feedback = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    family.drawn_heads = redrawn(case, train)[0]
    return Setting(family, plain, train)


def needs_heads(options: dict[str, Any]) -> bool:
    return not {options.get("target"), options.get("guess")}.isdisjoint({*FROM_HEADS, "ntk", "fixed-ntk"})


def redrawn(case: Case, train: bool = True, steps: int = 1) -> list[dict[str, nn.Module]]:
    """The heads that a guess "ntk" really used in each of some steps, caught as they ran."""
    caught: list[dict[str, nn.Module]] = []
    heads = {cut: copy.deepcopy(head) for cut, head in heads_of(case, train).items()}

    def catch(cut: str) -> Any:
        def note(head: nn.Module, args: Any) -> None:
            if not any(p.requires_grad for p in head.parameters()):
                head = copy.deepcopy(head)
                head._forward_pre_hooks.clear()
                caught[-1][cut] = head.requires_grad_()

        return note

    for cut, head in heads.items():
        head.register_forward_pre_hook(catch(cut))
    model, x, y, cuts, loss = build(case, train)
    estimator = ForwardGradient(model, cuts, loss=loss, guess="ntk", engine="reverse", heads=heads, seed=SEED)
    for _ in range(steps):
        caught.append({})
        estimator.estimate(x, y)
    return caught


def rule_of(case: Case, target: str) -> str:
    """Of the feedback guess: each is used somewhere."""
    if case.name == "in-place":
        return "fdfa"  # dkp needs outputs that are overwritten
    return {"global": "fdfa", "local": "dkp", "above": "dfa", "sum": "fdfa"}[target]


def estimator_of(
    case: Case, at: Setting, target: str, guess: str, space: str, **options: Any
) -> tuple[ForwardGradient, dict[str, nn.Module]]:
    """A fresh estimator, and the very modules that it was given as heads."""
    heads = {}
    if needs_heads({"target": target, "guess": guess}):
        heads = {cut: copy.deepcopy(head) for cut, head in heads_of(case, at.train).items()}
    model, _, _, cuts, loss = build(case, at.train)
    options = {"seed": SEED, **options}
    estimator = ForwardGradient(
        model,
        cuts,
        loss=loss,
        target=target,
        guess=guess,
        space=space,
        heads=heads or None,
        feedback=rule_of(case, target),
        **options,
    )
    if guess == "feedback":
        for matrix, value in zip(estimator.feedback, at.family.feedback, strict=True):
            matrix.materialize(value.shape)
            matrix.data.copy_(value)
    return estimator, heads


def check(case: Case, at: Setting, target: str, guess: str, space: str, **options: Any) -> tuple[int, int]:
    """One step of one estimator; returns how many gradients it has, and how many of them are matters of rounding errors."""
    family, plain, _ = at
    estimator, heads = estimator_of(case, at, target, guess, space, **options)
    torch.manual_seed(reference.MASKS)
    step = estimator.estimate(family.x, family.y)

    assert torch.equal(torch.get_rng_state(), plain.generator), "the global generator"
    torch.testing.assert_close(step.output, plain.logits)
    torch.testing.assert_close(step.loss, case.loss(plain.logits, family.y))
    assert not step.loss.requires_grad
    assert not step.output.requires_grad
    for name, buffer in estimator.model.named_buffers():
        torch.testing.assert_close(buffer, plain.buffers[name], msg=name)

    # Which head learns from what is the reference's business too: its own loss, once, whatever the estimate.
    if FROM_HEADS & {target, guess}:
        assert list(step.heads) == list(family.cuts)
        for cut, (loss, logits, gradients) in family.head_steps().items():
            torch.testing.assert_close(step.heads[cut], (loss, logits))
            for name, p in heads[cut].named_parameters():
                close(p.grad, gradients[name], f"head of {cut}: {name}")
    elif not heads:
        assert not step.heads
    if guess == "feedback":
        check_feedback(estimator, family, rule_of(case, target))

    options.pop("passes", None)
    undecided = 0
    expected = family.estimate(target, guess, space, **options)
    for name, p in estimator.model.named_parameters():
        if name in expected and expected[name].isnan().any():
            undecided += 1
        else:
            close(p.grad, expected.get(name), name, 1e-6 if space.startswith("span") else 1e-9)
    return len(expected), undecided


def check_feedback(estimator: ForwardGradient, family: Family, rule: str) -> None:
    if rule == "dfa":
        gradients: list[Tensor | None] = [None] * len(family.cuts)
    elif rule == "dkp":
        gradients = [reference.outer_sum(family.error, h.flatten(1)) for h in family.hidden]
    else:
        gradients = reference.fdfa_feedback(family.model, family.x, family.cuts, family.feedback, SEED, 0, 1, "gaussian")
    for cut, matrix, before, gradient in zip(family.cuts, estimator.feedback, family.feedback, gradients, strict=True):
        assert torch.equal(matrix, before)
        close(matrix.grad, gradient, f"feedback of {cut}")


def check_each(case: Case, at: Setting, target: str, combinations: list[tuple[str, str]], **options: Any) -> None:
    """All combinations of guess and space are tried before any failure is reported."""
    failures, counts = [], [(0, 0)]
    for guess, space in combinations:
        try:
            counts.append(check(case, at, target, guess, space, **options))
        except Exception as error:
            failures.append(f"{target} {guess} {space}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    assert not failures, "\n".join(failures)
    gradients, undecided = (sum(numbers) for numbers in zip(*counts, strict=True))
    assert undecided <= 0.1 * gradients


def some(case: Case, target: str, every: int) -> list[tuple[str, str]]:
    """A part of all combinations, another one for each network and target: each is tried on several networks."""
    shift = 7 * CASES.index(case) + 3 * TARGETS.index(target)
    product = list(itertools.product(GUESSES, SPACES))
    return [pair for i, pair in enumerate(product) if (i + i // len(SPACES) + shift) % every == 0]


# The reverse engine.


def engine_of(name: str) -> dict[str, str]:
    """Options for exact measurements by either engine."""
    return {"engine": name, "passes": "block"} if name == "forward" else {"engine": name}


@EACH_TARGET
@ALL
def test_reverse(case: Case, target: str) -> None:
    check_each(case, setting(case), target, some(case, target, 5), engine="reverse")


def test_what_the_sample_covers() -> None:
    """Every network meets every space, guess and target; every combination is tried on at least three networks."""
    tried = [(case.name, target, *pair) for case in CASES for target in TARGETS for pair in some(case, target, 5)]
    for case in CASES:
        for part, names in ((1, TARGETS), (2, GUESSES), (3, SPACES)):
            assert {one[part] for one in tried if one[0] == case.name} == set(names)
    for combination in itertools.product(TARGETS, GUESSES, SPACES):
        assert len({one[0] for one in tried if one[1:] == combination}) >= 3


@EACH_TARGET
@pytest.mark.parametrize("case", [c for c in CASES if c.mixes_samples or c.draws_masks], ids=lambda case: case.name)
def test_reverse_in_eval_mode(case: Case, target: str) -> None:
    check_each(case, setting(case, False), target, some(case, target, 10), engine="reverse")


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@EACH_TARGET
@ALL
def test_the_whole_product_in_reverse(case: Case, target: str, train: bool) -> None:
    check_each(case, setting(case, train), target, list(itertools.product(GUESSES, SPACES)), engine="reverse")


@ALL
def test_the_reference_agrees_with_itself(case: Case) -> None:
    """Samples add up to the batch; where nothing mixes them, a sample's gradient is that of its own row of the signal."""
    family = setting(case).family
    for k in range(len(family.cuts)):
        signal = family.signals("global")[k]
        samples = family.samples(k, signal)
        for name, gradient in family.batch(k, signal).items():
            close(samples[name].sum(0), gradient, name)
        if not case.mixes_samples:
            for n in range(SAMPLES):
                row = torch.zeros_like(signal)
                row[n] = signal[n]
                for name, gradient in family.batch(k, row).items():
                    close(samples[name][n], gradient, name)


@pytest.mark.parametrize("name", ["cnn-batch-norm", "transformer"])
def test_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gradients of samples are formed a few at a time, they are the same, and so are the directions drawn for them."""
    monkeypatch.setattr(per_sample, "_CHUNK", 1)
    case = by_name(name)
    pairs = [*(("random", space) for space in WEIGHT_SPACES), *(("local", space) for space in (*WEIGHT_SPACES, "activation-2"))]
    check_each(case, setting(case), "global", pairs, engine="reverse")


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", ["mlp", "transformer", "recurrent"])
def test_batches_of_other_sizes(name: str, samples: int) -> None:
    """One sample too, where nothing needs a batch."""
    case = by_name(name)
    built = build(case, True)
    built = built._replace(x=built.x[:samples], y=built.y[:samples])
    family = Family(built, heads_of(case, True), seed=SEED)
    for guess, space in [*(("local", space) for space in SPACES), ("random", "weight"), ("random", "span-weight")]:
        for engine in ("reverse", "forward") if space in FORWARD_SPACES else ("reverse",):
            estimator, _ = estimator_of(case, setting(case), "global", guess, space, **engine_of(engine))
            estimator.estimate(built.x, built.y)
            expected = family.estimate("global", guess, space)
            for parameter, p in estimator.model.named_parameters():
                if parameter not in expected or not expected[parameter].isnan().any():
                    close(p.grad, expected.get(parameter), f"{space} {parameter}", 1e-6)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", ["mlp-batch-norm", "convolutions", "transformer"])
def test_frozen_weights_or_biases(name: str, frozen: str) -> None:
    """What still learns gets the same as if everything did; what does not gets nothing."""
    case = by_name(name)
    at = setting(case)
    for guess, space in [("local", space) for space in SPACES] + [("random", "weight"), ("global", "span-weight")]:
        for engine in ("reverse", "forward") if guess == "local" and space in FORWARD_SPACES else ("reverse",):
            estimator, _ = estimator_of(case, at, "sum", guess, space, **engine_of(engine))
            for parameter, p in estimator.model.named_parameters():
                p.requires_grad_(not parameter.endswith(frozen) or parameter.startswith(("6", "4", "head")))
            estimator.estimate(at.family.x, at.family.y)
            expected = at.family.estimate("sum", guess, space, engine=engine)
            for parameter, p in estimator.model.named_parameters():
                if not p.requires_grad:
                    assert p.grad is None
                elif not expected[parameter].isnan().any():
                    close(p.grad, expected[parameter], f"{space} {parameter}", 1e-6)


def test_a_published_network() -> None:
    """ResNet-18 in eight blocks, thin and on small images, with its convolutional heads: (global, local) in weight space."""
    torch.manual_seed(0)
    model = build_network("resnet18-8b", (3, 8, 8), 4, Network(width=1 / 16)).double()
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1, 2])
    heads = make_heads(model, x, "cnn", width=3)
    cuts = tuple(heads)
    family = Family(Built(copy.deepcopy(model), x, y, cuts, F.cross_entropy), copy.deepcopy(heads), seed=SEED)
    for space in ("weight", "activation", "avg-weight"):
        once, given = copy.deepcopy(model), copy.deepcopy(heads)
        ForwardGradient(once, guess="local", space=space, engine="reverse", heads=given, seed=SEED).estimate(x, y)
        expected = family.estimate("global", "local", space)
        for name, p in once.named_parameters():
            close(p.grad, expected[name], f"{space} {name}", 1e-7)


RANDOM = [
    {"directions": 3},
    {"directions": 2, "noise": "rademacher"},
    {"scaling": "projection", "eps": 0.1},
    {"scaling": "projection", "directions": 2},
    {"directions": 3, "orthogonal": True},
]


@pytest.mark.parametrize("options", RANDOM, ids=str)
@pytest.mark.parametrize("name", ["mlp", "cnn-batch-norm", "transformer", "tied"])
def test_options_of_random_guesses(name: str, options: dict[str, Any]) -> None:
    """In reverse, in every space that they mean something in."""
    case, target = by_name(name), TARGETS[RANDOM.index(options) % 4]
    spaces = ("activation", "activation-2", "weight", "avg-weight") if "orthogonal" in options else SPACES
    check_each(case, setting(case), target, [("random", space) for space in spaces], engine="reverse", **options)


@pytest.mark.parametrize("space", ["activation", "activation-2", "weight", "avg-weight"])
def test_epsilon(space: str) -> None:
    case = by_name("mlp-batch-norm")
    check(case, setting(case), "global", "local", space, engine="reverse", eps=0.1)
    check(case, setting(case), "above", "feedback", space, engine="reverse", eps=1e-3)


@pytest.mark.parametrize("directions", [5, 8])
@pytest.mark.parametrize("engine", ["reverse", "forward"])
def test_orthogonal_directions_that_span_everything(engine: str, directions: int) -> None:
    """As many directions as a block has features, or more: the gradient itself."""
    model, x, y, cuts, loss = by_name("mlp").build(seed=1)
    options = {**engine_of(engine), "orthogonal": True}
    ForwardGradient(model, cuts, loss=loss, directions=directions, **options).estimate(x, y)
    expected = reference.backprop(model, x, y, loss)
    for name, p in model.named_parameters():
        close(p.grad, expected[name], name, 1e-6)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("guess", ["local", "random"])
def test_the_next_step_draws_afresh(guess: str, space: str) -> None:
    case = by_name("mlp")
    family = Family(build(case, True), heads_of(case, True), seed=SEED, step=1)
    estimator, _ = estimator_of(case, setting(case), "sum", guess, space, engine="reverse")
    estimator.estimate(family.x, family.y)
    estimator.zero_grad()
    estimator.estimate(family.x, family.y)
    expected = family.estimate("sum", guess, space)
    for name, p in estimator.model.named_parameters():
        close(p.grad, expected[name], name, 1e-7)


EXACT = ("activation", "activation-2", "weight", "avg-weight", "span-activation", "span-weight", "sign-weight")


@ALL
def test_the_true_gradient_as_guess_gives_it_back(case: Case) -> None:
    """With eps = 0, in every space that projects or looks at signs; dead units are no obstacle."""
    for space in EXACT:
        model, x, y, cuts, loss = case.build(seed=1)
        expected = reference.backprop(model, x, y, loss)
        torch.manual_seed(reference.MASKS)
        ForwardGradient(model, cuts, loss=loss, guess="global", space=space, engine="reverse", eps=0.0).estimate(x, y)
        for name, p in model.named_parameters():
            close(p.grad, expected.get(name), f"{space}: {name}", 1e-7 if space.startswith("span") else 1e-9)


@pytest.mark.parametrize("space", ["f-weight", "f-activation"])
@pytest.mark.parametrize("name", ["transformer", "attention", "tied", "tuple-of-inputs", "recurrent"])
def test_nothing_is_filtered_out_of_the_true_gradient(name: str, space: str) -> None:
    """On smooth networks, where every sample has some gradient for every parameter but those of words it lacks."""
    model, x, y, cuts, loss = by_name(name).build(seed=1)
    expected = reference.backprop(model, x, y, loss)
    ForwardGradient(model, cuts, loss=loss, guess="global", space=space, engine="reverse").estimate(x, y)
    for parameter, p in model.named_parameters():
        close(p.grad, expected.get(parameter), parameter)


# Known numbers.


def two_layers(hidden: int, output: list[list[float]]) -> tuple[nn.Module, Tensor]:
    """h = x W^T + b with W = 0 and b = 0, z = h V^T; and an input of one-hot rows."""
    model = nn.Sequential(nn.Linear(2, hidden), nn.Linear(hidden, len(output), bias=False)).double()
    with torch.no_grad():
        for p in model[0].parameters():
            p.zero_()
        model[1].weight.copy_(torch.tensor(output))
    return model, torch.eye(2, dtype=torch.float64)


def half_of_products(z: Tensor, y: Tensor) -> Tensor:
    """A mean over two samples whose output error is e = y / 2."""
    return (z * y).sum(1).mean()


KNOWN = {
    # e = [[1, 0], [0, 2]] = g; u = e B = [[3, 4], [2, -2]]; <g, u> = 3, -4; |u|^2 = 25, 8
    "activation": ([[0.36, -1], [0.48, 1]], [-0.64, 1.48]),
    "activation-2": ([[0.36, -1], [0.48, 1]], [-0.64, 1.48]),
    "weight": ([[0.36, -1], [0.48, 1]], [-0.64, 1.48]),
    # of the weight <G, U> = 3 - 4 and |U|^2 = 33; of the bias [1, 2].[5, 2] = 9 and 29
    "avg-weight": ([[-3 / 33, -2 / 33], [-4 / 33, 2 / 33]], [45 / 29, 18 / 29]),
    "sign-weight": ([[3, -2], [4, 2]], [1, 6]),
    "f-weight": ([[6, 0], [8, 0]], [6, 8]),
    "f-activation": ([[6, 0], [8, 0]], [6, 8]),
    "span-activation": ([[1, 0], [0, 2]], [1, 2]),  # two rows span the plane
    "span-weight": ([[0.36, -1], [0.48, 1]], [1, 2]),  # the inputs, and so the weight's gradients, are orthogonal
}


def with_feedback(model: nn.Module, matrix: list[list[float]], **options: Any) -> ForwardGradient:
    options = {"guess": "feedback", "feedback": "dfa", "loss": half_of_products, **options}
    estimator = ForwardGradient(model, ["0"], **options)
    estimator.feedback[0].materialize((len(matrix), len(matrix[0])))
    estimator.feedback[0].data.copy_(torch.tensor(matrix))
    return estimator


@pytest.mark.parametrize("space", KNOWN)
def test_known_numbers(space: str) -> None:
    model, x = two_layers(2, [[1, 0], [0, 1]])
    y = torch.tensor([[2, 0], [0, 4]], dtype=torch.float64)
    for engine in ("reverse", "forward") if space in FORWARD_SPACES else ("reverse",):
        model.zero_grad()
        with_feedback(model, [[3, 4], [1, -1]], space=space, engine=engine).estimate(x, y)
        weight, bias = (torch.tensor(numbers, dtype=torch.float64) for numbers in KNOWN[space])
        torch.testing.assert_close(model[0].weight.grad, weight)
        torch.testing.assert_close(model[0].bias.grad, bias)
        torch.testing.assert_close(model[1].weight.grad, torch.zeros_like(model[1].weight))  # h = 0


@pytest.mark.parametrize("engine", ["reverse", "forward"])
def test_random_signs_are_signs(engine: str) -> None:
    """Each sample's gradient under the guess, whole, with a sign that is heads as often as tails and not the same for all."""
    model, x = two_layers(2, [[1, 0], [0, 1]])
    y = torch.tensor([[2, 0], [0, 4]], dtype=torch.float64)
    estimator = with_feedback(model, [[3, 4], [1, -1]], space="random-sign-weight", engine=engine)
    seen = []
    for _ in range(200):
        estimator.zero_grad()
        estimator.estimate(x, y)
        columns = model[0].weight.grad / torch.tensor([[3, 2], [4, -2]], dtype=torch.float64)
        assert torch.equal(columns[0], columns[1])
        assert torch.equal(columns.abs(), torch.ones_like(columns))
        bias = model[0].bias.grad
        assert any(torch.equal(bias, torch.tensor(b, dtype=bias.dtype)) for b in ([5, 2], [1, 6], [-5, -2], [-1, -6]))
        seen.append(columns[0])
    coins = torch.stack(seen)
    assert (coins.mean(0).abs() < 4 / 200**0.5).all()
    assert coins.prod(1).mean().abs() < 4 / 200**0.5


def test_spans_of_known_rows() -> None:
    """u = [1, 0, 0] and [0, 1, 1]: each sample's target is projected on both."""
    y = 2 * torch.eye(2, dtype=torch.float64)
    numbers = {"span-activation": ([[5, 1], [3, 0], [3, 0]], [6, 3, 3]), "span-weight": ([[5, 0], [0, 0], [0, 0]], [6, 3, 3])}
    for space, (weight, bias) in numbers.items():
        model, x = two_layers(3, [[5, 2, 4], [1, 1, -1]])
        with_feedback(model, [[1, 0, 0], [0, 1, 1]], space=space, engine="reverse").estimate(x, y)
        torch.testing.assert_close(model[0].weight.grad, torch.tensor(weight, dtype=torch.float64))
        torch.testing.assert_close(model[0].bias.grad, torch.tensor(bias, dtype=torch.float64))


def test_nothing_kept_is_nothing_learned() -> None:
    """Filters where no inner product is positive, and guesses of zero without an epsilon."""
    y = torch.tensor([[2, 0], [0, 4]], dtype=torch.float64)
    for space in SPACES:
        for matrix in ([[-1.0, 0], [0, -1]], [[0.0, 0], [0, 0]]):
            if matrix[0][0] and not space.startswith("f-"):
                continue
            model, x = two_layers(2, [[1, 0], [0, 1]])
            with_feedback(model, matrix, space=space, engine="reverse", eps=0.0).estimate(x, y)
            for p in model[0].parameters():
                assert not p.grad.any(), (space, matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [8, 64])
def test_spans_of_dependent_guesses(dtype: torch.dtype, samples: int) -> None:
    """Ten classes and a linear head: errors sum to zero, so the guesses span nine dimensions however many samples there are.

    Rounding errors are no part of the span, whatever the precision.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(12, 512), nn.Tanh()), nn.Linear(512, 512), nn.Linear(512, 10)).double()
    head = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 10)).double()
    x, y = torch.randn(samples, 12, dtype=torch.float64), torch.randint(10, (samples,))
    target = reference.true_errors(model, x, y, ["0"], F.cross_entropy)[0]
    h = model[0](x).detach().requires_grad_()
    (guess,) = torch.autograd.grad(F.cross_entropy(head(h), y), h)
    rank = min(9, samples)
    basis = torch.linalg.svd(guess, full_matrices=False)[2][:rank]
    expected = reference.delivered(model, x, y, ["0"], F.cross_entropy, [target @ basis.T @ basis])
    model, heads = model.to(dtype), {"0": head.to(dtype)}
    ForwardGradient(model, ["0"], guess="local", space="span-activation", engine="reverse", heads=heads).estimate(
        x.to(dtype), y
    )
    for p, name in ((model[0][0].weight, "0.0.weight"), (model[0][0].bias, "0.0.bias")):
        error = (p.grad.double() - expected[name]).norm() / expected[name].norm()
        assert error < (1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("space", ["weight", "avg-weight", "activation-2", "span-weight"])
def test_scale_and_shift_have_gradients_of_their_own(space: str) -> None:
    """The published code wrote the bias's estimate into the weight's gradient: here each is compared with its own."""
    case = by_name("mlp-batch-norm")
    at = setting(case)
    estimator, _ = estimator_of(case, at, "global", "local", space, engine="reverse")
    estimator.estimate(at.family.x, at.family.y)
    expected = at.family.estimate("global", "local", space)
    for k, norm in ((0, "1"), (1, "4")):
        gamma, beta = (estimator.model.get_parameter(f"{norm}.{name}").grad for name in ("weight", "bias"))
        close(gamma, expected[f"{norm}.weight"], tolerance=1e-6)
        close(beta, expected[f"{norm}.bias"], tolerance=1e-6)
        assert not torch.allclose(gamma, beta, rtol=0.01)
        if space == "avg-weight":
            target, guess = (at.family.batch(k, at.family.signals(name)[k]) for name in ("global", "local"))
            for own, name in ((gamma, f"{norm}.weight"), (beta, f"{norm}.bias")):
                g, u = target[name], guess[name]
                close(own, (g @ u) / (u @ u) * u)


# The forward engine.


@EACH_TARGET
@ALL
def test_forward_block_by_block(case: Case, target: str) -> None:
    """The same numbers as in reverse; with batch statistics, of each sample's own derivative, as the reference measures it."""
    combinations = list(itertools.product(FORWARD_GUESSES, FORWARD_SPACES))
    shift = CASES.index(case) + TARGETS.index(target)
    chosen = [pair for i, pair in enumerate(combinations) if (i + shift) % 3 == 0]
    check_each(case, setting(case), target, chosen, engine="forward", passes="block")


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@EACH_TARGET
@ALL
def test_the_whole_product_forward(case: Case, target: str, train: bool) -> None:
    combinations = list(itertools.product(FORWARD_GUESSES, FORWARD_SPACES))
    check_each(case, setting(case, train), target, combinations, engine="forward", passes="block")


@SEPARATE
def test_both_engines_give_the_same_numbers(case: Case) -> None:
    for target, guess, space in (("global", "local", "activation"), ("sum", "feedback", "avg-weight")):
        both = []
        for engine in ("reverse", "forward"):
            estimator, _ = estimator_of(case, setting(case), target, guess, space, engine=engine)
            torch.manual_seed(reference.MASKS)
            estimator.estimate(setting(case).family.x, setting(case).family.y)
            both.append(estimator)
        for p, q in zip(*(list(each.parameters()) for each in both), strict=True):
            close(p.grad, q.grad)


@pytest.mark.parametrize(
    "options", [{"directions": 3}, {"scaling": "projection"}, {"directions": 2, "orthogonal": True}], ids=str
)
@pytest.mark.parametrize("name", ["mlp", "group-norm", "dropout", "tied"])
def test_options_of_random_guesses_forward(name: str, options: dict[str, Any]) -> None:
    case = by_name(name)
    spaces = [s for s in FORWARD_SPACES if "orthogonal" not in options or s in ("activation", "activation-2", "avg-weight")]
    pairs = [("random", space) for space in spaces]
    for target in ("global", "above"):
        check_each(case, setting(case), target, pairs, engine="forward", passes="block", **options)


def repeated(case: Case, times: int) -> tuple[Any, Tensor]:
    """Every sample several times, each copy with directions and signs of its own: one step is many draws."""
    _, x, y, _, _ = case.build(seed=1)
    return x.repeat(times, *[1] * (x.dim() - 1)), y.repeat(times, *[1] * (y.dim() - 1))


def draws(estimator: ForwardGradient, x: Any, y: Tensor, steps: int, parameters: list[str]) -> Tensor:
    """One row per step: the gradients of some parameters, flattened."""
    rows = []
    for _ in range(steps):
        estimator.zero_grad()
        estimator.estimate(x, y)
        rows.append(torch.cat([estimator.model.get_parameter(name).grad.flatten() for name in parameters]))
    return torch.stack(rows)


ONE_PASS = [("global", "local"), ("local", "random"), ("above", "fixed-ntk"), ("sum", "feedback")]


@pytest.mark.parametrize(("target", "guess"), ONE_PASS, ids=str)
@pytest.mark.parametrize(
    ("name", "space"),
    [("mlp", "activation"), ("group-norm", "activation"), ("in-place", "activation-2"), ("mlp", "avg-weight")],
)
def test_one_pass_is_unbiased(name: str, space: str, target: str, guess: str) -> None:
    """The mean of many steps is what block passes measure exactly; of random guesses, the target's gradient."""
    case, batch = by_name(name), space == "avg-weight"
    x, y = repeated(case, 1 if batch else 16)
    at = setting(case)
    family = Family(build(case, True)._replace(x=x, y=y), at.family.heads, feedback=at.family.feedback)
    expected = family.estimate(target, target if guess == "random" else guess, "avg-weight" if batch else "activation")
    estimator, _ = estimator_of(case, at, target, guess, space, passes="one")
    names = [name for name in expected if name not in family.last_block]
    assert len(names) > 3
    found = draws(estimator, x, y, 200 if batch else 40, names)
    exact = torch.cat([expected[name].flatten() for name in names])
    reference.assert_mean(found, exact, power=2.5 if batch else 1.0)


@pytest.mark.parametrize("engine", ["reverse", "forward"])
@pytest.mark.parametrize("space", ["activation", "activation-2", "weight", "avg-weight"])
def test_random_guesses_are_unbiased(space: str, engine: str) -> None:
    if (space, engine) == ("weight", "forward"):
        pytest.skip("no forward pass measures it")
    case = by_name("mlp")
    x, y = repeated(case, 1 if space == "avg-weight" else 16)
    model, _, _, cuts, loss = case.build(seed=1)
    expected = reference.backprop(model, x, y, loss)
    passes = "block" if engine == "forward" else None
    estimator = ForwardGradient(model, cuts, loss=loss, space=space, engine=engine, passes=passes)
    names = [name for name in expected if not name.startswith("2")]
    found = draws(estimator, x, y, 200 if space == "avg-weight" else 40, names)
    reference.assert_mean(found, torch.cat([expected[name].flatten() for name in names]), power=1.0)


@pytest.mark.parametrize("cuts", [None, ()], ids=str)
@pytest.mark.parametrize("name", ["mlp", "residual", "tied"])
def test_baydins_algorithm(name: str, cuts: tuple[str, ...] | None) -> None:
    """One direction for all parameters, of the last block too, scaled by the slope of the loss along it.

    Exact measurements (in reverse, or a pass for each parameter) scale each parameter's direction by its own slope.
    """
    model, x, y, _, loss = by_name(name).build(seed=1)
    together = reference.weight_forward_gradient(model, x, y, loss, SEED, 0, 2, "gaussian")
    exact, apart = reference.backprop(model, x, y, loss), {}
    for direction in range(2):
        for parameter, v in reference.parameter_directions(model, SEED, 0, direction, "gaussian").items():
            apart[parameter] = apart.get(parameter, 0) + (exact[parameter] * v).sum() * v / 2
    for options, expected in (({}, together), ({"passes": "block"}, apart), ({"engine": "reverse"}, apart)):
        model = by_name(name).build(seed=1).model
        ForwardGradient(model, cuts, loss=loss, space="avg-weight", directions=2, seed=SEED, **options).estimate(x, y)
        for parameter, p in model.named_parameters():
            close(p.grad, expected[parameter], f"{options}: {parameter}")


# Heads.


@pytest.mark.parametrize("engine", ["reverse", "forward"])
@pytest.mark.parametrize("name", ["mlp", "cnn-batch-norm", "transformer"])
def test_heads_with_batch_norm(name: str, engine: str) -> None:
    """They mix samples; their statistics move once in a step, whatever the target and the guess."""
    case = by_name(name)
    combinations = [("global", "local"), ("local", "random"), ("sum", "local"), ("above", "feedback"), ("local", "fixed-ntk")]
    for target, guess in combinations if engine == "forward" else [*combinations, ("local", "global"), ("sum", "above")]:
        heads = heads_for(case, batch_norm=True)
        family = Family(build(case, True), heads, seed=SEED)
        generator = torch.Generator().manual_seed(2)
        family.feedback = [torch.randn(3, h[0].numel(), generator=generator, dtype=torch.float64) for h in family.hidden]
        given = copy.deepcopy(heads)
        options = {"target": target, "guess": guess, **engine_of(engine), "heads": given, "feedback": "dfa"}
        model, x, y, cuts, loss = build(case, True)
        estimator = ForwardGradient(model, cuts, loss=loss, seed=SEED, **options)
        if guess == "feedback":
            for matrix, value in zip(estimator.feedback, family.feedback, strict=True):
                matrix.materialize(value.shape)
                matrix.data.copy_(value)
        step = estimator.estimate(x, y)
        expected = family.estimate(target, guess, "activation", engine=engine)
        for parameter, p in model.named_parameters():
            close(p.grad, expected.get(parameter), f"{target} {guess} {parameter}")
        for (cut, (value, logits, gradients)), h in zip(family.head_steps().items(), family.hidden, strict=True):
            torch.testing.assert_close(step.heads[cut], (value, logits))
            for parameter, p in given[cut].named_parameters():
                close(p.grad, gradients[parameter], parameter)
            heads[cut](h)  # moves its statistics once
            for one, other in zip(given[cut].buffers(), heads[cut].buffers(), strict=True):
                torch.testing.assert_close(one, other, msg=f"{target} {guess}: statistics of the head of {cut}")


@pytest.mark.parametrize("guess", ["local", "fixed-ntk"])
def test_heads_that_draw_masks(guess: str) -> None:
    """A function of seed, step and cut: the same in every pass and engine, and the network's own masks are as without heads."""
    case = by_name("dropout")
    at = setting(case)

    def step(seed: int, steps: int = 1, **options: Any) -> list[Tensor]:
        model, x, y, cuts, loss = build(case, True)
        heads = {cut: nn.Sequential(nn.Dropout(0.5), head) for cut, head in copy.deepcopy(heads_of(case, True)).items()}
        estimator = ForwardGradient(model, cuts, loss=loss, target="sum", guess=guess, heads=heads, seed=seed, **options)
        for _ in range(steps):
            estimator.zero_grad()
            torch.manual_seed(reference.MASKS)
            logits = estimator.estimate(x, y).output
            assert torch.equal(torch.get_rng_state(), at.plain.generator)
            torch.testing.assert_close(logits, at.plain.logits)
        return [p.grad for p in estimator.parameters() if p.grad is not None]

    reverse = step(1, engine="reverse")
    for p, q in zip(reverse, step(1, passes="block"), strict=True):
        close(p, q)
    assert not any(torch.equal(p, q) for p, q in zip(reverse[:4], step(2, engine="reverse"), strict=False))
    assert not any(torch.equal(p, q) for p, q in zip(reverse[:4], step(1, 2, engine="reverse"), strict=False))


class Attends(nn.Module):
    """Attention whose dropout is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        tokens = h.unsqueeze(2).expand(-1, -1, 4) * torch.arange(1.0, 5, dtype=h.dtype)
        return self.attention(tokens, tokens, tokens)[0].flatten(1)


class Drops(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.5)


DRAWING = {
    "functional": lambda: nn.Sequential(Drops(), nn.Linear(4, 3)),
    "attention": lambda: nn.Sequential(Attends(), nn.Linear(16, 3)),
    "rrelu": lambda: nn.Sequential(nn.RReLU(), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("drawing", DRAWING)
def test_heads_that_draw_without_a_dropout_module(drawing: str) -> None:
    """The guess that is measured is the one that is delivered: along itself, a local target is found exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    head, x, y = DRAWING[drawing]().double(), torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    found = []
    for make in (
        lambda model, heads: ForwardGradient(model, ["1"], target="local", guess="local", heads=heads, seed=SEED),
        lambda model, heads: LocalLoss(model, ["1"], heads=heads, seed=SEED),
    ):
        learner, given = copy.deepcopy(model), copy.deepcopy(head)
        torch.manual_seed(reference.MASKS)
        logits = make(learner, {"1": given}).estimate(x, y).output
        after = torch.get_rng_state()
        torch.manual_seed(reference.MASKS)
        torch.testing.assert_close(logits, model(x))
        assert torch.equal(after, torch.get_rng_state()), "the global generator"
        found.append([p.grad for p in (*learner.parameters(), *given.parameters())])
    for p, q in zip(*found, strict=True):
        close(p, q)


def test_ntk_heads_are_drawn_afresh() -> None:
    """For every step and cut, as their modules initialise themselves; from the seed, not from the global generator."""
    case = by_name("mlp")
    torch.manual_seed(5)
    first, second = redrawn(case, steps=2)
    torch.manual_seed(6)
    again = redrawn(case)[0]
    given = heads_of(case, True)
    for cut in given:
        for module in ("1", "3") if cut == "1" else ("1",):
            pair = [heads[cut].get_submodule(module) for heads in (first, second, again, given)]
            for p, q, r, s in zip(*(module.parameters() for module in pair), strict=True):
                assert torch.equal(p, r)
                assert not (p == q).any()
                assert not (p == s).any()
            for linear in pair[:2]:
                bound = linear.in_features**-0.5
                assert linear.weight.abs().max() <= bound
                assert linear.weight.std() > 0.4 * bound / 3**0.5


def test_ntk_heads_differ_from_cut_to_cut() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    estimator = ForwardGradient(model, ["1", "3"], guess="ntk", heads={cut: nn.Linear(4, 2) for cut in ("1", "3")})
    estimator.estimate(x, y)
    first, second = (p for p in estimator.parameters() if not p.requires_grad and p.dim() == 2)
    assert not torch.isin(first, second).any()


@pytest.mark.parametrize("engine", ["reverse", "forward"])
@pytest.mark.parametrize("guess", ["ntk", "fixed-ntk"])
@pytest.mark.parametrize("target", ["global", "local"])
def test_frozen_heads_never_learn(target: str, guess: str, engine: str) -> None:
    """In no group, without gradients, and weight decay does not reach them; the trained ones of a local target go on."""
    case = by_name("mlp")
    estimator, heads = estimator_of(case, setting(case), target, guess, "activation", engine=engine)
    groups = {group["role"]: group["params"] for group in estimator.parameter_groups()}
    grouped = {id(p) for params in groups.values() for p in params}
    frozen = {name: p.detach().clone() for name, p in estimator.named_parameters() if id(p) not in grouped}
    count = sum(p.numel() for head in heads.values() for p in head.parameters())
    assert sum(p.numel() for p in frozen.values()) == count
    assert ("heads" in groups) == (target == "local")
    optimizer = torch.optim.SGD(estimator.parameters(), lr=0.1, weight_decay=0.5)
    before = copy.deepcopy(heads)
    for _ in range(3):
        optimizer.zero_grad()
        estimator.estimate(setting(case).family.x, setting(case).family.y)
        optimizer.step()
    for name, value in frozen.items():
        p = estimator.get_parameter(name)
        assert not p.requires_grad
        assert p.grad is None
        assert torch.equal(p, value) == (guess == "fixed-ntk")
    for cut, head in heads.items():
        for p, q in zip(head.parameters(), before[cut].parameters(), strict=True):
            assert torch.equal(p, q) == (target == "global")


def test_heads_that_nothing_asks_for_learn_too() -> None:
    """As probes: their loss and accuracy are reported, and the estimate is the same as without them."""
    case = by_name("mlp")
    at = setting(case)
    expected = at.family.estimate("global", "random", "activation")
    for engine in ("reverse", "forward"):
        model, x, y, cuts, loss = build(case, True)
        heads = copy.deepcopy(heads_of(case, True))
        options = {**engine_of(engine), "heads": heads}
        step = ForwardGradient(model, cuts, loss=loss, seed=SEED, **options).estimate(x, y)
        for name, p in model.named_parameters():
            close(p.grad, expected[name], name)
        for cut, (value, logits, gradients) in at.family.head_steps().items():
            torch.testing.assert_close(step.heads[cut], (value, logits))
            for name, p in heads[cut].named_parameters():
                close(p.grad, gradients[name], name)


def test_parameter_groups() -> None:
    case = by_name("mlp")
    estimator, heads = estimator_of(case, setting(case), "global", "local", "activation")
    groups = estimator.parameter_groups(network={"lr": 0.1}, heads={"lr": 0.2})
    assert [(group["role"], group["lr"]) for group in groups] == [("network", 0.1), ("heads", 0.2)]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for head in heads.values() for p in head.parameters()}
    estimator, _ = estimator_of(case, setting(case), "sum", "feedback", "weight", engine="reverse")
    assert [group["role"] for group in estimator.parameter_groups()] == ["network", "heads", "feedback"]


STATES = [
    {"guess": "local", "space": "weight", "engine": "reverse"},
    {"target": "local", "guess": "fixed-ntk", "space": "activation"},
    {"guess": "ntk", "space": "avg-weight"},
    {"target": "sum", "guess": "feedback", "space": "span-weight", "engine": "reverse"},
    {"target": "above", "guess": "random", "space": "f-weight", "engine": "reverse", "directions": 2},
    {"guess": "local", "passes": "one"},
]


@pytest.mark.parametrize("options", STATES, ids=str)
def test_a_run_goes_on_from_its_state(options: dict[str, Any]) -> None:
    """Into a fresh estimator with other weights, other heads and another seed; and a copy goes on alike."""
    case = by_name("mlp-batch-norm")

    def make(seed: int) -> ForwardGradient:
        model, _, _, cuts, loss = case.build(seed)
        heads = heads_for(case, seed) if needs_heads(options) else None
        return ForwardGradient(model, cuts, loss=loss, seed=seed, **{**options, "heads": heads})

    def go_on(estimator: ForwardGradient, steps: int) -> None:
        _, x, y, _, _ = case.build(1)
        for _ in range(steps):
            estimator.zero_grad()
            estimator.estimate(x, y)
            with torch.no_grad():
                for p in estimator.parameters():
                    if p.grad is not None:
                        p -= 0.05 * p.grad

    estimator = make(1)
    go_on(estimator, 2)
    state, copied = copy.deepcopy(estimator.state_dict()), copy.deepcopy(estimator)
    go_on(estimator, 2)
    fresh = make(2)
    fresh.load_state_dict(state)
    for other in (fresh, copied):
        go_on(other, 2)
        for (name, p), (_, q) in zip(estimator.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(p, q) if isinstance(p, Tensor) else p == q, name


@pytest.mark.parametrize("options", [options for options in STATES if options.get("guess") != "ntk"], ids=str)
def test_single_and_half_precision(options: dict[str, Any]) -> None:
    """In float32 the estimate is near that of float64, and under autocast in bfloat16 it points the same way.

    The guesses have to be the same: signs are, Gaussian numbers and fresh heads differ from one precision to another.
    """
    case = by_name("mlp")
    if options.get("guess") == "random":
        options = {**options, "noise": "rademacher"}
    found = []
    for dtype, half in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        model, x, y, cuts, loss = case.build(2)
        heads = {cut: head.to(dtype) for cut, head in heads_for(case, 2).items()} if needs_heads(options) else None
        estimator = ForwardGradient(model.to(dtype), cuts, loss=loss, **{**options, "heads": heads})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            step = estimator.estimate(x.to(dtype), y)
        assert step.loss.dtype == dtype
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in estimator.parameters())
        found.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    assert (found[0] - found[1]).norm() < 1e-4 * found[0].norm()
    if options.get("space") != "f-weight":  # whether a product near zero is kept is a matter of rounding
        assert F.cosine_similarity(found[0], found[2], dim=0) > 0.95


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["reverse", "forward"])
@pytest.mark.parametrize("name", ["residual", "group-norm", "convolutions", "transformer", "recurrent"])
def test_on_a_gpu(name: str, engine: str) -> None:
    """Structured guesses, whose numbers do not depend on the kind of device."""
    check_on(torch.device("cuda"), name, engine)


def check_on(device: torch.device, name: str, engine: str) -> None:
    case = by_name(name)
    at = setting(case)
    spaces = FORWARD_SPACES if engine == "forward" else SPACES
    for target, guess, space in itertools.product(("global", "sum"), ("local", "fixed-ntk"), spaces):
        if space == "random-sign-weight":
            continue  # draws on the device
        estimator, _ = estimator_of(case, at, target, guess, space, **engine_of(engine))
        estimator.to(device).estimate(at.family.x.to(device), at.family.y.to(device))
        expected = at.family.estimate(target, guess, space, engine=engine)
        for parameter, p in estimator.model.named_parameters():
            if parameter not in expected or not expected[parameter].isnan().any():
                grad = None if p.grad is None else p.grad.cpu()
                close(grad, expected.get(parameter), f"{target} {guess} {space} {parameter}", 1e-6)


# Refusals.

REFUSED = [
    ({"target": "globbal"}, "target 'globbal'.*did you mean 'global'"),
    ({"guess": "locall"}, "guess 'locall'.*did you mean 'local'"),
    ({"space": "avg_weight"}, "space 'avg_weight'.*did you mean 'avg-weight'"),
    ({"engine": "forwards"}, "engine 'forwards'.*did you mean 'forward'"),
    ({"passes": "blocks"}, "passes 'blocks'.*did you mean 'block'"),
    ({"noise": "gausian"}, "noise 'gausian'.*did you mean 'gaussian'"),
    ({"scaling": "unbias"}, "scaling 'unbias'.*did you mean 'unbiased'"),
    ({"guess": "feedback", "feedback": "fdaf"}, "feedback 'fdaf'.*did you mean 'fdfa'"),
    ({"directions": 0}, "directions=0.*at least 1"),
    ({"directions": -2}, "directions=-2.*at least 1"),
    *[({"guess": guess}, f"guess='{guess}'.*heads") for guess in ("local", "ntk", "fixed-ntk")],
    *[({"guess": guess, "engine": "reverse"}, f"guess='{guess}'.*heads") for guess in ("above", "sum")],
    *[({"target": target}, f"target='{target}'.*heads") for target in ("local", "above", "sum")],
    *[({"guess": "local", "heads": True, option: value}, f"{option}=.*random.*'local'") for option, value in (
        ("directions", 2), ("orthogonal", True), ("scaling", "projection"))],
    *[({"guess": guess, "heads": True}, f"guess='{guess}'.*engine='reverse'") for guess in ("global", "above", "sum")],
    *[({"space": space}, f"space='{space}'.*engine='reverse'") for space in (
        "span-activation", "span-weight", "weight", "sign-weight", "f-weight")],
    *[({"space": space, "engine": "reverse", "orthogonal": True, "directions": 2}, f"orthogonal.*'{space}'") for space in (
        "sign-weight", "f-weight", "f-activation", "random-sign-weight", "span-weight", "span-activation")],
    ({"engine": "reverse", "passes": "one"}, "passes='one'.*forward"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "match"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_what_has_no_meaning_is_refused(options: dict[str, Any], match: str) -> None:
    """In one sentence or two on one line, which names the thing and what to do."""
    case = by_name("mlp")
    model, _, _, cuts, _ = case.build(seed=1)
    if options.get("heads"):
        options = {**options, "heads": heads_for(case)}
    with pytest.raises(UsageError, match=match) as raised:
        ForwardGradient(model, cuts, **options)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_heads_of_other_cuts() -> None:
    case = by_name("mlp")
    model, _, _, cuts, _ = case.build(seed=1)
    heads = heads_for(case)
    with pytest.raises(UsageError, match=r"head.*'O'.*known: 0, 1|head.*'O'"):
        ForwardGradient(model, cuts, guess="local", heads={**heads, "O": heads["0"]})
    with pytest.raises(UsageError, match=r"'1'.*no head.*make_heads"):
        ForwardGradient(model, cuts, guess="local", heads={"0": heads["0"]})


@pytest.mark.parametrize("engine", ["reverse", "forward"])
def test_a_head_with_too_few_outputs(engine: str) -> None:
    case = by_name("mlp")
    model, x, y, cuts, _ = case.build(seed=1)
    heads = {**heads_for(case), "1": nn.Linear(4, 2).double()}
    y[0] = 2
    with pytest.raises(UsageError, match=r"2.*labels run from 0 to 1"):
        ForwardGradient(model, cuts, guess="local", engine=engine, heads=heads).estimate(x, y)


class TimeFirst(nn.Module):
    """(N, T, d) of numbers, to outputs of (T, N, d) inside."""

    def __init__(self, flatten: bool) -> None:
        super().__init__()
        self.hidden, self.last, self.flatten = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2), flatten

    def forward(self, x: Tensor) -> Tensor:
        if self.flatten:
            return self.last(self.hidden(x)).flatten(0, 1)
        return self.last(self.hidden(x.transpose(0, 1)).mean(0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"passes": "block"},
        {"space": "activation-2"},
        {"space": "f-activation"},
        {"guess": "feedback", "feedback": "dfa"},
        {"directions": 2, "orthogonal": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("flatten", [False, True])
def test_samples_are_the_first_dimension(flatten: bool, options: dict[str, Any]) -> None:
    """Forward, a derivative is each sample's; what needs no samples goes on."""
    torch.manual_seed(0)
    model, x = TimeFirst(flatten), torch.randn(5, 6, 3)
    y = torch.randint(2, (30 if flatten else 5,))
    shape, rows = (r"\(5, 6, 4\)", 30) if flatten else (r"\(6, 5, 4\)", 5)
    by_shape = rf"cut 'hidden' has shape {shape}.* {rows} (rows|samples).*the sample dimension first"
    with pytest.raises(UsageError, match=by_shape):
        ForwardGradient(model, ["hidden"], check=False, **options).estimate(x, y)
    with pytest.raises(UsageError, match=by_shape if flatten else "cut 'hidden' has the samples in its second dimension"):
        ForwardGradient(model, ["hidden"], **options).estimate(x, y)
    model.zero_grad()
    ForwardGradient(model, ["hidden"], space="avg-weight").estimate(x, y)
    assert all(p.grad is not None for p in model.parameters())


def test_ntk_needs_modules_that_can_reset_themselves() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, h: Tensor) -> Tensor:
            return self.scale * h

    case = by_name("mlp")
    model, x, y, cuts, _ = case.build(seed=1)
    heads = {cut: nn.Sequential(Scale(), head) for cut, head in heads_for(case).items()}
    with pytest.raises(UsageError, match=r"Scale.*reset_parameters.*fixed-ntk"):
        ForwardGradient(model, cuts, guess="ntk", heads=heads).estimate(x, y)
    ForwardGradient(model, cuts, guess="fixed-ntk", heads=heads).estimate(x, y)
