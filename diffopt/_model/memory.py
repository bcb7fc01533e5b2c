"""Tensors of a model that share memory without being one: refused, by name.

A step makes new parameters and writes nothing, so where a model relies on one tensor following
another through their common memory, its trajectory would be another than ``torch.optim``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt._torch.dtensors import stored


def check_shared_memory(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Raise ``NotImplementedError`` where two tensors of a model overlap in memory.

    Ranges inside a storage are compared, so the weights of an LSTM, which lie side by side in one,
    pass. Interleaved views (every other column of one tensor) overlap as ranges, and are compared
    entry by entry.

    Args:
        params: all parameters, by name; one that is held at several places, once.
        buffers: all buffers, by name.

    Limits: tensors without a storage of their own (on ``meta``, sparse, ``DTensor``) are passed
    over.

    Cost: a sort of the names; memory and time of the tensors' size where ranges overlap.
    """
    for name, x in params.items():
        strided = x.layout is torch.strided
        if (
            strided
            and 0 in x.stride()
            and any(n > 1 and not step for n, step in zip(x.shape, x.stride(), strict=True))
        ):
            raise NotImplementedError(
                f"entries of parameter {name!r} share memory, as it is expanded, and could not be "
                "trained apart: give it a copy, x.clone(), or expand a smaller one in forward"
            )
    kinds = ((params, "parameter"), (buffers, "buffer"))
    named = []
    storages = set()
    for tensors, kind in kinds:
        for name, x in tensors.items():
            own = stored(x)
            if x.layout is torch.strided and own.numel() and (storage := _storage(own)):
                named.append((f"{kind} {name!r}", own))
                storages.add(storage)
    if len(storages) == len(named):
        return
    spans = [_Span(_storage(x), *_range(x), name, x) for name, x in named]
    active: list[_Span] = []  # those that reach into the next one
    for span in sorted(spans, key=attrgetter("storage", "start")):
        active = [a for a in active if a.storage == span.storage and a.stop > span.start]
        for other in active:
            if _overlap(span.tensor, other.tensor):
                raise NotImplementedError(
                    f"{other.name} and {span.name} share memory without being one tensor, so that "
                    "one would follow the other, which it does not in an unroll: make them one "
                    "(assign the same nn.Parameter), compute one from the other in forward or a "
                    "parametrization, or give one a copy, x.clone()"
                )
        active.append(span)


class _Span(NamedTuple):
    """The bytes of a storage from the first to the last that a tensor uses."""

    storage: int
    start: int
    stop: int
    name: str
    tensor: Tensor


def _storage(x: Tensor) -> int:
    """Where its storage is; 0 where it has none of its own, as on ``meta``."""
    return x.untyped_storage().data_ptr()


def _range(x: Tensor) -> tuple[int, int]:
    """The first byte and the one after the last that a tensor uses of its storage."""
    first = int(x.storage_offset())
    last = first + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return first * x.element_size(), (last + 1) * x.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of overlapping ranges have a byte in common."""
    if a.is_contiguous() or b.is_contiguous():
        dense, other = (a, b) if a.is_contiguous() else (b, a)
        start, end = _range(dense)
        first, last = _range(other)
        if other.is_contiguous() or (start <= first and last <= end):
            return True
    taken = set(_bytes(a))
    return any(i in taken for i in _bytes(b))


def _bytes(x: Tensor) -> list[int]:
    offsets = torch.tensor([x.storage_offset()])
    for n, step in zip(x.shape, x.stride(), strict=True):
        offsets = (offsets[:, None] + step * torch.arange(n)).flatten()
    size = x.element_size()
    numbers: list[int] = (offsets[:, None] * size + torch.arange(size)).flatten().tolist()
    return numbers
