"""What the forward pass of a plan leaves for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffopt._loop.blocks import InBlock
from diffopt._loop.snapshots import Snapshot, Snapshots
from diffopt._step.linearization import Linearization
from diffopt._values.state import State


@dataclass
class Store:
    """What the forward pass leaves for the backward pass.

    Attributes:
        snapshots: by position in the loop.
        graphs: steps recorded with their graph, or within a block, by position.
        peak_states, peak_graphs: the most of either held at once, so far. As in a plan, the start
            counts, which the loop holds.
    """

    snapshots: Snapshots
    graphs: dict[int, Linearization | InBlock] = field(default_factory=dict)
    peak_states: int = 1
    peak_graphs: int = 0

    def save(self, t: int, snapshot: Snapshot) -> None:
        self.snapshots[t] = snapshot
        self.peak_states = max(self.peak_states, len(self.snapshots))

    def count(self, more: int) -> None:
        """Count states that are held besides the snapshots."""
        self.peak_states = max(self.peak_states, len(self.snapshots) + more)

    def record(self, t: int, linearization: Linearization | InBlock) -> None:
        self.graphs[t] = linearization
        self.peak_graphs = max(self.peak_graphs, len(self.graphs))


@dataclass
class Begun:
    """The first step of a loop, taken before there was a plan.

    Attributes:
        start: the start of the loop.
        graph: the step's; dropped if the plan does not record the step.
        after: the state after it.
    """

    start: Snapshot
    graph: Linearization | None
    after: State
