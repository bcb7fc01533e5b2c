"""Calls of PyTorch that no ``TorchFunctionMode`` is shown."""

from __future__ import annotations

from typing import Any

from torch import _C

#: A context: within it calls go straight to PyTorch.
unseen: Any = _C.DisableTorchFunction
