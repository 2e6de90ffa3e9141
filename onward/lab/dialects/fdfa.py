"""The command line of the FDFA paper's code.

Source of the dialect: the README and the two scripts of github.com/Florian-BACHO/FDFA (Bacho & Chu 2024).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

from onward.lab.batches import Transform
from onward.lab.config import Feedback, ForwardGradient, Network, Optimizer, Schedule, Subset, Train

DATA = {"MNIST": "mnist", "FashionMNIST": "fashion-mnist", "CIFAR10": "cifar10", "CIFAR100": "cifar100"}
ALGORITHMS = {"BP": "bp", "DFA": "dfa", "DKP": "dkp", "FDFA": "fdfa", "FwdGrad": "fg"}


def parser() -> argparse.ArgumentParser:
    """The flags of the FDFA code, and `--data-dir`."""
    flags = argparse.ArgumentParser(
        description="The FDFA paper's command line. `onward train` offers more.",
        epilog="For the command line of ForwardLocalGradient give one of its flags too: --arch resnet18 --help.",
    )
    flags.add_argument("--dataset", choices=DATA, default="MNIST", help="CIFAR100 is trained on AlexNet (default: MNIST)")
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


def translate(arguments: Sequence[str] | None = None) -> Train:
    """The configuration that a command line of the FDFA code means."""
    asked = parser().parse_args(arguments)
    forward_gradient = asked.train_mode == "FwdGrad"
    cifar100 = asked.dataset == "CIFAR100"
    batch_size = asked.batch_size or (128 if cifar100 else 64)
    layers = asked.n_layers or (1 if forward_gradient else 2)
    model = "alexnet" if cifar100 else "cnn" if asked.conv else "mlp"
    return Train(
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
        forward_gradient=ForwardGradient(space="avg-weight") if forward_gradient else ForwardGradient(),
        transform=Transform(augment="resized-crop-flip", size=224) if cifar100 else Transform(),
        subset=Subset(train=batch_size) if asked.dry_run else Subset(),
    )
