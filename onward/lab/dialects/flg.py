"""The command line of ForwardLocalGradient, the code of "Can Forward Gradient Match Backpropagation?".

Source of the dialect: the README and args.py of github.com/streethagore/ForwardLocalGradient (Fournier et al. 2023). The README
and the code spell several flags differently, and none of the README's commands parse there; here both spellings do. What that
code does otherwise, and where this differs: docs/papers.md.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from onward import ForwardGradient
from onward.errors import UsageError
from onward.lab.data.sets import ON_HUB
from onward.lab.dialects import fdfa
from onward.lab.dialects.commands import Command, given, in_own_words, no_effect
from onward.lab.networks.blocks import scaled
from onward.lab.run.algorithms import spelled as entry
from onward.lab.settings import Heads, Network, Optimizer, Schedule, Subset, Train, Transform

HIDDEN_BLOCKS = {"resnet18-8b": 7, "resnet18-16b": 15, "resnet18-2b": 1, "small-net": 5}
ARCHITECTURES = {"resnet18": "resnet18-8b"} | {name: name for name in HIDDEN_BLOCKS}
ALGORITHMS = {"std": "bp", "localonly": "local", "avg-weight-fast": "fg", "generic": "fg"}
TARGETS = {"e2e": "global"} | {name: name for name in ("global", "local", "above", "sum")}
GUESSES = {"localgrad": "local", **TARGETS} | {name: name for name in ("random", "ntk", "fixed-ntk", "feedback")}
WEIGHT_SPACES = ("weight", "avg-weight", "span-weight", "sign-weight", "random-sign-weight", "f-weight")
SPACES = {name: name for name in (*WEIGHT_SPACES, "activation", "activation-2", "span-activation", "f-activation")}
SPACES |= {name.replace("activation", "activity"): name for name in SPACES}
PROJECTIONS = ("weight", "avg-weight", "activation", "activation-2")
"""Spaces where something is divided by a squared length."""
SCHEDULERS: dict[str, tuple[Any, dict[str, str]]] = {
    "steplr": ("step", {"gamma": "gamma", "step_size": "step_size"}),
    "plateau": ("plateau", {"factor": "gamma", "patience": "patience"}),
    "onecycle": ("onecycle", {"maxlr": "", "step_per_epoch_time_bs": ""}),
    "linear": ("linear", {"start_factor": "start", "end_factor": "end", "total_iters": ""}),
    "constant": ("constant", {}),
}
"""By that code's name: the schedule here, and for each of its flags the setting of the schedule, if there is one."""
WEIGHTS = ("xavier-uniform", "xavier-normal", "kaiming-uniform", "kaiming-normal", "normal", "uniform", "ones", "zeros")
HEADS = ("mlp", "cnn", "linear", "predsim")
IMAGENET = Transform(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), augment="resized-crop-flip", size=224)
CIFAR = Transform(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), augment="crop-flip")
TRANSFORMS = {"cifar10": CIFAR, "cifar100": CIFAR, "imagenette": IMAGENET, "imagenet": IMAGENET}
TRANSFORMS["imagenet32"] = replace(IMAGENET, size=32)
OF_OTHERS = Transform(mean=0.0, std=1.0)
WITHOUT_EFFECT = {
    **dict.fromkeys(("num_workers", "prefetch_factor"), "images are kept in memory, or decoded by threads"),
    **dict.fromkeys(("checkpoint_time", "dim", "num_block"), "nothing reads it there either"),
    "image_size_over_32": "the stem follows the size of the images",
    "step_per_epoch_time_bs": "the schedule counts the steps of the run itself",
}
FLAGS = {"--align-every": "histogram", "--batch-size": "batchsize", "--data": "dataset", "--data-dir": "path"}
FLAGS |= {"--device": "device", "--epochs": "n_epoch", "--heads.kind": "auxnet", "--heads.width": "h_channel"}
FLAGS |= {"--log-interval": "log_freq", "--lr": "lr", "--network.downsample": "downsample", "--network.width": "widen_factor"}
FLAGS |= {"--optimizer.momentum": "momentum", "--optimizer.name": "optimizer", "--optimizer.weight-decay": "wd"}
FLAGS |= {"--out": "log_dir", "--save-weights": "save_model", "--schedule.end": "end_factor", "--schedule.gamma": "gamma"}
FLAGS |= {"--schedule.name": "scheduler", "--schedule.patience": "patience", "--schedule.start": "start_factor"}
FLAGS |= {"--schedule.step-size": "step_size", "--seed": "seed", "--subset.test": "num_test_sample"}
FLAGS |= {"--subset.train": "num_train_sample", "--transform.augment": "augmentation", "--transform.size": "image_size"}
FLAGS |= {"--wandb": "status", "--wandb-name": "run_name", "--wandb-project": "project"}
"""Of `onward train`'s flags, what this code's flag for the same sets."""
PHRASES = {
    "or --device cpu": "or hide the GPUs with CUDA_VISIBLE_DEVICES=",
    "use cpu, or auto": "use another one, or hide the GPUs with CUDA_VISIBLE_DEVICES=",
}


def parser() -> argparse.ArgumentParser:
    """The flags of ForwardLocalGradient, and `--seed` and `--log-dir`."""
    flags = argparse.ArgumentParser(
        description="ForwardLocalGradient's command line. `onward train` offers more.", allow_abbrev=False
    )

    def nested(part: str, name: str, **options: Any) -> None:
        """A flag of a part's own, as the README spells it and as the code does."""
        flags.add_argument(f"--{part}.{name}", f"--{name}", dest=name, **options)

    for add_some in (_flags_of_method, _flags_of_optimizer, _flags_of_run):
        add_some(flags.add_argument, nested)
    return flags


def _flags_of_method(add: Callable[..., object], nested: Callable[..., object]) -> None:
    add("--algo", metavar="NAME", help="a name of --algorithm, or fg-tgt-TARGET-guess-GUESS-SPACE (default: as the next say)")
    add("--algorithm", choices=ALGORITHMS, default="generic")
    add("--target", choices=TARGETS, default="global", help="(default: global)")
    add("--guess", choices=GUESSES, default="local", help="(default: local)")
    add("--space", choices=[*SPACES, "constrained-weight"], default="weight", help="(default: weight)")
    add("--noise_type", choices=["gaussian", "rademacher"], default="gaussian", help="of random guesses (default: gaussian)")
    add("--eps_norm", "--eps", dest="eps", type=float, default=1e-16, help="(default: 1e-16)")
    add("--arch", choices=ARCHITECTURES, default="resnet18-8b", help="(default: resnet18-8b)")
    add("--downsample", choices=["conv", "avg-pool"], default="conv", help="(default: conv)")
    add("--widen_factor", type=float, default=1.0, metavar="W", help="(default: 1)")
    add("--weight_init", choices=WEIGHTS, default="kaiming-uniform", help="kaiming-uniform is the only one here")
    add("--auxnet", choices=HEADS, default="mlp", help="(default: mlp)")
    nested("auxnet", "h_channel", type=int, metavar="N", help="(default: 32 of cnn, 1024 of mlp; half with resnet18-16b)")
    for flag in ("aux_type", "pool_size", "n_layers"):
        nested("auxnet", flag, type=str if flag == "aux_type" else int, help=argparse.SUPPRESS)


def _flags_of_optimizer(add: Callable[..., object], nested: Callable[..., object]) -> None:
    add("--n_epoch", type=int, metavar="N", help="(default: 100; imagenet32: 70)")
    add("--optimizer", choices=["sgd", "adam"], default="sgd", help="(default: sgd)")
    nested("optimizer", "batchsize", type=int, metavar="N", help="(default: 128; adam: 512)")
    nested("optimizer", "lr", type=float, help="(default: 0.05; adam: 1e-3)")
    nested("optimizer", "wd", type=float, help="weight decay (default: 5e-4; adam: 1e-6)")
    nested("optimizer", "momentum", type=float, help="of sgd (default: 0.9)")
    add("--scheduler", choices=SCHEDULERS, default="steplr", help="(default: steplr)")
    nested("scheduler", "gamma", type=float, default=0.2, help="of steplr (default: 0.2)")
    nested("scheduler", "step_size", type=int, default=30, metavar="N", help="of steplr, in epochs (default: 30)")
    nested("scheduler", "factor", type=float, default=0.2, help="of plateau (default: 0.2)")
    nested("scheduler", "patience", type=int, default=15, metavar="N", help="of plateau, in epochs (default: 15)")
    nested("scheduler", "maxlr", type=float, default=0.1, metavar="LR", help="of onecycle, instead of lr (default: 0.1)")
    nested("scheduler", "step_per_epoch_time_bs", help=argparse.SUPPRESS)
    nested("scheduler", "start_factor", type=float, default=1.0, metavar="F", help="of linear (default: 1)")
    nested("scheduler", "end_factor", type=float, default=0.0, metavar="F", help="of linear (default: 0)")
    nested("scheduler", "total_iters", type=float, help=argparse.SUPPRESS)


def _flags_of_run(add: Callable[..., object], nested: Callable[..., object]) -> None:
    add("--dataset", type=_dataset, choices=list(ON_HUB), default="cifar10", help="(default: cifar10)")
    add("--path", default="", metavar="DIR", help="read the images from this folder")
    add("--num_train_sample", type=int, default=0, metavar="N", help="a random part of them (default: 0, all)")
    add("--num_test_sample", type=int, default=0, metavar="N", help="(default: 0, all)")
    add("--image_size", type=int, default=0, metavar="N", help="(default: 224 of imagenet and imagenette, 32 of imagenet32)")
    add("--image_size_over_32", action="store_true", help="without effect: the stem follows the size of the images")
    add("--augmentation", choices=["standard", "none"], default="standard", help="(default: standard)")
    add("--save_model", type=int, nargs="?", const=1, default=0, metavar="N", help="keep the weights every N epochs")
    add("--histogram", action="store_true", help="write histograms of the alignment with the true gradient")
    add("--status", action="store_true", help="log to Weights & Biases")
    add("--project", default="Forward Gradient", help="of Weights & Biases (default: Forward Gradient)")
    add("--run_name", default="default-name", help="of Weights & Biases (default: default-name)")
    add("--entity", help="of Weights & Biases")
    add("--device", type=int, default=0, metavar="N", help="number of the GPU, where there is one (default: 0)")
    add("--log-freq", type=int, default=39, metavar="N", help="steps between two logged losses (default: 39)")
    add("--log-dir", default="results", metavar="DIR", help="(default: results)")
    add("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    for flag in ("--num-workers", "--prefetch-factor", "--checkpoint_time", "--dim", "--num_block"):
        add(flag, help=argparse.SUPPRESS)


def _dataset(name: str) -> str:
    if name in fdfa.DATA:
        why = f"{name} is FDFA's name for it, and the other flags are not FDFA's: use {fdfa.DATA[name]}"
        raise argparse.ArgumentTypeError(f"{why}; or, for FDFA's command line, --data-dir instead of --path")
    return name


def read(arguments: Sequence[str]) -> Command:
    """What a command line of ForwardLocalGradient means. Raises a UsageError for a name that has no meaning, a value out of its
    range, or one that only that code has."""
    flags = parser()
    asked = flags.parse_args(arguments)
    spelled = {action.dest: action.option_strings[0] for action in flags._actions} | given(flags, arguments)
    algorithm, fg = _algorithm(asked)
    model = ARCHITECTURES[asked.arch]
    heads = model == "resnet18-2b" or algorithm == "local"  # whether any are trained
    heads |= algorithm == "fg" and ForwardGradient.needs_heads(**fg)
    sgd = asked.optimizer == "sgd"
    epochs = (70 if asked.dataset == "imagenet32" else 100) if asked.n_epoch is None else asked.n_epoch
    gpus = torch.cuda.device_count()
    _check(asked, spelled, epochs, gpus)
    if heads:
        _check_heads(asked, spelled)
    method = {"local": ["local", asked.auxnet], "bp": ["std"]}.get(algorithm)
    method = method or [asked.auxnet, fg["target"], fg["guess"], fg["space"]]
    names = _names(asked, spelled)
    with in_own_words(names):
        config = Train(
            algorithm=entry(algorithm, ForwardGradient, fg),
            model=model,
            cuts=_cuts(model, fg),
            data=asked.dataset,
            data_dir=asked.path or None,
            epochs=epochs,
            batch_size=(128 if sgd else 512) if asked.batchsize is None else asked.batchsize,
            drop_last=True,
            lr=asked.maxlr if asked.scheduler == "onecycle" else (0.05 if sgd else 1e-3) if asked.lr is None else asked.lr,
            seed=asked.seed,
            device=f"cuda:{asked.device}" if gpus else "cpu",
            out=str(Path(asked.log_dir) / "-".join([model, *method]) / time.strftime("%y%m%d_%H%M%S")),
            save_weights=asked.save_model,
            align_every=int(asked.histogram),
            wandb=asked.status,
            wandb_project=asked.project,
            wandb_name=asked.run_name,
            log_interval=asked.log_freq,
            network=Network(width=asked.widen_factor, downsample="conv" if model == "resnet18-16b" else asked.downsample),
            optimizer=Optimizer(
                name=asked.optimizer,
                momentum=(0.9 if asked.momentum is None else asked.momentum) if sgd else 0.0,
                weight_decay=(5e-4 if sgd else 1e-6) if asked.wd is None else asked.wd,
            ),
            schedule=_schedule(asked),
            heads=Heads(kind=asked.auxnet, width=asked.h_channel or None),
            transform=_transform(asked),
            subset=Subset(train=asked.num_train_sample or None, test=asked.num_test_sample or None),
        )
        told = no_effect(given(flags, arguments), _reasons(asked, config, fg, heads, gpus)) + _differences(asked, config, heads)
    environment = {"WANDB_ENTITY": asked.entity} if asked.entity and asked.status else {}
    return Command(config, names, tuple(told), environment)


def _names(asked: argparse.Namespace, spelled: dict[str, str]) -> dict[str, str]:
    """What this code has in the place of `onward train`'s flags, and of phrases with one."""
    names, data = {flag: spelled[name] for flag, name in FLAGS.items()} | PHRASES, spelled["dataset"]
    names["give one number, or one per channel"] = f"{data} {asked.dataset} has set that, for grey images use {data} mnist"
    if asked.scheduler == "onecycle":
        names["--lr"] = spelled["maxlr"]
    if asked.scheduler == "plateau":
        names["--schedule.gamma"] = spelled["factor"]
    return names


def _algorithm(asked: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What --algo means, or --algorithm, --target, --guess and --space: an algorithm, and how a forward gradient is set."""
    name = asked.algo or asked.algorithm
    if ALGORITHMS.get(name) in ("bp", "local"):
        return ALGORITHMS[name], {}
    if name == "avg-weight-fast":
        return "fg", _forward_gradient(asked.target, asked.guess, "avg-weight", asked, unbiased=True)
    if name == "generic":
        return "fg", _forward_gradient(asked.target, asked.guess, asked.space, asked)
    targets, guesses, spaces = ("|".join(names) for names in (TARGETS, GUESSES, [*SPACES, "constrained-weight"]))
    parts = re.fullmatch(f"fg-tgt-({targets})-guess-({guesses})-({spaces})", name)
    if parts is None:
        raise UsageError(
            f"--algo {name}: use {', '.join(ALGORITHMS)}, or fg-tgt-TARGET-guess-GUESS-SPACE with a TARGET out of "
            f"{', '.join(TARGETS)}, a GUESS out of {', '.join(GUESSES)} and a SPACE out of {', '.join(SPACES)}"
        )
    target, guess, space = parts.groups()
    return "fg", _forward_gradient(target, guess, space, asked)


def _forward_gradient(
    target: str, guess: str, space: str, asked: argparse.Namespace, *, unbiased: bool = False
) -> dict[str, Any]:
    """The forward gradient as that code measures it: by a backward sweep, and projecting on random directions of weights."""
    if space == "constrained-weight":
        why = "constrained-weight has no definition anywhere, neither in the paper nor in its code"
        raise UsageError(f"{why}: use weight, or avg-weight")
    projected = GUESSES[guess] == "random" and space in WEIGHT_SPACES and not unbiased
    scaling = "projection" if projected else "unbiased"
    names = {"target": TARGETS[target], "guess": GUESSES[guess], "space": SPACES[space]}
    return {**names, "engine": "reverse", "noise": asked.noise_type, "scaling": scaling, "eps": asked.eps}


def _schedule(asked: argparse.Namespace) -> Schedule:
    """The schedule, with the settings that it has and no others."""
    name, flags = SCHEDULERS[asked.scheduler]
    return Schedule(name, **{setting: getattr(asked, flag) for flag, setting in flags.items() if setting})


def _transform(asked: argparse.Namespace) -> Transform:
    usual = TRANSFORMS.get(asked.dataset, OF_OTHERS)
    augment = usual.augment if asked.augmentation == "standard" else "none"
    return replace(usual, augment=augment, size=asked.image_size or usual.size)


def _cuts(model: str, fg: dict[str, Any]) -> tuple[str, ...] | None:
    """Every hidden block's output, where the library's default would be none: that code's last block learns from its exact
    gradient also beside random directions of all weights."""
    if (fg.get("guess"), fg.get("space")) != ("random", "avg-weight"):
        return None
    return tuple(f"block{number}" for number in range(1, HIDDEN_BLOCKS[model] + 1))


def _check(asked: argparse.Namespace, spelled: dict[str, str], epochs: int, gpus: int) -> None:
    """Refuse values that only that code has, and those that no code could use."""
    if asked.momentum is not None and asked.optimizer != "sgd":
        raise UsageError(f"{spelled['momentum']} {asked.momentum} is for --optimizer sgd: give both or neither")
    if not 0 <= asked.eps < math.inf:
        raise UsageError(f"{spelled['eps']} {asked.eps}: use at least 0")
    if asked.weight_init != "kaiming-uniform":
        raise UsageError(f"--weight_init {asked.weight_init}: networks and heads start kaiming-uniform here, leave it out")
    if asked.scheduler == "linear" and asked.total_iters not in (None, epochs):
        why = f"{spelled['total_iters']} {asked.total_iters:g}: linear takes the whole run here, {epochs} epochs"
        raise UsageError(f"{why}: leave it out")
    if gpus and not 0 <= asked.device < gpus:
        raise UsageError(f"--device {asked.device}: the GPUs here have the numbers 0 to {gpus - 1}")


def _check_heads(asked: argparse.Namespace, spelled: dict[str, str]) -> None:
    """Refuse what only that code's heads can be."""
    kind = asked.auxnet
    if asked.aux_type not in (None, kind):
        known = asked.aux_type if asked.aux_type in HEADS else kind
        why = f"{spelled['aux_type']} {asked.aux_type} beside --auxnet {kind} gives one kind of head the sizes of another there"
        raise UsageError(f"{why}: use --auxnet {known} alone")
    if asked.h_channel == 0 and kind in ("cnn", "mlp"):
        why = f"{spelled['h_channel']} 0 makes each head as wide as its block there; here all heads are of one width"
        raise UsageError(f"{why}: give it")
    fixed = {"cnn": {"pool_size": 2, "n_layers": 3}, "mlp": {"pool_size": 2, "n_layers": 3}, "linear": {"pool_size": 2}}
    for name, value in fixed.get(kind, {}).items():
        if getattr(asked, name) not in (None, value):
            raise UsageError(f"{spelled[name]} {getattr(asked, name)}: it is {value} in every {kind} head here, leave it out")


def _reasons(asked: argparse.Namespace, config: Train, fg: dict[str, Any], heads: bool, gpus: int) -> dict[str, str]:
    """Why flags have no effect, at all or beside others, by what they set."""
    reasons = dict(WITHOUT_EFFECT)
    name = asked.algo or asked.algorithm
    if asked.algo:
        reasons["algorithm"] = f"--algo {name} says it"
    if not fg:
        reasons |= dict.fromkeys(("target", "guess", "space", "noise_type", "eps"), f"{name} is no forward gradient")
    elif name.startswith("fg-"):
        reasons |= dict.fromkeys(("target", "guess", "space"), f"--algo {name} says it")
    elif name == "avg-weight-fast":
        reasons["space"] = f"{name} is avg-weight"
    if fg and fg["guess"] != "random":
        reasons["noise_type"] = "it is of random guesses"
    if fg and (fg["space"] not in PROJECTIONS or (fg["guess"] == "random" and fg["scaling"] == "unbiased")):
        reasons["eps"] = "this estimate is not divided by a length"
    kind = asked.auxnet
    if not heads:
        reasons |= dict.fromkeys(("auxnet", "aux_type", "h_channel", "pool_size", "n_layers"), "no head is trained")
    elif kind in ("linear", "predsim"):
        reasons |= dict.fromkeys(("h_channel", "n_layers"), f"a {kind} head has no hidden layers")
    if heads and kind == "predsim":
        reasons["pool_size"] = "a predsim head pools to 2,048 features"
    others = [(own, flags) for own, (_, flags) in SCHEDULERS.items() if own != asked.scheduler]
    reasons |= {flag: f"it is for --scheduler {own}" for own, flags in others for flag in flags}
    if asked.scheduler == "onecycle":
        reasons["lr"] = "the rates of onecycle are given by --maxlr"
    if config.model == "resnet18-16b":
        reasons["downsample"] = "resnet18-16b has no skip connections"
    if TRANSFORMS.get(asked.dataset, OF_OTHERS).augment == "none":
        reasons["augmentation"] = f"images of {asked.dataset} are never augmented"
    if not asked.status:
        reasons |= dict.fromkeys(("project", "run_name", "entity"), "without --status nothing is logged to Weights & Biases")
    if not gpus:
        reasons["device"] = "there is no GPU here"
    return reasons


def _differences(asked: argparse.Namespace, config: Train, heads: bool) -> list[str]:
    """A line for each flag that makes another network here than there."""
    told, factor, kind = [], asked.widen_factor, asked.auxnet
    if config.model in ("resnet18-2b", "small-net"):
        if factor != 1:
            told.append(f"--widen_factor {factor:g}: that code leaves {config.model} as it is, and narrows its heads alone")
        if asked.downsample == "avg-pool":
            told.append(f"--downsample avg-pool: that code leaves {config.model} as it is")
    numbers = [64, 128, 256, 512] if config.model in ("resnet18-8b", "resnet18-16b") else []
    if heads and kind in ("cnn", "mlp"):
        usual = {"cnn": 32, "mlp": 1024}[kind] // (2 if config.model == "resnet18-16b" else 1)
        if config.model == "resnet18-16b" and asked.h_channel not in (None, usual):
            told.append(f"--h_channel {asked.h_channel}: that code makes it {usual} with resnet18-16b, whatever is asked for")
        numbers.append(asked.h_channel or usual)
    differing = [f"{scaled(n, factor)} for {int(n * factor)}" for n in numbers if scaled(n, factor) != int(n * factor)]
    if differing:
        told.append(
            f"--widen_factor {factor:g}: that code rounds channels down, here they go to the nearest: {', '.join(differing)}"
        )
    return told
