"""Running a Python function of PyTorch's inside a ``TorchFunctionMode`` that it is shown to.

The first thing such a function does is to ask whether a mode is there, and to hand itself over. The
mode calls it again, with itself switched off, so the operations inside are not seen. ``opened``
gives the function without the question: it can be run with the mode switched on.

Limits: a function that asks by another name than those imported into its module is run as it is,
and what it calls is not seen.
"""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType
from typing import Any

_QUESTIONS = frozenset(
    {"has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"}
)


def opened(function: FunctionType) -> FunctionType | None:
    """``function`` without the question whether a mode is there; None if it does not ask."""
    questions = _questions(function)
    if not questions:
        return None
    names = {**function.__globals__, **questions}
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@lru_cache(maxsize=1024)
def _questions(function: FunctionType) -> dict[str, Any]:
    asked = _QUESTIONS.intersection(function.__code__.co_names)
    if not asked or not all(name in function.__globals__ for name in asked):
        return {}
    return dict.fromkeys(asked, _never)


def _never(*operands: object) -> bool:
    return False
