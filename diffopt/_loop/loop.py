"""The training loop that an adjoint is given to run and to differentiate."""

from __future__ import annotations

from copy import copy
from typing import Self

from diffopt._loop.first_pass import FirstPass
from diffopt._loop.way_back import WayBack
from diffopt._values.state import State


class Loop(FirstPass, WayBack):
    """``steps`` inner steps from ``start``: a first pass over them, and the way back.

    Loops made from this one share its captured tensors, losses and session.
    """

    def first_order(self) -> Self:
        """This loop with every inner gradient taken as a constant."""
        loop = copy(self)
        loop.step = self.step.of_first_order()
        return loop

    def rest(self, state: State, t: int) -> Self:
        """The loop from position ``t`` on, where its own positions start again from 0.

        ``state`` is its start, a constant. The steps before have to be taken with ``pass_over``.
        """
        loop = copy(self)
        loop.step = self.step.later(t)
        loop.start, loop.inputs, loop.steps = state, {}, self.steps - t
        return loop
