"""Tracing a step: the operators in its graph, and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

from diffopt._torch.feature import optional, private

_autocast_is_on = private("torch._C", "_is_any_autocast_enabled", "compile=True")
_autocast_off = private("torch._C", "_DisableAutocast", "compile=True")
_OpOverload = optional("torch._ops", "OpOverload")


def is_overload(target: Any) -> TypeGuard[Any]:
    """Whether ``target`` is an operator of ``torch.ops``, as traced graphs call."""
    return _OpOverload is not None and isinstance(target, _OpOverload)


def without_autocast() -> AbstractContextManager[Any]:
    """Where no operation casts its operands, on no device."""
    if not _autocast_is_on():
        return nullcontext()
    context: AbstractContextManager[Any] = _autocast_off()
    return context
