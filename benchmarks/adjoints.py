"""What the adjoints promise about memory and time, measured; each run in a process of its own.

    python benchmarks/adjoints.py            all of it
    python benchmarks/adjoints.py --memory   the peaks alone, which a busy machine does not change

The work is 0.7 million parameters, an MLP of widths 256-512-512-512-10 on batches of 128, trained
by Adam and differentiated in the initial parameters. A peak is resident memory above what was
resident before the unroll, the largest during both passes. Times are the least of several runs, in
alternation, and count only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIB = 2**20


def problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    widths = [256, 512, 512, 512, 10]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    batches = [(torch.randn(128, 256), torch.randint(0, 10, (128,))) for _ in range(10)]
    return nn.Sequential(*layers[:-1]), batches


def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def by_diffopt(steps: int, adjoint: str) -> None:
    import diffopt

    model, batches = problem()
    inner = diffopt.Adam(model.parameters(), lr=1e-3)
    cycled = [batches[t % len(batches)] for t in range(steps)]
    chosen = eval(adjoint, {"diffopt": diffopt})
    fast = diffopt.unroll(model, inner, cycled, loss_fn, adjoint=chosen)
    loss_fn(fast, batches[0]).backward()


def by_higher(steps: int) -> None:
    import higher

    model, batches = problem()
    inner = torch.optim.Adam(model.parameters(), lr=1e-3)
    with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fast, opt):
        for t in range(steps):
            opt.step(loss_fn(fast, batches[t % len(batches)]))
        loss_fn(fast, batches[0]).backward()


def run(library: str, steps: int, adjoint: str) -> None:
    if library == "higher":
        by_higher(steps)
    else:
        by_diffopt(steps, adjoint)


def by_budget(workload: str, budget: str, steps: int = 20) -> None:
    """Print the peak that ``MemoryBudget`` predicts for a benchmark's network, and the peak."""
    from cases import Case, build
    from worker import PeakResident, release

    import diffopt

    torch.set_num_threads(1)

    def run(steps: int) -> diffopt.Plan:
        problem = build(Case(workload, "adam", steps))
        adjoint = diffopt.MemoryBudget(budget)
        fast = diffopt.unroll(
            problem.model,
            problem.torch_optimizer(),
            problem.batches[0],
            problem.loss_fn,
            adjoint=adjoint,
        )
        loss = fast.apply(problem.loss_fn, problem.queries[0])
        loss.backward()
        return adjoint.measured(problem.model).plan(steps)

    run(2)
    release()
    with PeakResident() as resident:
        plan = run(steps)
    predicted = plan.predicted_peak_bytes
    print(json.dumps({"peak": resident.peak - resident.start, "predicted": predicted}))


def in_this_process(library: str, steps: int, adjoint: str) -> None:
    """Print what one run takes, as JSON."""
    from worker import PeakResident, release

    torch.set_num_threads(1)
    run(library, 2, adjoint)  # what is loaded and kept once
    release()
    begun = time.perf_counter()
    with PeakResident() as resident:
        run(library, steps, adjoint)
    seconds = time.perf_counter() - begun
    print(json.dumps({"peak": resident.peak - resident.start, "seconds": seconds}))


def in_a_process(*arguments: str, **environment: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measured(library: str, steps: int, adjoint: str = "") -> dict[str, float]:
    result = in_a_process("--run", library, str(steps), adjoint)
    name = adjoint.removeprefix("diffopt.") or library
    print(
        f"{name:24} T = {steps:6,}  peak {result['peak'] / MIB:8,.1f} MiB"
        f"  {1000 * result['seconds'] / steps:7.1f} ms/step",
        flush=True,
    )
    return result


def thousandfold() -> None:
    """T = 10,000 under ``Binomial`` in no more than ``higher`` takes for T = 10."""
    theirs = measured("higher", 10)["peak"]
    ours = measured("diffopt", 10_000, "diffopt.Binomial(10)")["peak"]
    print(f"a thousand times the steps in {ours / theirs:.2f} of the memory (at most 1)\n")


def square_root() -> None:
    """The peak of ``Segmented()`` at T = 1,600 against T = 100."""
    few, many = (measured("diffopt", t, "diffopt.Segmented()")["peak"] for t in (100, 1600))
    print(f"16 times the steps in {many / few:.2f} times the memory (at most 4.5)\n")


def budgets() -> None:
    """The peak under ``MemoryBudget`` against what it predicts, and against the budget."""
    from harness import EXACT_MEMORY

    for workload in ("mlp", "conv4", "resnet18", "gpt"):
        for budget in ("200MiB", "500MiB"):
            found = in_a_process("--budget", workload, budget, **EXACT_MEMORY)
            print(
                f"{workload:9} MemoryBudget({budget!r}): predicted {found['predicted'] / MIB:6.1f}"
                f" MiB, measured {found['peak'] / MIB:6.1f} MiB",
                flush=True,
            )
    print()


def time_per_step(repeats: int) -> None:
    """Milliseconds a step of ``Segmented()`` at T = 1,600 against T = 100."""
    best = {100: float("inf"), 1600: float("inf")}
    for _ in range(repeats):
        for steps in best:
            seconds = measured("diffopt", steps, "diffopt.Segmented()")["seconds"]
            best[steps] = min(best[steps], seconds / steps)
    print(f"a step takes {best[1600] / best[100]:.2f} times as long (at most 1.15)\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true", help="leave the times out")
    parser.add_argument("--repeats", type=int, default=3, help="of each timed run")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--budget", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        library, steps, adjoint = given.run
        in_this_process(library, int(steps), adjoint)
        return
    if given.budget:
        by_budget(*given.budget)
        return
    budgets()
    square_root()
    thousandfold()
    if not given.memory:
        time_per_step(given.repeats)


if __name__ == "__main__":
    main()
