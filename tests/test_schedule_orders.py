"""Plans by their literal actions."""

from __future__ import annotations

import pytest
from plans import fitting, order

from diffopt.schedule import binomial, segmented, store_all


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
