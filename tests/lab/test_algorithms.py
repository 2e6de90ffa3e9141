from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import onward
from onward.errors import UsageError
from onward.lab.networks import models
from onward.lab.run.algorithms import ALGORITHMS, SETTINGS, build, folder_name, make_heads, variant
from onward.lab.settings import Feedback, Heads, Network, Train
from onward.network.cuts import cut_graph

X = torch.zeros(2, 4)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("text", "owner", "expected"),
    [
        ("bp:checkpoint=true", "backprop", {"checkpoint": True}),
        ("local:kind=linear,width=8", "heads", {"kind": "linear", "width": 8}),
        ("fdfa:directions=4", "feedback", {"directions": 4}),
        ("fdfa:feedback.directions=4", "feedback", {"directions": 4}),
        ("fdfa:feedback.lr=0.5", "feedback", {"lr": 0.5}),
        ("fg:guess=local,space=avg-weight,engine=reverse", "forward_gradient", {"guess": "local", "space": "avg-weight"}),
        ("fg:guess=feedback,feedback=dkp,feedback.lr=1e-3", "forward_gradient", {"guess": "feedback", "feedback": "dkp"}),
        ("fg:guess=feedback,feedback=dkp,feedback.lr=1e-3", "feedback", {"lr": 1e-3}),
        ("fg:heads.kind=predsim", "heads", {"kind": "predsim", "width": 5}),
    ],
)
def test_a_variant_changes_the_settings_it_names(text: str, owner: str, expected: dict[str, object]) -> None:
    config = variant(text, Train(algorithm="dkp", heads=Heads(width=5), feedback=Feedback(optimizer="sgd")))
    assert config.algorithm == text.partition(":")[0]
    settings = dataclasses.asdict(getattr(config, owner))
    assert settings == {**settings, **expected}
    assert config.feedback.optimizer == "sgd"  # what it does not name stays


def test_a_name_alone_changes_nothing_else() -> None:
    for name in ALGORITHMS:
        assert variant(name, Train(lr=0.5)) == Train(lr=0.5, algorithm=name)
    assert SETTINGS.keys() == ALGORITHMS.keys()


def test_lr_is_the_networks_in_every_algorithm() -> None:
    assert variant("fdfa:lr=0.5,low-memory=true", Train()) == Train(algorithm="fdfa", lr=0.5, low_memory=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fdaf", "unknown algorithm 'fdaf': did you mean 'fdfa'"),
        ("fg:gues=local", "unknown setting of fg 'gues': did you mean 'guess'"),
        ("fg:guess=locl", "unknown fg:guess 'locl': did you mean 'local'"),
        ("dfa:directions=2", r"unknown setting of dfa 'directions' \(known: lr, low_memory\)"),
        ("bp:checkpoint", "'checkpoint' is no setting=value, write it as in fg:guess=local"),
        ("bp:", "'' is no setting=value"),
        ("bp:checkpoint=yes", "bp:checkpoint=yes: use true or false"),
        ("fdfa:directions=1.5", "fdfa:directions=1.5: this is no whole number"),
        ("bp:lr=fast", "bp:lr=fast: this is no number"),
        ("bp:lr=-1", "--lr -1.0: use at least 0"),
        ("fdfa:directions=1,directions=2", "sets directions twice: leave one out"),
    ],
)
def test_a_variant_that_is_none(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        variant(text, Train())


def test_names_of_folders_cannot_lead_elsewhere() -> None:
    for text in ("fg:guess=local,space=weight", "../../etc/x.py:make", "c:\\nets\\x.py:make", "a b"):
        assert not set(folder_name(text)) & set("/\\: ,")
    assert folder_name("bp:lr=1e-4") != folder_name("bp:lr=1e+4")


@pytest.mark.parametrize("name", [*ALGORITHMS, "bp:checkpoint=true", "fg:guess=local"])
def test_cuts_are_those_asked_for(name: str) -> None:
    config = variant(name, Train(cuts=("3",), heads=Heads("linear")))
    estimator = build(network(), config, X)
    assert estimator.cuts == (() if name == "bp" else ("3",))


def test_an_input_that_is_not_the_datas_is_refused() -> None:
    assert isinstance(build(network(), Train(algorithm="dfa", input="4"), X), onward.DFA)
    with pytest.raises(UsageError, match="--input 5: the inputs are 4, leave it out"):
        build(network(), Train(algorithm="dfa", input="5"), X)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18-8b", "resnet18-16b"])
def test_a_head_costs_less_than_a_tenth_of_its_block(name: str) -> None:
    model, x = models.build(name, (3, 32, 32), 10, Network()), torch.zeros(2, 3, 32, 32)
    heads = make_heads(model, Train(algorithm="local", model=name), x)
    outputs, until = [], [0]

    def note(k: int, h: torch.Tensor) -> torch.Tensor:
        outputs.append(h)
        until.append(counted.get_total_flops())
        return h

    with torch.no_grad(), FlopCounterMode(display=False) as counted, cut_graph(model, list(heads), note):
        model(x)
    for head, h, (start, end) in zip(heads.values(), outputs, pairwise(until), strict=True):
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            head(h)
        assert 0 < counted.get_total_flops() < 0.1 * (end - start)


@pytest.mark.parametrize("kind", [None, "cnn", "mlp", "linear", "predsim"])
def test_resnet18_2b_ends_in_the_head_that_is_chosen(kind: str | None) -> None:
    """If none is, its classifier is that of the other residual networks, whatever heads its hidden block has."""
    torch.manual_seed(0)
    model = models.build("resnet18-2b", (3, 8, 8), 5, Network(width=0.1))
    block = model.output.block2
    config = Train(algorithm="bp", model="resnet18-2b", network=Network(width=0.1), heads=Heads(kind, 10 if kind else None))
    estimator = build(model, config, torch.zeros(2, 3, 8, 8))
    assert estimator.model.output.block2 is block
    names = [name for name, _ in estimator.model.output.named_children()]
    assert names == (["block2", "head"] if kind else ["block2", "norm", "pool", "flatten", "linear"])
    if kind in ("cnn", "mlp"):
        width = 4 if kind == "cnn" else 1  # a tenth of 10 each, and a cnn head pools to 2x2
        assert [m.in_features for m in model.output.modules() if isinstance(m, nn.Linear)][-1] == width
    assert estimator(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    step = estimator.estimate(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 4]))
    assert step.loss.isfinite()
    assert all(p.grad is not None for p in estimator.model.parameters())
