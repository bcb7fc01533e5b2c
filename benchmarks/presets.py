"""Which cases are measured with which libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cases import Case


@dataclass(frozen=True)
class Cell:
    """One case, and who takes part.

    Attributes:
        most_repeats: a bound on the rounds, for what takes long.
    """

    case: Case
    libraries: tuple[str, ...]
    most_repeats: int = 1000


EAGER = ("diffopt", "diffopt-sqrt", "diffopt-default", "diffopt-store")
STORING = ("higher", "torchopt", "torch_maml")


def grid(
    workloads: Sequence[str],
    optimizers: Sequence[str],
    steps: Sequence[int],
    libraries: Sequence[str],
    tasks: int = 1,
) -> list[Cell]:
    return [
        Cell(Case(w, o, t, tasks), tuple(libraries))
        for t in steps
        for w in workloads
        for o in optimizers
    ]


def quick() -> list[Cell]:
    """Every library on what takes no time: whether it all works."""
    libraries = (*EAGER, "diffopt-compile", *STORING, "torch_maml-checkpoint5", "plain")
    cells = grid(("tiny-mlp",), ("sgd", "adam"), (20,), (*libraries, "jax"))
    cells += grid(("tiny-conv4", "tiny-resnet18", "tiny-gpt"), ("sgd",), (20,), libraries)
    return cells + grid(("tiny-mlp",), ("sgd",), (5,), ("diffopt", "diffopt-tasks"), tasks=3)


def transformer() -> list[Cell]:
    """The two first claims: a transformer against ``higher``, in time and in memory."""
    return grid(("gpt",), ("sgd", "adam"), (20,), ("diffopt", "diffopt-store", "higher"))


def full() -> list[Cell]:
    """Everything the documentation shows, what matters most first."""
    cells = []
    for workload in ("mlp", "gpt", "conv4", "resnet18"):
        also = ("jax",) if workload in ("mlp", "gpt") else ()
        checkpoints = ("diffopt-segment5", "torch_maml-checkpoint5")
        for optimizer in ("sgd", "adam"):
            libraries = (*EAGER, "diffopt-compile", *STORING, *also)
            if optimizer == "sgd":
                libraries += checkpoints
            cells.append(Cell(Case(workload, optimizer), libraries))
    for workload in ("sinusoid", "conv4"):
        libraries = ("diffopt", "diffopt-tasks", "diffopt-tasks-compile")
        cells.append(Cell(Case(workload, "sgd", 5, 16), libraries))
    long = (
        "diffopt",
        "diffopt-sqrt",
        "diffopt-default",
        "diffopt-compile",
        "higher",
        "torchopt",
    )
    for steps in (20, 100, 1000):
        libraries = (*long, "diffopt-store", "torch_maml", "jax")
        cells.append(Cell(Case("small", "sgd", steps), libraries, 3))
    cells.append(Cell(Case("small", "adam"), (*long, "diffopt-store", "jax"), 3))
    for steps, repeats in ((100, 3), (1000, 1)):
        cells.append(Cell(Case("mlp", "sgd", steps), (*long, "jax"), repeats))
    for optimizer in ("momentum", "rmsprop"):
        for workload in ("mlp", "conv4", "gpt", "resnet18"):
            cells.append(
                Cell(
                    Case(workload, optimizer),
                    ("diffopt", "diffopt-default", *STORING),
                    3,
                )
            )
    return cells


def headline() -> list[Cell]:
    """The picture of the front page, drawn by ``headline.py``."""
    libraries = ("diffopt-sqrt", "diffopt-512", "higher", "torchopt", "torch_maml-checkpoint5")
    cells = grid(("gpt-mini",), ("sgd",), (10, 30, 100, 300, 1000), (*libraries, "plain"))
    rounds = {300: 2, 1000: 1}  # each over many steps
    return [replace(cell, most_repeats=rounds.get(cell.case.steps, 4)) for cell in cells]


PRESETS = {"quick": quick, "transformer": transformer, "full": full, "headline": headline}
