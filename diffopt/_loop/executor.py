"""Running a plan: the one place where snapshots, recomputation and derivatives are put in order.

A plan is a list of integer actions (``diffopt.schedule``). Its first part takes the loop to its
end and belongs to the forward pass; the rest takes it back, one vector-Jacobian product a step.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from diffopt._loop.journal import Way, WayBack
from diffopt._loop.loop import CapturedSum, Loop
from diffopt._loop.snapshots import Layer, Snapshot, Snapshots
from diffopt._step.linearization import Linearization
from diffopt._torch.batched import any_batched, not_batched
from diffopt._values.state import Cotangent, State
from diffopt.optim.lists import one_by_one
from diffopt.schedule import Plan

#: How many snapshots are fetched ahead of the one in use.
_AHEAD = 2


@dataclass
class Kept:
    """What the forward pass leaves for the backward pass.

    Attributes:
        snapshots: by position in the loop.
        graphs: steps recorded with their graph, by position.
        peak_states, peak_graphs: the most of either held at once, so far. As in a plan, the start
            counts, which the loop holds.
    """

    snapshots: Snapshots
    graphs: dict[int, Linearization] = field(default_factory=dict)
    peak_states: int = 1
    peak_graphs: int = 0

    def save(self, t: int, snapshot: Snapshot) -> None:
        self.snapshots[t] = snapshot
        self.peak_states = max(self.peak_states, len(self.snapshots))

    def record(self, t: int, linearization: Linearization) -> None:
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


def run_forward(
    loop: Loop, plan: Plan, snapshots: Snapshots, begun: Begun | None = None
) -> tuple[State, Kept]:
    """The plan's first part: from the start to the end of the loop.

    Whatever interrupts it, ``snapshots`` is closed then.

    Args:
        begun: the first step, which is not taken again then. Used up.
    """
    kept = Kept(snapshots)
    try:
        return _forward(loop, plan, kept, begun), kept
    except BaseException:
        snapshots.close()
        raise


def _forward(loop: Loop, plan: Plan, kept: Kept, begun: Begun | None) -> State:
    journal = kept.snapshots.journal
    way = journal.begin(loop, plan)
    state = way.state
    for i, (kind, start, stop) in enumerate(plan.forward_actions[way.action :], way.action):
        taken = begun if start == 0 else None
        if kind == "save":
            kept.save(start, loop.snapshot(state) if taken is None else taken.start)
            journal.forward(Way(i + 1, start, state))
        elif kind == "advance":
            if taken is not None:
                state, taken.graph = taken.after, None
            first = start if taken is None else 1
            for t in range(max(first, way.position), stop):
                state = loop.first(state, t)
                journal.forward(Way(i, t + 1, state))
        elif kind == "record":
            if taken is None or taken.graph is None:
                recorded, state = loop.first_recorded(state, start)
            else:
                recorded, state, taken.graph = taken.graph, taken.after, None
            kept.record(start, recorded)
        elif kind == "free":
            del kept.snapshots[start]
        else:
            raise ValueError(f"a plan cannot {kind!r} before it has reached the end")
    journal.arrived(state)
    return state


def run_backward(
    loop: Loop,
    plan: Plan,
    kept: Kept,
    cotangent: Cotangent,
    loss_cotangents: Tensor | None,
    *,
    keep: bool = False,
) -> tuple[Cotangent, list[Tensor | None]]:
    """The plan's second part: from the end of the loop back to its start.

    Args:
        kept: what ``run_forward`` left; used up unless ``keep``.
        cotangent: of the final state.
        loss_cotangents: of the losses, shape (T,), or None.
        keep: leave ``kept`` as it is, for another backward pass.

    Returns:
        the cotangents of the start and of ``loop.captured.tensors``.
    """
    # Only what is linear in the cotangents can be mapped over many of them.
    many = any_batched([*cotangent.values(), loss_cotangents])
    if keep:
        kept = Kept(Layer(kept.snapshots), dict(kept.graphs), kept.peak_states, kept.peak_graphs)
    try:
        with one_by_one() if many else nullcontext():
            return _backward(loop, plan, kept, cotangent, loss_cotangents, keep)
    finally:
        kept.snapshots.close()


def _backward(
    loop: Loop,
    plan: Plan,
    kept: Kept,
    cotangent: Cotangent,
    loss_cotangents: Tensor | None,
    keep: bool,
) -> tuple[Cotangent, list[Tensor | None]]:
    captured, journal = CapturedSum(loop.captured), kept.snapshots.journal
    way = journal.turn(WayBack(0, cotangent, captured.total), loss_cotangents)
    cotangent, captured.total = way.cotangent, way.captured
    actions = plan.backward_actions[way.action :]
    state, position = way.state, way.position
    loads, loaded = [action.start for action in actions if action.kind == "load"], 0
    for i, (kind, start, stop) in enumerate(actions, way.action):
        if kind == "load":
            journal.backward(WayBack(i, cotangent, captured.total))
            state = loop.restored(kept.snapshots[start])
            loaded += 1
            for upcoming in loads[loaded : loaded + _AHEAD]:
                if upcoming in kept.snapshots:
                    kept.snapshots.prefetch(upcoming)
        elif kind == "save":
            assert state is not None
            kept.save(start, loop.snapshot(state))
        elif kind == "advance":
            assert state is not None
            with not_batched():
                for t in range(max(start, position), stop):
                    state = loop.again(state, t)
                    journal.backward(WayBack(i, cotangent, captured.total, t + 1, state))
            position = 0
        elif kind == "record":
            assert state is not None
            with not_batched():
                linearization, state = loop.recorded(state, start)
            kept.record(start, linearization)
        elif kind == "vjp":
            if start in kept.graphs:
                linearization = kept.graphs.pop(start)
            else:
                assert state is not None
                with not_batched():
                    linearization = loop.linearize(state, start, values=False)
                state = None
            loss_cotangent = None if loss_cotangents is None else loss_cotangents[start]
            cotangent, found = loop.vjp(
                linearization, start, cotangent, loss_cotangent, retain_graph=keep
            )
            captured.add(loop.captured.at(start), found)
            del linearization
        elif kind == "free":
            del kept.snapshots[start]
        else:
            raise ValueError(f"a plan cannot {kind!r} on the way back")
    journal.finished()
    return cotangent, captured.total
