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

Each kind is a regular expression over the actions, one letter each. That the positions follow one
another need not be looked at: a plan that can be carried out has no other order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

from diffopt.schedule import Action, Plan

StretchKind = Literal["advance", "save", "record", "vjp", "reverse", "segment"]

#: The first letters of the actions; capitals: an ``advance`` over several steps; a ``free`` or
#: ``vjp`` of another position than the action before it.
_KINDS = re.compile(
    "(?P<save>(?:sa)+)|(?P<record>r+)|(?P<vjp>[vV]+)|(?P<advance>[aA])|(?P<reverse>(?:lf?v)+)"
)
_SEGMENT = re.compile("l(a(?:sa)*)V")  # and then a state loaded and reversed for each "a"


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

    @cached_property
    def freed(self) -> set[int]:
        """The positions whose snapshots are dropped."""
        return {action.start for action in self.actions if action.kind == "free"}


def stretches(actions: Sequence[Action]) -> list[Stretch | Action]:
    """The actions, with stretches in the place of those that form one."""
    text = "".join(map(_letter, [Action("free", -1, -1), *actions], actions))
    parts: list[Stretch | Action] = []
    at = 0
    while at < len(actions):
        kind, end = _longest(text, at)
        if kind is None:
            parts.append(actions[at])
        else:
            group = tuple(actions[at:end])
            start, stop = min(a.start for a in group), max(a.stop for a in group)
            parts.append(Stretch(kind, start, stop, group))
        at = end
    return parts


def _letter(before: Action, action: Action) -> str:
    follows = action.start == before.start
    small = action.stop == action.start + 1 if action.kind == "advance" else follows
    letter = action.kind[0]
    return letter.upper() if letter in "afv" and not small else letter


def _longest(text: str, at: int) -> tuple[StretchKind | None, int]:
    """The kind of the stretch that begins at a position, if one does, and where it ends."""
    if taken := _SEGMENT.match(text, at):
        reversed_ = re.compile(f"(?:lf?v){{{taken[1].count('a')}}}").match(text, taken.end())
        if reversed_:
            return "segment", reversed_.end()
    match = _KINDS.match(text, at)
    return (None, at + 1) if match is None else (cast(StretchKind, match.lastgroup), match.end())


def of_plan(plan: Plan) -> tuple[list[Stretch | Action], list[Stretch | Action]]:
    """The stretches of a plan's forward pass, and those of its backward pass."""
    values = vars(plan)  # where its other derived values are kept, too
    if "stretches" not in values:
        values["stretches"] = stretches(plan.forward_actions), stretches(plan.backward_actions)
    both: tuple[list[Stretch | Action], list[Stretch | Action]] = values["stretches"]
    return both
