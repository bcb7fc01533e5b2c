"""The one table of exact adjoints that every property test runs over."""

from __future__ import annotations

import pytest

import diffopt

EXACT: list[tuple[str, diffopt.Adjoint]] = [
    ("store-all", diffopt.StoreAll()),
    ("segmented-1", diffopt.Segmented(1)),
    ("segmented-3", diffopt.Segmented(3)),
    ("segmented", diffopt.Segmented()),
    ("binomial-2", diffopt.Binomial(2)),
    ("memory-budget", diffopt.MemoryBudget("64MiB")),
]

every_adjoint = pytest.mark.parametrize(
    "adjoint", [adjoint for _, adjoint in EXACT], ids=[name for name, _ in EXACT]
)

#: Those that groups of processes are tried with; two are approximate, and go step by step, too.
WITH_GROUP: list[diffopt.Adjoint] = [
    diffopt.StoreAll(),
    diffopt.Segmented(2),
    diffopt.Segmented(1),
    diffopt.Binomial(2),
    diffopt.MemoryBudget("1GiB"),
    diffopt.Truncated(2),
    diffopt.FirstOrder(),
]
