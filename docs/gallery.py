"""The gallery: runs the examples, and makes a page of each.

    python docs/gallery.py            # run every example in full: its printed result and pictures
    python docs/gallery.py imaml      # only this one

As a hook of MkDocs, it makes the pages from the files: the docstring and the comments after
``# %%`` as text, the code between them, the printed result and the picture. What is printed and
drawn is committed beside the examples, in ``docs/examples/output``; nothing is run when the site is
built.
"""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent / "examples"
OUTPUT = EXAMPLES / "output"
#: In the order of the gallery.
NAMES = (
    "attribution",
    "reweighting",
    "distillation",
    "learned_schedule",
    "maml_sinusoids",
    "maml_plus_plus",
    "meta_sgd",
    "imaml",
    "learned_loss",
    "learned_optimizer",
    "darts",
    "unrolled_gan",
    "nested",
    "lora",
)


def names() -> list[str]:
    """The examples that there are, without their ``.py``."""
    return [name for name in NAMES if (EXAMPLES / f"{name}.py").exists()]


def shown() -> list[str]:
    """Those that have been run, and so have a page."""
    return [name for name in names() if (OUTPUT / f"{name}.txt").exists()]


# -- Running ---------------------------------------------------------------------------------------


def digest(name: str) -> str:
    """Of the example's code, whatever its comments and its layout are."""
    code = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    code.body = code.body[1:]  # the docstring is text
    return hashlib.sha256(_said(code).encode()).hexdigest()[:16]


def _said(code: object) -> str:
    """A syntax tree as text, the same in every Python: ``ast.dump`` tells of new empty fields."""
    if isinstance(code, list):
        return f"[{', '.join(map(_said, code))}]"
    if not isinstance(code, ast.AST):
        return repr(code)
    fields = [(key, value) for key, value in ast.iter_fields(code) if value not in (None, [])]
    return f"{type(code).__name__}({', '.join(f'{key}={_said(value)}' for key, value in fields)})"


def run(name: str) -> None:
    """Run the example in full, and keep what it prints and draws."""
    OUTPUT.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"]
    command += ["--dark", "--out", OUTPUT / f"{name}.png"]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{name}: {time.perf_counter() - began:.0f} s\n{done.stdout}", flush=True)
    (OUTPUT / f"{name}.txt").write_text(f"{digest(name)}\n{done.stdout}", encoding="utf-8")


# -- Pages -----------------------------------------------------------------------------------------


def title_of(name: str) -> tuple[str, str]:
    """The first line of the docstring, and the rest of it."""
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    title, _, rest = (ast.get_docstring(ast.parse(text)) or "").partition("\n")
    return title.rstrip("."), rest.strip()


def page(name: str) -> str:
    """The Markdown of the example's page."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    title, text = title_of(name)
    code = source.split('"""', 2)[2]
    cells = re.split(r"^# %%\n", code.lstrip("\n"), flags=re.MULTILINE)
    _, _, printed = (OUTPUT / f"{name}.txt").read_text(encoding="utf-8").partition("\n")
    parts = [f"# {title}", text, _pictures(name, title)]
    parts += ["It prints", f"```text\n{printed.rstrip()}\n```"]
    parts.append(
        f"`python docs/examples/{name}.py` in a clone runs it, `--help` shows what can be chosen; "
        "the arguments, data and the look of the picture come from `shared.py` beside it."
    )
    for cell in cells:
        comment = re.match(r"(#.*\n)*", cell)
        lines = comment[0].splitlines() if comment else []
        parts.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
        rest = cell[comment.end() if comment else 0 :].strip("\n")
        if rest:
            parts.append(f"```py\n{rest}\n```")
    wide = "---\nhide:\n  - toc\n---\n\n"  # room for lines of code
    return wide + "\n\n".join(part for part in parts if part) + "\n"


def _pictures(name: str, title: str, where: str = "") -> str:
    return f"![{title}]({where}{name}.png#only-light)\n![{title}]({where}{name}-dark.png#only-dark)"


def cards() -> str:
    """The Markdown of the gallery."""
    parts = []
    for name in shown():
        title, text = title_of(name)
        head, _, tail = title.partition(": ")
        about = " ".join((tail[:1].upper() + tail[1:] if tail else text.partition(". ")[0]).split())
        about += "" if about.endswith("?") else "."
        parts.append(
            f"-   [![]({name}.png#only-light)![]({name}-dark.png#only-dark)]({name}.md)\n\n"
            f"    **[{head}]({name}.md)**\n\n    {about}\n"
        )
    return '<div class="grid cards gallery" markdown>\n\n' + "\n".join(parts) + "\n</div>\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and the pictures."""
    from mkdocs.structure.files import File

    for name in shown():
        files.append(File.generated(config, f"examples/{name}.md", content=page(name)))
        for picture in OUTPUT.glob(f"{name}*.png"):
            if picture.stem in (name, f"{name}-dark"):
                made = File.generated(config, f"examples/{picture.name}", abs_src_path=str(picture))
                files.append(made)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("<!-- gallery -->", cards() if "<!-- gallery -->" in markdown else "")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or names():
        run(chosen)
