"""Plans as text, and the sizes and budgets that the tests of schedules share."""

from __future__ import annotations

from diffopt._loop.snapshots import Snapshot, Snapshots
from diffopt.schedule import Action, Counts, Plan, binomial, budget, segmented, simulate, store_all


class CountedSnapshots(Snapshots):
    """Snapshots that know the most there were of them at once."""

    peak = 0

    def __setitem__(self, t: int, snapshot: Snapshot) -> None:
        super().__setitem__(t, snapshot)
        self.peak = max(self.peak, len(self))


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
