"""The losses of a loop, side by side in memory."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor


class Losses:
    """One scalar (or one of each task) per step.

    They are written side by side, on the CPU as numbers in double precision. As many small tensors,
    made between the states and outliving them, would keep the memory of the states from being used
    again: the allocator of the C library needed ten times as much for ten thousand steps.

    Args:
        steps: how many there will be at most.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._count = 0
        self._dtype: torch.dtype | None = None  # the first loss's
        self._numbers: array[float] | None = None
        self._all: Tensor | None = None

    def append(self, loss: Tensor) -> None:
        """Note the loss of the next step."""
        self.extend(loss.detach()[None])

    def extend(self, losses: Tensor) -> None:
        """Note the losses of the next steps, stacked and without a graph."""
        if self._dtype is None:
            self._dtype = losses.dtype
            if losses.is_cpu and losses.dim() == 1:
                self._numbers = array("d")
            else:
                self._all = losses.new_empty((self._steps, *losses.shape[1:]))
        if self._numbers is not None:
            self._numbers.extend(losses.tolist())
            return
        assert self._all is not None
        self._all[self._count : self._count + len(losses)] = losses
        self._count += len(losses)

    def all(self) -> Tensor | None:
        """The losses so far, shape (T,), or (T, N) for tasks; None without any."""
        if self._numbers is not None:
            return torch.frombuffer(self._numbers, dtype=torch.float64).to(self._dtype, copy=True)
        return None if self._all is None else self._all[: self._count].detach()
