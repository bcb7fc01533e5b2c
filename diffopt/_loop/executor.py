"""Running a plan: the one place where snapshots, recomputation and derivatives are put in order.

A plan is a list of integer actions (``diffopt.schedule``). Its first part takes the loop to its
end and belongs to the forward pass; the rest takes it back, one vector-Jacobian product a step.

Stretches of a plan are carried out for many steps at once where that can be. Where a run can be
killed and taken up where it was, the plan is carried out step by step: the journal of the snapshots
is told of every point that the run has come to, and is asked for the last of them at the beginning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice

from torch import Tensor

from diffopt._loop.blocks import Block, InBlock, block_again, block_vjp, first_block
from diffopt._loop.journal import BackwardPoint, ForwardPoint
from diffopt._loop.loop import Loop
from diffopt._loop.snapshots import Layer, Snapshots
from diffopt._loop.store import Begun, Store
from diffopt._loop.stretches import Stretch, of_plan
from diffopt._loop.way_back import CapturedSum
from diffopt._step.linearization import Linearization
from diffopt._torch.batched import any_batched, not_batched
from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import Cotangent, State
from diffopt.optim.lists import one_by_one
from diffopt.schedule import Action, Plan

#: How many snapshots are fetched ahead of the one in use.
_AHEAD = 2


def run_forward(
    loop: Loop, plan: Plan, snapshots: Snapshots, begun: Begun | None = None
) -> tuple[State, Store]:
    """The plan's first part: from the start to the end of the loop.

    Whatever interrupts it, ``snapshots`` is closed then.

    Args:
        begun: the first step, which is not taken again then. Used up.
    """
    store = Store(snapshots)
    try:
        return _forward(loop, plan, store, begun), store
    except BaseException:
        snapshots.close()
        raise


def pass_through(loop: Loop) -> State:
    """Take all steps for their result alone."""
    return _first_steps(loop, Store(Snapshots()), loop.start, "advance", 0, loop.steps, None)


def _forward(loop: Loop, plan: Plan, store: Store, begun: Begun | None) -> State:
    snapshots = store.snapshots
    point = snapshots.begin(loop, plan)
    state = point.state
    parts: Sequence[Stretch | Action] = of_plan(plan)[0]
    if snapshots.journaled:
        parts = plan.forward_actions[point.action :]
    for i, part in enumerate(parts, point.action):
        kind, start, stop = part.kind, part.start, part.stop
        taken = begun if start == 0 else None
        if kind == "free":
            del store.snapshots[start]
        elif kind == "save" and isinstance(part, Action):
            store.snapshots[start] = loop.snapshot(state) if taken is None else taken.start
            snapshots.forward(ForwardPoint(i + 1, start, state))
        elif kind == "advance" and snapshots.journaled:
            for t in range(max(start, point.position), stop):
                state = _first_steps(loop, store, state, kind, t, t + 1, taken if not t else None)
                snapshots.forward(ForwardPoint(i, t + 1, state))
        elif kind in ("advance", "save", "record"):
            state = _first_steps(loop, store, state, kind, start, stop, taken)
        else:
            raise ValueError(f"a plan cannot {kind!r} before it has reached the end")
    snapshots.arrived(state)
    return state


def _first_steps(
    loop: Loop, store: Store, state: State, kind: str, t: int, stop: int, begun: Begun | None
) -> State:
    """Take steps for the first time; ``kind`` says whether to save or record each."""
    if begun is not None and (kind != "record" or begun.graph is not None):
        if kind == "save":
            store.snapshots[0] = begun.start
        elif kind == "record":
            assert begun.graph is not None
            store.graphs[0] = begun.graph
        state, begun.graph = begun.after, None
        t += 1
    at_once = not store.snapshots.journaled and (kind != "save" or store.snapshots.by_reference)
    while t < stop:
        if at_once and (block := first_block(loop, state, t, stop, keep=kind != "advance")):
            _keep(store, kind, block)
            state, t = block.after, block.stop
            continue
        if kind == "save":
            store.snapshots[t] = loop.snapshot(state)
        if kind == "record":
            store.graphs[t], state = loop.first_recorded(state, t)
        else:
            state = loop.first(state, t)
        t += 1
    return state


def _keep(store: Store, kind: str, block: Block) -> None:
    """Hold what a stretch is to leave of the steps of a block."""
    held = {t: InBlock(block, t) for t in range(block.start, block.stop)}
    if kind == "save":
        store.snapshots.update(held)
    elif kind == "record":
        store.graphs.update(held)


def run_backward(
    loop: Loop,
    plan: Plan,
    store: Store,
    cotangent: Cotangent,
    outputs: OutputCotangents,
    *,
    keep: bool,
) -> tuple[Cotangent, list[Tensor | None]]:
    """The plan's second part: from the end of the loop back to its start.

    Args:
        store: what ``run_forward`` left; used up unless ``keep``.
        cotangent: of the final state.
        outputs: of the losses and extras.
        keep: leave ``store`` as it is, for another backward pass.

    Returns:
        the cotangents of the start and of ``loop.captured.tensors``.
    """
    # Only what is linear in the cotangents can be mapped over many of them.
    many = any_batched([*cotangent.values(), *outputs.tensors()])
    if keep:
        store = replace(store, snapshots=Layer(store.snapshots), graphs=dict(store.graphs))
    run = _Backward(loop, plan, store, cotangent, outputs, keep)
    try:
        with one_by_one() if many else nullcontext():
            run.journaled() if store.snapshots.journaled else run.in_stretches()
    finally:
        store.snapshots.close()
    return run.cotangent, run.captured.total


@dataclass
class _Backward:
    """A plan's second part while it is carried out.

    Attributes:
        cotangent: of the state that the way back has come to.
        captured: what has flown to the captured tensors so far.
        state: the working state.
        loads: the positions of the snapshots that are still to be loaded.
    """

    loop: Loop
    plan: Plan
    store: Store
    cotangent: Cotangent
    outputs: OutputCotangents
    keep: bool

    def __post_init__(self) -> None:
        self.captured = CapturedSum(self.loop.captured)
        self.state: State | None = None
        self.loads = deque(a.start for a in self.plan.backward_actions if a.kind == "load")

    def in_stretches(self) -> None:
        """Carry out the plan, many steps at once where that can be."""
        by_reference = self.store.snapshots.by_reference
        for part in of_plan(self.plan)[1]:
            if isinstance(part, Action):
                self._act(*part)
            elif part.kind == "vjp":
                self._from_graphs(part)
            elif part.kind in ("record", "advance"):
                self._again(part)
            elif part.kind == "reverse" and by_reference:
                self._from_snapshots(part)
            elif not (part.kind == "segment" and by_reference and self._segment(part)):
                for action in part.actions:
                    self._act(*action)

    def journaled(self) -> None:
        """Carry out the plan step by step, from where the journal says."""
        snapshots, outputs = self.store.snapshots, self.outputs
        point = snapshots.turn(BackwardPoint(0, self.cotangent, self.captured.total), outputs)
        self.cotangent, self.captured.total = point.cotangent, point.captured
        self.state, position = point.state, point.position
        actions = self.plan.backward_actions[point.action :]
        self.loads = deque(a.start for a in actions if a.kind == "load")
        for i, (kind, start, stop) in enumerate(actions, point.action):
            if kind == "load":
                snapshots.backward(BackwardPoint(i, self.cotangent, self.captured.total))
            if kind != "advance":
                self._act(kind, start, stop)
                continue
            for t in range(max(start, position), stop):
                self._act(kind, t, t + 1)
                total = self.captured.total
                snapshots.backward(BackwardPoint(i, self.cotangent, total, t + 1, self.state))
            position = 0
        snapshots.finished()

    @property
    def _working(self) -> State:
        assert self.state is not None
        return self.state

    def _again(self, stretch: Stretch) -> None:
        """Take steps again, and record them where the stretch says ``record``."""
        t, record = stretch.start, stretch.kind == "record"
        while t < stretch.stop:
            with not_batched():
                block = block_again(self.loop, self._working, t, stretch.stop, keep=record)
            if block is None:
                self._act(stretch.kind, t, t + 1)
                t += 1
            else:
                _keep(self.store, stretch.kind, block)
                self.state, t = block.after, block.stop

    def _segment(self, stretch: Stretch) -> bool:
        """Take a segment's steps again as one block, and go back through it, if a block serves."""
        start, stop = stretch.start, stretch.stop
        state = self.loop.restored(self.store.snapshots[start])
        with not_batched():
            block = block_again(self.loop, state, start, stop, keep=True)
        if block is None or block.stop < stop:
            return False
        self._pull(block, start, stop)
        if start in stretch.freed:
            del self.store.snapshots[start]
        return True

    def _from_snapshots(self, stretch: Stretch) -> None:
        """Go back from snapshots, through all at once that lie in one block."""
        snapshots, stop = self.store.snapshots, stretch.stop
        while stop > stretch.start:
            snapshot = snapshots[stop - 1]
            block = snapshot.block if isinstance(snapshot, InBlock) else None
            start = stop - 1 if block is None else max(block.start, stretch.start)
            if block is None:
                self._act("load", start, start)
            for t in stretch.freed.intersection(range(start, stop)):
                del snapshots[t]
            if block is None:
                self._act("vjp", start, stop)
            else:
                self._pull(block, start, stop)
            stop = start

    def _from_graphs(self, stretch: Stretch) -> None:
        """Go back through steps, through all at once that are held in one block."""
        graphs, stop = self.store.graphs, stretch.stop
        while stop > stretch.start:
            graph, start = graphs.get(stop - 1), stop - 1
            if isinstance(graph, InBlock):
                start = max(graph.block.start, stretch.start)
                self._pull(graph.block, start, stop)
                for t in range(start, stop):
                    del graphs[t]
            else:
                self._act("vjp", start, stop)
            stop = start

    def _pull(self, block: Block, start: int, stop: int) -> None:
        self.cotangent, indices, to_captured = block_vjp(
            self.loop, block, start, stop, self.cotangent, self.outputs, retain_graph=self.keep
        )
        self.captured.add(indices, to_captured)

    def _act(self, kind: str, start: int, stop: int) -> None:
        """Carry out one action."""
        loop, store = self.loop, self.store
        if kind == "load":
            self.state = loop.restored(store.snapshots[start])
            while self.loads.popleft() != start:
                pass  # those that a block served
            for upcoming in islice(self.loads, _AHEAD):
                if upcoming in store.snapshots:
                    store.snapshots.prefetch(upcoming)
        elif kind == "save":
            store.snapshots[start] = loop.snapshot(self._working)
        elif kind == "free":
            del store.snapshots[start]
        elif kind == "vjp":
            self._vjp(start)
        elif kind == "advance":
            with not_batched():
                for t in range(start, stop):
                    self.state = loop.again(self._working, t)
        elif kind == "record":
            with not_batched():
                store.graphs[start], self.state = loop.recorded(self._working, start)
        else:
            raise ValueError(f"a plan cannot {kind!r} on the way back")

    def _vjp(self, t: int) -> None:
        loop, linearization = self.loop, self.store.graphs.pop(t, None)
        if linearization is None:
            with not_batched():
                linearization = loop.linearize(self._working, t, values=False)
            self.state = None
        assert isinstance(linearization, Linearization)
        self.cotangent, to_captured = loop.vjp(
            linearization, t, self.cotangent, self.outputs.at(t), retain_graph=self.keep
        )
        self.captured.add(loop.captured.at(t), to_captured)
