"""What makes two runs the same one, in terms that a message can name."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffopt._loop.loop import Loop
from diffopt._loop.verify import digest
from diffopt.schedule import Plan


def terms_of(loop: Loop, plan: Plan) -> dict[str, Any]:
    """Everything that a run in a folder has to have in common with the call that takes it up.

    Hyperparameters that are callables count by what they give at the first, the middle and the
    last step. Of the batches nothing is compared here: the losses that they give are.
    """
    step = loop.step
    terms: dict[str, Any] = {
        "diffopt": sys.modules[__name__.partition(".")[0]].__version__,
        "torch": torch.__version__,
        "number of steps": loop.steps,
        "first step": step.first_step,
        "plan": f"{plan} ({zlib.crc32(' '.join(map(str, plan.actions)).encode()):08x})",
        "bound max_cotangent_norm": loop.max_cotangent_norm,
        "number of tasks": loop.tasks,
        "verify": loop.ledger is not None,
        "optimizer": type(step.opt).__name__,
        "grad_transform": step.grad_transform is not None,
    }
    if step.group is not None:
        terms["process"] = f"number {step.group.rank} of {step.group.size}"
    for path, x in loop.start.tensors().items():
        terms[f"form of {' '.join(path)}"] = f"{tuple(x.shape)}, {x.dtype}, on {x.device.type}"
        terms[f"start of {' '.join(path)}"] = fingerprint(x)
    numbers = {0, loop.steps // 2, max(loop.steps - 1, 0)}
    for t in sorted(step.first_step + n for n in numbers):
        for i, options in enumerate(step.opt.hyperparameters(t)):
            for key, value in options.items():
                terms[f"hyperparameter {key} of param group {i} at step {t}"] = _in_json(value)
    return terms


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Say what differs between the terms of a folder and the terms of a call."""
    for key in (*there, *(key for key in here if key not in there)):
        a, b = there.get(key, "missing"), here.get(key, "missing")
        if a != b:
            values = "other values" if key.startswith("start of") else f"{a} there and {b} here"
            yield f"{key}: {values}"


def fingerprint(x: Tensor) -> str:
    """A tensor as a text that differs where shape, dtype or values do."""
    return f"{tuple(x.shape)} {x.dtype} {int(digest(x.resolve_conj().resolve_neg())):x}"


def _in_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else fingerprint(value)
    if isinstance(value, (tuple, list)):
        return [_in_json(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
