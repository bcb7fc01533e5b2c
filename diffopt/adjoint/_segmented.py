"""Keep one state a segment, and recompute the rest."""

from __future__ import annotations

from dataclasses import dataclass

from diffopt import schedule
from diffopt.adjoint._base import Checkpointed
from diffopt.schedule import Plan


@dataclass(frozen=True)
class Segmented(Checkpointed):
    """Keep the state at the start of every segment; on the way back recompute a segment's states.

    At any time about T/k + k states are held and the graph of *one* step, since a state is all
    that a step's vector-Jacobian product needs. The gradient is exact and does not depend on k.

    Args:
        segment: k, how many steps lie between two kept states. 1 keeps every state and recomputes
            none. None: about √T, the smallest peak (Chen et al., 2016, "Training Deep Nets with
            Sublinear Memory Cost").

    Raises:
        TypeError: ``segment`` is not an int.
        ValueError: ``segment`` is below 1.

    Cost: about T - T/k steps are computed again without a graph, and each step once more inside its
    vector-Jacobian product.
    """

    segment: int | None = None

    def __post_init__(self) -> None:
        self.plan(0)  # refuses a segment that is not a positive int

    def plan(self, steps: int) -> Plan:
        return schedule.segmented(steps, self.segment)
