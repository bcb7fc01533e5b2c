"""Whether tensors that steps used have been changed in place since."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor

Ref = weakref.ref[Tensor]


class Unchanged:
    """Watches tensors for changes in place, of which autograd keeps count, without holding them.

    Args:
        used: the tensors and the count at which each was used; what has changed since is left out.
    """

    def __init__(self, used: Iterable[tuple[Ref, int]]) -> None:
        self._used = [(r, v) for r, v in used if (x := r()) is not None and x._version == v]

    def check(self) -> None:
        """Raise where one of them has been changed since."""
        for ref, version in self._used:
            x = ref()
            if x is not None and x._version != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(x.shape)} that the steps of this unroll use has "
                    "been changed in place since, and now they are computed again: call backward "
                    "before that, or put a new tensor in its place"
                )
