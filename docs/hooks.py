"""What MkDocs does not do by itself: files beside the documents are in the site, and every algorithm is in its menu."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(((?:\.\./)+)((?:examples|onward|tests|benchmarks|recipes)/[\w./-]+|[A-Z]+\.md)")
"""Links from a document to files of the repository."""


def on_files(files: Files, config: Any) -> Files:
    linked = {found[1] for path in (ROOT / "docs").rglob("*.md") for found in OUTSIDE.findall(path.read_text(encoding="utf-8"))}
    for name in sorted(linked):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Such links lead one folder less far up in the site, where these files are beside the documents."""
    if page.file.generated_by:
        return markdown.replace("](docs/", "](")
    return OUTSIDE.sub(lambda found: f"]({found[1].removeprefix('../')}{found[2]}", markdown)


def on_config(config: Any) -> Any:
    """One line in the menu for each page in `algorithms/`."""
    pages = sorted(path.name for path in (ROOT / "docs" / "algorithms").glob("*.md") if path.name != "index.md")
    for entry in config["nav"]:
        if "Algorithms" in entry:
            entry["Algorithms"] = ["algorithms/index.md", *({name.removesuffix(".md"): f"algorithms/{name}"} for name in pages)]
    return config
