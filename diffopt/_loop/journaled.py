"""Carrying out a plan step by step, for a run that can be killed and taken up where it was.

The journal of the snapshots (``journal.Journal``) is told of every place that the run has come to,
and is asked for the last of them when the run begins.
"""

from __future__ import annotations

from torch import Tensor

from diffopt._loop.journal import Way, WayBack
from diffopt._loop.kept import AHEAD, Begun, Kept
from diffopt._loop.loop import Loop
from diffopt._loop.way_back import CapturedSum
from diffopt._step.linearization import Linearization
from diffopt._torch.batched import not_batched
from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import Cotangent, State
from diffopt.schedule import Plan


def forward(loop: Loop, plan: Plan, kept: Kept, begun: Begun | None) -> State:
    """A plan's first part, as ``executor.run_forward`` carries it out."""
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


def backward(
    loop: Loop,
    plan: Plan,
    kept: Kept,
    cotangent: Cotangent,
    outputs: OutputCotangents,
    keep: bool,
) -> tuple[Cotangent, list[Tensor | None]]:
    """A plan's second part, as ``executor.run_backward`` carries it out."""
    captured, journal = CapturedSum(loop.captured), kept.snapshots.journal
    way = journal.turn(WayBack(0, cotangent, captured.total), outputs)
    cotangent, captured.total = way.cotangent, way.captured
    actions = plan.backward_actions[way.action :]
    state, position = way.state, way.position
    loads, loaded = [action.start for action in actions if action.kind == "load"], 0
    for i, (kind, start, stop) in enumerate(actions, way.action):
        if kind == "load":
            journal.backward(WayBack(i, cotangent, captured.total))
            state = loop.restored(kept.snapshots[start])
            loaded += 1
            for upcoming in loads[loaded : loaded + AHEAD]:
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
                held = kept.graphs.pop(start)
                assert isinstance(held, Linearization)
                linearization = held
            else:
                assert state is not None
                with not_batched():
                    linearization = loop.linearize(state, start, values=False)
                state = None
            cotangent, found = loop.vjp(
                linearization, start, cotangent, outputs.at(start), retain_graph=keep
            )
            captured.add(loop.captured.at(start), found)
            del linearization
        elif kind == "free":
            del kept.snapshots[start]
        else:
            raise ValueError(f"a plan cannot {kind!r} on the way back")
    journal.finished()
    return cotangent, captured.total
