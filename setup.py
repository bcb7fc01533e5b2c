"""Everything is in setup.cfg but the long description: the README with absolute addresses.

A package index shows the README away from its repository, so that relative links and pictures
lead nowhere there. ``DIFFOPT_REPOSITORY=https://github.com/OWNER/NAME`` in the environment of the
build makes them lead to the tag of this version.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import setup

_LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!https?://|#|mailto:)([^)\s]+)(\))")


def absolute(readme: str, repository: str, tag: str) -> str:
    """``readme`` with its relative links and pictures at ``repository``, a GitHub address."""
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/")

    def made(link: re.Match[str]) -> str:
        picture, text, path, end = link.groups()
        base = f"{raw}/{tag}" if picture else f"{repository}/blob/{tag}"
        return f"{picture}{text}{base}/{path}{end}"

    return _LINK.sub(made, readme)


def long_description() -> str:
    here = Path(__file__).parent
    readme = (here / "README.md").read_text(encoding="utf-8")
    repository = os.environ.get("DIFFOPT_REPOSITORY", "").rstrip("/")
    if not repository:
        return readme
    source = (here / "diffopt/__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"', source, re.MULTILINE)
    return absolute(readme, repository, f"v{version[1]}")


if __name__ == "__main__":
    setup(long_description=long_description(), long_description_content_type="text/markdown")
