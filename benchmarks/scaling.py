"""How time and memory grow with steps, parameters and processes; worked out for 1B parameters.

    python benchmarks/scaling.py --measure      half an hour: measures, and keeps scaling.json
    python benchmarks/scaling.py                fits, and fills docs/pages/scaling.md

The model is the GPT of ``models.py`` with two layers, trained by Adam on texts of 32 tokens, on one
thread. Times are CPU time, the least of some rounds in which everything takes turns; peaks are
resident memory over the start, each in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
import torch.nn.functional as F
from harness import EXACT_MEMORY
from torch import Tensor, nn
from torch import distributed as dist
from worker import PeakResident, release

import diffopt

HERE = Path(__file__).resolve().parent
RECORDED = HERE / "scaling.json"
PAGE = HERE.parent / "docs/pages/scaling.md"
MIB, GB, TB = 2**20, 1e9, 1e12

LAYERS, LENGTH = 2, 32
WIDTHS, BATCHES, STEPS = (64, 128, 256), (4, 16), (16, 64, 256)
ADJOINTS = ("Segmented()", "Binomial(8)", "MemoryBudget('64MiB')")
WORLDS = (1, 2, 4)


def adjoint(name: str) -> diffopt.Adjoint:
    made: diffopt.Adjoint = eval(f"diffopt.{name}", {"diffopt": diffopt})
    return made


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def problem(width: int, texts: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = models.GPT(LAYERS, width, 4, 64, LENGTH)
    text = torch.randint(64, (texts, LENGTH + 1))
    return model, (text[:, :-1], text[:, 1:])


def metagradient(
    width: int,
    texts: int,
    steps: int,
    how: diffopt.Adjoint,
    group: Any = None,
    sharded: bool = False,
) -> Callable[[], None]:
    model, batch = problem(width, texts)
    if sharded:
        diffopt.distributed.shard(model, group)
    inner = diffopt.Adam(model.parameters(), lr=1e-4)

    def run() -> None:
        options = {"adjoint": how, "group": group}
        fast = diffopt.unroll(model, inner, [batch] * steps, loss_fn, **options)
        torch.autograd.grad(loss_fn(fast, batch), list(model.parameters()))

    return run


def training(width: int, steps: int) -> Callable[[], None]:
    model, batch = problem(width, 4)
    inner = diffopt.Adam(model.parameters(), lr=1e-4)

    def run() -> None:
        with torch.no_grad():
            diffopt.unroll(model, inner, [batch] * steps, loss_fn)

    return run


def forward(width: int, steps: int) -> Callable[[], None]:
    model, batch = problem(width, 4)

    def run() -> None:
        with torch.no_grad():
            for _ in range(steps):
                loss_fn(model, batch)

    return run


# -- Measuring -------------------------------------------------------------------------------------


def seconds(run: Callable[[], None]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def least(runs: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, float]:
    """CPU seconds of each, the least of the rounds."""
    for run in runs.values():
        run()
    found = [{name: seconds(run) for name, run in runs.items()} for _ in range(rounds)]
    return {name: min(round[name] for round in found) for name in runs}


def by_width(rounds: int, steps: int = 16) -> list[dict[str, Any]]:
    rows = []
    for width in (*WIDTHS, 512):
        runs = {
            "forward": forward(width, steps),
            "training": training(width, steps),
            "metagradient": metagradient(width, 4, steps, diffopt.Segmented(1)),
        }
        found = {name: took / steps for name, took in least(runs, rounds).items()}
        rows.append({"width": width, "parameters": parameters(width), **found})
        print(rows[-1], flush=True)
    return rows


def parameters(width: int) -> int:
    return sum(p.numel() for p in problem(width, 1)[0].parameters())


def by_steps(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for steps in STEPS:
        runs = {name: metagradient(WIDTHS[0], 4, steps, adjoint(name)) for name in ADJOINTS}
        for name, took in least(runs, rounds).items():
            peak = peak_of(WIDTHS[0], 4, steps, name)
            rows.append({"adjoint": name, "steps": steps, "seconds": took / steps, "peak": peak})
            print(rows[-1], flush=True)
    return rows


def peak_of(*case: object) -> int:
    """Bytes at the peak of a metagradient over the start, in a process of its own."""
    command = [sys.executable, __file__, "--peak", *map(str, case)]
    env = os.environ | EXACT_MEMORY
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return int(done.stdout)


def peak_here(width: int, texts: int, steps: int, name: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        how = diffopt.Segmented(1, storage=folder) if name == "stored" else adjoint(name)
        metagradient(width, texts, 2, how)()
        run = metagradient(width, texts, steps, how)
        release()
        with PeakResident() as memory:
            run()
    return memory.peak - memory.start


def by_states() -> list[dict[str, Any]]:
    """Peaks where the number of states, the parameters and the tokens change, each on its own."""
    rows = []
    for width in WIDTHS:
        for texts in BATCHES:
            for steps, name in ((4, "Segmented(1)"), (16, "Segmented(1)"), (16, "stored")):
                row = {"parameters": parameters(width), "tokens": texts * LENGTH, "width": width}
                row |= {"states": 0 if name == "stored" else steps}
                rows.append(row | {"peak": peak_of(width, texts, steps, name)})
                print(rows[-1], flush=True)
    return rows


def by_processes(rounds: int, width: int = 256, steps: int = 8) -> list[dict[str, Any]]:
    rows = []
    for kind in ("group", "shard"):
        for world in WORLDS:
            with tempfile.TemporaryDirectory() as folder:
                args = [kind, world, f"{folder}/store", width, steps, rounds]
                started = [
                    subprocess.Popen(
                        [sys.executable, __file__, "--worker", *map(str, [rank, *args])],
                        stdout=subprocess.PIPE,
                        text=True,
                        env=os.environ | EXACT_MEMORY,
                    )
                    for rank in range(world)
                ]
                said = [process.communicate()[0] for process in started]
                if any(process.returncode for process in started):
                    raise RuntimeError("a process failed: its message is above")
            row = {"kind": kind, "processes": world, "parameters": parameters(width)}
            rows.append(row | json.loads(said[0]))
            print(rows[-1], flush=True)
    return rows


def worker(rank: int, kind: str, world: int, store: str, *numbers: int) -> None:
    """One of the processes: 16 texts a step, split over the group or all on each."""
    width, steps, rounds = numbers
    limit = datetime.timedelta(seconds=600)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit
    )
    texts = max(BATCHES) // world if kind == "group" else min(BATCHES)
    options = {"group": dist.group.WORLD, "sharded": kind == "shard"}
    metagradient(width, texts, 2, diffopt.Segmented(1), **options)()
    run = metagradient(width, texts, steps, diffopt.Segmented(1), **options)
    release()
    with PeakResident() as memory:
        run()
    took = min(seconds(run) for _ in range(rounds)) / steps
    print(json.dumps({"seconds": took, "peak": memory.peak - memory.start}))
    dist.destroy_process_group()


def measure(rounds: int) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "by_width": by_width(rounds),
        "by_states": by_states(),
        "by_processes": by_processes(rounds),
        "by_steps": by_steps(rounds),
    }


# -- Fitting ---------------------------------------------------------------------------------------


def bytes_by(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Least squares, each peak to the same relative accuracy, of

        peak = parameters · (working + state · states) + activation · tokens · layers · width + rest

    with another ``working`` where the states lie in files.
    """
    design, peaks = [], []
    for row in rows:
        p, stored = row["parameters"], not row["states"]
        activations = row["tokens"] * LAYERS * row["width"]
        design.append([p * row["states"], p * (not stored), p * stored, activations, MIB])
        peaks.append(row["peak"])
    scale = 1 / np.array(peaks)
    found, *_ = np.linalg.lstsq(np.array(design) * scale[:, None], np.ones(len(peaks)), rcond=None)
    off = np.abs(np.array(design) * scale[:, None] @ found - 1).max()
    names = ("state", "working", "working_stored", "activation", "rest")
    return dict(zip(names, found.tolist(), strict=True)) | {"off": float(off)}


def passes(row: dict[str, Any], recomputed: float) -> float:
    """Forward passes of a metagradient's step, if so many are computed again for each."""
    return float((row["metagradient"] + recomputed * row["training"]) / row["forward"])


def exponent(rows: list[dict[str, Any]], x: str, y: str) -> float:
    """The slope of log y over log x."""
    slope, _ = np.polyfit([math.log(r[x]) for r in rows], [math.log(r[y]) for r in rows], 1)
    return float(slope)


# -- The page --------------------------------------------------------------------------------------


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def steps_table(found: dict[str, Any]) -> str:
    small = found["by_width"][0]
    rows, name = [], ""
    for row in sorted(found["by_steps"], key=lambda r: (ADJOINTS.index(r["adjoint"]), r["steps"])):
        name = row["adjoint"]
        predicted = "–"
        if not name.startswith("MemoryBudget"):
            again = adjoint(name).plan(row["steps"]).recomputed_steps / row["steps"]
            predicted = f"{1000 * passes(small, again) * small['forward']:.0f}"
        rows.append([f"`{name}`", f"{row['steps']:,}", f"{1000 * row['seconds']:.0f}", predicted])
        rows[-1].append(f"{row['peak'] / MIB:.0f}")
    grown = []
    for name in ADJOINTS:
        of = [row for row in found["by_steps"] if row["adjoint"] == name]
        grown.append(f"`{name}` as T to the {exponent(of, 'steps', 'peak'):.2f}")
    heads = ["adjoint", "T", "ms a step", "predicted", "peak MiB"]
    return f"{markdown(heads, rows)}\nMemory grows with {', with '.join(grown)}.\n"


def width_table(found: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['width']:,}",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{1000 * row['forward']:.1f}",
            f"{row['training'] / row['forward']:.1f}",
            f"{passes(row, 0):.1f}",
        ]
        for row in found["by_width"]
    ]
    heads = [
        "width",
        "parameters",
        "forward pass, ms",
        "step of training",
        "step of a metagradient",
    ]
    return markdown(heads, rows)


def memory_text(found: dict[str, Any]) -> str:
    b = bytes_by(found["by_states"])
    return (
        f"- {b['state']:.1f} bytes a parameter for each state that is kept (Adam's: three numbers "
        "in float32: 12);\n"
        f"- {b['working']:.0f} bytes a parameter for the rest, while a step is differentiated; "
        f"{b['working_stored']:.0f} where states lie in files (`storage=`), the few that are on "
        "their way among them;\n"
        f"- {b['activation']:.0f} bytes for the graph of a step, for each token, layer and unit of "
        f"width, and {b['rest']:.0f} MiB that are always there.\n\n"
        f"The fit is at most {b['off']:.0%} off, over {len(found['by_states'])} peaks from "
        f"{min(r['peak'] for r in found['by_states']) / MIB:.0f} to "
        f"{max(r['peak'] for r in found['by_states']) / MIB:.0f} MiB.\n"
    )


def processes_table(found: dict[str, Any]) -> str:
    rows = []
    kinds = {"group": "`group=`, 16 texts split", "shard": "`shard`, 4 texts on each"}
    for row in found["by_processes"]:
        (alone,) = (
            r["seconds"]
            for r in found["by_processes"]
            if r["kind"] == row["kind"] and r["processes"] == 1
        )
        cells = [f"{row['seconds'] / alone:.2f}", f"{row['peak'] / MIB:.0f}"]
        rows.append([kinds[row["kind"]], str(row["processes"]), *cells])
    return markdown(["", "processes", "CPU time of each", "peak MiB of each"], rows)


BILLION, DEEP, WIDE, TOKENS, LONG = 1.0e9, 20, 2048, 2048, 10_000


def billion_table(found: dict[str, Any]) -> str:
    b, large = bytes_by(found["by_states"]), found["by_width"][-1]
    rows = []
    for name in ("Segmented(1)", "Segmented()", "Binomial(100)", "Binomial(20)", "Binomial(8)"):
        plan = adjoint(name).plan(LONG)
        took = passes(large, plan.recomputed_steps / LONG)
        rows.append(
            [
                f"`{name}`",
                f"{plan.peak_states:,}",
                f"{plan.peak_states * b['state'] * BILLION / TB:.2f} TB",
                f"{LONG * took:,.0f}",
                f"{took * large['forward'] / large['training']:.1f}",
            ]
        )
    heads = ["adjoint", "states", "storage", "forward passes", "times the training run"]
    return markdown(heads, rows)


def billion_text(found: dict[str, Any]) -> str:
    b = bytes_by(found["by_states"])
    working, graph = b["working_stored"] * BILLION, b["activation"] * TOKENS * DEEP * WIDE
    return (
        f"Memory on the device, with the states in files: {b['working_stored']:.0f} bytes a "
        f"parameter, {working / GB:.0f} GB, and the graph of one step, {graph / GB:.0f} GB for "
        f"{TOKENS:,} tokens at a time. `microbatches=` keeps the second at that for any batch, "
        "`shard` divides the storage by the number of processes, and most of the first.\n"
    )


def figures(found: dict[str, Any]) -> dict[str, str]:
    """What stands between the page's marks, by name."""
    return {
        "steps": steps_table(found),
        "width": width_table(found),
        "memory": memory_text(found),
        "processes": processes_table(found),
        "billion": billion_table(found) + "\n" + billion_text(found),
    }


def filled(page: str, found: dict[str, Any]) -> str:
    for name, text in figures(found).items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=7, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        *numbers, name = given.peak
        print(peak_here(*map(int, numbers), name))
    elif given.worker:
        rank, kind, world, store, *numbers = given.worker
        worker(int(rank), kind, int(world), store, *map(int, numbers))
    elif given.measure:
        RECORDED.write_text(json.dumps(measure(given.rounds), indent=1) + "\n", encoding="utf-8")
    if not (given.peak or given.worker):
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), recorded()), encoding="utf-8")


if __name__ == "__main__":
    main()
