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
    """

    snapshots: Snapshots
    graphs: dict[int, Linearization | InBlock] = field(default_factory=dict)


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
