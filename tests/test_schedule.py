"""What holds for every plan, what the interpreter refuses, and what users see of plans."""

from __future__ import annotations

import ast
from itertools import chain, pairwise
from pathlib import Path

import pytest
from plans import all_kinds, counted, parse

from diffopt import schedule
from diffopt.schedule import Action, Counts, Plan, binomial, budget, segmented, simulate, store_all

# --- What holds for every plan --------------------------------------------------------------------


@pytest.mark.parametrize("steps", [*range(15), 24, 100])
def test_every_plan_is_legal_and_wastes_no_room(steps: int) -> None:
    for plan in all_kinds(steps):
        simulate(plan)
        assert [a.start for a in plan.actions if a.kind == "vjp"] == [*reversed(range(steps))]
        assert {a.kind for a in plan.forward_actions} <= {"save", "advance", "record"}
        for before, free in pairwise(plan.actions):
            if free.kind == "free":
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
