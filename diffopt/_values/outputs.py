"""Cotangents of what steps give beside the next state: losses and extras."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffopt._values.tree import is_differentiable, tensors_in


@dataclass(frozen=True, slots=True)
class StepCotangents:
    """The cotangents of one step.

    Attributes:
        loss: of its loss; None stands for zero.
        aux: of tensors of its extras, by their index among these; a missing one stands for zero.
    """

    loss: Tensor | None = None
    aux: Mapping[int, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All cotangents, the loss's first."""
        return [*([] if self.loss is None else [self.loss]), *self.aux.values()]


@dataclass(frozen=True, slots=True)
class OutputCotangents:
    """The cotangents of the steps of a loop.

    Attributes:
        losses: of the losses, shape (T,) (or (T, N) for tasks); None stands for zero.
        aux: of the extras, by position in the loop and then as in ``StepCotangents``.
    """

    losses: Tensor | None = None
    aux: Mapping[int, Mapping[int, Tensor]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything flows back."""
        return self.losses is not None or bool(self.aux)

    def at(self, t: int) -> StepCotangents:
        """The cotangents of the step at position ``t``."""
        return StepCotangents(
            None if self.losses is None else self.losses[t], self.aux.get(t, _NOTHING)
        )

    def later(self, by: int) -> OutputCotangents:
        """The cotangents of the steps from position ``by`` on, counted from there."""
        return OutputCotangents(
            None if self.losses is None else self.losses[by:],
            {t - by: cotangents for t, cotangents in self.aux.items() if t >= by},
        )

    def until(self, count: int) -> OutputCotangents:
        """The cotangents of the first ``count`` steps."""
        return OutputCotangents(
            None if self.losses is None else self.losses[:count],
            {t: cotangents for t, cotangents in self.aux.items() if t < count},
        )

    def tensors(self) -> Iterator[Tensor]:
        """All cotangents."""
        if self.losses is not None:
            yield self.losses
        for cotangents in self.aux.values():
            yield from cotangents.values()


_NOTHING: Mapping[int, Tensor] = {}


def attached(aux: Any) -> dict[int, Tensor]:
    """The tensors of a step's extras that derivatives flow to, by their index among these."""
    if aux is None:
        return {}
    return {i: x for i, x in enumerate(tensors_in(aux)) if x.requires_grad and is_differentiable(x)}
