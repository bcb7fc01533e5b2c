"""Plans by independent optima, and by the bytes they are to fit."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from functools import cache
from math import ceil, comb, inf, isqrt

import pytest
from plans import BUDGETS, SIZES, counted, fitting

from diffopt.schedule import binomial, budget, segmented, store_all

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
    for steps in (61, 92, 185, 400):
        for snapshots in range(1, 21, 2 if steps > 100 else 1):
            plan = binomial(steps, snapshots)
            assert plan.recomputed_steps == by_slopes(steps, snapshots - 1)
            assert plan.peak_states == snapshots


@pytest.mark.parametrize(
    ("steps", "snapshots"),
    [(30_000, 2), (30_000, 300), *((5_000, c) for c in (1, 2, 3, 20, 100, 10**6))],
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
    plan = budget(20_000, state_bytes=1, graph_bytes=10, budget_bytes=11_000)
    assert plan.predicted_peak_bytes is not None
    assert 10_980 < plan.predicted_peak_bytes <= 11_000
    assert plan.recomputed_steps == 0
    assert plan.peak_graphs > 1000
