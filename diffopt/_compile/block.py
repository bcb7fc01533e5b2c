"""Compiled steps as the loop knows them: one that will be gone back through, and many at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffopt._compile.code import Code
from diffopt._compile.loops import Block
from diffopt._compile.specialise import Call
from diffopt._compile.step_inputs import StepInputs
from diffopt._compile.trace import Untraceable
from diffopt._compile.way_back import Cotangents
from diffopt._loop.blocks import Between
from diffopt._step.graph import Graph, end_of
from diffopt._step.linearization import Linearization
from diffopt._step.result import Checked, StepResult
from diffopt._torch.batched import any_batched
from diffopt._values.outputs import OutputCotangents, StepCotangents
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import add, add_each, vjp

if TYPE_CHECKING:
    from diffopt._compile.compiled import CompiledStep


class CompiledLinearization(Linearization):
    """A step that is evaluated again, by compiled code, when its derivative is wanted.

    It holds a state and the random numbers that were drawn. What compiled code is not there for,
    such as products with the Hessian alone, is left to the uncompiled linearization.
    """

    def __init__(
        self,
        step: CompiledStep,
        code: Code,
        call: Call,
        given: StepInputs,
        generators: tuple[Tensor, ...],
        drawn: Sequence[Tensor],
    ) -> None:
        self._compiled = step
        self._code = code
        self._call = call
        self._given = given
        self._generators = generators
        self._drawn = drawn
        self.checked = None
        self.graph = code.step.graph(call.fixed, call.hyper)

    @cached_property
    def _uncompiled(self) -> Linearization:
        call = self._call
        return self._compiled.eager(call.layout.build(call.state), call.t, self._generators)

    def __getattr__(self, name: str) -> Any:
        """The attributes of a linearization that has been evaluated."""
        return getattr(self._uncompiled, name)

    def advance(self) -> StepResult:
        """What the step gives."""
        try:
            return self._code.run(self._call, self._given, self._drawn)
        except Untraceable as reason:
            self._compiled.warn(self._call.t, reason)
            return self._uncompiled.advance()

    def drop_gradients(self) -> None:
        """There are none."""

    def vjp(
        self,
        state_cotangent: Cotangent,
        outputs: StepCotangents,
        captured: Sequence[Any],
        *,
        retain_graph: bool = False,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        """As for ``Linearization``."""
        call = self._call
        if any_batched([*state_cotangent.values(), *outputs.tensors()]):  # by code for one alone
            return self._uncompiled.vjp(
                state_cotangent, outputs, captured, retain_graph=retain_graph
            )
        try:
            before, pairs = self._code.vjp(call, self._given, self._drawn, state_cotangent, outputs)
        except Untraceable as reason:
            self._compiled.warn(call.t, reason)
            return self._uncompiled.vjp(
                state_cotangent, outputs, captured, retain_graph=retain_graph
            )
        return before, through(pairs, captured, retain_graph)


class CompiledBlock:
    """Consecutive steps that were taken in one compiled loop.

    Attributes:
        start, stop: their positions.
        after: the state after them.
        losses: of each, stacked.
        alike: whether all depend on the same tensors.
        scheduled: whether callables give hyperparameters.
        attached: which of the tensors of a step's extras derivatives flow to.
    """

    def __init__(
        self, step: CompiledStep, code: Code, block: Block, generators: list[tuple[Tensor, ...]]
    ) -> None:
        self._step = step
        self._code = code
        self._block = block
        self._generators = generators
        steps = block.steps
        self.start, self.stop = steps.start, steps.stop
        self.after, self.losses = block.after, block.losses
        self.scheduled, self.attached = step.scheduled, code.step.attached
        first, ends = steps.given[0], code.step.ends
        learned = any(x.requires_grad for x in first.hyper)
        self.alike = not learned or steps.given.one_hyper
        if any(i >= steps.call.shared for i in ends):
            self.alike &= steps.given.one_batch

    def aux(self) -> list[Any]:
        """The user's extras, one for each step."""
        return self._block.aux()

    def state(self, t: int) -> State:
        """The state before step ``t``."""
        return self._block.state(t)

    def generators(self, t: int) -> tuple[Tensor, ...]:
        """Where the random generators were then."""
        return self._generators[t - self.start if len(self._generators) > 1 else 0]

    def graph(self, t: int) -> Graph:
        """What step ``t`` depends on."""
        call, given = self._block.steps.call, self._block.steps.given[t - self.start]
        return self._code.step.graph([*call.fixed[: call.shared], *given.batch], given.hyper)

    def checked(self, t: int) -> Checked:
        """What step ``t`` has to give again."""
        row = t - self.start
        return self._step.checked(self.losses[row], self._block.steps.given[row])

    def vjp(
        self,
        start: int,
        stop: int,
        state_cotangent: Cotangent,
        outputs: OutputCotangents,
        captured: Sequence[Any],
        *,
        between: Between | None = None,
        retain_graph: bool = False,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        """``Linearization.vjp`` of the steps ``start``, ..., ``stop`` − 1, all at once.

        Args:
            outputs: of the losses and extras of the block.
            between: what is done to the cotangent before each step.
        """
        monitor, norm = (None, None) if between is None else (between.monitor, between.norm)
        cotangents = Cotangents(state_cotangent, outputs.losses, norm, shown=monitor is not None)
        extras = not outputs.aux.keys().isdisjoint(range(start - self.start, stop - self.start))
        given = start, stop, state_cotangent, outputs, captured, between
        if extras or any_batched([*state_cotangent.values(), *outputs.tensors()]):
            return self._one_by_one(*given)
        if monitor is not None and not self._block.can_show(stop - start, state_cotangent):
            return self._one_by_one(*given)
        try:
            pulled = self._block.vjp(start, stop, cotangents)
        except Untraceable:
            return self._one_by_one(*given)
        if between is not None and monitor is not None:
            for row, t in enumerate(reversed(range(start, stop))):
                named = {name: rows[row] for name, rows in pulled.shown.items()}
                monitor(between.first_step + t, named)
        return pulled.before, through(pulled.pairs, captured, retain_graph)

    def _one_by_one(
        self,
        start: int,
        stop: int,
        cotangent: Cotangent,
        outputs: OutputCotangents,
        captured: Sequence[Any],
        between: Between | None,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        steps = self._block.steps
        total: list[Tensor | None] = [None] * len(captured)
        for t in reversed(range(start, stop)):
            row = t - self.start
            if between is not None:
                cotangent = between.bounded(t, cotangent)
            given = steps.given[row]
            call = self._step.call(self.state(t), t, given)
            linearization = CompiledLinearization(
                self._step, self._code, call, given, self.generators(t), steps.drawn[row]
            )
            cotangent, found = linearization.vjp(
                cotangent, outputs.at(row), captured, retain_graph=True
            )
            total = add_each(total, found)
        return cotangent, total


def through(
    pairs: Sequence[tuple[Tensor, Tensor]], captured: Sequence[Any], retain_graph: bool
) -> list[Tensor | None]:
    """Carry what flows to the tensors of a call on to the captured ones that they are made of.

    Most are captured themselves. Not so hyperparameters that a callable computes, and batches that
    are indexed out of a tensor.
    """
    if not captured:
        return []
    ends = {end_of(x): i for i, x in enumerate(captured)}
    total: list[Tensor | None] = [None] * len(captured)
    made = []
    for x, c in pairs:
        place = ends.get(end_of(x))
        if place is None:
            made.append((x, c))
        else:
            total[place] = add(total[place], c)
    return add_each(total, vjp(made, captured, retain_graph=retain_graph))
