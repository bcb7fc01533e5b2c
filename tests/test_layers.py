"""The folders show the architecture: each imports only from those above it."""

import ast
from pathlib import Path

import pytest

import diffopt

PACKAGE = Path(diffopt.__file__).parent

#: From the bottom up. A part may import from itself and from the parts before it.
LAYERS = [
    "schedule",
    "_torch",
    "_values",
    "optim",
    "_derivatives",
    "_model",
    "_step",
    "_loop",
    "adjoint",
    "_compile",
    "_unroll",
    "distributed",
    "higher",
]


def parts_imported(path):
    """The parts of diffopt that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("diffopt."):
                yield name.split(".")[1]


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def test_every_file_belongs_to_a_layer():
    assert {part_of(path) for path in FILES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    own = LAYERS.index(part_of(path))
    above = {name for name in parts_imported(path) if LAYERS.index(name) > own}
    assert not above, f"{path.name} imports from {sorted(above)}"
