"""Keep a given number of states, in the best order."""

from __future__ import annotations

from dataclasses import dataclass

from diffopt import schedule
from diffopt._loop.storage import Storage
from diffopt.adjoint._base import Stored
from diffopt.schedule import Plan


@dataclass(frozen=True)
class Binomial(Stored):
    """Keep ``snapshots`` states, and recompute as few steps as that allows.

    c states reverse up to (c + r choose c) steps where each is computed at most r times more: with
    20 states, each of T = 10,000 steps is recomputed 2.8 times on average. The gradient is exact
    and does not depend on c. The schedule is the optimal one of Griewank and Walther, "Algorithm
    799: revolve" (ACM Transactions on Mathematical Software 26(1), 2000).

    Args:
        snapshots: c, how many states may be held at once, the start included. One suffices, at the
            cost of T² / 2 recomputed steps.
        storage: where they are kept: None, on their device; ``"cpu"``, in host memory, copied while
            computing goes on (for a model on the CPU the same as None); or a folder, which has to
            exist, in files, written and read while computing goes on and removed in the end; or a
            ``diffopt.Durable``, in files from which a run that was killed goes on.

    Raises:
        TypeError: ``snapshots`` is not an int, or ``storage`` neither a string nor a path.
        ValueError: ``snapshots`` is below 1.
        OSError: when unrolling, the folder does not exist, or is full.

    Cost: c states and the graph of one step; ``plan(T).recomputed_steps`` steps without a graph,
    and each step once more inside its vector-Jacobian product. Not where the backward pass is
    itself recorded: see ``diffopt.unroll``.
    """

    snapshots: int
    storage: Storage = None

    def plan(self, steps: int) -> Plan:
        return schedule.binomial(steps, self.snapshots)
