"""Every page of the built site, on phone and desktop: no sideways scrolling, a quiet console."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fenced import TOP

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


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


#: What people type: the section that has it.
ASKED = {
    "DataLoader": "recipes/#batches-from-a-dataloader",
    "iterator exhausted": "recipes/#an-iterator-that-is-used-up",
    "lr_scheduler": "recipes/#schedules-and-lr-schedulers",
    "freeze": "recipes/#freeze-a-part-of-the-model",
    "learning rate per task": "recipes/#a-learning-rate-for-each-layer-weight-or-task",
    "resume meta-training": "recipes/#save-and-resume-meta-training",
    "eval mode": "recipes/#evaluate-without-gradients-in-eval-mode",
    "logging TensorBoard": "recipes/#logging",
    "multi-GPU": "recipes/#one-gpu-several-gpus",
    "mixed precision GradScaler": "recipes/#mixed-precision-and-gradscaler",
    "Jupyter": "recipes/#notebooks",
    "gradient None": "recipes/#my-gradient-is-none",
    "gradient explodes": "recipes/#my-gradient-explodes-or-is-nan",
    "NaN": "recipes/#my-gradient-explodes-or-is-nan",
    "CUDA OOM": "recipes/#out-of-memory",
    "out of memory": "recipes/#out-of-memory",
    "slow": "recipes/#it-is-slow",
    "how do I cite": "faq/#how-do-i-cite-it",
}


@needs_docs
def test_the_search_has_the_words_that_people_use(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text("utf-8"))["docs"]
    sections = {doc["location"]: f"{doc['title']} {doc['text']}".lower() for doc in index}
    for words, section in ASKED.items():
        missing = [w for w in re.split(r"[\s-]", words.lower()) if w not in sections[section]]
        assert not missing, (words, section)


@needs_docs
def test_formulas_have_no_commands_left(site: Path) -> None:
    pages = {page: page.read_text("utf-8") for page in site.rglob("index.html")}
    formulas = {p: re.findall(r"<math.*?</math>", text, re.DOTALL) for p, text in pages.items()}
    assert sum(map(len, formulas.values())) > 20
    assert not [(p, f) for p, found in formulas.items() for f in found if "\\" in f]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@needs_docs
def test_nothing_scrolls_sideways_and_the_console_is_quiet(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOP / "docs"))
    screenshots = importlib.import_module("screenshots")
    index = site / "search/search_index.json"
    whole = index.read_text("utf-8")
    first = json.dumps(json.loads(whole) | {"docs": json.loads(whole)["docs"][:1]})
    found = {}
    views = screenshots.VIEWS[:3]  # the fourth has other colours alone
    for view, wrong in screenshots.look_at(site, BROWSER, views):
        found[view] = wrong
        index.write_text(first, "utf-8")  # each page sorts what can be found: half of the time
    index.write_text(whole, "utf-8")
    assert len(found) == 3 * len(list(site.rglob("index.html")))
    assert {view: wrong for view, wrong in found.items() if wrong} == {}
