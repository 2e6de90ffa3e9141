"""What makes direct Kolen-Pollack beat direct feedback in its authors' table: the recipe, or how its matrices start?

python benchmarks/dkp_start.py [--data-dir FOLDER] [--seeds 2]

The network of the authors' code (two convolutions of 32 maps, a linear layer of 128), on CIFAR-10 made small: 10,000 images
averaged to 16 x 16, 10 epochs, test accuracy on 2,000. `sgd` is the authors' recipe (SGD at 5e-4 with Nesterov momentum, decay
1e-6), `adam` that of FDFA's code (Adam at 1e-4, times 0.95 after every epoch); feedback learns by Adam at 1e-4 in both.
`falling` multiplies the feedback's rate by 0.8 after every epoch, as the authors' code does.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward.lab.data.sets import load

EPOCHS, BATCH, CUTS = 10, 50, ("0", "1", "2")
RULES = ("bp", "dfa", "dkp zero", "dkp random", "dkp random falling", "dkp zero falling")


def small(images: Tensor) -> Tensor:
    return F.avg_pool2d((images.float() / 255 - 0.5) / 0.5, 2)


def network() -> nn.Sequential:
    first = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
    third = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 36, 128), nn.ReLU())
    return nn.Sequential(first, second, third, nn.Linear(128, 10))


def accuracy(rule: str, recipe: str, seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """In percent, after the last epoch."""
    (x, y), (unseen, labels) = train, test
    torch.manual_seed(seed)
    model = network()
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(model.parameters(), lr=5e-4, momentum=0.9, nesterov=True, weight_decay=1e-6)
        if recipe == "sgd"
        else torch.optim.Adam(model.parameters(), lr=1e-4)
    ]
    schedules = [torch.optim.lr_scheduler.StepLR(optimizers[0], 1, 0.95)] if recipe == "adam" else []
    name, start, *falling = [*rule.split(), ""][:3]
    if name == "dkp":
        estimator: onward.Estimator = onward.DKP(model, CUTS, seed=seed, start=start)
        estimator.initialize(x[:BATCH])
        matrices = estimator.feedback.parameters()
        optimizers.append(torch.optim.Adam(matrices, lr=1e-4, weight_decay=1e-6 if recipe == "sgd" else 0))
        schedules += [torch.optim.lr_scheduler.StepLR(optimizers[1], 1, 0.8)] if "falling" in falling else []
    else:
        estimator = onward.Backprop(model) if name == "bp" else onward.DFA(model, CUTS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            estimator.zero_grad()
            estimator.estimate(x[rows], y[rows])
            for optimizer in optimizers:
                optimizer.step()
        for schedule in schedules:
            schedule.step()
    estimator.eval()
    with torch.no_grad():
        return 100 * (estimator(unseen).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load("cifar10", options.data_dir)
    train, test = ((small(part.images[:n]), part.labels[:n]) for part, n in ((data.train, 10_000), (data.test, 2_000)))
    for recipe in ("sgd", "adam"):
        for rule in RULES:
            found = [accuracy(rule, recipe, seed, train, test) for seed in range(options.seeds)]
            print(f"{recipe}  {rule:20s}", "  ".join(f"{one:.2f}" for one in found), flush=True)


if __name__ == "__main__":
    main()
