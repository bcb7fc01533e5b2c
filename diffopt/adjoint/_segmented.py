"""Keep one state a segment, and recompute the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffopt import schedule
from diffopt._loop.loop import Loop
from diffopt._loop.storage import Storage
from diffopt._step.parts_step import PartsStep
from diffopt._values.state import State
from diffopt.adjoint._base import Stored
from diffopt.schedule import Plan


@dataclass(frozen=True)
class Segmented(Stored):
    """Keep the state at the start of every segment; on the way back recompute a segment's states.

    At any time about T/k + k states are held and the graph of *one* step, since a state is all
    that a step's vector-Jacobian product needs. The gradient is exact and does not depend on k.

    Args:
        segment: k, how many steps lie between two kept states. 1 keeps every state and recomputes
            none. None: about √T, the smallest peak (Chen et al., 2016, "Training Deep Nets with
            Sublinear Memory Cost").
        storage: where they are kept: None, on their device; ``"cpu"``, in host memory, copied while
            computing goes on (for a model on the CPU the same as None); or a folder, which has to
            exist, in files, written and read while computing goes on and removed in the end; or a
            ``diffopt.Durable``, in files from which a run that was killed goes on.

    Raises:
        TypeError: ``segment`` is not an int, or ``storage`` neither a string nor a path.
        ValueError: ``segment`` is below 1.
        OSError: when unrolling, the folder does not exist, or is full.

    Cost: about T - T/k steps are computed again without a graph, and each step once more inside its
    vector-Jacobian product. With ``microbatches``, the gradient of each step of a segment is held
    beside the state, where the derivative of the rule reads it, as Adam's does; with a storage it
    is not, and is computed once more. Not where the backward pass is itself recorded: see
    ``diffopt.unroll``.
    """

    segment: int | None = None
    storage: Storage = None

    def plan(self, steps: int) -> Plan:
        return schedule.segmented(steps, self.segment)

    def forward(self, loop: Loop) -> tuple[State, Any]:
        if self.storage is None and isinstance(loop.step, PartsStep):
            advances = [a for a in self.plan_for(loop).backward_actions if a.kind == "advance"]
            again = {t for action in advances for t in range(action.start, action.stop)}
            loop.step.keep_gradients({*range(loop.steps)} - again)
        return super().forward(loop)
