"""``torch.autograd.grad(..., is_grads_batched=True)``: a backward pass of many cotangents at once.

PyTorch runs it within its first kind of vmap, which knows no ``_foreach`` operations and no random
ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from diffopt._torch.feature import optional

_is_batched = optional("torch._C._functorch", "is_legacy_batchedtensor")
_enter = optional("torch._C", "_vmapmode_increment_nesting")
_leave = optional("torch._C", "_vmapmode_decrement_nesting")


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
