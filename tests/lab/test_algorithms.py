from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import onward
from onward.errors import UsageError
from onward.estimators.base import ALGORITHMS
from onward.estimators.settings import settings_of
from onward.lab.networks import models
from onward.lab.run.algorithms import build, folder_name, variant
from onward.lab.run.heads import make_heads
from onward.lab.settings import Feedback, Heads, Network, Optimizer, Train
from onward.network.cuts import cut_graph

X = torch.zeros(2, 4)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


RULE = """
import torch
from typing import Annotated
import onward

class Loud(onward.SignalEstimator):
    \"\"\"Every signal is a constant.\"\"\"

    def __init__(self, model, cuts=None, *, loud: Annotated[float, onward.AtLeast(0)] = 1.0, **options):
        super().__init__(model, cuts, **options)
        self.loud = loud

    def signal(self, k, h, known):
        return torch.full_like(h, self.loud)

    def __str__(self):
        return "loud"

def no_class():
    pass

class Demands(onward.DFA):
    def __init__(self, model, cuts=None, *, rate, **options):
        super().__init__(model, cuts, **options)

class Rates(onward.DFA):
    def __init__(self, model, cuts=None, *, lr=0.5, **options):
        super().__init__(model, cuts, **options)
"""


@pytest.mark.parametrize(
    ("text", "algorithm", "changes"),
    [
        ("bp:checkpoint=true", "bp:checkpoint=true", {}),
        ("bp:checkpoint=false", "bp", {}),
        ("local:heads.kind=linear,heads.width=8", "local", {"heads": Heads("linear", 8)}),
        ("fdfa:directions=4,low-memory=true", "fdfa:directions=4,low_memory=true", {}),
        ("fdfa:low_memory=true,directions=4", "fdfa:directions=4,low_memory=true", {}),
        ("fdfa:feedback.lr=0.5", "fdfa", {"feedback": Feedback(lr=0.5, optimizer="sgd")}),
        ("fg:guess=local,space=avg-weight", "fg:guess=local,space=avg-weight", {}),
        (
            "fg:guess=feedback,feedback=dkp,feedback.lr=1e-3",
            "fg:guess=feedback,feedback=dkp",
            {"feedback": Feedback(lr=1e-3, optimizer="sgd")},
        ),
        ("fg:target=local,heads.kind=predsim", "fg:target=local", {"heads": Heads("predsim", 5)}),
        ("fdfa:lr=0.5", "fdfa", {"lr": 0.5}),
        ("bp:optimizer.name=sgd,optimizer.momentum=0.9", "bp", {"optimizer": Optimizer("sgd", 0.9)}),
    ],
)
def test_an_entry_changes_what_it_names(text: str, algorithm: str, changes: dict[str, object]) -> None:
    """The rest of the configuration stays, and the algorithm is spelled in one way."""
    config = Train(algorithm="dkp", heads=Heads(width=5), feedback=Feedback(optimizer="sgd"))
    found = variant(text, config)
    assert found == dataclasses.replace(config, algorithm=algorithm, **changes)
    assert variant(found.algorithm, found) == found


def test_a_name_alone_changes_nothing_else() -> None:
    for name in ALGORITHMS:
        assert variant(name, Train(lr=0.5)) == Train(lr=0.5, algorithm=name)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_setting_can_be_written_and_read(name: str) -> None:
    """What a constructor takes for itself is what an entry says; each setting has a line about it."""
    for setting in settings_of(ALGORITHMS[name]).values():
        assert setting.parsed(setting.written(setting.default)) == setting.default
        assert setting.line, f"{setting.name} of {name}: the docstring has no line on it"
        for choice in setting.choices:
            assert setting.parsed(str(choice)) == choice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fdaf", "unknown algorithm 'fdaf': did you mean 'fdfa'"),
        ("fg:gues=local", "algorithm 'fg:gues=local': unknown setting 'gues': did you mean 'guess'"),
        ("fg:guess=locl", "unknown guess 'locl': did you mean 'local'"),
        ("dfa:directions=2", r"unknown setting 'directions': .* \(known: positions, low_memory, allow_bypass\)"),
        (
            "dfa:feedback.lr=2",
            r"unknown setting 'feedback.lr' .*known: positions, low_memory, allow_bypass, lr, compile, optimizer.name",
        ),
        ("dfa:heads.kind=cnn", "unknown setting 'heads.kind'"),
        ("bp:checkpoint", "'checkpoint' is no setting=value, write it as in fg:guess=local"),
        ("bp:", "'' is no setting=value"),
        ("bp:checkpoint=yes", "checkpoint=yes: use true or false"),
        ("fdfa:directions=1.5", "directions=1.5: this is no whole number"),
        ("fdfa:directions=0", "directions=0: use at least 1"),
        ("fg:eps=-1", "eps=-1.0: use at least 0"),
        ("bp:lr=fast", "lr=fast: this is no number"),
        ("bp:lr=-1", "--lr -1.0: use at least 0"),
        ("fdfa:directions=1,directions=2", "sets directions twice: leave one out"),
        ("rule.py", "--algorithm rule.py: say which class of the file is the algorithm, such as rule.py:MyRule"),
        ("gone.py:Loud", "--algorithm gone.py:Loud: there is no file gone.py"),
        ("rule.py:Lout", "unknown class of rule.py 'Lout': did you mean 'Loud'"),
        ("rule.py:no_class", "--algorithm rule.py:no_class is no class of estimators: derive it from onward.SignalEstimator"),
        ("rule.py:Loud:loud=-1", "loud=-1.0: use at least 0"),
        ("rule.py:Loud:loud=x.py:y", "loud=x.py:y: this is no number"),
        ("rule.py:Rates", "--algorithm rule.py:Rates has a setting 'lr', which is the run's: give it another name"),
        ("fdfa:directions=99999999999999999999", "directions=99999999999999999999: use at most 2147483647"),
        ("rule.py:Loud:lout=1", r"unknown setting 'lout': did you mean 'loud'\? \(known: loud, low_memory, allow_bypass\)"),
    ],
)
def test_an_entry_that_is_none(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rule.py").write_text(RULE)
    with pytest.raises(UsageError, match=message):
        variant(text, Train())


def test_a_rule_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rule.py").write_text(RULE)
    config = variant("rule.py:Loud:loud=2,low_memory=true,lr=0.5", Train())
    assert (config.algorithm, config.lr) == ("rule.py:Loud:loud=2.0,low_memory=true", 0.5)
    estimator = build(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), dataclasses.replace(config, cuts=("0",)), X)
    assert estimator.low_memory
    estimator.estimate(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    assert torch.equal(estimator.model[0].bias.grad, torch.full((6,), 10.0))
    with pytest.raises(
        UsageError, match=r"rule.py:Demands cannot be made with .*'rate'.*: give arguments of your own a default"
    ):
        build(network(), variant("rule.py:Demands", Train()), X)
    Path("rule.py").write_text(RULE + "\nraise ValueError('not today')\n")
    with pytest.raises(UsageError, match=r"rule.py, line \d+: ValueError: not today"):
        variant("rule.py:Loud", Train())


def test_names_of_folders_cannot_lead_elsewhere() -> None:
    for text in ("fg:guess=local,space=weight", "../../etc/x.py:make", "c:\\nets\\x.py:make", "a b"):
        assert not set(folder_name(text)) & set("/\\: ,")
    assert folder_name("bp:lr=1e-4") != folder_name("bp:lr=1e+4")


@pytest.mark.parametrize("name", [*ALGORITHMS, "bp:checkpoint=true", "fg:guess=local"])
def test_cuts_are_those_asked_for(name: str) -> None:
    config = variant(name, Train(cuts=("3",), heads=Heads("linear")))
    estimator = build(network(), config, X)
    whole = ("bp", "spsa", "fa", "kp", "usf", "brsf", "frsf")  # cut nothing
    assert estimator.cuts == (() if name in whole else ("3",))


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mlp", "linear"), ("cnn", "linear"), ("resnet18-8b", "cnn"), ("small-net", "cnn"), ("rows", "linear"), ("images", "cnn")],
)
def test_heads_are_convolutional_where_all_outputs_are_images(name: str, kind: str) -> None:
    own = {
        "rows": nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(8, 4)),
        "images": nn.Sequential(
            nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (32, 32)), nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 10, 30)
        ),
    }
    model = own[name] if name in own else models.build(name, (3, 32, 32), 10, Network())
    x = torch.zeros(2, 5, 32) if name == "rows" else torch.zeros(2, 3, 32, 32)
    config = Train(algorithm="local", cuts=("0",)) if name in own else Train(algorithm="local", model=name)
    heads = make_heads(model, config, x)
    assert {any(isinstance(layer, nn.Conv2d) for layer in head.modules()) for head in heads.values()} == {kind == "cnn"}
    if name == "rows":
        with pytest.raises(UsageError, match=r"a cnn head at cut '0': .* not \(N, C, H, W\): use --heads.kind linear"):
            make_heads(model, dataclasses.replace(config, heads=Heads("cnn")), x)


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
