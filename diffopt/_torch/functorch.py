"""The transforms of ``torch.func`` that are being applied, and the tensors that vmap maps over."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from diffopt._torch.feature import optional, private

_C = "torch._C._functorch"
_MAPPING = "going through tasks one by one"

_peek = optional(_C, "peek_interpreter_stack")
_stack = optional(_C, "get_interpreter_stack")
_is_batched = optional(_C, "is_batchedtensor")
_is_wrapped = optional(_C, "is_functorch_wrapped_tensor")
_unwrap = private(_C, "_unwrap_batched", _MAPPING)
_wrap = private(_C, "_add_batch_dim", _MAPPING)
_outside = private("torch._functorch.pyfunctorch", "temporarily_pop_interpreter_stack", _MAPPING)

#: A level of ``torch.vmap``, as far as tensors are told to belong to one.
Level = int


def in_functorch() -> bool:
    """Whether a ``torch.func`` transform is being applied.

    False where PyTorch cannot tell. PyTorch then refuses what is not made for transforms.
    """
    return _peek is not None and _peek() is not None


def active_transform() -> str | None:
    """The innermost transform that is being applied, such as ``vmap``; None where none is."""
    level = None if _peek is None else _peek()
    return None if level is None else _kind(level).lower()


def in_derivative() -> bool:
    """Whether one of the transforms being applied takes derivatives."""
    return any(_kind(level) in ("Grad", "Jvp") for level in _levels())


def only_level() -> Level | None:
    """The level of the one ``torch.vmap`` that is being applied, and nothing else."""
    levels = _levels()
    if len(levels) != 1 or _kind(levels[0]) != "Vmap":
        return None
    return int(levels[0].level())


def unwrapped(x: Any, level: Level) -> tuple[Tensor, int] | None:
    """The tensor that ``x`` is a part of, and the dimension mapped over; None if there is none."""
    if not isinstance(x, Tensor) or _is_batched is None or not _is_batched(x):
        return None
    value, dim = _unwrap(x, level)
    return value, int(dim)


def is_batched(x: Tensor) -> bool:
    """Whether ``x`` is mapped over by ``torch.vmap``."""
    return _is_batched is not None and bool(_is_batched(x))


def is_wrapped(x: Tensor) -> bool:
    """Whether ``x`` stands for another tensor inside a ``torch.func`` transform."""
    return _is_wrapped is not None and bool(_is_wrapped(x))


def wrapped(x: Tensor, level: Level) -> Any:
    """``x`` as what is mapped over its first dimension."""
    return _wrap(x, 0, level)


def outside() -> AbstractContextManager[Any]:
    """Where no transform is being applied."""
    context: AbstractContextManager[Any] = _outside()
    return context


def _levels() -> list[Any]:
    return [] if _stack is None else list(_stack() or ())


def _kind(level: Any) -> str:
    return str(level.key().name)
