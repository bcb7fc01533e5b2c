"""The pages for contributors name files, functions and folders that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from fenced import TOP
from test_layers import LAYERS

import diffopt

PACKAGE = Path(diffopt.__file__).parent
PAGE = (TOP / "docs/pages/inside/unroll-to-gradient.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([\w/]+\.py)`(?: \||,)\s+`([\w.]+)`", PAGE)


def names_in(path: Path) -> set[str]:
    """The functions and classes of a file, and the methods of the classes."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}" for method in methods}
    return found


def test_the_way_has_ten_lines() -> None:
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)] == [*range(1, 11)]


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[" ".join(pair) for pair in NAMED])
def test_what_the_page_names_is_there(file: str, name: str) -> None:
    assert name in names_in(PACKAGE / file)


def test_the_tree_is_that_of_the_package() -> None:
    text = (TOP / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("## The shape of the code")
    tree = re.findall(r"^\| `(\w+)[/.]", rest, re.MULTILINE)
    assert tree == LAYERS
