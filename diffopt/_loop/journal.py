"""Where a run that was killed goes on: what the executor tells, and asks when it begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import Cotangent, State
from diffopt.schedule import Plan

if TYPE_CHECKING:
    from diffopt._loop.loop import Loop


@dataclass(frozen=True, slots=True)
class ForwardPoint:
    """A point in the forward pass: at ``position``, in or before ``action`` of its actions."""

    action: int
    position: int
    state: State


@dataclass(frozen=True, slots=True)
class BackwardPoint:
    """A point in the backward pass, in or before ``action`` of its actions.

    Attributes:
        cotangent: of the state that was come back to.
        captured: the sums so far of what flows to the captured tensors.
        position, state: where steps are being computed again, within ``action``, if they are.
    """

    action: int
    cotangent: Cotangent
    captured: list[Tensor | None]
    position: int = 0
    state: State | None = None


class Journal:
    """Told of a run's progress. This one forgets it, and every run begins at its beginning.

    Attributes:
        journaled: whether anything is kept of what the journal is told.
    """

    journaled = False

    def begin(self, loop: Loop, plan: Plan) -> ForwardPoint:
        """The forward pass begins, inside the loop's session. Gives where."""
        return ForwardPoint(0, 0, loop.start)

    def forward(self, point: ForwardPoint) -> None:
        """The forward pass has come to a point."""

    def arrived(self, state: State) -> None:
        """The forward pass is at the end of the loop."""

    def turn(self, point: BackwardPoint, outputs: OutputCotangents) -> BackwardPoint:
        """The backward pass begins with what flows to the results. Gives where."""
        return point

    def backward(self, point: BackwardPoint) -> None:
        """The backward pass has come to a point, from which it can go on if a state is loaded."""

    def finished(self) -> None:
        """The backward pass is at the start of the loop: nothing is needed any more."""
