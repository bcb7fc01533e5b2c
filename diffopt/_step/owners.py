"""Which memory belongs to which parameter of the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffopt._torch.dtensors import has_own_memory, stored
from diffopt._torch.functorch import is_wrapped


@dataclass(frozen=True, slots=True)
class Owner:
    """A parameter of the module.

    Attributes:
        name: as ``named_parameters()`` gives it.
        inner: whether it is trained.
        start, stop: the addresses between which its memory lies.
    """

    name: str
    inner: bool
    start: int
    stop: int


class Owners:
    """The parameters of a module, by their memory.

    Args:
        inner: those that are trained, by name.
        constants: the others.
    """

    def __init__(self, inner: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> None:
        self._owners: dict[int, list[Owner]] = {}
        for values in (inner, constants):
            for name, x in zip(values, map(stored, values.values()), strict=True):
                if has_memory(x):
                    owner = Owner(name, values is inner, *_extent(x))
                    self._owners.setdefault(x.untyped_storage().data_ptr(), []).append(owner)

    def of(self, x: Tensor) -> Owner | None:
        """The parameter in whose memory ``x`` lies."""
        x = stored(x)
        owners = self._owners.get(x.untyped_storage().data_ptr()) if has_memory(x) else None
        if owners is None or not x.numel():
            return None
        start, stop = _extent(x)
        return next((o for o in owners if o.start < stop and start < o.stop), None)


def has_memory(x: Tensor) -> bool:
    """Whether ``x`` has entries that lie in memory of its own."""
    return x.layout is torch.strided and not is_wrapped(x) and has_own_memory(x)


def _extent(x: Tensor) -> tuple[int, int]:
    """The addresses between which the entries of ``x`` lie."""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
