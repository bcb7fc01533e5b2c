"""Plans by their literal actions, by independent optima, and by the bytes they are to fit."""

from __future__ import annotations

import ast
import heapq
from collections.abc import Iterator
from functools import cache
from itertools import chain, pairwise
from math import ceil, comb, inf, isqrt
from pathlib import Path

import pytest

from diffopt import schedule
from diffopt.schedule import Action, Counts, Plan, binomial, budget, segmented, simulate, store_all


def order(plan: Plan) -> str:
    """The actions, with a bar between the forward and the backward pass."""
    forward = "; ".join(map(str, plan.forward_actions))
    backward = "; ".join(map(str, plan.backward_actions))
    return f"{forward} | {backward}"


def parse(text: str) -> tuple[Action, ...]:
    """Actions from text such as ``save 0; advance 0 2; vjp 1``."""
    actions = []
    for part in text.split("; "):
        kind, start, *stop = part.split()
        width = 1 if kind in ("record", "vjp") else 0
        actions.append(Action(kind, int(start), int(stop[0]) if stop else int(start) + width))
    return tuple(actions)


def loads_and_frees(plan: Plan) -> Iterator[tuple[Action, Action]]:
    """Every free with the action before it."""
    return ((a, b) for a, b in pairwise(plan.actions) if b.kind == "free")


# Bytes of a state, of a held graph, and of evaluating and differentiating a step.
SIZES = [(5, 10, 14), (1, 10, 12), (1, 1, 1), (10, 3, 7)]
BUDGETS = [*range(8, 60), 75, 100, 150, 300, 2000]


def fitting(steps: int, sizes: tuple[int, int, int], budget_bytes: int) -> Plan | None:
    """``budget``, or None where nothing fits."""
    state, graph, workspace = sizes
    try:
        return budget(
            steps,
            state_bytes=state,
            graph_bytes=graph,
            workspace_bytes=workspace,
            budget_bytes=budget_bytes,
        )
    except ValueError:
        return None


def counted(plan: Plan, sizes: tuple[int, int, int]) -> Counts:
    state, graph, workspace = sizes
    return simulate(plan, state_bytes=state, graph_bytes=graph, workspace_bytes=workspace)


def all_kinds(steps: int) -> list[Plan]:
    budgets = (fitting(steps, sizes, bound) for sizes in SIZES for bound in (*BUDGETS, 10**6))
    return [
        store_all(steps),
        *(segmented(steps, k) for k in (None, 1, 2, 3, 4, 5, 7, 11, 200)),
        *(binomial(steps, c) for c in (1, 2, 3, 4, 5, 9, 200)),
        *(plan for plan in budgets if plan is not None),
    ]


# --- Literal orders -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (0, " | "),
        (1, "record 0 | vjp 0"),
        (2, "record 0; record 1 | vjp 1; vjp 0"),
        (4, "record 0; record 1; record 2; record 3 | vjp 3; vjp 2; vjp 1; vjp 0"),
    ],
)
def test_store_all_records_every_step(steps: int, expected: str) -> None:
    plan = store_all(steps)
    assert order(plan) == expected
    assert (plan.peak_graphs, plan.peak_states, plan.recomputed_steps) == (steps, 1, 0)
    assert plan.relative_cost == 1


EVERY_STATE = {
    1: "save 0; advance 0 1 | load 0; free 0; vjp 0",
    2: "save 0; advance 0 1; save 1; advance 1 2 | load 1; free 1; vjp 1; load 0; free 0; vjp 0",
    3: "save 0; advance 0 1; save 1; advance 1 2; save 2; advance 2 3"
    " | load 2; free 2; vjp 2; load 1; free 1; vjp 1; load 0; free 0; vjp 0",
}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_with_room_for_it_every_state_is_kept(steps: int) -> None:
    for plan in (
        segmented(steps, 1),
        segmented(steps, steps),
        segmented(steps, steps + 5),
        binomial(steps, steps),
        binomial(steps, steps + 5),
    ):
        assert order(plan) == EVERY_STATE[steps]


@pytest.mark.parametrize(
    ("steps", "segment", "expected"),
    [
        (0, 3, " | "),
        (
            3,
            2,
            "save 0; advance 0 2; save 2; advance 2 3"
            " | load 2; free 2; vjp 2; load 0; advance 0 1; vjp 1; load 0; free 0; vjp 0",
        ),
        (
            4,
            2,
            "save 0; advance 0 2; save 2; advance 2 3; save 3; advance 3 4"
            " | load 3; free 3; vjp 3; load 2; free 2; vjp 2"
            "; load 0; advance 0 1; vjp 1; load 0; free 0; vjp 0",
        ),
        (
            4,
            3,
            "save 0; advance 0 3; save 3; advance 3 4"
            " | load 3; free 3; vjp 3"
            "; load 0; advance 0 1; save 1; advance 1 2; vjp 2"
            "; load 1; free 1; vjp 1; load 0; free 0; vjp 0",
        ),
        (
            6,
            2,
            "save 0; advance 0 2; save 2; advance 2 4; save 4; advance 4 5; save 5; advance 5 6"
            " | load 5; free 5; vjp 5; load 4; free 4; vjp 4"
            "; load 2; advance 2 3; vjp 3; load 2; free 2; vjp 2"
            "; load 0; advance 0 1; vjp 1; load 0; free 0; vjp 0",
        ),
        (
            6,
            4,
            "save 0; advance 0 4; save 4; advance 4 5; save 5; advance 5 6"
            " | load 5; free 5; vjp 5; load 4; free 4; vjp 4"
            "; load 0; advance 0 1; save 1; advance 1 2; save 2; advance 2 3; vjp 3"
            "; load 2; free 2; vjp 2; load 1; free 1; vjp 1; load 0; free 0; vjp 0",
        ),
    ],
)
def test_segmented_order(steps: int, segment: int, expected: str) -> None:
    assert order(segmented(steps, segment)) == expected


@pytest.mark.parametrize(
    ("steps", "snapshots", "expected"),
    [
        (0, 1, " | "),
        (1, 1, EVERY_STATE[1]),
        (2, 1, "save 0; advance 0 2 | load 0; advance 0 1; vjp 1; load 0; free 0; vjp 0"),
        (
            3,
            1,
            "save 0; advance 0 3 | load 0; advance 0 2; vjp 2"
            "; load 0; advance 0 1; vjp 1; load 0; free 0; vjp 0",
        ),
        (
            3,
            2,
            "save 0; advance 0 1; save 1; advance 1 3"
            " | load 1; advance 1 2; vjp 2; load 1; free 1; vjp 1; load 0; free 0; vjp 0",
        ),
        (
            4,
            2,
            "save 0; advance 0 2; save 2; advance 2 4"
            " | load 2; advance 2 3; vjp 3; load 2; free 2; vjp 2"
            "; load 0; advance 0 1; vjp 1; load 0; free 0; vjp 0",
        ),
        (
            5,
            2,
            "save 0; advance 0 3; save 3; advance 3 5"
            " | load 3; advance 3 4; vjp 4; load 3; free 3; vjp 3"
            "; load 0; advance 0 1; save 1; advance 1 2; vjp 2"
            "; load 1; free 1; vjp 1; load 0; free 0; vjp 0",
        ),
        (
            6,
            3,
            "save 0; advance 0 1; save 1; advance 1 4; save 4; advance 4 6"
            " | load 4; advance 4 5; vjp 5; load 4; free 4; vjp 4"
            "; load 1; advance 1 2; save 2; advance 2 3; vjp 3"
            "; load 2; free 2; vjp 2; load 1; free 1; vjp 1; load 0; free 0; vjp 0",
        ),
    ],
)
def test_binomial_order(steps: int, snapshots: int, expected: str) -> None:
    assert order(binomial(steps, snapshots)) == expected


@pytest.mark.parametrize(
    ("budget_bytes", "expected"),
    [
        # 14 for a step and 10 for two states, the result being one of them.
        (
            24,
            "save 0; advance 0 3; save 3; advance 3 4; record 4 | vjp 4; load 3; free 3; vjp 3"
            "; load 0; advance 0 2; vjp 2; load 0; advance 0 1; vjp 1; load 0; free 0; vjp 0",
        ),
        # A third state.
        (
            29,
            "save 0; advance 0 1; save 1; advance 1 3; save 3; advance 3 4; record 4"
            " | vjp 4; load 3; free 3; vjp 3; load 1; advance 1 2; vjp 2; load 1; free 1; vjp 1"
            "; load 0; free 0; vjp 0",
        ),
        # Two states and a second graph: blocks of two, and nothing is advanced over twice.
        (
            34,
            "save 0; advance 0 1; save 1; advance 1 3; record 3; record 4"
            " | vjp 4; vjp 3; load 1; free 1; record 1; vjp 2; vjp 1; load 0; free 0; vjp 0",
        ),
        # At the turn, three graphs and the result; later two graphs and two states.
        (
            39,
            "save 0; advance 0 2; record 2; record 3; record 4"
            " | vjp 4; vjp 3; vjp 2; load 0; free 0; record 0; vjp 1; vjp 0",
        ),
        (
            49,
            "save 0; advance 0 1; record 1; record 2; record 3; record 4"
            " | vjp 4; vjp 3; vjp 2; vjp 1; load 0; free 0; vjp 0",
        ),
        (
            59,
            "record 0; record 1; record 2; record 3; record 4 | vjp 4; vjp 3; vjp 2; vjp 1; vjp 0",
        ),
    ],
)
def test_budget_order(budget_bytes: int, expected: str) -> None:
    plan = fitting(5, (5, 10, 14), budget_bytes)
    assert plan is not None
    assert order(plan) == expected
    assert plan.predicted_peak_bytes == budget_bytes
    less = fitting(5, (5, 10, 14), budget_bytes - 1)
    assert less is None or less.relative_cost > plan.relative_cost


# --- What holds for every plan --------------------------------------------------------------------


@pytest.mark.parametrize("steps", [*range(15), 24, 100])
def test_every_plan_is_legal_and_wastes_no_room(steps: int) -> None:
    for plan in all_kinds(steps):
        simulate(plan)
        assert [a.start for a in plan.actions if a.kind == "vjp"] == [*reversed(range(steps))]
        assert {a.kind for a in plan.forward_actions} <= {"save", "advance", "record"}
        for before, free in loads_and_frees(plan):
            # Freed right after the last load, so no sooner and no later than it can be.
            assert before == Action("load", free.start, free.start)
        saved = [a.start for a in plan.actions if a.kind == "save"]
        freed = [a.start for a in plan.actions if a.kind == "free"]
        assert sorted(saved) == sorted(freed)
        if saved:
            assert plan.actions[0] == Action("save", 0, 0)


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_counts_are_those_of_the_actions(steps: int) -> None:
    for plan in all_kinds(steps):
        assert plan.forward_actions + plan.backward_actions == plan.actions
        assert plan.forward_actions[-1].stop == steps
        forward = sum(a.stop - a.start for a in plan.forward_actions if a.kind != "save")
        assert forward == steps
        again = sum(a.stop - a.start for a in plan.backward_actions if a.kind == "advance")
        assert plan.recomputed_steps == again
        over = sum(a.stop - a.start for a in plan.actions if a.kind == "advance")
        # An evaluation is worth 1, and differentiating the graph of a step is worth 2.
        recorded = {a.start for a in plan.actions if a.kind == "record"}
        evaluations = over + len(recorded) + len(set(range(steps)) - recorded)
        assert plan.relative_cost == pytest.approx((evaluations + 2 * steps) / (3 * steps))


def test_no_steps_need_nothing() -> None:
    for plan in all_kinds(0):
        assert plan.actions == ()
        assert (plan.peak_states, plan.peak_graphs, plan.recomputed_steps) == (1, 0, 0)
        assert plan.relative_cost == 1


# --- Segmented ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(1, 41))
def test_segmented_counts(steps: int) -> None:
    plans = {k: segmented(steps, k) for k in range(1, steps + 3)}
    for k, plan in plans.items():
        segments = ceil(steps / k)
        last = steps - (segments - 1) * k
        assert plan.peak_states <= segments + min(k, steps) - 1
        assert plan.recomputed_steps == steps - segments - (last - 1)
        assert plan.peak_graphs == 1
    best = min((plan.peak_states, plan.recomputed_steps) for plan in plans.values())
    default = segmented(steps)
    assert (default.peak_states, default.recomputed_steps) == best


@pytest.mark.parametrize("steps", [100, 1000, 10_000])
def test_default_segment_takes_two_square_roots_of_states(steps: int) -> None:
    plan = segmented(steps)
    assert 2 * isqrt(steps) - 3 <= plan.peak_states <= 2 * isqrt(steps)
    assert plan.relative_cost < 5 / 3


# --- Binomial -------------------------------------------------------------------------------------


@cache
def reversal(length: int, free: int) -> int:
    """t(l, s), searched over every m."""
    if length == 1:
        return 0
    if free == 0:
        return length * (length - 1) // 2
    return min(m + reversal(length - m, free - 1) + reversal(m, free) for m in range(1, length))


@cache
def optimum(length: int, free: int) -> int:
    """G(l, s), searched over every m."""
    if length == 1:
        return 0
    if free == 0:
        return length * (length - 1) // 2
    return min(optimum(length - m, free - 1) + reversal(m, free) for m in range(1, length))


def by_slopes(length: int, free: int) -> int:
    """G(l, s) as the sum of its increments: r for C(s+r+1, s) times, and 0 for s times."""
    total, left, slope = 0, length - 1 - free, 1
    while left > 0:
        taken = min(left, comb(free + slope + 1, free))
        total, left, slope = total + slope * taken, left - taken, slope + 1
    return total


@pytest.mark.parametrize("snapshots", range(1, 9))
def test_binomial_is_optimal(snapshots: int) -> None:
    for steps in range(1, 61):
        plan = binomial(steps, snapshots)
        assert plan.recomputed_steps == optimum(steps, snapshots - 1)
        assert plan.peak_states <= snapshots
        assert plan.peak_graphs == 1


def test_binomial_is_optimal_for_more() -> None:
    for free in range(20):
        for steps in (97, 160, 230):
            assert optimum(steps, free) == by_slopes(steps, free)
    for steps in (*range(61, 400, 31), 400):
        for snapshots in range(1, 21):
            plan = binomial(steps, snapshots)
            assert plan.recomputed_steps == by_slopes(steps, snapshots - 1)
            assert plan.peak_states == snapshots


@pytest.mark.parametrize(
    ("steps", "snapshots"),
    [(100_000, 2), (100_000, 300), *((10_000, c) for c in (1, 2, 3, 20, 100, 10**6))],
)
def test_binomial_is_optimal_for_many_steps(steps: int, snapshots: int) -> None:
    plan = binomial(steps, snapshots)
    assert plan.recomputed_steps == by_slopes(steps, snapshots - 1)
    assert plan.peak_states == min(snapshots, steps)
    assert len(plan.actions) <= 5 * steps


def search(
    steps: int, *, snapshots: float = inf, graphs: float = inf, room: float = inf,
    sizes: tuple[int, int, int] = (0, 0, 0), forward_is_free: bool = False,
) -> float:  # fmt: skip
    """The fewest steps advanced over by any legal plan at all: Dijkstra's algorithm.

    What is held is as in ``simulate``, written again: at most ``snapshots`` snapshots, ``graphs``
    recorded graphs and ``room`` bytes.
    """
    state_bytes, graph_bytes, workspace = sizes
    Node = tuple[frozenset[int], frozenset[int], int | None, int, bool]
    start: Node = frozenset(), frozenset(), 0, steps, False
    known: dict[Node, int] = {start: 0}
    queue: list[tuple[int, int, Node]] = [(0, 0, start)]

    def moves(node: Node) -> Iterator[tuple[int, int, Node, Node]]:
        """The cost, the bytes besides, the node while under way and the node after."""
        saved, recorded, at, left, turned = node
        for t in saved:
            after = saved - {t}, recorded, at, left, turned
            yield 0, 0, after, after
            if turned:
                after = saved, recorded, t, left, turned
                yield 0, 0, after, after
        if at is not None and at < left:
            after = saved | {at}, recorded, at, left, turned
            yield 0, 0, after, after
            there = turned or at + 1 == steps
            after = saved, recorded, at + 1, left, there
            yield 0 if forward_is_free and not turned else 1, workspace, after, after
            after = saved, recorded | {at}, at + 1, left, there
            yield 0, workspace - graph_bytes, after, after
        if turned and (at == left - 1 or left - 1 in recorded):
            meanwhile = saved, recorded | {left - 1}, at, left, turned
            after = saved, recorded - {left - 1}, None, left - 1, turned
            yield 0, workspace - graph_bytes, meanwhile, after

    def fits(node: Node, extra: int, after: Node) -> bool:
        saved, recorded, at, _, turned = node
        states = saved | ({at} if at is not None else set()) | ({steps} if turned else set())
        held = len(states - {0}) * state_bytes + len(recorded) * graph_bytes + extra
        return len(saved) <= snapshots and len(after[1]) <= graphs and held <= room

    while queue:
        cost, _, node = heapq.heappop(queue)
        if node[3] == 0:
            return cost
        if known[node] < cost:
            continue
        for price, extra, meanwhile, after in moves(node):
            total = cost + price
            if fits(meanwhile, extra, after) and total < known.get(after, inf):
                known[after] = total
                heapq.heappush(queue, (total, len(known), after))
    return inf


@pytest.mark.parametrize("steps", range(1, 8))
def test_no_legal_plan_recomputes_less_than_binomial(steps: int) -> None:
    for snapshots in range(1, 5):
        best = search(steps, snapshots=snapshots, graphs=0, forward_is_free=True)
        assert binomial(steps, snapshots).recomputed_steps == best


# --- Budget ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13, 40])
def test_budget_fits_and_more_bytes_are_never_slower(
    steps: int, sizes: tuple[int, int, int]
) -> None:
    plans = {bound: fitting(steps, sizes, bound) for bound in BUDGETS}
    found = {bound: plan for bound, plan in plans.items() if plan is not None}
    assert [*found] == BUDGETS[-len(found) :]
    for bound, plan in found.items():
        assert plan.predicted_peak_bytes == counted(plan, sizes).peak_bytes
        assert plan.predicted_peak_bytes <= bound
    costs = [plan.relative_cost for plan in found.values()]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 1
    assert found[BUDGETS[-1]].actions == store_all(steps).actions


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13])
def test_budget_beats_every_other_plan_that_fits(steps: int, sizes: tuple[int, int, int]) -> None:
    others = [store_all(steps)]
    for n in range(1, steps + 1):
        others += segmented(steps, n), binomial(steps, n)
    counts = [counted(plan, sizes) for plan in others]
    for bound in BUDGETS:
        best = min((c.advanced for c in counts if c.peak_bytes <= bound), default=None)
        plan = fitting(steps, sizes, bound)
        if best is not None:
            assert plan is not None
            assert plan.counts.advanced <= best


@pytest.mark.parametrize("sizes", [(5, 10, 14), (1, 10, 12)])
@pytest.mark.parametrize("steps", range(1, 6))
def test_no_legal_plan_that_fits_is_faster(steps: int, sizes: tuple[int, int, int]) -> None:
    # Where a graph takes as much as two states or more, which it does: it holds a state.
    for bound in range(12, 75, 1 if steps < 5 else 3):
        plan = fitting(steps, sizes, bound)
        best = search(steps, room=bound, sizes=sizes)
        assert (inf if plan is None else plan.counts.advanced) == best


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 1000])
def test_budget_names_the_smallest_that_fits(steps: int, sizes: tuple[int, int, int]) -> None:
    state, graph, workspace = sizes
    with pytest.raises(ValueError, match="budget of 1 bytes is too small") as error:
        budget(
            steps,
            state_bytes=state + 1,
            graph_bytes=graph,
            workspace_bytes=workspace,
            budget_bytes=1,
        )
    smallest = int(str(error.value).split("write ")[1].split()[0])
    sizes = state + 1, graph, workspace
    plan = fitting(steps, sizes, smallest)
    assert plan is not None
    assert plan.predicted_peak_bytes == smallest
    assert fitting(steps, sizes, smallest - 1) is None


def test_of_equally_fast_plans_the_smallest_is_taken() -> None:
    # Six steps are advanced over once each with one graph and every state, in 18 bytes, and with
    # two graphs, too, where one of five is gone over twice.
    plan = fitting(7, (1, 10, 12), 24)
    assert plan is not None
    assert plan == fitting(7, (1, 10, 12), 18)
    assert (plan.predicted_peak_bytes, plan.peak_graphs, plan.counts.advanced) == (18, 1, 6)


def test_workspace_is_a_graph_at_least() -> None:
    for bound in range(15, 120):
        assert fitting(9, (5, 10, 3), bound) == fitting(9, (5, 10, 10), bound)
    sizes = {"state_bytes": 5, "graph_bytes": 10, "budget_bytes": 40}
    without = budget(9, **sizes)
    assert without == budget(9, **sizes, workspace_bytes=10)
    assert without.relative_cost < budget(9, **sizes, workspace_bytes=20).relative_cost


def test_budget_for_many_steps() -> None:
    plan = budget(100_000, state_bytes=1, graph_bytes=10, budget_bytes=11_000)
    assert plan.predicted_peak_bytes is not None
    assert 10_980 < plan.predicted_peak_bytes <= 11_000
    assert plan.recomputed_steps == 0
    assert plan.peak_graphs > 1000


# --- The interpreter ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ("save 1", "action 0 of the plan, save 1: it needs the working state there"),
        ("save 0; save 0", "action 1 of the plan, save 0: .* no snapshot of it yet"),
        ("advance 0 2; save 2", "action 1 of the plan, save 2: .* before the end"),
        ("load 0", "action 0 of the plan, load 0: it needs a snapshot there"),
        ("save 0; free 0; load 0", "action 2 of the plan, load 0: it needs a snapshot there"),
        ("free 0", "action 0 of the plan, free 0: it needs a snapshot there"),
        ("advance 1 2", "action 0 of the plan, advance 1 2: it needs the working state at"),
        ("advance 0 3", "action 0 of the plan, advance 0 3: .* to end later, within the steps"),
        ("advance 0 0", "action 0 of the plan, advance 0 0: .* to end later"),
        ("record 1", "action 0 of the plan, record 1: it needs the working state there"),
        ("save 0; record 0; record 1; load 0; record 0", "action 4 .* not yet recorded"),
        ("save 0; advance 0 1; record 1; vjp 1; load 0; record 0; record 1", "action 6 .*reversed"),
        ("vjp 1", "action 0 of the plan, vjp 1: it needs all later steps run"),
        (
            "record 0; record 1; vjp 0",
            "action 2 of the plan, vjp 0: .* all later steps .* reversed",
        ),
        ("advance 0 2; vjp 1", "action 1 of the plan, vjp 1: .* its graph or the working state"),
        ("save 0; advance 0 2; load 0; advance 0 1; vjp 1; vjp 0", "action 5 .* its graph or the"),
        ("advance 0 2; save 0", "action 1 of the plan, save 0: it needs the working state there"),
        ("record 0; record 1; vjp 1; save 2", "action 3 of the plan, save 2: .* working state"),
        ("save 0; advance 0 1; record 1; vjp 1; record 1", "action 4 .* working state there"),
        ("save 0; advance 0 2; load 0; advance 0 1; vjp 1; save 1", "action 5 .* working state"),
        ("save 0; advance 0 1; vjp 0", "action 2 of the plan, vjp 0: it needs all later steps"),
        ("record 0; record 1; vjp 1", "ends with 1 step still to reverse, .* graphs of steps .0."),
        ("save 0; record 0; record 1; vjp 1; vjp 0", r"ends with 0 steps .* snapshots \[0\]"),
        ("", "ends with 2 steps still to reverse"),
    ],
)
def test_illegal_plans_are_refused(actions: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(Plan(2, parse(actions) if actions else ()))


def test_simulate_counts_bytes() -> None:
    plan = Plan(3, parse("save 0; advance 0 1; save 1; advance 1 2; record 2; vjp 2; load 1; "
                         "free 1; vjp 1; load 0; free 0; vjp 0"))  # fmt: skip
    # The start takes nothing. Two states besides: 1 and the working one, while step 1 runs.
    assert counted(plan, (100, 10, 17)).peak_bytes == 217
    assert counted(plan, (0, 10, 17)).peak_bytes == 17
    # Step 2's graph is held while it is differentiated, in 7 bytes more; it is not counted twice.
    assert counted(Plan(1, parse("record 0; vjp 0")), (100, 10, 17)).peak_bytes == 117
    two = Plan(2, parse("record 0; record 1; vjp 1; vjp 0"))
    assert counted(two, (100, 10, 17)).peak_bytes == 127
    assert simulate(plan) == Counts(
        turn=5, advanced=2, recomputed_steps=0, peak_states=2, peak_graphs=1, peak_bytes=0
    )


# --- For the user ---------------------------------------------------------------------------------


def test_plans_print_as_a_summary() -> None:
    assert str(segmented(100)) == (
        "100 steps: at most 18 states and 1 graph held, 84 steps recomputed, "
        "1.61 times the work of storing every graph"
    )
    assert str(store_all(1)) == (
        "1 step: at most 1 state and 1 graph held, 0 steps recomputed, "
        "1.00 times the work of storing every graph"
    )
    plan = budget(10, state_bytes=2**20, graph_bytes=2**23, budget_bytes=2**25)
    assert str(plan).endswith("1.23 times the work of storing every graph, 27.0 MiB predicted")
    assert "actions" not in repr(plan)
    assert [str(action) for action in segmented(1).actions] == [
        "save 0", "advance 0 1", "load 0", "free 0", "vjp 0",
    ]  # fmt: skip


SOME_BYTES = {"state_bytes": 1, "graph_bytes": 1, "budget_bytes": 9}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: store_all(-1), ValueError, "number of steps is -1, but must be at least 0"),
        (lambda: segmented(2.0), TypeError, "steps is 2.0, of type float, but must be an int"),
        (lambda: binomial(True, 1), TypeError, "steps is True, of type bool, but must be an int"),
        (lambda: budget(-1, **SOME_BYTES), ValueError, "number of steps is -1"),
        (
            lambda: segmented(5, 0),
            ValueError,
            "^segment is 0, but must be at least 1: write segment=10, or leave it out for about √T",
        ),
        (lambda: segmented(5, -2), ValueError, "segment is -2, but must be at least 1"),
        (lambda: segmented(5, True), TypeError, "segment is True, of type bool"),
        (lambda: segmented(5, "3"), TypeError, "segment is '3', of type str, but must be an int"),
        (lambda: segmented(0, 0), ValueError, "segment is 0"),
        (
            lambda: binomial(5, 0),
            ValueError,
            "^snapshots is 0, but must be at least 1: write snapshots=1 or more, of which",
        ),
        (lambda: binomial(0, 0), ValueError, "snapshots is 0"),
        (lambda: binomial(5, 2.5), TypeError, "snapshots is 2.5, of type float"),
        (
            lambda: budget(5, **{**SOME_BYTES, "state_bytes": 0}),
            ValueError,
            "state_bytes is 0, but must be at least 1: write a number of bytes",
        ),
        (
            lambda: budget(5, **{**SOME_BYTES, "budget_bytes": 1e9}),
            TypeError,
            "budget_bytes is 1000000000.0, of type float, but must be an int",
        ),
        (lambda: budget(5, **SOME_BYTES, workspace_bytes=-1), ValueError, "workspace_bytes is -1"),
        (
            lambda: budget(3, state_bytes=5, graph_bytes=10, budget_bytes=12, workspace_bytes=14),
            ValueError,
            "a budget of 12 bytes is too small for 3 steps, with 5 bytes for a state and 14 to "
            "evaluate and differentiate a step: write 24 bytes or more",
        ),
    ],
)
def test_arguments_are_checked(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_plans_need_no_tensors() -> None:
    tree = ast.parse(Path(schedule.__file__).read_text(encoding="utf-8"))
    modules = chain.from_iterable(
        [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    )
    assert not {str(name).split(".")[0] for name in modules} & {"torch", "diffopt", "numpy"}
