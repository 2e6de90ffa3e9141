"""What a run is made of. Each part's settings nest under its owner: `--feedback.lr` is the field `feedback.lr`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from onward.errors import UsageError, unknown
from onward.lab.checks import FROM_0, FROM_1, POSITIVE, at_home, check_number
from onward.lab.plain import flat
from onward.lab.system.extra import lab_extra

with lab_extra():
    import tyro

AUGMENTATIONS = ("none", "crop-flip", "resized-crop-flip")


@dataclass(frozen=True)
class Network:
    """The network, beyond its name."""

    width: float = 1.0
    """Multiplies the width of every hidden layer; of gpt, the features of a token (128 if left at 1)."""
    layers: int = 2
    """Hidden layers of mlp, blocks of chain and local-mixer, layers of gpt."""
    heads: int = 4
    """Of attention, in gpt."""
    lora: Annotated[int | None, tyro.conf.arg(aliases=["--lora"])] = None
    """Of hf: the rank of adapters (peft) that are trained in place of the network's own weights."""
    pool_first: bool = False
    """Max-pool after the first convolution of cnn too."""
    downsample: Literal["conv", "avg-pool"] = "conv"
    """How resnet18-8b and -2b halve what goes around a block, by stride or average pool; conv leaves small-net at full size."""
    dropout: float = 0.0
    """Of mlp, vgg8b and vgg11b: the share of each hidden layer's outputs that a training step leaves out."""
    leaky: bool = False
    """Of mlp, vgg8b and vgg11b: a slope of 0.01 below zero instead of ReLU."""


@dataclass(frozen=True)
class Optimizer:
    """How the network's parameters follow their gradient estimates."""

    name: Literal["adam", "sgd", "lean"] = "adam"
    """lean is sgd that stores no gradient, for spsa, and for fg in avg-weight with random guesses."""
    momentum: float = 0.0
    """Of sgd."""
    nesterov: bool = False
    """Of sgd with momentum: look ahead along it, as Nesterov does."""
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """The learning rate of the network and its heads over time; the feedback's stays as it is."""

    name: Literal["exponential", "step", "milestones", "plateau", "onecycle", "linear", "cosine", "constant"] = "exponential"
    """exponential, step, milestones and plateau multiply the rate by gamma, after every epoch, every step_size epochs, the
    epochs of milestones, or when the training loss no longer falls; onecycle (whose peak is lr), linear and cosine (down to 0)
    change it at every step of the run."""
    gamma: float | None = None
    """If not given: 0.95 of exponential, 0.2 of the others."""
    step_size: int = 30
    """Epochs between two changes of step."""
    milestones: tuple[int, ...] = ()
    """The epochs after which milestones changes the rate."""
    patience: int = 15
    """Epochs that plateau waits for a lower training loss."""
    start: float = 1.0
    """Where linear begins, as a multiple of lr."""
    end: float = 0.0
    """Where linear ends, as a multiple of lr."""


@dataclass(frozen=True)
class Feedback:
    """The feedback matrices of dkp, fdfa and feedback guesses."""

    lr: float = 1e-4
    optimizer: Literal["adam", "sgd"] = "adam"
    """With sgd, fdfa's matrices are moving averages at rate lr."""
    decay: float = 0.0
    """Weight decay; 1e-6 is recommended for dkp."""


@dataclass(frozen=True)
class Heads:
    """The auxiliary networks that give hidden blocks a loss of their own; they learn as the network does."""

    kind: Literal["cnn", "mlp", "linear", "predsim", "auglocal", "pieces"] | None = None
    """If not given: cnn, or linear where a hidden block's output is no image: an mlp would cost more than such a block."""
    width: int | None = None
    """Hidden channels of cnn (if not given: 32), features of mlp (1024), half of that beyond 8 hidden blocks; multiplied by
    network.width."""
    depth: int | None = None
    """Copied blocks in the first head of auglocal; if not given: 2. Later ones have fewer."""
    groups: int | None = None
    """Groups of channels of pieces; if not given: 1."""
    patches: int | None = None
    """Patches along each side of an image (or of a sequence) of pieces; if not given: 1."""
    lr: float | None = None
    """Their learning rate; if not given, that of the network."""
    decay: float | None = None
    """Their weight decay; if not given, that of the network."""


@dataclass(frozen=True)
class Transform:
    """What happens to images: pixels go to [0, 1], then (x - mean) / std; training batches are augmented in between."""

    mean: float | tuple[float, ...] = 0.5
    """One number, or one per channel."""
    std: float | tuple[float, ...] = 0.5
    """One number, or one per channel."""
    augment: str = "none"
    """Of training batches: none; crop-flip, a random crop of the image padded with black pixels on every side, mirrored half
    of the time; resized-crop-flip, a random 8 to 100 % of its area, resized to size, mirrored half of the time."""
    padding: int = 4
    """Black pixels on every side that crop-flip crops from."""
    cutout: int = 0
    """Of training batches: the side of a square, anywhere on the image, that is set to the mean; 0 for none."""
    size: int | None = None
    """Side of the squares that images become: resized on their shorter side, cut to their middle; not given, they stay."""

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise unknown("augmentation", self.augment, AUGMENTATIONS)
        check_number("transform.size", self.size, 1)
        check_number("transform.padding", self.padding)
        check_number("transform.cutout", self.cutout)
        if not all(0 < value < float("inf") for value in (self.std if isinstance(self.std, tuple) else (self.std,))):
            raise UsageError(f"--transform.std {self.std}: use positive numbers")


@dataclass(frozen=True)
class TaskSettings:
    """What the network is trained for."""

    name: Annotated[str, tyro.conf.arg(aliases=["--task"])] = "auto"
    """A task that `onward list` names; auto takes the one that the targets look like."""
    label_smoothing: float = 0.0
    """Of classification: a part of each label that is spread over all classes."""
    class_weights: tuple[float, ...] = ()
    """Of classification, a number for each class: what a sample of it counts in the loss."""

    def __post_init__(self) -> None:
        weights = self.class_weights
        if not 0 <= self.label_smoothing <= 1:
            raise UsageError(f"--task.label-smoothing {self.label_smoothing}: use a number from 0 to 1")
        if weights and not (all(0 <= weight < float("inf") for weight in weights) and any(weights)):
            raise UsageError(f"--task.class-weights {' '.join(map(str, weights))}: use numbers from 0, and one above it")


@dataclass(frozen=True)
class Text:
    """How text becomes numbers."""

    unit: Literal["characters", "bytes"] = "characters"
    """What a token is: a character of the text, or a byte of it in UTF-8."""
    window: int = 64
    """Tokens that the network sees at once. A text is cut into such windows; rows of a table are cut, or filled up, to one."""
    tokenizer: str | None = None
    """In place of a unit: a tokenizer of transformers, by its name on the hub or its folder."""
    column: str | None = None
    """Of a table: the column of text. If not given: text, sentence, ..., or the only one that is text."""
    label: str | None = None
    """Of a table: the column of classes. If not given: label, class or target; without one, the text itself is predicted."""


@dataclass(frozen=True)
class Subset:
    """A fixed random part of the data, for quick trials."""

    train: int | None = None
    """Training samples; all of them if not given."""
    test: int | None = None
    """Test samples; all of them if not given."""
    held_out: bool = False
    """Test on a fifth of the training samples (of each class), which are then not trained on; the test samples stay unseen."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every command that builds a network and an algorithm is told about them."""

    model: str = "mlp"
    """A network that `onward list` names, or path/to/file.py:function of your own, whose function (called without arguments,
    or with those it names: shape, classes and what --network has) returns it."""
    input: str | None = None
    """Shape of one input, such as 3,32,32; if not given, that of the data (bench: of the images that the network is for)."""
    cuts: tuple[str, ...] | None = None
    """Modules whose outputs end a block; if not given, the children of a Sequential with parameters but the last."""
    batch_size: int = 64
    lr: float = 1e-4
    """Learning rate of the network and its heads."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 computes in bfloat16 where autocast does, on processors and GPUs that can; weights and losses stay as they are."""
    channels_last: bool = False
    """Keep images in memory pixel by pixel instead of map by map, which some convolutions run faster on."""
    compile: Literal["off", "auto", "replay", "inductor"] = "off"
    """Trace a step once and replay it, as it is (the same numbers) or compiled by inductor; auto takes what is fastest here."""
    network: Network = field(default_factory=Network)
    optimizer: Optimizer = field(default_factory=Optimizer)
    feedback: Feedback = field(default_factory=Feedback)
    heads: Heads = field(default_factory=Heads)

    def __post_init__(self) -> None:
        at_home(self)
        if self.cuts == ():
            raise UsageError("--cuts: name at least one module, or leave it out")
        for name, value in flat(self).items():
            if name in FROM_1 | FROM_0 | POSITIVE:
                for number in value if isinstance(value, tuple) else (value,):
                    check_number(name, number, int(name in FROM_1), above=name in POSITIVE)
        if self.optimizer.momentum and self.optimizer.name != "sgd":
            why = f"--optimizer.momentum {self.optimizer.momentum} is for --optimizer.name sgd"
            raise UsageError(f"{why}: give both or neither")
        if self.optimizer.nesterov and not self.optimizer.momentum:
            why = "--optimizer.nesterov looks ahead along a momentum, and there is none"
            raise UsageError(f"{why}: give --optimizer.name sgd and --optimizer.momentum too")


@dataclass(frozen=True, kw_only=True)
class Recipe(Setup):
    """What runs that are compared with each other have in common."""

    data: str = "digits"
    """A data set that `onward list` names, path/to/file.txt, owner/name on the Hugging Face hub, or path/to/file.py:function of
    your own, whose function (called without arguments, or with the seed) returns (train, test): two pairs of tensors (inputs,
    targets), or torch.utils.data.Dataset of such pairs."""
    data_dir: str | None = None
    """A folder of parquet files, or of class folders of images, to read instead."""
    data_timeout: float = 300.0
    """Seconds that an image may take to be read, before a disk or a network is taken to have stalled and the run stops."""
    epochs: int = 20
    test_batch_size: int = 1000
    drop_last: bool = False
    """Leave out the last batch of an epoch, if it is not full."""
    out: str | None = None
    """Folder to write to; a name under runs/ if not given."""
    overwrite: bool = False
    """Replace what an earlier run left there."""
    checkpoint_every: str = "10m"
    """How often within an epoch the run is saved, so that it can go on from there: in minutes (10m) or steps (500)."""
    save_weights: int = 0
    """Keep the network's weights, in a file of their own, every so many epochs and at the end; 0 keeps none."""
    align_every: int = 0
    """Before training, every so many epochs and at the end, measure how the estimates of each block align with the true
    gradient; 0 never does."""
    align_estimates: int = 10
    """Estimates on one batch that bias and variance are measured from."""
    wandb: bool = False
    """Log to Weights & Biases too."""
    wandb_project: str = "onward"
    """The project there."""
    wandb_name: str | None = None
    """The name of the run there; that of its folder if not given."""
    log_interval: int = 100
    """Steps between two training losses in TensorBoard."""
    task: TaskSettings = field(default_factory=TaskSettings)
    schedule: Schedule = field(default_factory=Schedule)
    transform: Transform = field(default_factory=Transform)
    text: Text = field(default_factory=Text)
    subset: Subset = field(default_factory=Subset)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[1-9]\d*|(\d+\.)?\d+m", self.checkpoint_every):
            why = f"--checkpoint-every {self.checkpoint_every}"
            raise UsageError(f"{why}: give a number of steps, such as 500, or of minutes, such as 10m")


@dataclass(frozen=True, kw_only=True)
class Train(Recipe):
    """Train one network with one algorithm, into a run folder."""

    recipe: str | None = None
    """Published settings that `onward list` names, or path/to/file.toml of your own; what else is given comes before them."""
    algorithm: str = "fdfa"
    """An algorithm that `onward list` names, or path/to/file.py:MyRule of your own; with settings if need be, as in
    fdfa:directions=4."""
    seed: int = 0
    """Of the initial weights, the order of the data and every random direction."""
    statistics: str = "averaged"
    """What batch norm does on several processes (torchrun): averaged, local or synchronised, as onward.distribute has them."""
    resume: str | None = None
    """Go on with the run in this folder, whose settings are kept; --device, --data-dir and others that no result depends on may
    be given anew."""


@dataclass(frozen=True, kw_only=True)
class Compare(Recipe):
    """Train a network with several algorithms and several seeds; print a table, draw the learning curves."""

    algorithms: tuple[str, ...] = ("bp", "local", "dfa", "dkp", "fdfa", "fg", "fg:guess=local")
    """Algorithms that `onward list` names, each with settings of its own if need be: fdfa:lr=1e-3, fg:guess=local."""
    epochs: int = 5
    seeds: int = 3
    """Runs of each algorithm: seeds 0, 1, ..."""
    lr_grid: tuple[float, ...] = ()
    """Try these learning rates, with seed 0, for every algorithm whose entry sets none: the one that does best on a
    held-out fifth of the training samples is taken."""
    lr_epochs: int | None = None
    """Epochs of such a trial; those of the runs if not given."""
    jobs: int = 1
    """Runs at once, each in a process of its own with its share of the threads."""


@dataclass(frozen=True, kw_only=True)
class Align(Recipe):
    """Measure, block by block, how estimated gradients agree with the true one: from checkpoints, or while training."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders, whose checkpoints are looked at; if none are given, --algorithms are trained and looked at on the way."""
    algorithms: tuple[str, ...] = ("bp", "local", "dfa", "dkp", "fdfa", "fg", "fg:guess=local")
    """Algorithms that `onward list` names, each with settings of its own if need be: fdfa:lr=1e-3, fg:guess=local."""
    seed: int = 0
    """Of the initial weights, the order of the data and every random direction."""
    epochs: int = 5
    align_every: int = 1
    """Epochs between two measurements; the first is made before training."""
    align_estimates: int = 20
    """Estimates on one batch that bias and variance are measured from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("align_every", self.align_every, 1)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Put runs on one HTML page that needs nothing else: tables, curves, cost, alignment, settings, commands."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders, or folders with run folders somewhere below them."""
    out: str = "report.html"
    """The page."""
    watch: float | None = None
    """Write the page anew every so many seconds, while runs go on, until Ctrl-C; an open page reloads itself."""

    def __post_init__(self) -> None:
        at_home(self)
        check_number("watch", self.watch, above=True)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Put finished runs of recipes into a table beside what was published."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders, files that --keep has written, or folders with either somewhere below them."""
    keep: str | None = None
    """Write each run's result to a file of its own in this folder, and count those that are there already."""
    into: str | None = None
    """Put the table into this Markdown file, between its two lines that mark the place."""

    def __post_init__(self) -> None:
        at_home(self)


@dataclass(frozen=True)
class Doctor:
    """Say what there is on this machine (versions, devices, threads, extras), and try every algorithm against its formula."""


@dataclass(frozen=True, kw_only=True)
class Bench(Setup):
    """Measure time, memory and arithmetic of a training step with each algorithm, beside backpropagation with and without
    checkpoints."""

    algorithms: tuple[str, ...] = ("local", "dfa", "dkp", "fdfa", "fdfa:low_memory=true", "fg")
    """Algorithms that `onward list` names, or variants such as fg:guess=local,engine=reverse; bp and bp:checkpoint=true are
    always measured."""
    classes: int = 10
    """Outputs of the network; of networks for tokens, how many of these there are."""
    task: str = "auto"
    """A task that `onward list` names, whose loss is computed; auto takes the one that the network is for."""
    turns: int = 7
    """Turns that the algorithms take."""
    steps: int | None = None
    """Timed steps in a turn; if not given, as many as bp makes in half a second, at most 20."""
    sweep: tuple[str, ...] | None = None
    """depth (--network.layers), width (--network.width) or batch, and the values to measure at: depth 8 16 32 64."""
    plot: str | None = None
    """Picture of the sweep; if not given, bench-<model>-<sweep>.png."""
    json: str | None = None
    """Write all figures to this file too."""
