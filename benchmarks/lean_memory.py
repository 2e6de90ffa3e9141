"""Peak memory and time of a training step without a gradient, beside inference and backpropagation.

    python benchmarks/lean_memory.py                        a transformer of 34 million parameters
    python benchmarks/lean_memory.py --device cuda --width 2048 --layers 24 --tokens 512

Each candidate is a process of its own, one after the other, that builds the network and takes a few steps. Peak memory is what
its resident size grew by (on a GPU: what tensors took at most), network included. Directions are drawn in pieces, in as many
threads as torch has; `OMP_NUM_THREADS=1` is the plainest measurement.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward.lab.system import memory

CANDIDATES = ("inference", "spsa, lean", "fg, lean", "spsa, sgd", "fg, sgd", "bp, sgd", "bp, adam")


class Transformer(nn.Module):
    """Tokens in, logits of the next ones out; the embedding gives the outputs too."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        heads = max(1, width // 64)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.words(tokens)
        for layer in self.layers:
            h = layer(h)
        return F.linear(self.norm(h), self.words.weight).transpose(1, 2)


def stepper(name: str, model: nn.Module, x: Tensor) -> Callable[[], object]:
    """A step of that candidate."""
    if name == "inference":

        @torch.no_grad()
        def inference() -> Tensor:
            return F.cross_entropy(model(x), x)

        return inference
    rule, follows = name.split(", ")
    estimator: onward.Estimator
    if rule == "spsa":
        estimator = onward.SPSA(model, check=False)
    elif rule == "fg":
        estimator = onward.ForwardGradient(model, space="avg-weight", check=False)
    else:
        estimator = onward.Backprop(model)
    optimizer: torch.optim.Optimizer
    if follows == "lean":
        optimizer = onward.Lean(estimator, lr=1e-6)
    else:
        optimizer = (torch.optim.Adam if follows == "adam" else torch.optim.SGD)(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        estimator.estimate(x, x)
        optimizer.step()

    return step


def measure(options: argparse.Namespace) -> tuple[int, float]:
    """Bytes by which memory grew, and seconds of a step."""
    device = torch.device(options.device)
    build = partial(Transformer, options.vocabulary)
    stepper(options.candidate, build(8, 1).to(device), torch.zeros(1, 4, dtype=torch.int64, device=device))()
    memory.keep_freed()
    memory.reset_peak(device)
    before = memory.peak(device)
    model = build(options.width, options.layers).to(device)
    if options.bf16:
        model.to(torch.bfloat16)
    x = torch.randint(options.vocabulary, (options.batch_size, options.tokens), device=device)
    step, seconds = stepper(options.candidate, model, x), []
    for _ in range(options.steps):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return memory.peak(device) - before, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=16000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="weights in bfloat16")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=CANDIDATES)
    parser.add_argument("--candidate", choices=CANDIDATES, help="measure this one alone, in this process")
    options = parser.parse_args()
    if options.candidate:
        print(json.dumps(measure(options)))
        return
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(options.vocabulary, options.width, options.layers).parameters())
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, {parameters / 1e6:.1f} M parameters, {options.batch_size} x {options.tokens}")
    base: tuple[float, float] | None = None
    for name in options.candidates:
        command = [sys.executable, __file__, *sys.argv[1:], "--candidate", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name:12} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        peak, seconds = json.loads(done.stdout)
        base = base or (peak, seconds)
        print(f"{name:12}{peak / 1e6:10.0f} MB {peak / base[0]:6.2f}{1e3 * seconds:10.0f} ms {seconds / base[1]:6.2f}")


if __name__ == "__main__":
    main()
