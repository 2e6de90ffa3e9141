"""The tree says what belongs where: imports run one way, files and functions are small, and `onward` alone is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import onward

ROOT = Path(onward.__file__).parent
FILES = {".".join(("onward", *path.relative_to(ROOT).with_suffix("").parts)): path for path in sorted(ROOT.rglob("*.py"))}
LEVELS = [
    ["onward.errors", "onward.phases"],
    ["onward.derivatives"],
    ["onward.network"],
    ["onward.estimators"],
    ["onward.parallel", "onward.alignment", "onward.capturing"],
    ["onward"],
    ["onward.lab.system"],
    ["onward.lab.settings"],
    ["onward.lab.tasks", "onward.lab.data", "onward.lab.networks", "onward.lab.recipes"],
    ["onward.lab.run"],
    ["onward.lab.report"],
    ["onward.lab.studies"],
    ["onward.lab.cli", "onward.lab.dialects"],
    ["onward.__main__"],
]
"""What may import what: everything what is on a level above it in this list, and rooms their own files."""
MOST_LINES, LONGEST = 450, 60


def imports(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, wherever in it that is."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "onward")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "onward":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES or f"{whole}.__init__" in FILES else str(node.module)


def level(module: str) -> int:
    """The level of the longest name in the list that the module begins with."""
    fitting = [
        (len(name), number)
        for number, names in enumerate(LEVELS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(fitting)[1]


@pytest.mark.parametrize("module", [name for name in FILES if name != "onward.lab.__init__"])
def test_imports_run_one_way(module: str) -> None:
    mine = module.removesuffix(".__init__")
    for imported in imports(FILES[module]):
        assert level(imported) <= level(mine), f"{module} imports {imported}, which is above it"


def test_no_imports_go_in_a_circle() -> None:
    """Of files; a package that gathers names of its own files does not count where these import one another."""
    graph = {
        name: {found for found in imports(path) if found in FILES and found != name}
        for name, path in FILES.items()
        if not name.endswith("__init__")
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for following in sorted(graph.get(name, ())):
                visit(following, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    """Each function by its whole name, with its lines; a docstring does not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}.{node.name}")
        elif isinstance(node, ast.FunctionDef):
            said = node.body[0] if ast.get_docstring(node) is not None else None
            docstring = said.end_lineno - said.lineno + 1 if said is not None and said.end_lineno else 0
            yield f"{prefix}.{node.name}", (node.end_lineno or 0) - node.lineno + 1 - docstring


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_are_small(module: str) -> None:
    text = FILES[module].read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for name, lines in functions(ast.parse(text), module):
        assert lines <= LONGEST, f"{name} has {lines} lines"


def test_the_library_imports_torch_and_nothing_else() -> None:
    """So it does not import the lab either."""
    script = "import torch, sys; before = set(sys.modules); import onward; print(*set(sys.modules) - before)"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    ).stdout.split()
    ours = {name.partition(".")[0] for name in found if name.partition(".")[0] not in sys.stdlib_module_names}
    assert ours <= {"onward", "torch"}, ours
    assert not any(name.startswith("onward.lab") for name in found)


def test_what_is_public_is_said() -> None:
    assert sorted(onward.__all__) == sorted(set(onward.__all__))
    for name in onward.__all__:
        assert getattr(onward, name).__doc__, name
