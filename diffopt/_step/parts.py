"""The parts of a step's batch.

With their losses l and coefficients c, the loss is L = Σ c l and its gradient ∇L = Σ c ∇l.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt._step.loss import Evaluation, InnerLoss
from diffopt._step.microbatches import Coefficient, Microbatches
from diffopt._step.result import Evaluated, present
from diffopt._torch.autograd import in_forward_mode
from diffopt._values.tree import Sums, add

_NOTHING = nullcontext()


@dataclass(frozen=True)
class Parts:
    """The parts of one step's batch.

    Attributes:
        losses: with their coefficients.
        weight: of the whole batch beside those of other processes; None: losses are added up.
    """

    losses: list[tuple[InnerLoss, Coefficient]]
    weight: Coefficient | None

    @property
    def learning(self) -> list[Tensor]:
        """The coefficients that derivatives flow to."""
        return [c for _, c in self.losses if isinstance(c, Tensor) and c.requires_grad]


class PartsLoss(InnerLoss):
    """The loss of a step's whole batch, evaluated part by part. Its aux is a list of the parts'."""

    microbatches: Microbatches

    def parts(self, t: int) -> Parts:
        """The parts of the batch at position ``t``."""
        step = self._first_step + t
        items = self.microbatches.split(self.item_at(t), step)
        shares = self.microbatches.shares(items, step)
        parts = [
            (self._of_part(item), c)
            for item, c in zip(items, shares.coefficients, strict=True)
            if c is not None
        ]
        return Parts(parts, shares.weight)

    def _of_part(self, item: Any) -> InnerLoss:
        loss = InnerLoss.__new__(InnerLoss)
        loss.__dict__.update(self.__dict__)
        loss.item_at = lambda t: item
        return loss

    def __call__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        t: int,
        within: AbstractContextManager[Any] = _NOTHING,
    ) -> Evaluation:
        total: Any = 0
        extras, left = [], dict(buffers)
        with within:
            parts = self.parts(t)
        for loss, c in parts.losses:
            value, aux, left = loss(params, left, t, within)
            self.check_buffers(t)
            scaled = copy(loss)
            scaled.scale = c
            total = total + scaled.total(value)
            extras.append(aux)
        return total, gathered(extras), left

    def check_buffers(self, t: int) -> None:
        """Raise where derivatives flow by way of a buffer, which would be from part to part."""
        for name in self.buffers.tracked:
            raise NotImplementedError(
                f"microbatches: step {self._first_step + t} computes the buffer {name!r} with "
                "gradients, which would flow from part to part: compute it from a detached tensor, "
                "or leave microbatches out"
            )


def gathered(extras: list[Any]) -> Any:
    """The extras of a step, from those of its parts."""
    return None if all(aux is None for aux in extras) else extras


class Total:
    """The sum over parts."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.buffers: dict[str, Tensor] = {}
        self._names: Sequence[str] = ()
        self._gradients = Sums()

    @property
    def raw(self) -> dict[str, Tensor | None]:
        """The gradients, None where no part has one."""
        return {name: self._gradients.get(name) for name in self._names}

    def add(self, evaluated: Evaluated, loss: Tensor) -> None:
        """Add a part, of which nothing is kept but values."""
        with torch.no_grad():
            self.loss = add(self.loss, values(loss))
            for name, g in present(evaluated.raw).items():
                self._gradients.add(name, values(g))
        self._names = list(evaluated.raw)
        self.buffers = evaluated.buffers


def values(x: Tensor) -> Tensor:
    """``x`` without its graph; a tangent in forward mode stays."""
    with torch.no_grad():
        return x.clone() if in_forward_mode() else x.detach()


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, which a function may change in place."""
    return {name: x.clone() for name, x in tensors.items()}


def attached_values(outputs: Mapping[int, Tensor]) -> list[Tensor]:
    """The values of extras."""
    return [x.detach() for x in outputs.values()]
