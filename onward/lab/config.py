"""What a run is made of. Each part's settings nest under its owner: `--feedback.lr` is the field `feedback.lr`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_type_hints

from onward.errors import UsageError
from onward.lab.batches import Transform

T = TypeVar("T")


@dataclass(frozen=True)
class Network:
    """The network, beyond its name."""

    width: float = 1.0
    """Multiplies the width of every hidden layer."""
    layers: int = 2
    """Hidden layers of mlp."""
    pool_first: bool = False
    """Max-pool after the first convolution of cnn too."""
    downsample: Literal["conv", "avg-pool"] = "conv"
    """How resnet18-8b and -2b halve what goes around a block, by stride or average pool; conv leaves small-net at full size."""


@dataclass(frozen=True)
class Optimizer:
    """How the network's parameters follow their gradient estimates."""

    name: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.0
    """Of sgd."""
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """The network's learning rate over time; the feedback's stays as it is."""

    gamma: float = 0.95
    """The learning rate is multiplied by this after every epoch."""


@dataclass(frozen=True)
class Feedback:
    """The feedback matrices of dkp and fdfa."""

    lr: float = 1e-4
    optimizer: Literal["adam", "sgd"] = "adam"
    """With sgd, fdfa's matrices are moving averages at rate lr."""
    decay: float = 0.0
    """Weight decay; 1e-6 is recommended for dkp."""
    directions: int = 1
    """Tangents that fdfa averages in each step."""


@dataclass(frozen=True)
class ForwardGradient:
    """The random directions of fg."""

    space: Literal["activation", "avg-weight"] = "activation"
    """Perturb each sample's activations, or all weights at once."""
    noise: Literal["gaussian", "rademacher"] = "gaussian"
    directions: int = 1
    """Tangents averaged in each step."""


@dataclass(frozen=True)
class Backprop:
    """Backpropagation, the baseline."""

    checkpoint: bool = False
    """Keep no activations inside a block: run it again in the backward sweep."""


@dataclass(frozen=True)
class Subset:
    """A fixed random part of the data, for quick trials."""

    train: int | None = None
    """Training images; all of them if not given."""
    test: int | None = None
    """Test images; all of them if not given."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What runs that are compared with each other have in common."""

    model: str = "mlp"
    """A network that `onward list` names."""
    data: str = "digits"
    """A data set that `onward list` names, or owner/name on the Hugging Face hub."""
    data_dir: str | None = None
    """A folder of parquet files, or of class folders of images, to read instead."""
    epochs: int = 20
    batch_size: int = 64
    test_batch_size: int = 1000
    lr: float = 1e-4
    """Learning rate of the network."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    out: str | None = None
    """Folder to write to; a name under runs/ if not given."""
    overwrite: bool = False
    """Replace what an earlier run left there."""
    low_memory: bool = False
    """dfa, dkp, fdfa, fg: run the network twice and keep nothing per block."""
    wandb: bool = False
    """Log to Weights & Biases too."""
    log_interval: int = 100
    """Steps between two training losses in TensorBoard."""
    network: Network = field(default_factory=Network)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    feedback: Feedback = field(default_factory=Feedback)
    forward_gradient: ForwardGradient = field(default_factory=ForwardGradient)
    backprop: Backprop = field(default_factory=Backprop)
    transform: Transform = field(default_factory=Transform)
    subset: Subset = field(default_factory=Subset)

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("test_batch_size", 1), ("log_interval", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: use at least {least}")
        for flag, rate in (("--lr", self.lr), ("--feedback.lr", self.feedback.lr)):
            if not 0 <= rate < float("inf"):
                raise UsageError(f"{flag} {rate}: a learning rate is a number from 0 on")
        if self.optimizer.momentum and self.optimizer.name != "sgd":
            raise UsageError(
                f"--optimizer.momentum {self.optimizer.momentum} is for --optimizer.name sgd: give both or neither"
            )


@dataclass(frozen=True, kw_only=True)
class Train(Recipe):
    """Train one network with one algorithm, into a run folder."""

    algorithm: str = "fdfa"
    """An algorithm that `onward list` names."""
    seed: int = 0
    """Of the initial weights, the order of the data and every random direction."""


@dataclass(frozen=True, kw_only=True)
class Compare(Recipe):
    """Train a network with several algorithms and several seeds; print a table, draw the learning curves."""

    algorithms: tuple[str, ...] = ("bp", "dfa", "dkp", "fdfa")
    """Algorithms that `onward list` names."""
    seeds: int = 3
    """Runs of each algorithm: seeds 0, 1, ..."""

    def runs(self) -> list[Train]:
        """One training for every algorithm and seed."""
        shared = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(Recipe)}
        return [
            Train(**shared, algorithm=name, seed=seed) for name in dict.fromkeys(self.algorithms) for seed in range(self.seeds)
        ]


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """The configuration that `dataclasses.asdict` turned into `values`, also after a trip through JSON.

    >>> import json
    >>> from_dict(Train, json.loads(json.dumps(dataclasses.asdict(Train(lr=0.1))))) == Train(lr=0.1)
    True
    """
    hints = get_type_hints(kind)
    return kind(**{name: _restored(hints[name], value) for name, value in values.items()})


def _restored(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    return tuple(value) if isinstance(value, list) else value
