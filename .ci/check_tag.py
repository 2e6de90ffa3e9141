"""Refuse a tag that is not the version of the package, the changelog and CITATION.cff: `check_tag.py v0.1.0`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = {
    "onward.__version__": ("onward/__init__.py", r'^__version__ = "(.*)"'),
    "the changelog's newest release": ("CHANGELOG.md", r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$"),
    "the version in CITATION.cff": ("CITATION.cff", r"^version: (.*)$"),
}


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What is not as the tag says."""
    wrong = []
    for what, (path, pattern) in PLACES.items():
        found = re.search(pattern, (root / path).read_text(encoding="utf-8"), re.MULTILINE)
        if found is None or f"v{found[1]}" != tag:
            wrong.append(f"tag {tag}, and {what} is {found[1] if found else 'missing'}")
    return wrong


if __name__ == "__main__":
    sys.exit("\n".join(problems(sys.argv[1])) or None)
