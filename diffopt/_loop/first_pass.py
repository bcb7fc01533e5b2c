"""The first pass: every step is taken once, in order, and is observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt._loop.setting import Setting
from diffopt._step.linearization import Linearization
from diffopt._step.result import Checked, StepResult
from diffopt._torch.autograd import present_sequence
from diffopt._values.state import State


class FirstPass(Setting):
    """Taking the steps of a loop for the first time."""

    def first(self, state: State, t: int) -> State:
        """Take step ``t`` for the first time, without keeping a graph."""
        since = present_sequence()
        with torch.no_grad():
            result = self.step(state, t, self.observer)
        self._note(state, t, result, since)
        if self.ledger is not None:
            self.ledger.note(self.step.first_step + t, result.state, result.loss)
        return self._collect(state, t, result)

    def pass_over(self, state: State, t: int) -> State:
        """Take step ``t`` for its result alone: nothing that it uses is to get a gradient."""
        with torch.no_grad():
            result = self.step(state, t, self.observer)
        return self._collect(state, t, result)

    def first_recorded(self, state: State, t: int) -> tuple[Linearization, State]:
        """Take step ``t`` for the first time and keep its graph."""
        since = present_sequence()
        linearization = self.step.linearize(state, t, self.observer)
        result = linearization.advance()
        linearization.drop_gradients()
        self._note(state, t, result, since)
        if not self.step.first_order:
            self.captured.refuse_unrecorded(result.graph, self.step.first_step + t)
        # Of first order, the graph will not be kept and the step may be computed again.
        if self.ledger is not None and self.step.first_order:
            self.ledger.note(self.step.first_step + t, result.state, result.loss)
        return linearization, self._collect(state, t, result)

    def _note(self, before: State, t: int, result: StepResult, since: int) -> None:
        self.refuse_originals(before, t, result.state)
        if self.check is None:
            return
        twice = not self.step.first_order
        self.captured.note(result.graph, self.observer, since, twice)
        self.check.first(self.step.first_step + t, result.checked)

    def refuse_originals(self, before: State, t: int, after: State) -> None:
        """Refuse a step that uses a parameter's original where it should use the present value."""
        slots = self.step.loss.slots
        for name, x in self.observer.originals_used.items():
            unused = (
                name in slots.constants
                or after.params[name].data_ptr() == before.params[name].data_ptr()
            )
            if unused or slots.holds_apart(x):
                raise NotImplementedError(
                    f"step {self.step.first_step + t} uses the model's own parameter {name!r} and "
                    "not the value that it has in the unroll, which stands in the module: do not "
                    "keep parameters in a list, a closure or a global, but take them from the "
                    "module (an nn.ParameterList holds a list). Where its initial value is meant, "
                    "keep that outside of the model"
                )

    def _collect(self, before: State, t: int, result: StepResult) -> State:
        self.options.check(self.step.first_step + t)
        self.losses.append(result.loss)
        self.extras.append(self.step.first_step + t, result.aux, result.attached)
        self.progress.forward()
        # What the caller is given is the caller's to change, and no snapshot's memory.
        return result.state.apart_from(before) if t + 1 == self.steps else result.state

    # Steps that were taken in another process.

    def given(self, t: int) -> dict[str, Any]:
        """What step ``t`` gave besides its loss that it has to give again, of JSON's kinds."""
        return {} if self.check is None else self.check.noted(self.step.first_step + t)

    def pass_by(
        self,
        t: int,
        loss: Tensor,
        aux: tuple[Any, Sequence[int]],
        step: Mapping[str, Any],
        index: Sequence[int],
    ) -> None:
        """Note a step that is not taken: its loss, what it gave, and what it used.

        Args:
            aux: its extras, and to which of their tensors derivatives flow.
            step: what ``given`` and ``Captured.use`` said of it.
            index: the index here of each captured tensor there.
        """
        self.captured.note_use(step, index)
        self.observer.replaced = self.captured.functions = True  # nobody saw that it was not so
        if self.check is not None:
            number = self.step.first_step + t
            self.check.first(number, Checked(loss))
            self.check.note_again(number, step, loss)
        self.losses.append(loss)
        self.extras.append(self.step.first_step + t, *aux)
        self.progress.forward()
