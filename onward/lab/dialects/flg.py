"""The command line of ForwardLocalGradient, the code of "Can Forward Gradient Match Backpropagation?".

Source of the dialect: the README and args.py of github.com/streethagore/ForwardLocalGradient (Fournier et al. 2023). The README
and the code spell several flags differently, and none of the README's commands parse there; here both spellings do.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from onward.errors import UsageError
from onward.lab.batches import Transform
from onward.lab.config import ForwardGradient, Heads, Network, Optimizer, Schedule, Subset, Train
from onward.lab.data import DATASETS
from onward.lab.dialects import fdfa

ARCHITECTURES = {"resnet18": "resnet18-8b"} | {
    name: name for name in ("resnet18-8b", "resnet18-16b", "resnet18-2b", "small-net")
}
TARGETS = {"e2e": "global"} | {name: name for name in ("global", "local", "above", "sum")}
GUESSES = {"localgrad": "local", **TARGETS} | {name: name for name in ("random", "ntk", "fixed-ntk", "feedback")}
WEIGHT_SPACES = ("weight", "avg-weight", "span-weight", "sign-weight", "random-sign-weight", "f-weight")
SPACES = {name: name for name in (*WEIGHT_SPACES, "activation", "activation-2", "span-activation", "f-activation")} | {
    "activity": "activation",
    "activity-2": "activation-2",
    "span-activity": "span-activation",
    "f-activity": "f-activation",
}
SCHEDULERS = {"steplr": "step", "plateau": "plateau", "onecycle": "onecycle", "linear": "linear", "constant": "constant"}
IMAGENET = Transform(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), augment="resized-crop-flip", size=224)
CIFAR = Transform(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), augment="crop-flip")
TRANSFORMS = {
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "imagenette": IMAGENET,
    "imagenet": IMAGENET,
    "imagenet32": Transform(IMAGENET.mean, IMAGENET.std, IMAGENET.augment, size=32),
}
OF_OTHERS = Transform(mean=0.0, std=1.0)
WITHOUT_EFFECT = ("--num-workers", "--prefetch-factor", "--checkpoint_time", "--dim", "--num_block")


def parser() -> argparse.ArgumentParser:
    """The flags of ForwardLocalGradient, and `--seed`."""
    flags = argparse.ArgumentParser(
        description="ForwardLocalGradient's command line. `onward train` offers more.", allow_abbrev=False
    )

    def nested(part: str, name: str, **options: object) -> None:
        """A flag of a part's own, as the README spells it and as the code does."""
        flags.add_argument(f"--{part}.{name}", f"--{name}", dest=name, **options)

    add = flags.add_argument
    add("--algo", metavar="NAME", help="std, localonly, or fg-tgt-TARGET-guess-GUESS-SPACE (default: as the next four say)")
    add("--algorithm", choices=["std", "localonly", "avg-weight-fast", "generic"], default="generic")
    add("--target", choices=TARGETS, default="global", help="(default: global)")
    add("--guess", choices=GUESSES, default="local", help="(default: local)")
    add("--space", choices=[*SPACES, "constrained-weight"], default="weight", help="(default: weight)")
    add("--noise_type", choices=["gaussian", "rademacher"], default="gaussian", help="of random guesses (default: gaussian)")
    add("--eps_norm", "--eps", dest="eps", type=float, default=1e-16, help="(default: 1e-16)")
    add("--arch", choices=ARCHITECTURES, default="resnet18-8b", help="(default: resnet18-8b)")
    add("--downsample", choices=["conv", "avg-pool"], default="conv", help="(default: conv)")
    add("--widen_factor", type=float, default=1.0, metavar="W", help="(default: 1)")
    add("--weight_init", choices=["kaiming-uniform"], help=argparse.SUPPRESS)
    add("--auxnet", choices=["mlp", "cnn", "linear", "predsim"], default="mlp", help="(default: mlp)")
    nested("auxnet", "h_channel", type=int, metavar="N", help="(default: 32 of cnn, 1024 of mlp; half with resnet18-16b)")
    add("--n_epoch", type=int, metavar="N", help="(default: 100; imagenet32: 70)")
    add("--optimizer", choices=["sgd", "adam"], default="sgd", help="(default: sgd)")
    nested("optimizer", "batchsize", type=int, metavar="N", help="(default: 128; adam: 512)")
    nested("optimizer", "lr", type=float, help="(default: 0.05; adam: 1e-3)")
    nested("optimizer", "wd", type=float, help="weight decay (default: 5e-4; adam: 1e-6)")
    nested("optimizer", "momentum", type=float, help="of sgd (default: 0.9)")
    add("--scheduler", choices=SCHEDULERS, default="steplr", help="(default: steplr)")
    nested("scheduler", "gamma", type=float, help="of steplr (default: 0.2)")
    nested("scheduler", "step_size", type=int, default=30, metavar="N", help="of steplr, in epochs (default: 30)")
    nested("scheduler", "factor", type=float, help="of plateau (default: 0.2)")
    nested("scheduler", "patience", type=int, default=15, metavar="N", help="of plateau, in epochs (default: 15)")
    nested("scheduler", "maxlr", type=float, default=0.1, metavar="LR", help="of onecycle, instead of lr (default: 0.1)")
    nested("scheduler", "start_factor", type=float, default=1.0, metavar="F", help="of linear (default: 1)")
    nested("scheduler", "end_factor", type=float, default=0.0, metavar="F", help="of linear (default: 0)")
    names = [name for name in DATASETS if name != "digits"]
    add("--dataset", type=_dataset, choices=names, default="cifar10", help="(default: cifar10)")
    add("--path", default="", metavar="DIR", help="read the images from this folder")
    add("--num_train_sample", type=int, default=0, metavar="N", help="a random part of them (default: 0, all)")
    add("--num_test_sample", type=int, default=0, metavar="N", help="(default: 0, all)")
    add(
        "--image_size",
        type=int,
        default=0,
        metavar="N",
        help="(default: 0: 224 for imagenet and imagenette, 32 for imagenet32)",
    )
    add("--image_size_over_32", action="store_true", help="without effect: the stem follows the size of the images")
    add("--augmentation", choices=["standard", "none"], default="standard", help="(default: standard)")
    add("--save_model", type=int, nargs="?", const=1, default=0, metavar="N", help="keep the weights every N epochs")
    add("--histogram", action="store_true", help="write histograms of the alignment with the true gradient")
    add("--status", action="store_true", help="log to Weights & Biases")
    add("--project", default="Forward Gradient", help="of Weights & Biases (default: Forward Gradient)")
    add("--run_name", default="default-name", help="of Weights & Biases (default: default-name)")
    add("--device", type=int, default=0, metavar="N", help="number of the GPU, where there is one (default: 0)")
    add("--log-freq", type=int, default=39, metavar="N", help="steps between two logged losses (default: 39)")
    add("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    for flag in WITHOUT_EFFECT:
        add(flag, help=argparse.SUPPRESS)
    return flags


def _dataset(name: str) -> str:
    if name in fdfa.DATA:
        raise argparse.ArgumentTypeError(
            f"{name} is FDFA's name for it, and the other flags are not FDFA's: use {fdfa.DATA[name]}; or, for FDFA's command "
            "line, --data-dir instead of --path"
        )
    return name


def translate(arguments: Sequence[str] | None = None) -> Train:
    """The configuration that a command line of ForwardLocalGradient means.

    Raises:
        UsageError: a name that has no meaning.
    """
    asked = parser().parse_args(arguments)
    algorithm, forward_gradient = _named(asked) if asked.algo else _spelled_out(asked)
    model = ARCHITECTURES[asked.arch]
    sgd = asked.optimizer == "sgd"
    if asked.momentum is not None and not sgd:
        raise UsageError(f"--momentum {asked.momentum} is for --optimizer sgd: give both or neither")
    lr = (0.05 if sgd else 1e-3) if asked.lr is None else asked.lr
    transform = TRANSFORMS.get(asked.dataset, OF_OTHERS)
    method = [asked.auxnet, forward_gradient.target, forward_gradient.guess, forward_gradient.space]
    method = {"fg": method, "local": ["local", asked.auxnet], "bp": ["std"]}[algorithm]
    return Train(
        algorithm=algorithm,
        model=model,
        data=asked.dataset,
        data_dir=asked.path or None,
        epochs=(70 if asked.dataset == "imagenet32" else 100) if asked.n_epoch is None else asked.n_epoch,
        batch_size=(128 if sgd else 512) if asked.batchsize is None else asked.batchsize,
        lr=asked.maxlr if asked.scheduler == "onecycle" else lr,
        seed=asked.seed,
        device=f"cuda:{asked.device}" if torch.cuda.is_available() else "cpu",
        out=str(Path("results") / "-".join([model, *method]) / time.strftime("%y%m%d_%H%M%S")),
        save_weights=asked.save_model,
        align_every=int(asked.histogram),
        wandb=asked.status,
        wandb_project=asked.project,
        wandb_name=asked.run_name,
        log_interval=asked.log_freq,
        network=Network(width=asked.widen_factor, downsample=asked.downsample),
        optimizer=Optimizer(
            name=asked.optimizer,
            momentum=(0.9 if asked.momentum is None else asked.momentum) if sgd else 0.0,
            weight_decay=(5e-4 if sgd else 1e-6) if asked.wd is None else asked.wd,
        ),
        schedule=_schedule(asked),
        heads=Heads(kind=asked.auxnet, width=asked.h_channel),
        forward_gradient=forward_gradient,
        transform=Transform(
            transform.mean,
            transform.std,
            augment=transform.augment if asked.augmentation == "standard" else "none",
            size=asked.image_size or transform.size,
        ),
        subset=Subset(train=asked.num_train_sample or None, test=asked.num_test_sample or None),
    )


def _named(asked: argparse.Namespace) -> tuple[str, ForwardGradient]:
    """What the README's --algo means: std, localonly, or a forward gradient."""
    if asked.algo in ("std", "localonly"):
        return {"std": "bp", "localonly": "local"}[asked.algo], ForwardGradient()
    targets, guesses, spaces = ("|".join(names) for names in (TARGETS, GUESSES, [*SPACES, "constrained-weight"]))
    parts = re.fullmatch(f"fg-tgt-({targets})-guess-({guesses})-({spaces})", asked.algo)
    if parts is None:
        raise UsageError(
            f"--algo {asked.algo}: use std, localonly, or fg-tgt-TARGET-guess-GUESS-SPACE with a TARGET out of "
            f"{', '.join(TARGETS)}, a GUESS out of {', '.join(GUESSES)} and a SPACE out of {', '.join(SPACES)}"
        )
    return "fg", _forward_gradient(*parts.groups(), asked)


def _spelled_out(asked: argparse.Namespace) -> tuple[str, ForwardGradient]:
    """What the code's --algorithm, --target, --guess and --space mean."""
    if asked.algorithm in ("std", "localonly"):
        return {"std": "bp", "localonly": "local"}[asked.algorithm], ForwardGradient()
    fast = asked.algorithm == "avg-weight-fast"
    return "fg", _forward_gradient(asked.target, asked.guess, "avg-weight" if fast else asked.space, asked, unbiased=fast)


def _forward_gradient(
    target: str, guess: str, space: str, asked: argparse.Namespace, *, unbiased: bool = False
) -> ForwardGradient:
    """The forward gradient as that code measures it: by a backward sweep, and projecting on random directions of weights."""
    if space == "constrained-weight":
        raise UsageError(
            "constrained-weight has no definition anywhere, neither in the paper nor in its code: use weight, or avg-weight"
        )
    projected = GUESSES[guess] == "random" and space in WEIGHT_SPACES and not unbiased
    return ForwardGradient(
        target=TARGETS[target],
        guess=GUESSES[guess],
        space=SPACES[space],
        engine="reverse",
        noise=asked.noise_type,
        scaling="projection" if projected else "unbiased",
        eps=asked.eps,
    )


def _schedule(asked: argparse.Namespace) -> Schedule:
    """The schedule, with the settings that it has and no others."""
    settings = {
        "steplr": {"gamma": 0.2 if asked.gamma is None else asked.gamma, "step_size": asked.step_size},
        "plateau": {"gamma": 0.2 if asked.factor is None else asked.factor, "patience": asked.patience},
        "linear": {"start": asked.start_factor, "end": asked.end_factor},
    }
    return Schedule(SCHEDULERS[asked.scheduler], **settings.get(asked.scheduler, {}))
