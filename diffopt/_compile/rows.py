"""The tensors of many steps as rows of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def distinct(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int] | None]:
    """Each tensor once, and which of them each is; None where all are different."""
    first = tensors[0]
    if all(x is first for x in tensors):
        return [first], [0] * len(tensors)
    places: dict[int, int] = {}
    found: list[Tensor] = []
    for x in tensors:
        if id(x) not in places:
            places[id(x)] = len(found)
            found.append(x)
    if len(found) == len(tensors):
        return found, None
    return found, [places[id(x)] for x in tensors]


def in_rows(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as rows, each in the memory layout that they have; a single one is not copied.

    Those with gaps in their memory are copied without the gaps. Cut from any graph.
    """
    first = tensors[0].detach()
    if not is_dense(first):
        with torch.no_grad():
            return torch.stack([x.contiguous() for x in tensors])
    if len(tensors) == 1:
        return first.as_strided((1, *first.shape), (first.numel(), *first.stride()))
    if first.is_contiguous():
        with torch.no_grad():
            return torch.stack(tensors)  # type: ignore[arg-type]
    rows = torch.empty_strided(
        (len(tensors), *first.shape),
        (first.numel(), *first.stride()),
        dtype=first.dtype,
        device=first.device,
    )
    with torch.no_grad():
        for row, x in zip(rows, tensors, strict=True):
            row.copy_(x)
    return rows


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill the memory from the first to the last, each once."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
