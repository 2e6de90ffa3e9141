"""Docstrings as the reference shows them: examples are code, and Sphinx's roles are names in code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
"""Prompts, and what is printed, up to an empty line."""
ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc):`~?([^`]+)`")
SECTION = re.compile(r"^Settings:$", re.MULTILINE)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)


def shown(text: str) -> str:
    """A docstring in Markdown."""
    text = EXAMPLE.sub(lambda found: f"\n```pycon\n{found[0]}\n```\n", text)
    text = SECTION.sub("Parameters:", text)
    return ROLE.sub(r"`\1`", text)
