"""Running a plan: the one place where snapshots, recomputation and derivatives are put in order.

A plan is a list of integer actions (``diffopt.schedule``). Its first part takes the loop to its
end and belongs to the forward pass; the rest takes it back, one vector-Jacobian product a step.
"""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor

from diffopt._loop import journaled
from diffopt._loop.blocks import Block, InBlock, block_again, block_vjp, first_block
from diffopt._loop.kept import AHEAD, Begun, Kept
from diffopt._loop.loop import Loop
from diffopt._loop.snapshots import Layer, Snapshots
from diffopt._loop.stretches import Stretch, of_plan
from diffopt._loop.way_back import CapturedSum
from diffopt._step.linearization import Linearization
from diffopt._torch.batched import any_batched, not_batched
from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import Cotangent, State
from diffopt.optim.lists import one_by_one
from diffopt.schedule import Action, Plan


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
    if kept.snapshots.journal.keeps:
        return journaled.forward(loop, plan, kept, begun)
    state = loop.start
    for part in of_plan(plan)[0]:
        if isinstance(part, Stretch):
            state = _forward_stretch(loop, kept, state, part, begun if part.start == 0 else None)
        elif part.kind == "save":
            taken = begun if part.start == 0 else None
            kept.save(part.start, loop.snapshot(state) if taken is None else taken.start)
        elif part.kind == "free":
            del kept.snapshots[part.start]
        else:
            raise ValueError(f"a plan cannot {part.kind!r} before it has reached the end")
    return state


def pass_through(loop: Loop) -> State:
    """Take all steps for their result alone."""
    kept = Kept(Snapshots())
    steps = loop.steps
    whole = Stretch("advance", 0, steps, (Action("advance", 0, steps),))
    return _forward_stretch(loop, kept, loop.start, whole, None)


def _forward_stretch(
    loop: Loop, kept: Kept, state: State, stretch: Stretch, begun: Begun | None
) -> State:
    """Take the steps of a stretch for the first time: many at once where that can be."""
    kind, t = stretch.kind, stretch.start
    if kind not in ("advance", "save", "record"):
        raise ValueError(f"a plan cannot {kind!r} before it has reached the end")
    if begun is not None and (kind != "record" or begun.graph is not None):
        if kind == "save":
            kept.save(0, begun.start)
        elif kind == "record":
            assert begun.graph is not None
            kept.record(0, begun.graph)
        state, begun.graph = begun.after, None
        t += 1
    while t < stretch.stop:
        block = None
        if kind != "save" or kept.snapshots.in_place:
            block = first_block(loop, state, t, stretch.stop, keep=kind != "advance")
        if block is not None:
            _keep(kept, kind, block)
            state, t = block.after, block.stop
            continue
        if kind == "save":
            kept.save(t, loop.snapshot(state))
        if kind == "record":
            recorded, state = loop.first_recorded(state, t)
            kept.record(t, recorded)
        else:
            state = loop.first(state, t)
        t += 1
    return state


def _keep(kept: Kept, kind: str, block: Block) -> None:
    """Hold what a stretch is to leave of the steps of a block."""
    held = {t: InBlock(block, t) for t in range(block.start, block.stop)}
    if kind == "save":
        kept.save_each(held)
    elif kind == "record":
        kept.record_each(held)


def run_backward(
    loop: Loop,
    plan: Plan,
    kept: Kept,
    cotangent: Cotangent,
    outputs: OutputCotangents,
    *,
    keep: bool = False,
) -> tuple[Cotangent, list[Tensor | None]]:
    """The plan's second part: from the end of the loop back to its start.

    Args:
        kept: what ``run_forward`` left; used up unless ``keep``.
        cotangent: of the final state.
        outputs: of the losses and extras.
        keep: leave ``kept`` as it is, for another backward pass.

    Returns:
        the cotangents of the start and of ``loop.captured.tensors``.
    """
    # Only what is linear in the cotangents can be mapped over many of them.
    many = any_batched([*cotangent.values(), *outputs.tensors()])
    if keep:
        kept = Kept(Layer(kept.snapshots), dict(kept.graphs), kept.peak_states, kept.peak_graphs)
    try:
        with one_by_one() if many else nullcontext():
            return _backward(loop, plan, kept, cotangent, outputs, keep)
    finally:
        kept.snapshots.close()


def _backward(
    loop: Loop,
    plan: Plan,
    kept: Kept,
    cotangent: Cotangent,
    outputs: OutputCotangents,
    keep: bool,
) -> tuple[Cotangent, list[Tensor | None]]:
    if kept.snapshots.journal.keeps:
        return journaled.backward(loop, plan, kept, cotangent, outputs, keep)
    way = _WayBack(loop, plan, kept, cotangent, outputs, keep)
    for part in of_plan(plan)[1]:
        if isinstance(part, Stretch):
            way.stretch(part)
        else:
            way.act(*part)
    return way.cotangent, way.captured.total


class _WayBack:
    """A plan's second part while it is carried out.

    Attributes:
        cotangent: of the state that the way back has come to.
        captured: what has flown to the captured tensors so far.
    """

    def __init__(
        self,
        loop: Loop,
        plan: Plan,
        kept: Kept,
        cotangent: Cotangent,
        outputs: OutputCotangents,
        keep: bool,
    ) -> None:
        self.cotangent = cotangent
        self.captured = CapturedSum(loop.captured)
        self._loop = loop
        self._kept = kept
        self._outputs = outputs
        self._keep = keep
        self._state: State | None = None
        self._loads = [action.start for action in plan.backward_actions if action.kind == "load"]
        self._loaded = 0

    def stretch(self, stretch: Stretch) -> None:
        """Carry out a stretch: for many steps at once where that can be."""
        kind, in_place = stretch.kind, self._kept.snapshots.in_place
        if kind == "vjp":
            self._held(stretch)
        elif kind in ("record", "advance"):
            self._again(stretch)
        elif kind == "reverse" and in_place:
            self._reversed(stretch)
        elif not (kind == "segment" and in_place and self._segment(stretch)):
            for action in stretch.actions:
                self.act(*action)

    def _again(self, stretch: Stretch) -> None:
        t, record = stretch.start, stretch.kind == "record"
        while t < stretch.stop:
            assert self._state is not None
            with not_batched():
                block = block_again(self._loop, self._state, t, stretch.stop, keep=record)
            if block is None:
                self.act("record" if record else "advance", t, t + 1)
                t += 1
            else:
                _keep(self._kept, stretch.kind, block)
                self._state, t = block.after, block.stop

    def _segment(self, stretch: Stretch) -> bool:
        """Take a segment's steps again, as one block, and go back through them, if that can be."""
        start, stop = stretch.start, stretch.stop
        state = self._loop.restored(self._kept.snapshots[start])
        with not_batched():
            block = block_again(self._loop, state, start, stop, keep=True)
        if block is None or block.stop < stop:
            return False
        self._kept.count(len(stretch.saved))
        for action in stretch.actions:
            if action.kind == "load":
                self._loaded += 1
        self._pull(block, start, stop)
        if start in stretch.freed:
            del self._kept.snapshots[start]
        return True

    def _reversed(self, stretch: Stretch) -> None:
        """Go back from snapshots, through all at once that lie in one block."""
        snapshots, freed, stop = self._kept.snapshots, stretch.freed, stretch.stop
        actions = iter(stretch.actions)
        while stop > stretch.start:
            snapshot = snapshots[stop - 1]
            if isinstance(snapshot, InBlock):
                start = max(snapshot.block.start, stretch.start)
                self._pull(snapshot.block, start, stop)
                for t in reversed(range(start, stop)):
                    if t in freed:
                        del snapshots[t]
                    while next(actions).kind != "vjp":
                        pass
                    self._loaded += 1
                stop = start
            else:
                kind = None
                while kind != "vjp":
                    kind, start, end = next(actions)
                    self.act(kind, start, end)
                stop -= 1

    def _held(self, stretch: Stretch) -> None:
        """Go back through steps, through all at once that are held in one block."""
        graphs, stop = self._kept.graphs, stretch.stop
        while stop > stretch.start:
            held = graphs.get(stop - 1)
            if not isinstance(held, InBlock):
                self.act("vjp", stop - 1, stop)
                stop -= 1
                continue
            start = max(held.block.start, stretch.start)
            self._pull(held.block, start, stop)
            for t in range(start, stop):
                del graphs[t]
            stop = start

    def _pull(self, block: Block, start: int, stop: int) -> None:
        self.cotangent, indices, found = block_vjp(
            self._loop, block, start, stop, self.cotangent, self._outputs, retain_graph=self._keep
        )
        self.captured.add(indices, found)

    def act(self, kind: str, start: int, stop: int) -> None:
        """Carry out one action."""
        loop, kept, state = self._loop, self._kept, self._state
        if kind == "load":
            self._state = loop.restored(kept.snapshots[start])
            self._loaded += 1
            for upcoming in self._loads[self._loaded : self._loaded + AHEAD]:
                if upcoming in kept.snapshots:
                    kept.snapshots.prefetch(upcoming)
        elif kind == "save":
            assert state is not None
            kept.save(start, loop.snapshot(state))
        elif kind == "advance":
            assert state is not None
            with not_batched():
                for t in range(start, stop):
                    state = loop.again(state, t)
            self._state = state
        elif kind == "record":
            assert state is not None
            with not_batched():
                linearization, self._state = loop.recorded(state, start)
            kept.record(start, linearization)
        elif kind == "vjp":
            self._vjp(start)
        elif kind == "free":
            del kept.snapshots[start]
        else:
            raise ValueError(f"a plan cannot {kind!r} on the way back")

    def _vjp(self, t: int) -> None:
        loop, kept = self._loop, self._kept
        held = kept.graphs.pop(t, None)
        if held is None:
            assert self._state is not None
            with not_batched():
                held = loop.linearize(self._state, t, values=False)
            self._state = None
        assert isinstance(held, Linearization)
        self.cotangent, found = loop.vjp(
            held, t, self.cotangent, self._outputs.at(t), retain_graph=self._keep
        )
        self.captured.add(loop.captured.at(t), found)
