"""``torch.autograd.grad(..., is_grads_batched=True)``: a backward pass of many cotangents at once.

PyTorch runs it within its first kind of vmap, which knows no ``_foreach`` operations and no random
ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import _C, Tensor

_is_batched: Any = getattr(getattr(_C, "_functorch", None), "is_legacy_batchedtensor", None)
_enter: Any = getattr(_C, "_vmapmode_increment_nesting", None)
_leave: Any = getattr(_C, "_vmapmode_decrement_nesting", None)


def any_batched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of the tensors stands for many, of which each operation is mapped."""
    return _is_batched is not None and any(x is not None and _is_batched(x) for x in tensors)


@contextmanager
def not_batched() -> Iterator[None]:
    """Outside of that mapping: for operations on tensors that do not stand for many."""
    if _enter is None or _leave is None:
        yield
        return
    _enter()
    depth = int(_leave())
    for _ in range(depth):
        _leave()
    try:
        yield
    finally:
        for _ in range(depth):
            _enter()
