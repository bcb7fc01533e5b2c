"""Differentiate the same training runs with diffopt and with its peers, side by side.

    python benchmarks/compare.py --preset full --out results

Every library lives in a process of its own and they take turns, so that whatever disturbs the
machine disturbs them all; peak memory is taken in further, fresh processes. Everyone has the same
initial weights, batches and optimizer, and everyone's meta-gradient is compared with that of a
loop written by hand in float64. A library that is not installed, or that fails, says so in the
table. Results are written case by case: the same command continues where it was stopped.

Presets: ``quick`` (does it all work, a minute), ``transformer`` (GPT against higher), ``full`` (the
documentation's figures). Or choose with --workloads, --optimizers, --steps, --libraries, --tasks.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import environment
import report
from cases import OPTIMIZERS, WORKLOADS
from harness import Bench, Failed, Settings
from libraries import LIBRARIES
from presets import PRESETS, Cell, grid


def main(arguments: list[str] | None = None) -> None:
    options = _parsed(arguments)
    out = options.out
    (out / "cells").mkdir(parents=True, exist_ok=True)
    settings = Settings(options.threads, options.timeout, options.memory, options.clock)
    cells = _cells(options)
    # A busy core is best left for another one; the time spent waiting for one is not CPU time.
    cores = options.threads if options.clock == "seconds" else None
    environment.confine(cores, limit_memory=options.device == "cpu")
    about = environment.describe(options.device, options.threads)
    (out / "environment.json").write_text(json.dumps(about, indent=1))
    with Bench(settings, out / "workers.log") as bench:
        _measure(bench, cells, settings, options)
    results = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
    report.write(out, about, results)
    if options.docs:
        report.write_into_page(options.docs, about, results)


def _measure(
    bench: Bench, cells: list[Cell], settings: Settings, options: argparse.Namespace
) -> None:
    started = time.monotonic()
    for i, cell in enumerate(cells):
        path = options.out / "cells" / f"{cell.case.name}.json"
        repeats = min(options.repeats, cell.most_repeats)
        wanted = {"repeats": repeats, **asdict(settings)}
        if not options.fresh and _is_done(path, cell, wanted):
            print(f"{cell.case.name}: done before", flush=True)
            continue
        if options.minutes and time.monotonic() - started > 60 * options.minutes:
            print(
                f"{len(cells) - i} cases left: the same command goes on with them",
                flush=True,
            )
            return
        before = time.monotonic()
        try:
            result = bench.measure(cell.case, cell.libraries, repeats)
        except Failed as error:  # of the reference: without one there is nothing to compare with
            print(f"{cell.case.name}: no reference gradient: {error}", flush=True)
            continue
        path.write_text(json.dumps({**result, "settings": wanted}, indent=1))
        print(report.summary(result, time.monotonic() - before), flush=True)


def _cells(options: argparse.Namespace) -> list[Cell]:
    if options.preset:
        cells = PRESETS[options.preset]()
        if options.libraries:
            cells = [replace(cell, libraries=tuple(options.libraries)) for cell in cells]
        chosen = [c for c in cells if not options.workloads or c.case.workload in options.workloads]
        cells = [
            c for c in chosen if not options.optimizers or c.case.optimizer in options.optimizers
        ]
    else:
        cells = grid(
            options.workloads or ["mlp"],
            options.optimizers or ["sgd"],
            options.steps,
            options.libraries or _everyone(options.tasks),
            options.tasks,
        )
    return [replace(cell, case=replace(cell.case, device=options.device)) for cell in cells]


def _everyone(tasks: int) -> list[str]:
    hidden = {"reference"} if tasks > 1 else {"reference", "diffopt-tasks", "diffopt-tasks-compile"}
    return [name for name in LIBRARIES if name not in hidden]


def _is_done(path: Path, cell: Cell, settings: dict[str, object]) -> bool:
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    return (
        found["settings"] == settings
        and found["case"] == cell.case.json()
        and set(found["libraries"]) >= set(cell.libraries)
    )


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def several(known: dict[str, object]):
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if unknown := set(names) - set(known):
                raise argparse.ArgumentTypeError(
                    f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}"
                )
            return names

        return parse

    add = parser.add_argument
    add("--preset", choices=PRESETS)
    add("--workloads", type=several(WORKLOADS))
    add("--optimizers", type=several(OPTIMIZERS))
    add("--steps", type=lambda text: [int(t) for t in text.split(",")], default=[20])
    add("--libraries", type=several(LIBRARIES))
    add("--tasks", type=int, default=1, help="tasks per meta-gradient")
    add(
        "--repeats",
        type=int,
        default=5,
        help="rounds; a preset may take fewer for long cases",
    )
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="cpu or cuda")
    add(
        "--timeout",
        type=float,
        default=600,
        help="seconds for one answer of one library",
    )
    add(
        "--clock",
        choices=("seconds", "cpu_seconds"),
        default="seconds",
        help="cpu_seconds: what the process worked, for a busy machine with --threads 1",
    )
    add(
        "--minutes",
        type=float,
        help="begin no further case after that; the rest: next time",
    )
    add("--no-memory", dest="memory", action="store_false", help="times alone")
    add(
        "--fresh",
        action="store_true",
        help="measure again what is in the folder already",
    )
    add("--out", type=Path, default=Path("benchmark-results"))
    add(
        "--docs",
        type=Path,
        help="a page to fill with the figures, docs/pages/benchmarks.md",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
