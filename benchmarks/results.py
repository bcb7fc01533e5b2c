"""Reading off what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from cases import Case
from libraries import LIBRARIES

#: Distance from the float64 reference up to which a gradient counts as that of PyTorch's rule.
SAME = 1e-6


@dataclass(frozen=True)
class Result:
    """What one case gave.

    Attributes:
        rounds: seconds by library, one dict a round.
        libraries: by name: ``first_seconds``, ``peak`` in bytes, ``distance`` from the reference
            over a few steps in float64, ``timed_distance`` of a timed gradient; or ``failed``.
    """

    case: Case
    rounds: list[dict[str, float]]
    libraries: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, json: dict[str, Any]) -> Result:
        return cls(Case(**json["case"]), json["rounds"], json["libraries"])

    def times(self, library: str) -> list[float]:
        return [seconds[library] for seconds in self.rounds if library in seconds]

    def milliseconds(self, library: str) -> float | None:
        """The median, per inner step."""
        times = self.times(library)
        return 1e3 * median(times) / self.case.steps if times else None

    def least_milliseconds(self, library: str) -> float | None:
        """The least, per inner step."""
        times = self.times(library)
        return 1e3 * min(times) / self.case.steps if times else None

    def ratio(self, library: str, other: str) -> float | None:
        """The median, over the rounds, of one time over the other in the same round."""
        pairs = [r[library] / r[other] for r in self.rounds if library in r and other in r]
        return median(pairs) if pairs else None

    def spread(self, library: str, other: str) -> tuple[float, float]:
        pairs = [r[library] / r[other] for r in self.rounds if library in r and other in r]
        return min(pairs), max(pairs)

    def peak(self, library: str) -> float | None:
        """In MiB."""
        peak = self.libraries.get(library, {}).get("peak")
        return None if peak is None else peak / 2**20

    def verdict(self, library: str) -> str:
        """``same``, ``nan``, ``other`` for another rule than PyTorch's, or ``unknown``."""
        entry = self.libraries[library]
        seen = [entry[key] for key in ("distance", "timed_distance") if key in entry]
        if any(not math.isfinite(x) for x in seen):
            return "nan"
        if "distance" not in entry:
            return "unknown"
        return "same" if entry["distance"] <= SAME else "other"

    def fastest_peer(self) -> str | None:
        """Of the published libraries that keep every graph and give a gradient without NaNs."""
        able = [
            name
            for name in self.libraries
            if LIBRARIES[name].peer and self.times(name) and self.verdict(name) != "nan"
        ]
        return min(able, key=lambda name: median(self.times(name)), default=None)

    def baseline(self) -> str | None:
        """What the ratios are taken against: for many tasks, one after the other."""
        if self.case.tasks > 1 and self.times("diffopt"):
            return "diffopt"
        return self.fastest_peer()
