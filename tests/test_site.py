"""The built site: no page scrolls sideways or fills the console, and the search finds things."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fenced import TOP

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium")
needs_docs = pytest.mark.skipif(
    not importlib.util.find_spec("mkdocs"), reason="needs the docs extra"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict"]
    command += ["-f", str(TOP / "docs/mkdocs.yml"), "-d", str(site)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(TOP)}
    subprocess.run(command, check=True, env=env)
    return site


@pytest.fixture
def screenshots(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOP / "docs"))
    return importlib.import_module("screenshots")


#: What people type: the section that the site's search names first.
ASKED = {
    "DataLoader": "recipes/#batches-from-a-dataloader",
    "iterator exhausted": "recipes/#an-iterator-that-is-used-up",
    "lr_scheduler": "recipes/#schedules-and-lr-schedulers",
    "scheduler": "recipes/#schedules-and-lr-schedulers",
    "freeze": "recipes/#freeze-a-part-of-the-model",
    "learning rate per task": "recipes/#a-learning-rate-for-each-layer-weight-or-task",
    "resume meta-training": "recipes/#save-and-resume-meta-training",
    "eval mode": "recipes/#evaluate-without-gradients-in-eval-mode",
    "logging TensorBoard": "recipes/#logging",
    "wandb": "recipes/#logging",
    "multi-GPU": "recipes/#one-gpu-several-gpus",
    "DDP": "recipes/#one-gpu-several-gpus",
    "mixed precision GradScaler": "recipes/#mixed-precision-and-gradscaler",
    "Jupyter": "recipes/#notebooks",
    "gradient None": "recipes/#my-gradient-is-none",
    "gradient explodes": "recipes/#my-gradient-explodes-or-is-nan",
    "NaN": "recipes/#my-gradient-explodes-or-is-nan",
    "CUDA OOM": "recipes/#out-of-memory",
    "out of memory": "recipes/#out-of-memory",
    "slow": "recipes/#it-is-slow",
    "how do I cite": "faq/#how-do-i-cite-it",
    "pip install": "faq/#is-this-pip-install-diffopt",
}


TYPED = """(words => {
  const field = document.querySelector("input[name=query]");
  field.focus();
  field.value = words;
  field.dispatchEvent(new Event("input", {bubbles: true}));
  field.dispatchEvent(new KeyboardEvent("keyup", {key: "a", bubbles: true}));
})"""
FOUND = """[
  document.querySelector(".md-search-result__meta").textContent.trim(),
  ...[...document.querySelectorAll("a.md-search-result__link")].map(a => a.pathname + a.hash)
]"""


def searched(browser: Any, words: str) -> list[str]:
    """What the page's search field answers: a line, and the addresses that it lists."""
    for typed, said in (("", "Type"), (words, "matching")):
        browser.run(f"{TYPED}({json.dumps(typed)})")
        until = time.monotonic() + 30
        while said not in (found := browser.run(FOUND))[0]:
            assert time.monotonic() < until, (words, found)
            time.sleep(0.02)
    return found


@needs_browser
@needs_docs
def test_the_search_finds_what_people_ask_for(site: Path, screenshots: ModuleType) -> None:
    browser = screenshots.Browser(BROWSER)
    try:
        with screenshots.served(site) as address:
            browser.open(address)
            browser.run("document.querySelector('[data-md-toggle=search]').click()")
            found = {words: searched(browser, words) for words in ASKED}
    finally:
        browser.close()
    sections = {words: [x for x in links if "#" in x] for words, (_, *links) in found.items()}
    assert {words: links[:1] for words, links in sections.items()} == {
        words: [f"/{section}"] for words, section in ASKED.items()
    }


@needs_docs
def test_formulas_have_no_commands_left(site: Path) -> None:
    pages = {page: page.read_text("utf-8") for page in site.rglob("index.html")}
    formulas = {p: re.findall(r"<math.*?</math>", text, re.DOTALL) for p, text in pages.items()}
    assert sum(map(len, formulas.values())) > 20
    assert not [(p, f) for p, found in formulas.items() for f in found if "\\" in f]


@needs_browser
@needs_docs
def test_nothing_scrolls_sideways_and_the_console_is_quiet(
    site: Path, screenshots: ModuleType
) -> None:
    index = site / "search/search_index.json"
    whole = index.read_text("utf-8")
    first = json.dumps(json.loads(whole) | {"docs": json.loads(whole)["docs"][:1]})
    found = {}
    views = screenshots.VIEWS[::2]  # each size and each mode; the script looks at all four
    for view, wrong in screenshots.look_at(site, BROWSER, views):
        found[view] = wrong
        index.write_text(first, "utf-8")  # each page sorts what can be found: half of the time
    index.write_text(whole, "utf-8")
    assert len(found) == len(views) * len(list(site.rglob("index.html")))
    assert {view: wrong for view, wrong in found.items() if wrong} == {}
