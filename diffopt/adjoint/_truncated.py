"""Go back through the last steps only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffopt import schedule
from diffopt._loop.loop import Loop
from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path
from diffopt.adjoint._base import Adjoint
from diffopt.adjoint._segmented import Segmented
from diffopt.schedule import Plan, check_int, check_kind


@dataclass(frozen=True)
class Truncated(Adjoint):
    """Backpropagation through the last ``window`` steps: the state before them is a constant.

    The state is everything which a step hands to the next: parameters, optimizer state and
    buffers. So nothing is delivered to the start, and any other tensor gets what the tensor
    contributes in the window, the losses and ``aux`` of the window included. Approximate: the terms
    left out are small where the inner problem forgets its past, as close to a minimum, and lead
    astray where the problem does not (Shaban et al., "Truncated back-propagation for bilevel
    optimization", AISTATS 2019; Wu et al., "Understanding short-horizon bias in stochastic
    meta-optimization", ICLR 2018).

    Args:
        window: how many steps to go back through. With as many as there are, only the start goes
            without its gradient; with more, nothing is left out.
        inner: how the derivative of the window is computed.

    Raises:
        TypeError: ``window`` is not an int, or ``inner`` not an adjoint.
        ValueError: ``window`` is below 1.

    Cost: ``inner``'s for the window; each step before is evaluated once, and leaves nothing.
    """

    window: int
    inner: Adjoint = field(default_factory=Segmented)

    def __post_init__(self) -> None:
        check_int("window", self.window, 1, "write window=10 for the last ten steps")
        check_kind("inner", self.inner, Adjoint, "pass an adjoint, such as diffopt.Segmented()")

    def plan(self, steps: int) -> Plan:
        """``inner``'s plan, after the steps that are only advanced over."""
        before = max(steps - self.window, 0)
        return schedule.preceded(self.inner.plan(steps - before), before)

    def forward(self, loop: Loop) -> tuple[State, Any]:
        before = loop.steps - self.window
        if before < 0:
            state, kept = self.inner.forward(loop)
            return state, _Window(0, loop, kept)
        state = loop.start
        for t in range(before):
            state = loop.pass_over(state, t)
        window = loop.rest(state, before)
        state, kept = self.inner.forward(window)
        return state, _Window(before, window, kept)

    def backward(
        self,
        loop: Loop,
        kept: _Window,
        cotangent: Cotangent,
        outputs: OutputCotangents,
        *,
        keep: bool,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        of_window, captured = self.inner.backward(
            kept.loop, kept.inner, cotangent, outputs.later(kept.before), keep=keep
        )
        return {path: c for path, c in of_window.items() if path in kept.loop.inputs}, captured

    def differentiable_backward(
        self,
        loop: Loop,
        kept: _Window,
        start: Mapping[Path, Tensor],
        captured: Sequence[Tensor],
        cotangent: Cotangent,
        outputs: OutputCotangents,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        return self.inner.differentiable_backward(
            kept.loop,
            kept.inner,
            {path: x for path, x in start.items() if path in kept.loop.inputs},
            captured,
            cotangent,
            outputs.later(kept.before),
        )


@dataclass(frozen=True)
class _Window:
    """How many steps come before the window, its steps as a loop, and what ``inner`` keeps."""

    before: int
    loop: Loop
    inner: Any
