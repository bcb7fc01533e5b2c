"""The documentation's code blocks run as they are printed, and so does docs/examples."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fenced import TOP, blocks, run

import diffopt

PAGES = sorted(page for page in (TOP / "docs").rglob("*.md") if blocks(page))
PUBLIC = [getattr(diffopt, name) for name in diffopt.__all__]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_blocks_run(page: Path) -> None:
    if "import diffopt.higher" in page.read_text(encoding="utf-8"):
        pytest.importorskip("diffopt.higher", exc_type=ImportError)
    run(page)


def test_the_digits_example_runs(tmp_path: Path) -> None:
    out = tmp_path / "digits.png"
    done = subprocess.run(
        [
            *[sys.executable, "-W", "error", TOP / "docs/examples/digits.py"],
            *["--inner", "6", "--outer", "1", "--out", out],
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")
    for line in ("gradient", "validation", "test", "peak memory"):
        assert line in done.stdout.lower()


def test_every_public_name_is_on_the_api_page() -> None:
    page = (TOP / "docs/pages/api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: diffopt\.([\w.]+)$", page, re.MULTILINE)
    assert sorted(shown) == sorted(diffopt.__all__)


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_what_is_documented_as_an_argument_is_one(public: Any) -> None:
    args = re.search(r"^Args:\n((?:    .*\n|\n)+)", inspect.getdoc(public) or "", re.MULTILINE)
    if args:
        documented = re.findall(r"^    (\w[\w, ]*):", args[1], re.MULTILINE)
        names = [name for names in documented for name in names.split(", ")]
        assert set(names) <= set(inspect.signature(public).parameters)


def test_every_public_name_has_an_example_on_the_api_page() -> None:
    page = "\n".join(source for _, source in blocks(TOP / "docs/pages/api.md"))
    used = set(re.findall(r"diffopt\.(\w+)", page))
    assert set(diffopt.__all__) <= used


def test_the_drawing_is_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOP / "docs"))
    drawing = importlib.import_module("drawing")
    assert drawing.drawing() == drawing.PICTURE.read_text("utf-8")


def test_the_table_of_adjoints_is_that_of_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOP / "docs"))
    adjoints = importlib.import_module("adjoints_table")
    assert adjoints.BEGIN + adjoints.table() + adjoints.END in adjoints.PAGE.read_text("utf-8")
