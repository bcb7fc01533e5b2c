"""The table and the picture of "Choosing an adjoint", from the plans themselves.

    python docs/adjoints_table.py

writes docs/pages/images/adjoints.png and the table between the page's two markers. The tests check
that the page has the table that this script makes.
"""

from __future__ import annotations

from pathlib import Path

import torch

import diffopt
from diffopt import schedule
from diffopt.schedule import Plan

PAGES = Path(__file__).parent / "pages"
PAGE = PAGES / "choosing-an-adjoint.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

STEPS = 1000
GRAPH = 8  # The bytes of a step's graph, in states: a small network on a batch of some size.


def in_states(plan: Plan) -> int:
    """The memory that the plan takes beyond the start, in states."""
    return schedule.simulate(
        plan, state_bytes=1, graph_bytes=GRAPH, workspace_bytes=GRAPH
    ).peak_bytes


def budget(states: int) -> Plan:
    """What MemoryBudget takes, with that much memory."""
    return schedule.budget(STEPS, state_bytes=1, graph_bytes=GRAPH, budget_bytes=states)


def table() -> str:
    """The plans for 1,000 steps."""
    three = torch.zeros(3, requires_grad=True)
    adjoints = [
        diffopt.StoreAll(),
        diffopt.Segmented(1),
        diffopt.Segmented(),
        diffopt.Binomial(20),
        diffopt.Binomial(5),
        diffopt.Truncated(100),
        diffopt.FirstOrder(),
        diffopt.ForwardMode([three]),
        diffopt.Implicit(diffopt.CG(20)),
    ]
    plans: list[tuple[str, Plan]] = [(_name(a), a.plan(STEPS)) for a in adjoints]
    plans.insert(3, (f"`MemoryBudget`, of {GRAPH * 50} states", budget(GRAPH * 50)))
    rows = [
        "| adjoint | states | graphs | recomputed | work |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, plan in plans:
        graphs = max(plan.peak_graphs, 1)
        rows.append(
            f"| {name} | {plan.peak_states:,} | {graphs:,} | {plan.recomputed_steps:,} "
            f"| {plan.relative_cost:.2f} |"
        )
    return "\n".join(rows) + "\n"


def _name(adjoint: diffopt.Adjoint) -> str:
    names = {
        "Segmented(segment=None, storage=None)": "Segmented()",
        "Segmented(segment=1, storage=None)": "Segmented(1)",
    }
    if isinstance(adjoint, diffopt.Binomial):
        return f"`Binomial({adjoint.snapshots})`"
    if isinstance(adjoint, diffopt.Truncated):
        return f"`Truncated({adjoint.window})`"
    if isinstance(adjoint, diffopt.ForwardMode):
        return f"`ForwardMode(wrt)`, {adjoint.wrt[0].numel()} numbers"
    if isinstance(adjoint, diffopt.Implicit):
        return "`Implicit(CG(20))`"
    return f"`{names.get(repr(adjoint), repr(adjoint))}`"


def picture(path: Path) -> None:
    """Work against memory, for the exact adjoints."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    segments = [diffopt.Segmented(k).plan(STEPS) for k in (1, 2, 3, 5, 8, 13, 20, 32)]
    few = [schedule.binomial(STEPS, c) for c in (3, 4, 5, 6, 8, 11, 15, 20, 30, 45, 70, 110, 200)]
    sizes = [12, 14, 18, 25, 35, 50, 80, 140, 300, 700, 1500, 3000, 5000, GRAPH * STEPS + 2]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), constrained_layout=True)
    for label, plans, style in (
        ("Segmented(k)", segments, "s-"),
        ("Binomial(c)", few, "o-"),
        ("MemoryBudget", [budget(size) for size in sizes], "d--"),
        ("StoreAll", [schedule.store_all(STEPS)], "*"),
    ):
        axes.plot(
            [in_states(plan) for plan in plans],
            [plan.relative_cost for plan in plans],
            style,
            label=label,
            markersize=12 if style == "*" else 4,
        )
    about_root = diffopt.Segmented().plan(STEPS)
    axes.annotate(
        "Segmented()",
        (in_states(about_root), about_root.relative_cost),
        (120, 2.3),
        arrowprops={"arrowstyle": "->"},
    )
    axes.set_xscale("log")
    axes.set_xlabel(f"peak memory in states, where a step's graph takes {GRAPH}")
    axes.set_ylabel("work, relative to storing all graphs")
    axes.set_title(f"{STEPS:,} steps, by their plans")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{after}", encoding="utf-8")
    picture(PAGES / "images" / "adjoints.png")


if __name__ == "__main__":
    main()
