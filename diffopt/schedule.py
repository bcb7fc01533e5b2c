"""Checkpointing plans: which states to keep, which steps to run again, as integers alone.

Steps 0, ..., T−1 lead from state 0, the start, to state T. The way back takes the vector-Jacobian
products of the steps in the order T−1, ..., 0, and each needs the state before its step. A plan
says beforehand how each of them is had. There is one *working state*, at some position, 0 at first.

=============== ================================================================================
``save t``      keep a snapshot of the working state, which is at t
``load t``      the working state becomes snapshot t, which stays held
``free t``      drop snapshot t
``advance a b`` run steps a, ..., b−1 without a graph: the working state goes from a to b
``record t``    run step t and hold its graph: the working state goes from t to t+1
``vjp t``       the vector-Jacobian product of step t: from its graph where it was recorded, which
                is then dropped; else by evaluating step t once, from the working state at t. After
                a vjp there is no working state until the next load.
=============== ================================================================================

The *turn* is where position T is reached first: what comes before is the forward pass, which only
saves, advances and records; what comes after is the backward pass.

Every plan evaluates each step exactly once with a graph, in a ``record`` or a ``vjp``. Plans differ
in the steps they ``advance`` over, and so that number alone decides which is the fastest.

- ``store_all``: T graphs, and no step is advanced over.
- ``segmented``: segments of about √T steps (Chen, Xu, Zhang and Guestrin, "Training deep nets with
  sublinear memory cost", arXiv:1604.06174, 2016).
- ``binomial``: the fewest recomputed steps for a number of snapshots (Griewank and Walther,
  "Algorithm 799: revolve", ACM Transactions on Mathematical Software 26(1), 2000).
- ``budget``: the same over blocks of steps whose graphs are held together. With blocks of one step
  this is revolve, with a snapshot for every block Chen's method, with one block ``store_all``.

>>> print(*binomial(3, snapshots=2).actions, sep="; ")
save 0; advance 0 1; save 1; advance 1 3; load 1; advance 1 2; vjp 2; load 1; free 1; vjp 1;
load 0; free 0; vjp 0
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import comb, inf, isqrt
from typing import Literal, NamedTuple

Kind = Literal["save", "load", "free", "advance", "record", "vjp"]


class Action(NamedTuple):
    """One action, on steps ``start``, ..., ``stop`` − 1; on none where it is about a snapshot."""

    kind: Kind
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.kind} {self.start}" + f" {self.stop}" * (self.kind == "advance")


class Counts(NamedTuple):
    """What ``simulate`` finds: ``turn`` actions are the forward pass's; the rest as in ``Plan``."""

    turn: int
    advanced: int
    recomputed_steps: int
    peak_states: int
    peak_graphs: int
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """The actions that take ``steps`` steps forward and back, in order.

    ``predicted_peak_bytes`` is there where the plan was made from sizes in bytes, by ``budget``.
    ``constant`` steps at the start are not gone back through. ``more_work`` is what is done besides
    the steps and their vector-Jacobian products, in evaluations of a step.
    """

    steps: int
    actions: tuple[Action, ...] = field(repr=False)
    predicted_peak_bytes: int | None = None
    constant: int = 0
    more_work: float = 0.0

    @cached_property
    def counts(self) -> Counts:
        """What carrying out the plan takes."""
        return simulate(self)

    @property
    def peak_states(self) -> int:
        """The most snapshots held at once. The start counts, also where no snapshot is taken."""
        return self.counts.peak_states

    @property
    def peak_graphs(self) -> int:
        """The most graphs of one step alive at once, the one being differentiated included."""
        return self.counts.peak_graphs

    @property
    def recomputed_steps(self) -> int:
        """Steps computed again on the way back without a graph.

        The one evaluation inside each step's vector-Jacobian product is not counted.
        """
        return self.counts.recomputed_steps

    @property
    def relative_cost(self) -> float:
        """The work relative to storing every graph: 1 + A / 3T, for A steps advanced over.

        Evaluating a step counts 1, with a graph or without. Differentiating that graph counts 2,
        since a step is a gradient step itself. All graphs come to 3T; this plan, to A more, and to
        3 less for each step that is not gone back through.
        """
        if self.steps == 0:
            return 1.0
        reversed_steps = self.steps - self.constant
        work = 3 * reversed_steps + self.counts.advanced + self.more_work
        return work / (3 * self.steps)

    @cached_property
    def forward_actions(self) -> tuple[Action, ...]:
        """The actions of the forward pass: all until position ``steps`` is reached first."""
        return self.actions[: self.counts.turn]

    @cached_property
    def backward_actions(self) -> tuple[Action, ...]:
        """The actions of the backward pass: all after position ``steps`` is reached first."""
        return self.actions[self.counts.turn :]

    def __str__(self) -> str:
        text = (
            f"{_plural(self.steps, 'step')}: at most {_plural(self.peak_states, 'state')} and "
            f"{_plural(self.peak_graphs, 'graph')} held, "
            f"{_plural(self.recomputed_steps, 'step')} recomputed, "
            f"{self.relative_cost:.2f} times the work of storing every graph"
        )
        if self.predicted_peak_bytes is not None:
            text += f", {self.predicted_peak_bytes / 2**20:,.1f} MiB predicted"
        return text


def store_all(steps: int) -> Plan:
    """Record every step: T graphs, and no step is evaluated twice."""
    check_int("the number of steps", steps, 0, "write 0 or more")
    return Plan(steps, tuple(_blocks(steps, free=0, block=steps)))


def segmented(steps: int, segment: int | None = None) -> Plan:
    """Save the start of every segment; on the way back, compute a segment's states again.

    With N = ⌈T/k⌉ segments of k steps, the last of L ≤ k steps: at most N + k − 1 states, and
    T − N − (L − 1) recomputed steps. The last segment's states are kept in the forward pass, which
    saves computing them again and takes no more room: that would need a working state besides.

    Left out, the segment is the one with the fewest states, which are about 2√T − 2, and of several
    such the one with the fewest recomputed steps.
    """
    check_int("the number of steps", steps, 0, "write 0 or more")
    if segment is None:
        segment = min(range(1, 2 * isqrt(steps) + 2), key=lambda k: _segmented_counts(steps, k))
    check_int("segment", segment, 1, "write segment=10, or leave it out for about √T")
    last = max(steps - 1, 0) // segment * segment
    actions: list[Action] = []
    for start in range(0, last, segment):
        actions += Action("save", start, start), Action("advance", start, start + segment)
    for t in range(last, steps):
        actions += Action("save", t, t), Action("advance", t, t + 1)
    for t in reversed(range(last, steps)):
        actions += _vjp_from_snapshot(t)
    for start in reversed(range(0, last, segment)):
        end = start + segment - 1
        if start < end:
            actions += Action("load", start, start), Action("advance", start, start + 1)
            for t in range(start + 1, end):
                actions += Action("save", t, t), Action("advance", t, t + 1)
            actions.append(Action("vjp", end, end + 1))
        for t in reversed(range(start, max(end, start + 1))):
            actions += _vjp_from_snapshot(t)
    return Plan(steps, tuple(actions))


def binomial(steps: int, snapshots: int) -> Plan:
    """The fewest recomputed steps with at most ``snapshots`` states held, the start included.

    Reversing l steps from a saved state with s free places takes t(l, s) advances, where reversing
    one step takes none. The forward pass has to reach the end anyway, so its advances are free:
    that leaves G(T, snapshots − 1).

        t(l, 0) = l(l−1)/2,  t(l, s) = min over m of m + t(l−m, s−1) + t(m, s),   t(1, s) = 0,
        G(l, 0) = l(l−1)/2,  G(l, s) = min over m of     G(l−m, s−1) + t(m, s),   G(1, s) = 0.

    Nothing new is needed for G. Let one more step stand at the end, which takes no work and whose
    reversal is the turn: until then the schedule of these T + 1 steps has run each of the first T
    once, and so G(T, s) = t(T+1, s) − T.
    """
    check_int("the number of steps", steps, 0, "write 0 or more")
    check_int("snapshots", snapshots, 1, "write snapshots=1 or more, of which the start is one")
    if steps == 0:
        return Plan(0, ())
    actions, turn = _revolve(steps + 1, free=snapshots - 1, block=1)
    del actions[turn]
    return Plan(steps, tuple(actions))


def budget(
    steps: int,
    *,
    state_bytes: int,
    graph_bytes: int,
    budget_bytes: int,
    workspace_bytes: int | None = None,
) -> Plan:
    """The fastest plan whose predicted peak fits into ``budget_bytes``.

    The plans to choose from hold the graphs of k steps, for any k from 1 to T, and as many states
    as then fit. The last k steps are recorded in the forward pass and never computed again. Those
    before are reversed in blocks of k, whose graphs take the room that the last ones left: with few
    states by the binomial schedule over blocks, with more by one snapshot a block. Of equally fast
    plans the one that takes less is chosen. More bytes never give a slower plan.

    Args:
        steps: T.
        state_bytes: one state. The start is not counted: it was there before.
        graph_bytes: the graph of one step, held.
        budget_bytes: what all may take together, at any time, as ``simulate`` counts it.
        workspace_bytes: what evaluating and differentiating one step takes at its peak, its graph
            and the cotangent included; taken to be ``graph_bytes`` at least, also where left out.

    Raises:
        ValueError: nothing fits; the message names the smallest budget that does.
    """
    workspace = graph_bytes if workspace_bytes is None else workspace_bytes
    check_int("the number of steps", steps, 0, "write 0 or more")
    sizes = {"state": state_bytes, "graph": graph_bytes, "budget": budget_bytes}
    for name, size in {**sizes, "workspace": workspace}.items():
        check_int(f"{name}_bytes", size, 1, "write a number of bytes")
    if steps == 0:
        return Plan(0, (), predicted_peak_bytes=0)
    workspace = max(workspace, graph_bytes)

    best: tuple[float, int, int, int] = inf, 0, 0, 0  # Advances, peak, free places, block.
    for block in range(steps, 0, -1):
        before = steps - block
        if before > best[0]:
            break  # Each step before the last block is advanced over once at least.
        # With one snapshot a block, more places would stay empty.
        graphs = (block - 1) * graph_bytes + workspace
        free = max(0, min((budget_bytes - graphs) // state_bytes, -(-before // block)) - 2)
        peak = _blocks_peak(steps, free, block, state_bytes, graph_bytes, workspace)
        if peak <= budget_bytes:
            advances = _advances(before, free, block) + min(before, block)
            best = min(best, (advances, peak, free, block))
    if best[0] == inf:
        smallest = smallest_budget(
            steps, state_bytes=state_bytes, graph_bytes=graph_bytes, workspace_bytes=workspace
        )
        raise ValueError(
            f"a budget of {budget_bytes} bytes is too small for {_plural(steps, 'step')}, with "
            f"{state_bytes} bytes for a state and {workspace} to evaluate and differentiate a "
            f"step: write {smallest} bytes or more"
        )
    plan = Plan(steps, tuple(_blocks(steps, *best[2:])))
    counts = simulate(
        plan, state_bytes=state_bytes, graph_bytes=graph_bytes, workspace_bytes=workspace
    )
    return replace(plan, predicted_peak_bytes=counts.peak_bytes)


def smallest_budget(steps: int, *, state_bytes: int, graph_bytes: int, workspace_bytes: int) -> int:
    """The least ``budget_bytes`` for which ``budget`` has a plan."""
    workspace = max(workspace_bytes, graph_bytes)
    return min(
        (
            _blocks_peak(steps, 0, block, state_bytes, graph_bytes, workspace)
            for block in range(1, steps + 1)
        ),
        default=0,
    )


def preceded(plan: Plan, steps: int) -> Plan:
    """``plan`` after ``steps`` more steps, which are advanced over and not gone back through."""
    if steps == 0:
        return plan
    later = (Action(kind, start + steps, stop + steps) for kind, start, stop in plan.actions)
    return replace(
        plan,
        steps=plan.steps + steps,
        actions=(Action("advance", 0, steps), *later),
        constant=plan.constant + steps,
    )


def one_way(steps: int, more_work: float) -> Plan:
    """Advance over all steps, and go back through none."""
    actions = (Action("advance", 0, steps),) if steps else ()
    return Plan(steps, actions, constant=steps, more_work=more_work)


def simulate(
    plan: Plan, *, state_bytes: int = 0, graph_bytes: int = 0, workspace_bytes: int = 0
) -> Counts:
    """Carry out a plan on integers: check that every action is legal, and count.

    The bytes are those of the states at different positions (the snapshots, the working state, and
    from the turn on state T, which is the result) and of the recorded graphs; evaluating or
    differentiating a step takes ``workspace_bytes`` besides, its own graph included. The start is
    held all along and takes none: it was there before.

    Raises:
        ValueError: an action is illegal, or something is left at the end; the message names it.
    """
    steps = plan.steps
    workspace = max(workspace_bytes, graph_bytes)
    snapshots: set[int] = set()
    graphs: set[int] = set()
    working: int | None = 0
    left = steps  # Steps whose vjp is still to come.
    turn = None if steps else 0
    advanced = forward = peak_graphs = peak_bytes = 0
    peak_states = 1

    for index, (kind, start, stop) in enumerate(plan.actions):
        extra = 0  # Bytes besides states and graphs.
        if kind == "save":
            legal = start == stop == working and start < steps and start not in snapshots
            snapshots.add(start)
        elif kind == "load":
            legal = start == stop and start in snapshots
            working = start
        elif kind == "free":
            legal = start == stop and start in snapshots
            snapshots.discard(start)
        elif kind == "advance":
            legal = start == working and start < stop <= steps
            working, extra = stop, workspace
            advanced += stop - start
        elif kind == "record":
            legal = start == working and start + 1 == stop <= left and start not in graphs
            graphs.add(start)
            working, extra = stop, workspace - graph_bytes
        else:
            legal = turn is not None and plan.constant < stop == left == start + 1
            legal = legal and (start in graphs or start == working)
            graphs.add(start)
            left, extra = start, workspace - graph_bytes
        if not legal:
            raise ValueError(f"action {index} of the plan, {plan.actions[index]}: {_NEEDS[kind]}")

        if turn is None and working == steps:
            turn, forward = index + 1, advanced
        peak_states = max(peak_states, len(snapshots))
        peak_graphs = max(peak_graphs, len(graphs))
        states = len(snapshots) - (0 in snapshots)
        states += working not in (None, 0) and working not in snapshots
        states += turn is not None and working != steps
        peak_bytes = max(peak_bytes, states * state_bytes + len(graphs) * graph_bytes + extra)
        if kind == "vjp":
            graphs.discard(start)
            working = None

    left -= plan.constant
    if left or snapshots or graphs:
        raise ValueError(
            f"the plan ends with {_plural(left, 'step')} still to reverse, snapshots "
            f"{sorted(snapshots)} and the graphs of steps {sorted(graphs)}: reverse every step, "
            "and free every snapshot"
        )
    return Counts(turn or 0, advanced, advanced - forward, peak_states, peak_graphs, peak_bytes)


_NEEDS: dict[Kind, str] = {
    "save": "it needs the working state there, before the end, and no snapshot of it yet",
    "load": "it needs a snapshot there",
    "free": "it needs a snapshot there",
    "advance": "it needs the working state at its start, and to end later, within the steps",
    "record": "it needs the working state there, and a step not yet recorded or reversed",
    "vjp": "it needs all later steps run and reversed, and its graph or the working state there",
}


def check_int(name: str, value: object, minimum: int, advice: str) -> None:
    """Raise unless ``value`` is an int, bools excepted, and ``minimum`` at least."""
    if isinstance(value, bool) or not isinstance(value, int):
        kind = type(value).__name__
        raise TypeError(f"{name} is {value!r}, of type {kind}, but must be an int: {advice}")
    if value < minimum:
        raise ValueError(f"{name} is {value}, but must be at least {minimum}: {advice}")


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], advice: str) -> None:
    """Raise a ``TypeError`` unless ``value`` is of one of ``kinds``; a bool counts as no number."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise TypeError(f"{name} is a {type(value).__name__}: {advice}")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _segmented_counts(steps: int, segment: int) -> tuple[int, int]:
    """The peak of states and the recomputed steps of ``segmented(steps, segment)``."""
    full = max(steps - 1, 0) // segment  # Segments before the last.
    forward = full + steps - full * segment
    backward = full + max(segment - 2, 0) if full else 0
    return max(forward, backward), full * (segment - 1)


def _beta(s: int, r: int) -> int:
    """Griewank and Walther's β(s, r): how many steps s snapshots reverse with r repetitions."""
    return comb(s + r, s)


def _repeats(length: int, free: int, block: int) -> int:
    """The least r with l ≤ k β(s+1, r): how often ``_revolve`` advances over a step at the most."""
    r = 0
    while block * _beta(free + 1, r) < length:
        r += 1
    return r


def _advances(length: int, free: int, block: int) -> int:
    """The advances of ``_revolve``: t(l, s) = r l − k β(s+2, r−1), r being ``_repeats``."""
    r = _repeats(length, free, block)
    return r * length - block * _beta(free + 2, r - 1)


def _revolve(length: int, free: int, block: int) -> tuple[list[Action], int]:
    """Reverse l = ``length`` steps by the fewest advances, in time proportional to the actions.

    Holds at most s + 1 snapshots, s = ``free``, and k = ``block`` graphs. A stretch of up to k
    steps is reversed by evaluating each once. A longer one is parted: its first m steps are
    advanced over and wait until those after them are reversed, with one free place less.

        t(l, s) = min over m of m + t(l−m, s−1) + t(m, s),   t(l, s) = 0 for l ≤ k

    As a function of l this is convex and has k β(s, r) increments of size r, for every r ≥ 1. So
    the minimum is had without a search: the smallest increments of both terms come first. That
    gives the closed form in ``_advances`` and bounds on the best m, of which the lower one is
    taken, as it mostly makes for fewer snapshots to write.

    Returns:
        the actions, and the index of the first that evaluates a step with its graph.
    """
    actions: list[Action] = []
    turn = None
    waiting: list[tuple[int, int, int, int]] = []
    start, stop, r = 0, length, _repeats(length, free, block)
    if length > block:
        actions.append(Action("save", 0, 0))
    while True:
        while (rest := stop - start) > block:
            while rest <= block * _beta(free + 1, r - 1):
                r -= 1
            m = max(1, rest - block * _beta(free, r), block * _beta(free + 1, r - 2))
            waiting.append((start, start + m, free, r))
            actions.append(Action("advance", start, start + m))
            start, free = start + m, free - 1
            if stop - start > block:
                actions.append(Action("save", start, start))
        turn = len(actions) if turn is None else turn
        # The graph of the last of them is wanted at once: its vjp evaluates it.
        actions += (Action("record", t, t + 1) for t in range(start, stop - 1))
        actions += (Action("vjp", t, t + 1) for t in reversed(range(start, stop)))
        if not waiting:
            return actions, turn
        start, stop, free, r = waiting.pop()
        actions.append(Action("load", start, start))
        if stop - start <= block:
            actions.append(Action("free", start, start))


def _blocks(steps: int, free: int, block: int) -> list[Action]:
    """Record the last k = ``block`` steps in the forward pass, and ``_revolve`` the steps before.

    When ``_revolve`` first comes to a stretch that it reverses at once, it holds at most s + 1
    snapshots. Here the start of that stretch is saved besides and the forward pass goes on, to
    return once the last steps are reversed. So at most s + 3 states are held, the start and
    state T included.
    """
    before = max(steps - block, 0)
    last = [Action("record", t, t + 1) for t in range(before, steps)]
    last += (Action("vjp", t, t + 1) for t in reversed(range(before, steps)))
    if before == 0:
        return last
    actions, turn = _revolve(before, free, block)
    start = actions[turn].start
    there = Action("save", start, start), Action("advance", start, before)
    back = Action("load", start, start), Action("free", start, start)
    return [*actions[:turn], *there, *last, *back, *actions[turn:]]


def _blocks_peak(
    steps: int, free: int, block: int, state_bytes: int, graph_bytes: int, workspace: int
) -> int:
    """The bytes that ``simulate`` finds for ``_blocks``, or a bound on them."""
    before = steps - block
    graphs = (block - 1) * graph_bytes + workspace
    if before > block:
        return graphs + (free + 2) * state_bytes
    # The peak is at the turn, or after it, with the graphs of the steps before.
    later = graphs - (block - before) * graph_bytes + min(before, 2) * state_bytes
    return max(graphs + state_bytes, later)


def _vjp_from_snapshot(t: int) -> tuple[Action, Action, Action]:
    """The vector-Jacobian product of step t from snapshot t, which has no further use then."""
    return Action("load", t, t), Action("free", t, t), Action("vjp", t, t + 1)
