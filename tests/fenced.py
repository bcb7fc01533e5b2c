"""Run the fenced Python blocks of a Markdown page as they are printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

TOP = Path(__file__).parent.parent
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str = "python") -> list[tuple[int, str]]:
    """The fenced blocks in ``language``, each with the number of its first line in the page."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, fence.start(2)) + 1, fence[2])
        for fence in _FENCE.finditer(text)
        if fence[1] == language
    ]


def run(page: Path) -> dict[str, Any]:
    """Execute the page's Python blocks, top to bottom, in one namespace, and return it.

    A traceback shows the page's own path and line numbers.
    """
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for line, source in blocks(page):
        exec(compile("\n" * (line - 1) + source, str(page), "exec", dont_inherit=True), namespace)
    return namespace
