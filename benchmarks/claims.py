"""What diffopt sets out to reach, each claim a ratio with a bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from results import Result

Measured = Callable[[Result], float | None]


@dataclass(frozen=True)
class Claim:
    """``of(result) <= bound`` for every result of the named cases."""

    text: str
    cases: tuple[str, ...]
    of: Measured
    bound: float


def time(library: str, other: str | None = None) -> Measured:
    """Against ``other``, by default the fastest peer that keeps every graph."""

    def ratio(result: Result) -> float | None:
        against = other or result.fastest_peer()
        return result.ratio(library, against) if against else None

    return ratio


def memory(library: str, other: str | None = None) -> Measured:
    def ratio(result: Result) -> float | None:
        against = other or result.fastest_peer()
        ours, theirs = result.peak(library), against and result.peak(against)
        return ours / theirs if ours is not None and theirs else None

    return ratio


def best(*choices: Measured) -> Measured:
    def ratio(result: Result) -> float | None:
        return min((x for of in choices if (x := of(result)) is not None), default=None)

    return ratio


def _each(optimizer: str, *workloads: str) -> tuple[str, ...]:
    return tuple(f"{workload}-{optimizer}-T20" for workload in workloads)


ALL = ("mlp", "conv4", "resnet18", "gpt")
COMPILED = time("diffopt-compile")
EITHER = best(COMPILED, time("diffopt"))
DEFAULT = time("diffopt-default")
SMALL = ("small-sgd-T20", "small-adam-T20")
LONG = ("small-sgd-T100", "small-sgd-T1000")
CONVOLUTIONS = (*_each("sgd", "conv4", "resnet18"), *_each("adam", "conv4", "resnet18"))
THAT = "the fastest peer that keeps every graph"

CLAIMS = [
    Claim(
        "GPT: time of `Segmented(1)` against higher",
        _each("sgd", "gpt"),
        time("diffopt", "higher"),
        1.4,
    ),
    Claim(
        "GPT: peak memory of `Segmented(1)` against higher",
        _each("sgd", "gpt"),
        memory("diffopt", "higher"),
        1 / 5,
    ),
    # Of twelve products of matrices, or eleven, against nine.
    Claim(f"`Segmented(1)`, SGD, against {THAT}", _each("sgd", *ALL), time("diffopt"), 1.3),
    Claim(f"`Segmented(1)`, Adam, against {THAT}", _each("adam", *ALL), time("diffopt"), 1.1),
    Claim("The default, SGD, against that peer", _each("sgd", *ALL), DEFAULT, 1.0),
    Claim("The default, Adam, against that peer", _each("adam", *ALL), DEFAULT, 0.9),
    Claim("1,002 parameters, the default, against that peer", SMALL, DEFAULT, 1.1),
    Claim("1,002 parameters, `StoreAll`, against that peer", SMALL, time("diffopt-store"), 1.1),
    Claim("1,002 parameters, `compile`, against that peer", SMALL, COMPILED, 0.25),
    Claim("1,002 parameters, `compile`, against that peer", LONG, COMPILED, 0.18),
    Claim(
        "1,002 parameters, `compile`, against JAX",
        SMALL + LONG,
        time("diffopt-compile", "jax"),
        1.5,
    ),
    Claim("`compile`, Adam, against that peer", _each("adam", "mlp", "gpt"), COMPILED, 0.70),
    Claim("`compile`, SGD, against that peer", _each("sgd", "mlp"), COMPILED, 0.90),
    Claim("`compile`, SGD, against that peer", _each("sgd", "gpt"), COMPILED, 0.75),
    Claim("Convolutions, `compile` or eager, against that peer", CONVOLUTIONS, EITHER, 1.0),
    Claim(
        "`compile` against JAX",
        _each("sgd", "mlp") + _each("adam", "mlp"),
        time("diffopt-compile", "jax"),
        0.85,
    ),
    Claim(
        "`compile` against JAX",
        _each("sgd", "gpt") + _each("adam", "gpt"),
        time("diffopt-compile", "jax"),
        0.45,
    ),
    Claim(
        "Peak memory of `Segmented(1)` against that peer",
        _each("sgd", "gpt", "conv4") + _each("adam", "gpt", "conv4"),
        memory("diffopt"),
        1 / 8,
    ),
    Claim(
        "Peak memory of `Segmented()` against that peer",
        _each("sgd", "gpt", "conv4") + _each("adam", "gpt", "conv4"),
        memory("diffopt-sqrt"),
        1 / 8,
    ),
    Claim(
        "Peak memory of `Segmented(5)` against torch_maml's checkpoints of 5",
        _each("sgd", *ALL),
        memory("diffopt-segment5", "torch_maml-checkpoint5"),
        0.6,
    ),
    Claim(
        "`tasks=16` against 16 unrolls",
        ("sinusoid-sgd-T5-tasks16",),
        best(time("diffopt-tasks", "diffopt"), time("diffopt-tasks-compile", "diffopt")),
        0.25,
    ),
    Claim(
        "`tasks=16` against 16 unrolls",
        ("conv4-sgd-T5-tasks16",),
        best(time("diffopt-tasks", "diffopt"), time("diffopt-tasks-compile", "diffopt")),
        1.0,
    ),
    Claim(
        "1,002 parameters, T = 1,000, against higher",
        ("small-sgd-T1000",),
        best(*(time(name, "higher") for name in ("diffopt", "diffopt-default", "diffopt-store"))),
        0.7,
    ),
]


def table(results: Iterable[Result]) -> str:
    """Every claim for which there is a measurement, in Markdown."""
    by_name = {result.case.name: result for result in results}
    lines = ["| claim | case | bound | measured | |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        for name in claim.cases:
            if name in by_name and (value := claim.of(by_name[name])) is not None:
                met = "met" if value <= claim.bound else f"missed by {value / claim.bound - 1:.0%}"
                lines.append(f"| {claim.text} | {name} | {claim.bound:.3g} | {value:.3g} | {met} |")
    return "\n".join(lines) if len(lines) > 2 else ""
