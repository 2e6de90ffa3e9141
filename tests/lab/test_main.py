"""The command lines of two papers' codes: every command of their READMEs, word for word."""

from __future__ import annotations

import io
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import main
import onward
from main import translate
from onward.errors import UsageError
from onward.lab.data import Data
from onward.lab.dialects import commands, fdfa, flg
from onward.lab.plain import flat
from onward.lab.run.algorithms import spelled
from onward.lab.run.loop import TrainingFailed, prepare
from onward.lab.run.record import read
from onward.lab.settings import Feedback, Heads, Network, Optimizer, Schedule, Subset, Train, Transform

ROOT = Path(__file__).parents[2]
DEFAULTS = Train(algorithm="fdfa", model="mlp", data="mnist", epochs=100, batch_size=64, lr=1e-4, schedule=Schedule(gamma=0.95))
ALEXNET = replace(
    DEFAULTS, model="alexnet", data="cifar100", batch_size=128, transform=Transform(augment="resized-crop-flip", size=224)
)
README = {
    "python3 main.py --dataset=MNIST --train-mode=FDFA --n-layers=2": DEFAULTS,
    "python3 main.py --dataset=MNIST --train-mode=FDFA --conv": replace(DEFAULTS, model="cnn"),
    "python3 main.py --dataset=CIFAR100 --train-mode=FDFA": ALEXNET,
    "python3 main.py --dataset=MNIST --train-mode=BP --n-layers=2": replace(DEFAULTS, algorithm="bp"),
    "python3 main.py --dataset=MNIST --train-mode=DFA --n-layers=2": replace(DEFAULTS, algorithm="dfa"),
    "python3 main.py --dataset=MNIST --train-mode=DKP --n-layers=2": replace(DEFAULTS, algorithm="dkp"),
}
OTHERS = {
    "python main.py": DEFAULTS,
    "python main.py --train-mode FwdGrad": replace(
        DEFAULTS,
        algorithm="fg:space=avg-weight",
        lr=1e-3,
        network=Network(layers=1),
    ),
    "python main.py --dataset FashionMNIST --n-layers 3 --no-cuda": replace(
        DEFAULTS, data="fashion-mnist", network=Network(layers=3), device="cpu"
    ),
    "python main.py --conv --dataset=CIFAR10 --dry-run": replace(
        DEFAULTS, model="cnn", data="cifar10", epochs=1, subset=Subset(train=64)
    ),
    "python main.py --dataset=CIFAR100 --batch-size=32 --dry-run": replace(
        ALEXNET, batch_size=32, epochs=1, subset=Subset(train=32)
    ),
    "python main.py --batch-size 32 --test-batch-size 500 --epochs 3 --lr 0.01 --b-lr 0.02 --gamma 0.9 --weight-decay 1e-5 "
    "--feedback-decay 1e-6 --log-interval 10": replace(
        DEFAULTS,
        batch_size=32,
        test_batch_size=500,
        epochs=3,
        lr=0.01,
        schedule=Schedule(gamma=0.9),
        optimizer=Optimizer(weight_decay=1e-5),
        feedback=Feedback(lr=0.02, decay=1e-6),
        log_interval=10,
    ),
}


@pytest.mark.parametrize(("line", "meant"), [*README.items(), *OTHERS.items()])
def test_a_command_means_this_configuration(line: str, meant: Train) -> None:
    config = translate([*shlex.split(line)[2:], "--seed", "5"])
    assert replace(config, out=None) == replace(meant, seed=5)


def test_runs_of_fdfa_are_kept_apart_by_mode_and_time() -> None:
    out = Path(translate(["--train-mode", "DFA", "--log-dir", "elsewhere"]).out or "")
    assert out.parts[:2] == ("elsewhere", "DFA")
    assert len(out.name) == len("240131_235959")


def test_no_seed_draws_one() -> None:
    seeds = {translate([]).seed for _ in range(5)}
    assert len(seeds) > 1
    assert min(seeds) >= 0


def test_grey_images_of_a_data_set_of_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for at in range(24):
        Path("images", "ab"[at % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 9 * at).save(Path("images", "ab"[at % 2], f"{at}.png"))
    said = r"for images of 1 channel\(s\): --dataset cifar10 has set that, for grey images use --dataset mnist"
    with pytest.raises(UsageError, match=said):
        commands.run(flg.read(["--path", "images", "--arch", "resnet18-2b", "--n_epoch", "1"]))


def test_several_processes_have_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onward.lab.run.processes.asked_for", lambda: 2)
    assert translate(["--seed", "3"]).seed == 3
    with pytest.raises(UsageError, match="--seed -1 would draw another seed in each of 2 processes: give one of at least 0"):
        translate([])


def test_a_choice_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        translate(["--train-mode", "BPP"])
    assert exit.value.code == 2
    assert "'BP', 'DFA', 'DKP', 'FDFA', 'FwdGrad'" in capsys.readouterr().err


def test_a_command_runs_in_full(tmp_path: Path) -> None:
    write_digits(tmp_path / "images", train=6, test=3)
    line = next(iter(README))
    small = "--data-dir images --epochs 5 --batch-size 8 --lr 1e-3 --seed 1"
    done = start(f"{line} {small}".partition("main.py")[2], tmp_path)
    _, said = done.communicate()
    assert (done.returncode, said) == (0, "")
    (folder,) = (tmp_path / "results" / "FDFA").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 2
    assert rows[-1]["test_accuracy"] == 100


def write_digits(folder: Path, **counts: int) -> None:
    """Class folders of grey images of 28x28 pixels."""
    for split, number in counts.items():
        for digit in range(4):
            (folder / split / str(digit)).mkdir(parents=True)
            for index in range(number):
                image = Image.new("L", (28, 28), color=20 * index)
                image.paste(255, (7 * digit, 0, 7 * digit + 7, 28))
                image.save(folder / split / str(digit) / f"{index}.png")


def start(line: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, ROOT / "main.py", *shlex.split(line)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_while_it_imports(tmp_path: Path) -> None:
    shutil.copy(ROOT / "main.py", tmp_path)
    (tmp_path / "onward.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


# ---- ForwardLocalGradient

README_OF_FLG = (
    "python -u main.py --algo 'fg-tgt-e2e-guess-localgrad-weight' --arch resnet18 --auxnet cnn   --auxnet.h_channel 32 "
    "--n_epoch 100  --optimizer.lr 5e-2 --optimizer.wd 5e-4 --eps_norm 1e-14"
)
PAPER = Train(
    algorithm="fg:guess=local,space=weight,engine=reverse",
    model="resnet18-8b",
    data="cifar10",
    epochs=100,
    batch_size=128,
    drop_last=True,
    lr=0.05,
    log_interval=39,
    device="cuda:0" if torch.cuda.is_available() else "cpu",
    wandb_project="Forward Gradient",
    wandb_name="default-name",
    optimizer=Optimizer("sgd", momentum=0.9, weight_decay=5e-4),
    schedule=Schedule("step", gamma=0.2, step_size=30),
    heads=Heads("mlp"),
    transform=Transform(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), augment="crop-flip"),
)
ImageNet = Transform(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), augment="resized-crop-flip", size=224)


def fg(**changes: str | float) -> str:
    settings = {"guess": "local", "space": "weight", "engine": "reverse", **changes}
    return spelled("fg", onward.ForwardGradient, settings)


FLG = {
    README_OF_FLG: replace(PAPER, heads=Heads("cnn", 32), algorithm=fg(eps=1e-14)),
    "python -u main.py --algo localonly --arch resnet18-16b --auxnet mlp --auxnet.h_channel 512 --n_epoch 100  "
    "--optimizer.lr 5e-2 --optimizer.wd 5e-4 --eps_norm 1e-14": replace(
        PAPER, algorithm="local", model="resnet18-16b", heads=Heads("mlp", 512)
    ),
    "python -u main.py --algo std --arch resnet18 --auxnet linear --auxnet.h_channel 32 --n_epoch 100  --optimizer.lr 5e-2 "
    "--optimizer.wd 5e-4 --eps_norm 1e-14": replace(PAPER, algorithm="bp", heads=Heads("linear", 32)),
    "python main.py --algorithm generic": PAPER,
    "python main.py --algorithm=std": replace(PAPER, algorithm="bp"),
    "python main.py --algorithm localonly --auxnet predsim": replace(PAPER, algorithm="local", heads=Heads("predsim")),
    "python main.py --algorithm avg-weight-fast --guess random": replace(
        PAPER,
        cuts=("block1", "block2", "block3", "block4", "block5", "block6", "block7"),
        algorithm=fg(guess="random", space="avg-weight"),
    ),
    "python main.py --algo avg-weight-fast": replace(PAPER, algorithm=fg(space="avg-weight")),
    "python main.py --algo generic --space activation": replace(PAPER, algorithm=fg(space="activation")),
    "python main.py --arch resnet18-16b --downsample avg-pool": replace(PAPER, model="resnet18-16b"),
    "python main.py --aux_type cnn --auxnet cnn --pool_size 2 --auxnet.n_layers 3": replace(PAPER, heads=Heads("cnn")),
    "python main.py --auxnet linear --h_channel 0": replace(PAPER, heads=Heads("linear")),
    "python main.py --algo std --h_channel 0 --n_layers 5 --pool_size 1": replace(PAPER, algorithm="bp"),
    "python main.py --weight_init kaiming-uniform": PAPER,
    "python main.py --scheduler linear --total_iters 9 --n_epoch 9": replace(PAPER, epochs=9, schedule=Schedule("linear")),
    "python main.py --scheduler onecycle --step_per_epoch_time_bs 45000": replace(PAPER, lr=0.1, schedule=Schedule("onecycle")),
    "python main.py --entity us": PAPER,
    "python main.py --target sum --guess ntk --space activation-2 --eps 1e-3": replace(
        PAPER, algorithm=fg(target="sum", guess="ntk", space="activation-2", eps=1e-3)
    ),
    "python main.py --guess random --space sign-weight --noise_type rademacher": replace(
        PAPER, algorithm=fg(guess="random", space="sign-weight", noise="rademacher", scaling="projection")
    ),
    "python main.py --guess random --space activation": replace(PAPER, algorithm=fg(guess="random", space="activation")),
    "python main.py --arch resnet18-2b --downsample avg-pool --widen_factor 0.5 --auxnet cnn --h_channel 16": replace(
        PAPER, model="resnet18-2b", network=Network(width=0.5, downsample="avg-pool"), heads=Heads("cnn", 16)
    ),
    "python main.py --arch small-net --optimizer adam": replace(
        PAPER, model="small-net", batch_size=512, lr=1e-3, optimizer=Optimizer("adam", weight_decay=1e-6)
    ),
    "python main.py --optimizer sgd --batchsize 32 --lr 0.1 --wd 0 --momentum 0 --n_epoch 7": replace(
        PAPER, batch_size=32, lr=0.1, epochs=7, optimizer=Optimizer("sgd")
    ),
    "python main.py --optimizer.batchsize 32 --optimizer.momentum 0.5": replace(
        PAPER, batch_size=32, optimizer=Optimizer("sgd", momentum=0.5, weight_decay=5e-4)
    ),
    "python main.py --scheduler steplr --step_size 10 --scheduler.gamma 0.1": replace(
        PAPER, schedule=Schedule("step", gamma=0.1, step_size=10)
    ),
    "python main.py --scheduler plateau --patience 3": replace(PAPER, schedule=Schedule("plateau", gamma=0.2, patience=3)),
    "python main.py --scheduler onecycle --maxlr 0.2": replace(PAPER, lr=0.2, schedule=Schedule("onecycle")),
    "python main.py --scheduler linear --end_factor 0.1": replace(PAPER, schedule=Schedule("linear", end=0.1)),
    "python main.py --scheduler constant": replace(PAPER, schedule=Schedule("constant")),
    "python main.py --arch resnet18 --dataset cifar100 --num_train_sample 10 --num_test_sample 20 --augmentation none": replace(
        PAPER, data="cifar100", subset=Subset(10, 20), transform=replace(PAPER.transform, augment="none")
    ),
    "python main.py --arch resnet18 --dataset mnist --path here": replace(
        PAPER, data="mnist", data_dir="here", transform=Transform(mean=0.0, std=1.0)
    ),
    "python main.py --dataset imagenette --image_size 128 --image_size_over_32": replace(
        PAPER, data="imagenette", transform=replace(ImageNet, size=128)
    ),
    "python main.py --arch resnet18 --dataset imagenet": replace(PAPER, data="imagenet", transform=ImageNet),
    "python main.py --arch resnet18 --dataset imagenet32": replace(
        PAPER, data="imagenet32", epochs=70, transform=replace(ImageNet, size=32)
    ),
    "python main.py --save_model 20 --histogram --log-freq 5 --num-workers 4": replace(
        PAPER, save_weights=20, align_every=1, log_interval=5
    ),
    "python main.py --status --project 'My project' --run_name mine --save_model": replace(
        PAPER, wandb=True, wandb_project="My project", wandb_name="mine", save_weights=1
    ),
}


@pytest.mark.parametrize(("line", "meant"), FLG.items())
def test_a_command_of_flg_means_this_configuration(line: str, meant: Train) -> None:
    config = translate([*shlex.split(line)[1 + shlex.split(line).index("main.py") :], "--seed", "5"])
    assert replace(config, out=None) == replace(meant, seed=5)


@pytest.mark.parametrize(
    "space", ["weight", "activity", "activation", "avg-weight", "activation-2", "span-activity", "f-weight"]
)
def test_every_name_of_a_target_and_a_guess(space: str) -> None:
    targets = {"e2e": "global", "local": "local", "above": "above", "sum": "sum"}
    guesses = {**targets, "localgrad": "local"} | {name: name for name in ("random", "ntk", "fixed-ntk", "feedback")}
    for target, guess in itertools.product(targets, guesses):
        config = translate(["--algo", f"fg-tgt-{target}-guess-{guess}-{space}"])
        assert config.algorithm == fg(
            target=targets[target],
            guess=guesses[guess],
            space=space.replace("activity", "activation"),
            scaling="projection" if guess == "random" and "weight" in space else "unbiased",
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--algo fg-tgt-e2e-guess-localgrad-constrained-weight", "constrained-weight has no definition anywhere, neither in"),
        ("--space constrained-weight", "constrained-weight has no definition anywhere, neither in the paper nor in its code"),
        (
            "--algo fg-tgt-e2e-guess-localgrad-activity-map",
            "--algo fg-tgt-e2e-guess-localgrad-activity-map: use std, localonly",
        ),
        ("--algo fg-tgt-end-guess-local-weight", "with a TARGET out of e2e, global, local, above, sum, a GUESS out of "),
        ("--algo bp", "--algo bp: use std, localonly, avg-weight-fast, generic, or fg-tgt-TARGET-guess-GUESS-SPACE"),
        ("--optimizer adam --momentum 0.9", "--momentum 0.9 is for --optimizer sgd: give both or neither"),
        ("--auxnet cnn --h_channel 0", "^--h_channel 0 makes each head as wide as its block there"),
        ("--auxnet.h_channel 0", "^--auxnet.h_channel 0 makes each head as wide as its block there"),
        ("--aux_type cnn", "^--aux_type cnn beside --auxnet mlp gives .*: use --auxnet cnn alone"),
        ("--aux_type generic", "^--aux_type generic beside --auxnet mlp gives .*: use --auxnet mlp alone"),
        ("--pool_size 4", "^--pool_size 4: it is 2 in every mlp head here, leave it out"),
        ("--auxnet cnn --auxnet.n_layers 1", "^--auxnet.n_layers 1: it is 3 in every cnn head here, leave it out"),
        ("--scheduler linear --total_iters 10", "^--total_iters 10: linear takes the whole run here, 100 epochs: leave it out"),
        ("--weight_init ones", "^--weight_init ones: networks and heads start kaiming-uniform here, leave it out"),
    ],
)
def test_a_command_of_flg_without_a_meaning(arguments: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        translate(shlex.split(arguments))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--arch resnet50", "'resnet18', 'resnet18-8b'"),
        ("--arch resnet18 --conv", "unrecognized arguments: --conv"),
        ("--train-mode BP --alg std", "unrecognized arguments: --alg std"),
        ("--n-layers=0", "argument --n-layers: 0: use a whole number of at least 1"),
        ("--batch-size -1", "argument --batch-size: -1: use a whole number of at least 1"),
        ("--batch-size many", "many: use a whole number of at least 1"),
        ("--dataset cifar10", "argument --dataset: cifar10 is ForwardLocalGradient's name for it, and no other flag is that"),
        ("--dataset cifar10", "use CIFAR10; or, for its command line, give one of its flags too, such as --arch resnet18"),
        ("--data fashion-mnist", "use FashionMNIST; or"),
        ("--dataset svhn", "no other flag is that code's: for its command line, give one of its flags too"),
        ("--dataset=CIFAR10 --path here", "use cifar10; or, for FDFA's command line, --data-dir instead of --path"),
    ],
)
def test_flags_that_do_not_exist(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        translate(shlex.split(arguments))
    assert exit.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("given", "shown"), [("", "--train-mode"), ("--arch resnet18", "--auxnet.h_channel")])
def test_each_command_line_has_its_help(given: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        translate([*given.split(), "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert shown in printed
    assert given + " --help" in printed or given


def test_runs_of_flg_are_kept_apart_by_network_method_and_time() -> None:
    names = {
        "--algo fg-tgt-e2e-guess-localgrad-activity --auxnet cnn": "resnet18-8b-cnn-global-local-activation",
        "--algo localonly --arch resnet18-16b": "resnet18-16b-local-mlp",
        "--algo std": "resnet18-8b-std",
    }
    for line, name in names.items():
        out = Path(translate(line.split()).out or "")
        assert out.parts[:2] == ("results", name)
        assert len(out.name) == len("240131_235959")


def write_cifar10(folder: Path, **counts: int) -> None:
    """Files in the format of CIFAR-10 on the hub: the class is the hue of a noisy picture."""
    names = [f"class {number}" for number in range(10)]
    features = {"img": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    for part, count in counts.items():
        rows = []
        generator = torch.Generator().manual_seed(len(part))
        for number in range(count):
            pixels = torch.randint(0, 60, (32, 32, 3), dtype=torch.uint8, generator=generator)
            pixels[..., number % 3] += 20 * (number % 10)
            buffer = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        image = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        table = pa.table({"img": image, "label": [number % 10 for number in range(count)]})
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}),
            folder / f"{part}-00000-of-00001.parquet",
        )


@pytest.mark.slow
def test_the_readme_command_of_flg_trains(tmp_path: Path) -> None:
    """Word for word, on a narrow network, for two epochs, with CIFAR-10's format in a folder."""
    write_cifar10(tmp_path, train=64, test=20)
    small = f"--path {tmp_path} --n_epoch 2 --batchsize 16 --widen_factor 0.125 --histogram --save_model"
    done = subprocess.run(
        [sys.executable, "-u", ROOT / "main.py", *shlex.split(f"{README_OF_FLG} {small}")[3:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fg:guess=local,space=weight,engine=reverse,eps=1e-14 (reverse)")
    (folder,) = (tmp_path / "results" / "resnet18-8b-cnn-global-local-weight").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert list(rows[0]["heads"]) == [f"block{number}" for number in range(1, 8)]
    assert all(rows[1]["heads"][cut]["loss"] < rows[0]["heads"][cut]["loss"] for cut in rows[0]["heads"])
    weights = torch.load(folder / "weights-2.pt", weights_only=True)
    assert weights["block1.0.weight"].shape == (8, 3, 3, 3)
    assert len((folder / "alignment.jsonl").read_text().splitlines()) == 3


Make = Callable[..., Data]


@pytest.mark.parametrize("line", ["--algorithm avg-weight-fast --guess random", "--guess random --space avg-weight"])
@pytest.mark.parametrize("arch", flg.ARCHITECTURES)
def test_beside_random_directions_the_last_block_learns_from_its_exact_gradient(images: Make, line: str, arch: str) -> None:
    """Its classifier was trained by noise."""
    config = translate([*line.split(), "--arch", arch, "--widen_factor", "0.0625", "--batchsize", "8"])
    run = prepare(config, images(train=8, channels=3, size=8))
    x, y = next(run.training_batches(1))
    model = run.estimator.model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    F.cross_entropy(model(x), y).backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.load_state_dict(state)
    model.zero_grad()
    run.estimator.estimate(x, y)
    for name, p in model.named_parameters():
        if name.startswith("output."):
            torch.testing.assert_close(p.grad, exact[name])
    assert not torch.allclose(model.block1[0].weight.grad, exact["block1.0.weight"])


@pytest.mark.parametrize("auxnet", ["cnn", "mlp", "linear", "predsim"])
@pytest.mark.parametrize("algo", ["std", "localonly", "generic"])
def test_resnet18_2b_ends_in_the_chosen_head(images: Make, algo: str, auxnet: str) -> None:
    line = f"--algo {algo} --arch resnet18-2b --auxnet {auxnet} --widen_factor 0.125 --batchsize 8"
    run = prepare(translate(line.split()), images(train=8, channels=3, size=8))
    block, head = run.estimator.model.output
    assert [type(part).__name__ for part in block] == ["Residual"] * 2
    kinds = [type(module).__name__ for module in head.modules() if not list(module.children())]
    assert (
        kinds
        == {
            "cnn": ["Conv2d", "BatchNorm2d", "ReLU"] * 4 + ["AdaptiveAvgPool2d", "Flatten", "Linear"],
            "mlp": ["AdaptiveAvgPool2d", "Flatten"] + ["Linear", "BatchNorm1d", "ReLU"] * 3 + ["Linear"],
            "linear": ["BatchNorm2d", "AdaptiveAvgPool2d", "Flatten", "Linear"],
            "predsim": ["AdaptiveAvgPool2d", "Flatten", "Linear"],
        }[auxnet]
    )
    last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
    assert (last.bias == 0.01).all()
    assert last.in_features == {"cnn": 4 * 32 // 8, "mlp": 1024 // 8, "linear": 4 * 128 // 8, "predsim": 16 * 4 * 4}[auxnet]
    x, y = next(run.training_batches(1))
    run.estimator.estimate(x, y)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in run.estimator.parameters())


TOLD = {
    # of FDFA's code
    "--conv --n-layers 3": ["--n-layers has no effect: --conv is a network of its own, of four layers"],
    "--dataset CIFAR100 --conv": ["--conv has no effect: CIFAR100 is trained on AlexNet"],
    "--train-mode BP --b-lr 1 --feedback 0": [
        "--b-lr has no effect: BP has no feedback that learns",
        "--feedback-decay has no effect: BP has no feedback that learns",
    ],
    "--dry-run --epochs 3": ["--epochs has no effect: --dry-run is one batch"],
    "--train-mode DKP --b-lr 1 --n-layers 4 --lr 3": [],
    # of ForwardLocalGradient
    "--scheduler onecycle --lr 0.1": ["--lr has no effect: the rates of onecycle are given by --maxlr"],
    "--scheduler onecycle --optimizer.lr 0.1": ["--optimizer.lr has no effect: the rates of onecycle are given by --maxlr"],
    "--arch small-net --factor 0.1": ["--factor has no effect: it is for --scheduler plateau"],
    "--scheduler plateau --gamma 0.1": ["--gamma has no effect: it is for --scheduler steplr"],
    "--scheduler constant --scheduler.step_size 3": ["--scheduler.step_size has no effect: it is for --scheduler steplr"],
    "--algo fg-tgt-e2e-guess-localgrad-weight --algorithm std --target sum --guess random --space weight": [
        f"{flag} has no effect: --algo fg-tgt-e2e-guess-localgrad-weight says it"
        for flag in ("--algorithm", "--target", "--guess", "--space")
    ],
    "--algo avg-weight-fast --algorithm std --space weight --target local": [
        "--algorithm has no effect: --algo avg-weight-fast says it",
        "--space has no effect: avg-weight-fast is avg-weight",
    ],
    "--algorithm localonly --eps 1 --guess ntk": [
        "--guess has no effect: localonly is no forward gradient",
        "--eps has no effect: localonly is no forward gradient",
    ],
    "--guess local --noise_type gaussian": ["--noise_type has no effect: it is of random guesses"],
    "--space sign-weight --eps 1e-3": ["--eps has no effect: this estimate is not divided by a length"],
    "--space weight --eps 1e-3": [],
    "--guess random --space activation --auxnet cnn": ["--auxnet has no effect: no head is trained"],
    "--algo std --auxnet linear --auxnet.h_channel 32": [
        "--auxnet has no effect: no head is trained",
        "--auxnet.h_channel has no effect: no head is trained",
    ],
    "--algo std --auxnet linear --arch resnet18-2b": [],
    "--auxnet linear --h_channel 32": ["--h_channel has no effect: a linear head has no hidden layers"],
    "--auxnet predsim --pool_size 0": ["--pool_size has no effect: a predsim head pools to 2,048 features"],
    "--arch resnet18 --image_size_over_32": ["--image_size_over_32 has no effect: the stem follows the size of the images"],
    "--arch resnet18-16b --downsample avg-pool": ["--downsample has no effect: resnet18-16b has no skip connections"],
    "--num-workers 4 --dim 3": [
        "--num-workers has no effect: images are kept in memory, or decoded by threads",
        "--dim has no effect: nothing reads it there either",
    ],
    "--entity us": ["--entity has no effect: without --status nothing is logged to Weights & Biases"],
    "--entity us --status": [],
    "--arch resnet18 --dataset mnist --augmentation standard": [
        "--augmentation has no effect: images of mnist are never augmented"
    ],
    "--widen_factor 0.3 --auxnet cnn": [
        "--widen_factor 0.3: that code rounds channels down, here they go to the nearest: 77 for 76, 154 for 153, 10 for 9"
    ],
    "--widen_factor 0.5": [],
    "--widen_factor 0.5 --arch small-net": [
        "--widen_factor 0.5: that code leaves small-net as it is, and narrows its heads alone"
    ],
    "--arch resnet18-2b --downsample avg-pool --widen_factor 2": [
        "--widen_factor 2: that code leaves resnet18-2b as it is, and narrows its heads alone",
        "--downsample avg-pool: that code leaves resnet18-2b as it is",
    ],
    "--arch resnet18-16b --auxnet cnn --auxnet.h_channel 32": [
        "--h_channel 32: that code makes it 16 with resnet18-16b, whatever is asked for"
    ],
}


@pytest.mark.parametrize(("line", "told"), TOLD.items())
def test_a_flag_without_effect_is_told(line: str, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    translate(line.split())
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(told)


def test_the_gpu_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert translate(["--device", "3"]).device == "cpu"
    assert capsys.readouterr().err == "--device has no effect: there is no GPU here\n"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert translate(["--device", "1"]).device == "cuda:1"
    with pytest.raises(UsageError, match=r"^--device 3: the GPUs here have the numbers 0 to 1$"):
        translate(["--device", "3"])


def test_the_entity_of_weights_and_biases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_ENTITY", "others")
    seen = []
    monkeypatch.setattr(commands, "train", lambda config: seen.append(os.environ["WANDB_ENTITY"]))
    for line in (["--entity", "us"], ["--entity", "us", "--status"]):
        main.run(line)
    assert seen == ["others", "us"]


@pytest.mark.parametrize("short", ["--dataset", "--data", "--dat", "--da", "--datas"])
def test_fdfas_flag_for_the_data_may_be_shortened_as_there(short: str) -> None:
    assert translate([short, "CIFAR10"]).data == "cifar10"
    assert translate([f"{short}=CIFAR10", "--data-dir", "here"]).data_dir == "here"


# ---- what goes wrong is told in the command line's own words


def all_settings(dialect: Any) -> list[str]:
    """A sentence on every flag of `onward train`, as a user of the dialect gets it."""
    names = dialect.read([]).flags
    return [commands.reworded(f"--{name.replace('_', '-')} 3: leave it out", names) for name in flat(Train())]


@pytest.mark.parametrize("dialect", [fdfa, flg])
def test_no_sentence_names_a_flag_that_is_not_there(dialect: Any) -> None:
    known = dialect.parser()._option_string_actions
    sentences = all_settings(dialect)
    assert len(sentences) > 50
    flags = [sentence.split()[0] for sentence in sentences if sentence.startswith("--")]
    assert len(flags) > 10
    assert set(flags) <= known.keys()
    assert "`onward train`'s checkpoint-every 3: leave it out" in sentences


@pytest.mark.parametrize(
    ("dialect", "said", "meant"),
    [
        (flg, "--network.width 0: use a positive number", "--widen_factor 0: use a positive number"),
        (flg, "a smaller --batch-size, or", "a smaller --optimizer.batchsize, or"),
        (flg, "another folder with --out, or replace it with --overwrite", "another folder with --log-dir, or take it away"),
        (flg, "onward train --resume results/x goes on", "onward train --resume results/x goes on"),
        (flg, "give torchrun --nproc-per-node 2, or --device cpu", "give torchrun --nproc-per-node 2, or hide the GPUs with"),
        (fdfa, "give torchrun --nproc-per-node 2, or --device cpu", "give torchrun --nproc-per-node 2, or --no-cuda"),
        (fdfa, "it needs 10x10, enlarge them with --transform.size 28", "it needs 10x10, enlarge them, or leave out --conv"),
        (fdfa, "the disk, or wait longer with --data-timeout", "the disk, or copy the images to another"),
        (fdfa, "start the run anew with --overwrite", "start the run anew"),
        (fdfa, "--lr-grid and --lr.", "--lr-grid and --lr."),
    ],
)
def test_sentences_in_own_words(dialect: Any, said: str, meant: str) -> None:
    assert commands.reworded(said, dialect.read([]).flags).startswith(meant)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--epochs 0", "^--epochs 0: use at least 1"),
        ("--b-lr -1", "^--b-lr -1.0: use at least 0"),
        ("--gamma 0", "^--gamma 0.0: use a positive number"),
        ("--weight-decay -1", "^--weight-decay -1.0: use at least 0"),
        ("--feedback-decay -1", "^--feedback-decay -1.0: use at least 0"),
        ("--test-batch-size 0", "^--test-batch-size 0: use at least 1"),
        ("--arch resnet18 --n_epoch 0", "^--n_epoch 0: use at least 1"),
        ("--auxnet.h_channel -3", "^--auxnet.h_channel -3: use at least 1"),
        ("--auxnet linear --h_channel -3", "^--h_channel -3: use at least 1"),
        ("--widen_factor -1", "^--widen_factor -1.0: use a positive number"),
        ("--widen_factor 2e4", "^--widen_factor 20000.0: use a positive number, at most 10000"),
        ("--batchsize 0", "^--batchsize 0: use at least 1"),
        ("--optimizer.wd -1", "^--optimizer.wd -1.0: use at least 0"),
        ("--scheduler plateau --factor 0", "^--factor 0.0: use a positive number"),
        ("--scheduler onecycle --maxlr -1", "^--maxlr -1.0: use at least 0"),
        ("--scheduler linear --end_factor -1", "^--end_factor -1.0: use at least 0"),
        ("--num_train_sample -1", "^--num_train_sample -1: use at least 1"),
        ("--arch resnet18 --image_size -1", "^--image_size -1: use at least 1"),
        ("--eps_norm -1", "^--eps_norm -1.0: use at least 0"),
        ("--arch resnet18 --seed -1", "^--seed -1: use at least 0"),
    ],
)
def test_a_value_out_of_range_is_told_with_the_flag_that_was_given(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        translate(line.split())


def test_what_stops_a_run_is_told_in_own_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for raised, kind, message in (
        (UsageError("another --data-dir"), UsageError, "another --path"),
        (TrainingFailed("lower --lr"), TrainingFailed, "lower --optimizer.lr"),
        (TimeoutError("no --epochs"), OSError, "no --n_epoch"),
        (MemoryError(), TrainingFailed, "out of memory .*: use a smaller --optimizer.batchsize, or a smaller network"),
        (RuntimeError("something else about --lr"), RuntimeError, "something else about --lr"),
        (BrokenPipeError("--lr"), BrokenPipeError, "^--lr$"),
    ):

        def fails(config: Train, error: Exception = raised) -> None:
            raise error

        monkeypatch.setattr(commands, "train", fails)
        with pytest.raises(kind, match=message):
            main.run(["--arch", "small-net"])
    assert not list(tmp_path.iterdir())  # nothing was written, so nothing is left


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for flag in ("--train-mode=BP", "--arch=small-net"):
        with pytest.raises(UsageError, match=r"cannot be written to .*: choose another folder with --log-dir$"):
            main.run([flag, "--log-dir", str(tmp_path / "file")])


def test_small_images_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for digit in range(2):
            (tmp_path / "images" / split / str(digit)).mkdir(parents=True)
            for index in range(2):
                Image.new("L", (8, 8)).save(tmp_path / "images" / split / str(digit) / f"{index}.png")
    with pytest.raises(UsageError, match=r"^cnn on 8x8 images: it needs 10x10, enlarge them, or leave out --conv$"):
        main.run(["--conv", "--data-dir", "images"])


# ---- folders


def test_runs_that_start_in_the_same_second_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "240131_235959")
    write_digits(tmp_path / "images", train=2, test=1)
    for _ in range(3):
        main.run(["--train-mode", "BP", "--data-dir", "images", "--batch-size", "8", "--epochs", "1", "--no-cuda"])
    folders = sorted((tmp_path / "results" / "BP").iterdir())
    assert [folder.name for folder in folders] == ["240131_235959", "240131_235959-2", "240131_235959-3"]
    for folder in folders:
        assert read(folder).config.out == str(folder.relative_to(tmp_path))
        assert f"written to {folder.relative_to(tmp_path)}\n" in capsys.readouterr().out or folder != folders[0]


@pytest.mark.slow
def test_runs_that_start_at_once(tmp_path: Path) -> None:
    write_digits(tmp_path / "images", train=2, test=1)
    line = "--train-mode BP --data-dir images --batch-size 8 --epochs 1 --no-cuda"
    runs = [start(line, tmp_path) for _ in range(3)]
    for run in runs:
        _, said = run.communicate()
        assert (run.returncode, said) == (0, "")
    assert len(list((tmp_path / "results" / "BP").glob("*/metrics.jsonl"))) == 3


# ---- parts of the data


def test_more_images_than_there_are_are_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path, train=24, test=12)
    small = f"--algo std --path {tmp_path} --arch small-net --widen_factor 0.0625 --n_epoch 1 --batchsize 8 --augmentation none"
    main.run(f"{small} --num_train_sample 16 --num_test_sample 1000 --log-dir first".split())
    main.run(f"{small} --num_train_sample 50000 --log-dir second".split())
    first, second = (read(next(Path(name).glob("*/*"))).config for name in ("first", "second"))
    assert (first.subset, second.subset) == (Subset(16, None), Subset(None, None))


def test_a_dry_run_of_few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path / "images", train=2, test=1)
    main.run(["--dataset=MNIST", "--train-mode=DFA", "--data-dir", "images", "--dry-run", "--no-cuda"])
    (folder,) = Path("results/DFA").iterdir()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
