"""``higher`` is optional: one module needs it, and says so where it is missing."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest
import torch

import diffopt

PACKAGE = Path(diffopt.__file__).parent


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
    assert importing == {"higher/__init__.py"}


def test_the_plug_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "higher", None)
    monkeypatch.delitem(sys.modules, "diffopt.higher", raising=False)
    with pytest.raises(ImportError, match="pip install higher") as caught:
        importlib.import_module("diffopt.higher")
    assert caught.value.__cause__ is not None


def test_its_objects_are_recognized_before_the_plug_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("diffopt.higher", exc_type=ImportError)
    import higher

    monkeypatch.setattr("diffopt._unroll.problem._ADAPTERS", [])
    model = torch.nn.Linear(1, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    after = "of higher, which diffopt knows only after `import diffopt.higher`"
    with higher.innerloop_ctx(model, opt) as (fmodel, dopt):
        for pair in ((fmodel, dopt), (fmodel, opt)):
            with pytest.raises(TypeError, match=f"model is a FunctionalLinear {after}"):
                diffopt.unroll(*pair, 1, lambda m, t: m.weight.sum())
        with pytest.raises(TypeError, match=f"opt is a DifferentiableSGD {after}"):
            diffopt.unroll(model, dopt, 1, lambda m, t: m.weight.sum())
