"""What a ``TorchFunctionMode`` is shown, and what not.

Running a Python function of PyTorch's inside a ``TorchFunctionMode`` that it is shown to.

The first thing such a function does is to ask whether a mode is there, and to hand itself over. The
mode calls it again, with itself switched off, so the operations inside are not seen. ``opened``
gives the function without the question: it can be run with the mode switched on.

Limits: a function that asks by another name than those imported into its module is run as it is,
and what it calls is not seen.
"""

from __future__ import annotations

import builtins
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import _C

from diffopt._torch.feature import optional

#: A context: within it calls go straight to PyTorch, and no ``TorchFunctionMode`` is shown them.
unseen: Any = _C.DisableTorchFunction

#: How many modes are active here.
_modes: Any = optional("torch._C", "_len_torch_function_stack")
_CPU = torch.device("cpu")

_QUESTIONS = frozenset(
    {"has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"}
)


class _Names(dict[str, Any]):
    """The present names of a function's module, some of them replaced."""

    def __init__(self, module: dict[str, Any], others: dict[str, Any]) -> None:
        super().__init__(others, __builtins__=builtins)
        self._module = module

    def __missing__(self, name: str) -> Any:
        return self._module[name]


def default_device() -> torch.device:
    """``torch.get_default_device()``, quickly where no mode can have set another than the CPU."""
    if _modes is not None and not _modes():
        set_before = getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)
        if set_before is None:
            return _CPU
    try:
        return torch.get_default_device()
    except AttributeError:  # PyTorch 2.9, once set_default_device(None) was called: none is set
        return _CPU


@lru_cache(maxsize=1024)
def opened(function: FunctionType) -> FunctionType | None:
    """``function`` without the question whether a mode is there; None if it does not ask."""
    code, module = function.__code__, function.__globals__
    asked = _QUESTIONS.intersection(code.co_names)
    if not asked or not all(name in module for name in asked):
        return None
    names = _Names(module, dict.fromkeys(asked, _never))
    inside = FunctionType(
        code, names, function.__name__, function.__defaults__, function.__closure__
    )
    inside.__kwdefaults__ = function.__kwdefaults__
    return inside


def _never(*operands: object) -> bool:
    return False
