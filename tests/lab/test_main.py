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
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from main import translate
from onward.errors import UsageError
from onward.lab.batches import Transform
from onward.lab.config import Feedback, ForwardGradient, Heads, Network, Optimizer, Schedule, Subset, Train

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
        algorithm="fg",
        lr=1e-3,
        network=Network(layers=1),
        forward_gradient=ForwardGradient(space="avg-weight"),
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


def test_a_choice_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        translate(["--train-mode", "BPP"])
    assert exit.value.code == 2
    assert "'BP', 'DFA', 'DKP', 'FDFA', 'FwdGrad'" in capsys.readouterr().err


def test_a_command_runs_in_full(tmp_path: Path) -> None:
    for split, number in (("train", 6), ("test", 3)):
        for digit in range(4):
            folder = tmp_path / "images" / split / str(digit)
            folder.mkdir(parents=True)
            for index in range(number):
                image = Image.new("L", (28, 28), color=20 * index)
                image.paste(255, (7 * digit, 0, 7 * digit + 7, 28))
                image.save(folder / f"{index}.png")
    line = next(iter(README))
    small = "--data-dir images --epochs 5 --batch-size 8 --lr 1e-3 --seed 1"
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", *shlex.split(f"{line} {small}")[2:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = (tmp_path / "results" / "FDFA").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 2
    assert rows[-1]["test_accuracy"] == 100


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
    algorithm="fg",
    model="resnet18-8b",
    data="cifar10",
    epochs=100,
    batch_size=128,
    lr=0.05,
    log_interval=39,
    device="cuda:0" if torch.cuda.is_available() else "cpu",
    wandb_project="Forward Gradient",
    wandb_name="default-name",
    optimizer=Optimizer("sgd", momentum=0.9, weight_decay=5e-4),
    schedule=Schedule("step", gamma=0.2, step_size=30),
    heads=Heads("mlp"),
    forward_gradient=ForwardGradient(guess="local", space="weight", engine="reverse"),
    transform=Transform(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), augment="crop-flip"),
)
ImageNet = Transform(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), augment="resized-crop-flip", size=224)


def fg(**changes: str | float) -> ForwardGradient:
    return replace(PAPER.forward_gradient, **changes)  # type: ignore[arg-type]


FLG = {
    README_OF_FLG: replace(PAPER, heads=Heads("cnn", 32), forward_gradient=fg(eps=1e-14)),
    "python -u main.py --algo localonly --arch resnet18-16b --auxnet mlp --auxnet.h_channel 512 --n_epoch 100  "
    "--optimizer.lr 5e-2 --optimizer.wd 5e-4 --eps_norm 1e-14": replace(
        PAPER, algorithm="local", model="resnet18-16b", heads=Heads("mlp", 512), forward_gradient=ForwardGradient()
    ),
    "python -u main.py --algo std --arch resnet18 --auxnet linear --auxnet.h_channel 32 --n_epoch 100  --optimizer.lr 5e-2 "
    "--optimizer.wd 5e-4 --eps_norm 1e-14": replace(
        PAPER, algorithm="bp", heads=Heads("linear", 32), forward_gradient=ForwardGradient()
    ),
    "python main.py --algorithm generic": PAPER,
    "python main.py --algorithm=std": replace(PAPER, algorithm="bp", forward_gradient=ForwardGradient()),
    "python main.py --algorithm localonly --auxnet predsim": replace(
        PAPER, algorithm="local", heads=Heads("predsim"), forward_gradient=ForwardGradient()
    ),
    "python main.py --algorithm avg-weight-fast --guess random": replace(
        PAPER, forward_gradient=fg(guess="random", space="avg-weight")
    ),
    "python main.py --target sum --guess ntk --space activation-2 --eps 1e-3": replace(
        PAPER, forward_gradient=fg(target="sum", guess="ntk", space="activation-2", eps=1e-3)
    ),
    "python main.py --guess random --space sign-weight --noise_type rademacher": replace(
        PAPER, forward_gradient=fg(guess="random", space="sign-weight", noise="rademacher", scaling="projection")
    ),
    "python main.py --guess random --space activation": replace(PAPER, forward_gradient=fg(guess="random", space="activation")),
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
        assert config.forward_gradient == fg(
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
        ("--algo bp", "--algo bp: use std, localonly, or fg-tgt-TARGET-guess-GUESS-SPACE"),
        ("--optimizer adam --momentum 0.9", "--momentum 0.9 is for --optimizer sgd: give both or neither"),
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


def test_the_readme_command_of_flg_trains(tmp_path: Path) -> None:
    """Word for word, on a narrow network, for two epochs, with CIFAR-10's format in a folder."""
    write_cifar10(tmp_path, train=64, test=20)
    small = f"--path {tmp_path} --n_epoch 2 --batchsize 16 --widen_factor 0.07 --histogram --save_model"
    done = subprocess.run(
        [sys.executable, "-u", ROOT / "main.py", *shlex.split(f"{README_OF_FLG} {small}")[3:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fg (")
    (folder,) = (tmp_path / "results" / "resnet18-8b-cnn-global-local-weight").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert list(rows[0]["heads"]) == [f"block{number}" for number in range(1, 8)]
    assert all(rows[1]["heads"][cut]["loss"] < rows[0]["heads"][cut]["loss"] for cut in rows[0]["heads"])
    weights = torch.load(folder / "weights-2.pt", weights_only=True)
    assert weights["block1.0.weight"].shape == (4, 3, 3, 3)
    assert len((folder / "alignment.jsonl").read_text().splitlines()) == 3
