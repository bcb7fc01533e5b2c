"""What is published: its version, its citation, its README on a package index, its sources."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from fenced import TOP

import diffopt


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("diffopt_setup", TOP / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_citation_has_the_version() -> None:
    cited = re.search(r"^version: (.+)$", (TOP / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert cited is not None
    assert cited[1] == diffopt.__version__


def test_the_changelog_and_the_citation_have_the_release_of_the_same_day() -> None:
    day = re.search(r"^date-released: (.+)$", (TOP / "CITATION.cff").read_text("utf-8"), re.M)
    assert day is not None
    heading = f"## {diffopt.__version__}, {day[1]}\n"
    assert heading in (TOP / "CHANGELOG.md").read_text("utf-8")


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(
        r"\]\((?!https?://)([^)#\s]*)(#[^)\s]+)?\)", (TOP / "README.md").read_text("utf-8")
    )
    assert any(anchor for _, anchor in links)
    for path, anchor in links:
        assert (TOP / path).exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (TOP / path).read_text("utf-8"), re.MULTILINE)
            named = {re.sub(r"[^\w\s-]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor[1:] in named, path + anchor


def test_links_of_the_readme_are_absolute_on_a_package_index(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFOPT_REPOSITORY", "https://github.com/some/where/")
    text = setup_py.long_description()
    assert not re.findall(r"\]\((?!https?://|#)", text)
    tag = f"v{diffopt.__version__}"
    assert f"](https://github.com/some/where/blob/{tag}/LICENSE)" in text
    assert re.search(
        rf"!\[[^\]]*\]\(https://raw\.githubusercontent\.com/some/where/{tag}/docs/", text
    )


def test_the_source_distribution_has_what_its_tests_need(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    if not (TOP / ".git").exists():
        pytest.skip("not a checkout")
    code = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    tree = tmp_path / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=TOP,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (TOP / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((TOP / name).read_bytes())
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tree, check=True, capture_output=True
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    needed = [TOP / "README.md", TOP / "constraints.txt", TOP / "CITATION.cff", TOP / "setup.py"]
    for folder in ("diffopt", "tests", "docs", "benchmarks"):
        needed += [
            path for path in (TOP / folder).rglob("*") if path.suffix in (".py", ".md", ".txt")
        ]
    missing = {str(path.relative_to(TOP)) for path in needed} - inside
    assert not {path for path in missing if "/site/" not in path}


def test_importing_it_warns_of_nothing() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", "import diffopt"], check=True)
