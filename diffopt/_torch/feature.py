"""A private name, or in its place a function that says what cannot be done without it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch


def private(module: str, name: str, feature: str) -> Any:
    """``module.name``. Where this PyTorch has none, a function that raises when it is called.

    Args:
        feature: what is lost without it, as the subject of a sentence.
    """
    value = optional(module, name)
    if value is not None:
        return value

    def lost(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{feature} cannot be served with PyTorch {torch.__version__}, which has no "
            f"{module}.{name}: install a version that diffopt was tested with"
        )

    return lost


def optional(module: str, name: str) -> Any:
    """``module.name``, None where this PyTorch has none. ``name`` may have several parts."""
    parts = f"{module}.{name}".split(".")
    value: Any = torch
    for i, part in enumerate(parts[1:], 2):
        attribute = getattr(value, part, None)
        if attribute is None:
            try:
                attribute = import_module(".".join(parts[:i]))
            except ImportError:
                return None
        value = attribute
    return value
