"""Type checkers accept an annotated loss on the model and on the result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import diffopt

SNIPPET = """
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffopt

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


def loss_fn(model: diffopt.Model, batch: Batch) -> Tensor:
    x, y = batch
    penalty = torch.stack([p.square().sum() for p in model.parameters()]).sum()
    norm: Tensor = model.head(x).norm() + model.head.weight.norm()
    return F.cross_entropy(model(x), y) + penalty + norm


model = Net()
support: Batch = (torch.randn(25, 64), torch.arange(25) % 5)
inner = diffopt.SGD(model.parameters(), lr=0.4)
fast = diffopt.unroll(model, inner, [support] * 5, loss_fn, segment=5)
loss_fn(fast, support).backward()
loss_fn(fast.detach(), support)
loss_fn(model, support)
out: Tensor = fast(support[0])
reveal_type(fast.apply(loss_fn, support))
reveal_type(fast.params)
reveal_type(fast(support[0]))
loss_fn(3, support)
"""

#: What no line of the snippet has a type from. To read it would take most of the time.
UNREAD = (
    "numpy",
    "torch._dynamo",
    "torch._export",
    "torch._functorch",
    "torch._higher_order_ops",
    "torch._inductor",
    "torch._prims",
    "torch._subclasses",
    "torch.ao",
    "torch.distributed",
    "torch.export",
    "torch.fx",
    "torch.jit",
    "torch.onnx",
    "torch.testing",
    "torch.utils",
)


def test_mypy_accepts_an_annotated_loss(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    patterns = ",".join(f"{name}.*" for name in UNREAD)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{patterns}]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--allow-untyped-calls", "--no-pretty"]
    command += ["--config-file", str(tmp_path / "mypy.ini")]
    command += ["--cache-dir", str(tmp_path / "cache"), "--hide-error-context"]
    done = subprocess.run(
        [*command, str(tmp_path / "snippet.py")],
        cwd=Path(diffopt.__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [
        line.split(": ", 1)[1].replace("builtins.", "")
        for line in done.stdout.splitlines()
        if "snippet.py:" in line
    ]
    assert [line.replace("torch._tensor.", "") for line in lines[:3]] == [
        'note: Revealed type is "Tensor"',
        'note: Revealed type is "dict[str, Tensor]"',
        'note: Revealed type is "Any"',
    ], done.stdout
    # The one line that is wrong, and nothing else.
    assert len(lines) >= 4, done.stdout
    assert 'Argument 1 to "loss_fn" has incompatible type "int"; expected "Model"' in lines[3]
    assert not [line for line in lines[4:] if line.startswith("error")], done.stdout
