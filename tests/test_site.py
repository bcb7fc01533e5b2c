"""Every page of the built site, on a phone: no sideways scrolling, nothing on the console."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fenced import TOP

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs the docs extra")
def test_nothing_scrolls_sideways_and_the_console_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict"]
    command += ["-f", str(TOP / "docs/mkdocs.yml"), "-d", str(site)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(TOP)}
    subprocess.run(command, check=True, env=env)
    monkeypatch.syspath_prepend(str(TOP / "docs"))
    screenshots = importlib.import_module("screenshots")
    pictures = tmp_path / "pictures"
    assert screenshots.look_at(site, pictures, BROWSER, ["phone"]) == {}
    taken = len(list(pictures.glob("*.png")))
    assert taken == 2 * len(list(site.rglob("index.html")))
