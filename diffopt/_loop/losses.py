"""The losses of a loop, side by side in memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Losses:
    """One scalar (or one of each task) per step.

    They are written into one tensor. As many small ones, made between the states and outliving
    them, would keep the memory of the states from being used again: the allocator of the C library
    needed ten times as much for ten thousand steps.

    Args:
        steps: how many there will be at most.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._count = 0
        self._all: Tensor | None = None

    def append(self, loss: Tensor) -> None:
        """Note the loss of the next step."""
        if self._all is None:
            self._all = loss.new_empty((self._steps, *loss.shape))
        self._all[self._count] = loss.detach()
        self._count += 1

    def extend(self, losses: Tensor) -> None:
        """Note the losses of the next steps, stacked."""
        if self._all is None:
            self._all = losses.new_empty((self._steps, *losses.shape[1:]))
        with torch.no_grad():
            self._all[self._count : self._count + len(losses)] = losses
        self._count += len(losses)

    def all(self) -> Tensor | None:
        """Those so far, shape (T,), or (T, N) for tasks; None without any."""
        return None if self._all is None else self._all[: self._count].detach()
