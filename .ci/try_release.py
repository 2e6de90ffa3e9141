"""Build the wheel and the sdist, and try each in an environment of its own, as a stranger would.

`try_release.py --keep dist` leaves what has been built there. The library alone has to import, say its version and estimate;
with `[lab]`, `onward doctor` and a short training have to work. `--constraints` holds the versions that are installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMOKE = "import torch, onward; m = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)); "
SMOKE += "onward.FDFA(m).estimate(torch.randn(3, 4), torch.tensor([0, 1, 1])); assert m[0].weight.grad is not None"


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--keep", type=Path, help="a folder for the wheel and the sdist")
    command.add_argument("--constraints", type=Path, help="versions to install, such as constraints.txt")
    asked = command.parse_args()
    fixed = ["-c", str(asked.constraints.resolve())] if asked.constraints else []
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        builder = made(folder / "builder")
        run(builder, "-m", "pip", "install", "--quiet", "build")
        run(builder, "-m", "build", "--outdir", str(folder / "dist"), str(ROOT))
        for kind in ("*.whl", "*.tar.gz"):
            (built,) = (folder / "dist").glob(kind)
            python = made(folder / kind.strip("*.").replace(".", "-"))
            run(python, "-m", "pip", "install", "--quiet", *fixed, str(built), cwd=folder)
            run(python, "-m", "onward", "--version", cwd=folder)
            run(python, "-c", SMOKE, cwd=folder)
            run(python, "-m", "pip", "install", "--quiet", *fixed, f"{built}[lab]", cwd=folder)
            run(python, "-m", "onward", "doctor", cwd=folder)
            run(python, "-m", "onward", "train", "--epochs", "1", "--out", f"trained-by-{python.parents[1].name}", cwd=folder)
            print(f"{built.name}: installs, and works", flush=True)
        if asked.keep:
            shutil.copytree(folder / "dist", asked.keep, dirs_exist_ok=True)


def made(folder: Path) -> Path:
    """The Python of a new, empty environment."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(python: Path, *arguments: str, cwd: Path = ROOT) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, *arguments], cwd=cwd, env=environment, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
