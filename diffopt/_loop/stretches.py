"""What of a plan can be carried out for many steps at once.

A plan works step by step. Where it does one thing to one step after the other, that is a *stretch*
of the plan:

======== ===================================================================================
advance  steps without a trace, ``advance a b``
save     the state before each step is saved: ``save a; advance a a+1; save a+1; ...``
record   each step is held: ``record a; record a+1; ...``
vjp      the products of steps that are held: ``vjp b-1; vjp b-2; ...``
reverse  the products of steps from the states before them: ``load b-1; free b-1; vjp b-1; ...``
segment  a state is loaded, the steps from it are taken again, and reversed from their states, which
         nothing else needs: ``load a; advance a a+1; save a+1; ...; vjp b-1; load b-2; ...; vjp a``
======== ===================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffopt.schedule import Action, Plan

StretchKind = Literal["advance", "save", "record", "vjp", "reverse", "segment"]


@dataclass(frozen=True)
class Stretch:
    """Actions on steps ``start``, ..., ``stop`` − 1 that can be carried out at once.

    Attributes:
        actions: those that it stands for.
    """

    kind: StretchKind
    start: int
    stop: int
    actions: tuple[Action, ...]

    @property
    def freed(self) -> set[int]:
        """The positions whose snapshots are dropped."""
        return {a.start for a in self.actions if a.kind == "free"}

    @property
    def saved(self) -> set[int]:
        """The positions at which snapshots are taken."""
        return {a.start for a in self.actions if a.kind == "save"}


def stretches(actions: Sequence[Action]) -> list[Stretch | Action]:
    """The actions, with stretches in the place of those that form one."""
    found: list[Stretch | Action] = []
    at = 0
    while at < len(actions):
        reader = _Reader(actions, at)
        stretch = reader.stretch()
        found.append(actions[at] if stretch is None else stretch)
        at = at + 1 if stretch is None else reader.at
    return found


class _Reader:
    """Reads one stretch, if there is one, from a position in the actions on."""

    def __init__(self, actions: Sequence[Action], at: int) -> None:
        self._actions = actions
        self._first = at
        self.at = at

    def _is(self, kind: str, start: int | None = None, ahead: int = 0) -> bool:
        at = self.at + ahead
        if at >= len(self._actions):
            return False
        action = self._actions[at]
        return action.kind == kind and (start is None or action.start == start)

    def _made(self, kind: StretchKind, start: int, stop: int) -> Stretch:
        return Stretch(kind, start, stop, tuple(self._actions[self._first : self.at]))

    def stretch(self) -> Stretch | None:
        kind, start, stop = self._actions[self.at]
        if kind == "advance":
            self.at += 1
            return self._made("advance", start, stop)
        if kind == "record":
            return self._held("record", start, 1)
        if kind == "vjp":
            return self._held("vjp", start, -1)
        if kind == "save":
            return self._saved(start)
        if kind == "load":
            return self._segment(start) or self._reversed(start)
        return None

    def _held(self, kind: Literal["record", "vjp"], t: int, by: int) -> Stretch:
        first = t
        while self._is(kind, t):
            self.at += 1
            t += by
        return self._made(kind, min(first, t + 1), max(first + 1, t))

    def _saved(self, start: int) -> Stretch | None:
        t = start
        while self._is("save", t) and self._is("advance", t, 1) and self._by_one(1):
            self.at += 2
            t += 1
        return self._made("save", start, t) if t > start else None

    def _by_one(self, ahead: int) -> bool:
        action = self._actions[self.at + ahead]
        return action.stop == action.start + 1

    def _reversed(self, top: int) -> Stretch | None:
        t = top
        while self._one_reversed(t):
            t -= 1
        return self._made("reverse", t + 1, top + 1) if t < top else None

    def _one_reversed(self, t: int) -> bool:
        free = self._is("free", t, 1)
        if not (self._is("load", t) and self._is("vjp", t, 1 + free)):
            return False
        self.at += 2 + free
        return True

    def _segment(self, start: int) -> Stretch | None:
        before = self.at
        self.at += 1
        t = start
        while self._is("advance", t) and self._by_one(0):
            self.at += 1
            t += 1
            if not self._is("save", t):
                break
            self.at += 1
        stop = t + 1
        if t > start and self._is("vjp", t):
            self.at += 1
            t -= 1
            while t >= start and self._one_reversed(t):
                t -= 1
            if t < start:
                return self._made("segment", start, stop)
        self.at = before
        return None


def of_plan(plan: Plan) -> tuple[list[Stretch | Action], list[Stretch | Action]]:
    """The stretches of a plan's forward pass, and those of its backward pass."""
    known = vars(plan)  # where its other derived values are kept, too
    if "stretches" not in known:
        known["stretches"] = stretches(plan.forward_actions), stretches(plan.backward_actions)
    found: tuple[list[Stretch | Action], list[Stretch | Action]] = known["stretches"]
    return found
