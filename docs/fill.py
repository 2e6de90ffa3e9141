"""Fill the marked regions of the algorithms' pages: settings from the registry, figures from `docs/figures/*.json`.

`python docs/fill.py` writes them, and a test finds them as they should be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
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
    """What was measured of an algorithm: a sentence and a table for each file of figures that has it."""
    parts = []
    for path in sorted((DOCS / "figures").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in found["rows"] if row["algorithm"].partition(":")[0] in (name, "bp")]
        if any(row["algorithm"] != "bp" for row in rows) or name == "bp":
            parts += [f"{found['what']}:\n\n{_table(found['columns'], rows)}"]
    return "\n\n".join(parts) if parts else "Nothing yet."


def _table(columns: Mapping[str, str], rows: list[dict[str, Any]]) -> str:
    lines = [f"| algorithm | {' | '.join(columns.values())} |", f"|---|{'---|' * len(columns)}"]
    return "\n".join(
        lines + [f"| `{row['algorithm']}` | {' | '.join(str(row.get(key, '')) for key in columns)} |" for row in rows]
    )


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
