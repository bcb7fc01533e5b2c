"""Keep every step's graph."""

from __future__ import annotations

from dataclasses import dataclass

from diffopt import schedule
from diffopt.adjoint._base import Checkpointed
from diffopt.schedule import Plan


@dataclass(frozen=True)
class StoreAll(Checkpointed):
    """Keep the graph of all T steps: nothing is computed twice, and memory grows by a graph a step.

    The reference that every other exact adjoint is compared with, and the fastest where a handful
    of steps fits. This is ordinary backpropagation through the unrolled loop (Maclaurin, Duvenaud
    and Adams, 2015; Franceschi et al., 2017).

    Cost: T graphs; one evaluation and one vector-Jacobian product a step.
    """

    def plan(self, steps: int) -> Plan:
        return schedule.store_all(steps)
