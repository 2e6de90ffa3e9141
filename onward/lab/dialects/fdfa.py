"""The command line of the FDFA paper's code.

Source of the dialect: the README and the two scripts of github.com/Florian-BACHO/FDFA (Bacho & Chu 2024).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onward.errors import UsageError
from onward.lab.data.sets import ON_HUB
from onward.lab.dialects.commands import Command, given, in_own_words, no_effect
from onward.lab.run import processes
from onward.lab.settings import Feedback, Network, Optimizer, Schedule, Subset, Train, Transform

DATA = {"MNIST": "mnist", "FashionMNIST": "fashion-mnist", "CIFAR10": "cifar10", "CIFAR100": "cifar100"}
ALGORITHMS = {"BP": "bp", "DFA": "dfa", "DKP": "dkp", "FDFA": "fdfa", "FwdGrad": "fg:space=avg-weight"}
FLAGS = {"--batch-size": "--batch-size", "--data-dir": "--data-dir", "--device cpu": "--no-cuda", "--epochs": "--epochs"}
FLAGS |= {"--feedback.decay": "--feedback-decay", "--feedback.lr": "--b-lr", "--log-interval": "--log-interval", "--lr": "--lr"}
FLAGS |= {"--network.layers": "--n-layers", "--optimizer.weight-decay": "--weight-decay", "--out": "--log-dir"}
FLAGS |= {"--schedule.gamma": "--gamma", "--seed": "--seed", "--subset.train": "--batch-size"}
FLAGS |= {"--test-batch-size": "--test-batch-size"}
FLAGS["enlarge them with --transform.size 28"] = "enlarge them, or leave out --conv"  # no flag here changes the size of images
FLAGS["give the size that they are to have, for example --transform.size 224"] = "bring them to one size"
"""Of `onward train`'s flags, and of phrases with one, what this code has in that place."""


def parser() -> argparse.ArgumentParser:
    """The flags of the FDFA code, and `--data-dir`."""
    flags = argparse.ArgumentParser(
        description="The FDFA paper's command line. `onward train` offers more.",
        epilog="For the command line of ForwardLocalGradient give one of its flags too: --arch resnet18 --help.",
    )
    flags.add_argument(
        "--dataset", type=_dataset, choices=DATA, default="MNIST", help="CIFAR100 is trained on AlexNet (default: MNIST)"
    )
    # What --dataset may be shortened to there, where no other flag begins like that.
    short: dict[str, Any] = {"dest": "dataset", "type": _dataset, "choices": DATA, "default": argparse.SUPPRESS}
    flags.add_argument("--data", "--dat", "--da", **short, help=argparse.SUPPRESS)
    flags.add_argument("--data-dir", metavar="DIR", help="read the images from this folder")
    flags.add_argument("--train-mode", choices=ALGORITHMS, default="FDFA", help="FwdGrad perturbs weights (default: FDFA)")
    flags.add_argument("--conv", action="store_true", help="train the convolutional network")
    flags.add_argument("--n-layers", type=_at_least_one, metavar="N", help="hidden layers otherwise (default: 2; FwdGrad: 1)")
    flags.add_argument("--batch-size", type=_at_least_one, metavar="N", help="(default: 64; CIFAR100: 128)")
    flags.add_argument("--test-batch-size", type=int, default=1000, metavar="N", help="(default: 1000)")
    flags.add_argument("--epochs", type=int, default=100, metavar="N", help="(default: 100)")
    flags.add_argument("--lr", type=float, help="learning rate (default: 1e-4; FwdGrad: 1e-3)")
    flags.add_argument("--b-lr", type=float, default=1e-4, metavar="LR", help="of the feedback matrices (default: 1e-4)")
    flags.add_argument("--gamma", type=float, default=0.95, help="the learning rate's factor per epoch (default: 0.95)")
    flags.add_argument("--weight-decay", type=float, default=0.0, metavar="D", help="(default: 0)")
    flags.add_argument("--feedback-decay", type=float, default=0.0, metavar="D", help="(default: 0; 1e-6 is good for DKP)")
    flags.add_argument("--no-cuda", action="store_true", help="train on the CPU")
    flags.add_argument("--dry-run", action="store_true", help="one batch, then the test")
    flags.add_argument("--log-interval", type=int, default=100, metavar="N", help="steps between two logged losses")
    flags.add_argument("--log-dir", default="results/", metavar="DIR", help="(default: results/)")
    flags.add_argument("--seed", type=int, default=-1, metavar="N", help="-1 draws one (default: -1)")
    return flags


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: use a whole number of at least 1")
    return int(text)


def _dataset(name: str) -> str:
    if name in ON_HUB and name not in DATA:
        own = next((f"use {theirs}; or, " for theirs, here in DATA.items() if here == name), "")
        why = f"{name} is ForwardLocalGradient's name for it, and no other flag is that code's: {own}for its command line"
        raise argparse.ArgumentTypeError(f"{why}, give one of its flags too, such as --arch resnet18")
    return name


def read(arguments: Sequence[str]) -> Command:
    """What a command line of the FDFA code means. Raises a UsageError for a value out of its range, or no seed for several
    processes."""
    flags = parser()
    asked = flags.parse_args(arguments)
    forward_gradient = asked.train_mode == "FwdGrad"
    cifar100 = asked.dataset == "CIFAR100"
    batch_size = asked.batch_size or (128 if cifar100 else 64)
    layers = asked.n_layers or (1 if forward_gradient else 2)
    model = "alexnet" if cifar100 else "cnn" if asked.conv else "mlp"
    if asked.seed < 0 and (count := processes.asked_for()) > 1:
        raise UsageError(f"--seed {asked.seed} would draw another seed in each of {count} processes: give one of at least 0")
    with in_own_words(FLAGS):
        config = Train(
            algorithm=ALGORITHMS[asked.train_mode],
            model=model,
            data=DATA[asked.dataset],
            data_dir=asked.data_dir,
            epochs=1 if asked.dry_run else asked.epochs,
            batch_size=batch_size,
            test_batch_size=asked.test_batch_size,
            lr=asked.lr if asked.lr is not None else 1e-3 if forward_gradient else 1e-4,
            seed=asked.seed if asked.seed >= 0 else random.randrange(2**31),
            device="cpu" if asked.no_cuda else "auto",
            out=str(Path(asked.log_dir) / asked.train_mode / time.strftime("%y%m%d_%H%M%S")),
            log_interval=asked.log_interval,
            network=Network(layers=layers) if model == "mlp" else Network(),
            optimizer=Optimizer(weight_decay=asked.weight_decay),
            schedule=Schedule(gamma=asked.gamma),
            feedback=Feedback(lr=asked.b_lr, decay=asked.feedback_decay),
            transform=Transform(augment="resized-crop-flip", size=224) if cifar100 else Transform(),
            subset=Subset(train=batch_size) if asked.dry_run else Subset(),
        )
    return Command(config, FLAGS, tuple(no_effect(given(flags, arguments), _reasons(asked))))


def _reasons(asked: argparse.Namespace) -> dict[str, str]:
    """Why flags have no effect beside others, by what they set."""
    reasons: dict[str, str] = {}
    if asked.dataset == "CIFAR100":
        reasons |= dict.fromkeys(("conv", "n_layers"), "CIFAR100 is trained on AlexNet")
    elif asked.conv:
        reasons["n_layers"] = "--conv is a network of its own, of four layers"
    if asked.train_mode not in ("DKP", "FDFA"):
        reasons |= dict.fromkeys(("b_lr", "feedback_decay"), f"{asked.train_mode} has no feedback that learns")
    if asked.dry_run:
        reasons["epochs"] = "--dry-run is one batch"
    return reasons
