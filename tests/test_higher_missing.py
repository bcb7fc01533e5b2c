"""``higher`` is optional: one module needs it, and says so where it is missing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffopt

PACKAGE = Path(diffopt.__file__).parent


def python(source: str) -> str:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_the_plug_imports_it() -> None:
    importing = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            if any(name.split(".")[0] == "higher" for name in names):
                importing.add(path.relative_to(PACKAGE).as_posix())
    assert importing == {"higher.py"}


def test_without_it_the_rest_works_and_the_plug_says_what_to_install() -> None:
    out = python(
        """if True:
        import sys
        sys.modules["higher"] = None
        import torch, diffopt
        model = torch.nn.Linear(1, 1)
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        diffopt.unroll(model, opt, 2, lambda m, t: m.weight.sum())
        try:
            import diffopt.higher
        except ImportError as error:
            print(error)
        """
    )
    assert out == 'diffopt.higher needs the package higher: pip install "torch-diffopt[higher]"\n'


def test_its_objects_are_recognized_before_the_plug_is_imported() -> None:
    pytest.importorskip("diffopt.higher", exc_type=ImportError)
    out = python(
        """if True:
        import torch, higher, diffopt
        model = torch.nn.Linear(1, 1)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        with higher.innerloop_ctx(model, opt) as (fmodel, dopt):
            for pair in ((fmodel, dopt), (model, dopt), (fmodel, opt)):
                try:
                    diffopt.unroll(*pair, 1, lambda m, t: m.weight.sum())
                except TypeError as error:
                    print(error)
        """
    )
    after = "of higher, which diffopt knows only after `import diffopt.higher`\n"
    patched, optimizer = (
        f"model is a FunctionalLinear {after}",
        f"opt is a DifferentiableSGD {after}",
    )
    assert out == patched + optimizer + patched
