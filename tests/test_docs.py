"""The documentation's code blocks run as they are printed, and so does docs/examples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fenced import TOP, blocks, run

PAGES = sorted(page for page in (TOP / "docs").rglob("*.md") if blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_blocks_run(page: Path) -> None:
    run(page)


def test_the_digits_example_runs(tmp_path: Path) -> None:
    out = tmp_path / "digits.png"
    done = subprocess.run(
        [
            *[sys.executable, "-W", "error", TOP / "docs/examples/digits.py"],
            *["--inner", "12", "--outer", "2", "--out", out],
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
