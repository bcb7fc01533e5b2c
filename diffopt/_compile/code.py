"""Compiled code for the steps of one structure: in loops where that can be, else one by one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from diffopt._compile.loops import Block, Loops
from diffopt._compile.specialise import Call, Pulled, Specialisation
from diffopt._compile.step_inputs import ManyInputs, StepInputs
from diffopt._compile.steps import Steps
from diffopt._compile.trace import Untraceable
from diffopt._compile.way_back import Cotangents
from diffopt._step.result import Checked, StepResult
from diffopt._torch.vector_isa import find_out
from diffopt._values.outputs import StepCotangents
from diffopt._values.state import Cotangent

#: Bytes of states that may be kept for nothing where that spares the compilation of a loop.
SMALL = 1 << 20

_log = logging.getLogger("diffopt")


class Code:
    """What the steps of the structure of ``call`` are run by.

    Attributes:
        step: the step, traced.

    Raises:
        Untraceable: there can be none.
    """

    def __init__(self, call: Call, given: StepInputs) -> None:
        find_out()
        self.step = Specialisation(call)
        self._loops: Loops | None = None
        try:
            self._loops = Loops(self.step, call)
        except Untraceable as reason:
            self._one_by_one(reason)
        # To be told at once that there can be none.
        self.run(call, given, self.step.draw())

    def _one_by_one(self, reason: Untraceable) -> None:
        self._loops = None
        _log.info("steps are taken one by one, not in a loop: %s", reason)

    def most(self, call: Call, *, keep: bool) -> int | None:
        """How many steps one loop may take; None for any number."""
        size = sum(x.numel() * x.element_size() for x in call.state)
        return None if keep or size * 8 > SMALL else SMALL // max(size, 1)

    def block(self, steps: Steps, *, keep: bool) -> Block | None:
        """Take steps in a loop, if that can be. With ``keep``, it can be gone back through."""
        if self._loops is None:
            return None
        count = len(steps.given)
        size = sum(x.numel() * x.element_size() for x in steps.call.state)
        try:
            return self._loops.run(steps, keep=keep or count == 1 or count * size <= SMALL)
        except Untraceable as reason:
            self._one_by_one(reason)
            return None

    def run(self, call: Call, given: StepInputs, drawn: Sequence[Tensor]) -> StepResult:
        """Take one step.

        Raises:
            Untraceable: it cannot be compiled.
        """
        block = self.block(Steps(call, ManyInputs([given]), [drawn]), keep=False)
        if block is None:
            return self.step.run(call, drawn)
        loss = block.losses[0]
        graph = self.step.graph(call.fixed, call.hyper)
        extras = block.aux()[0]
        return StepResult(block.after, loss, extras, Checked(loss), graph, self.step.attached)

    def vjp(
        self,
        call: Call,
        given: StepInputs,
        drawn: Sequence[Tensor],
        cotangent: Cotangent,
        outputs: StepCotangents,
    ) -> Pulled:
        """Pull cotangents of the next state, of the loss and of extras back through one step.

        Raises:
            Untraceable: no code can be made for it.
        """
        if self._loops is not None and not outputs.aux:
            losses = None if outputs.loss is None else outputs.loss.unsqueeze(0)
            try:
                block = self._loops.taken(Steps(call, ManyInputs([given]), [drawn]))
                pulled = block.vjp(call.t, call.t + 1, Cotangents(cotangent, losses))
                return pulled.before, pulled.pairs
            except Untraceable as reason:
                self._one_by_one(reason)
        return self.step.vjp(call, drawn, cotangent, outputs)
