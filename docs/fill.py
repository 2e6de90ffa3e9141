"""Fill the marked regions of the algorithms' pages: settings from the registry, costs from `docs/figures/*.json`.

`python docs/fill.py` writes them, and a test finds them as they should be.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from onward.estimators.base import ALGORITHMS
from onward.estimators.settings import settings_of

DOCS = Path(__file__).parent
PAGES = DOCS / "algorithms"


def settings(name: str) -> str:
    """A table of an algorithm's settings."""
    rows = [
        f"| `{setting.name}` | `{setting.written(setting.default)}` | {setting.line.rstrip('.')} |"
        for setting in settings_of(ALGORITHMS[name]).values()
    ]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows]) if rows else "It has none."


def figures(name: str) -> str:
    """What a step costs: a sentence and a table for each file that `onward bench --json` has written into `docs/figures`."""
    parts = []
    for path in sorted((DOCS / "figures").glob("bench-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in found["rows"] if row["algorithm"].partition(":")[0] in (name, "bp") and not row["error"]]
        asked, where = found["config"], found["environment"]
        if name == "bp" or any(not row["algorithm"].startswith("bp") for row in rows):
            what = (
                f"A step of `{asked['model']}`, inputs of {asked['input']}, batch {asked['batch_size']}, {asked['precision']}"
            )
            parts.append(f"{what}; {where['device']}, torch {where['torch']}, by `onward bench`:\n\n{_table(rows)}")
    return "\n\n".join(parts) if parts else "Nothing yet."


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| algorithm | time / bp | memory / bp | GFLOP |", "|---|---|---|---|"]
    for row in rows:
        low, high = row["time / bp range"]
        cells = [f"{row['time / bp']:.2f} ({low:.2f} to {high:.2f})", f"{row['memory / bp']:.2f}", f"{row['flops'] / 1e9:.2f}"]
        lines.append(f"| `{row['algorithm']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def algorithms() -> str:
    """All algorithms, with a line on each."""
    rows = []
    for name in ALGORITHMS:
        heading, _, line = (PAGES / f"{name}.md").read_text(encoding="utf-8").split("\n")[:3]
        title = heading.partition(": ")[2]
        line = line.partition(". ")[0].rstrip(".")
        rows.append(f"| [`{name}`]({name}.md) | {title} | {line} |")
    return "\n".join(["| name | | the error signal |", "|---|---|---|", *rows])


def filled(path: Path) -> str:
    """A page as it should be."""
    fill = {"settings": lambda: settings(path.stem), "figures": lambda: figures(path.stem), "algorithms": algorithms}
    return re.sub(
        r"<!-- (settings|figures|algorithms) -->\n.*?<!-- end -->",
        lambda found: f"<!-- {found[1]} -->\n{fill[found[1]]()}\n<!-- end -->",
        path.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(filled(path), encoding="utf-8")
