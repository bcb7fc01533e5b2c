"""What a step in parts takes, and an outer loss over every step.

    python benchmarks/outputs.py parts --parts 1 2 4 8 --rounds 7
    python benchmarks/outputs.py steps --steps 1000

``parts``: a GPT with 4 layers of 128, batches of 16 times 64 tokens, by ``Segmented(1)``, for
``microbatches`` of each number. Memory is how much more the process holds at its peak than before
the call, in a process of its own for each (Linux's VmHWM over VmRSS, with a malloc that gives freed
tensors back). Beside it stands what does not shrink with the parts: the same for a batch of one
token. Time is the CPU time of the process for one meta-gradient, which neighbours on the machine
disturb least: medians over rounds in which all take turns, and of each round's ratio to one part.

``steps``: an MLP of 0.4 million parameters, by ``Segmented()``: the outer loss at the end, the sum
of a query loss after every step, and that sum with each step unrolled on its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

# glibc gives a tensor's memory back when it is freed, and so the process shows what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

Run = Callable[[], Any]


def gpt(parts: int, steps: int, optimizer: str, shape: tuple[int, int] = (16, 64)) -> Run:
    import models
    import torch
    import torch.nn.functional as F

    import diffopt

    torch.manual_seed(0)
    model = models.GPT(4, 128, 4, 256, shape[1])
    data = [torch.randint(256, (2, *shape)).unbind() for _ in range(steps)]

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def run() -> None:
        rule = {"sgd": diffopt.SGD, "adam": diffopt.Adam}[optimizer]
        inner = rule(model.parameters(), lr=1e-3)
        more = {"microbatches": parts} if parts > 1 else {}
        fast = diffopt.unroll(model, inner, data, loss_fn, segment=1, **more)
        total = sum(p.square().sum() for p in fast.params.values())  # no activations of its own
        torch.autograd.grad(total, list(model.parameters()))

    return run


def every_step(kind: str, steps: int) -> Run:
    import torch
    import torch.nn.functional as F
    from torch import nn

    import diffopt

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 600), nn.Tanh(), nn.Linear(600, 600), nn.Tanh())
    model.append(nn.Linear(600, 10))
    data = [(torch.randn(32, 64), torch.randint(10, (32,))) for _ in range(8)]
    batches = [data[t % 8] for t in range(steps)]
    query = torch.randn(32, 64), torch.randint(10, (32,))

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def with_query(model: Any, batch: Any) -> Any:
        return loss_fn(model, batch), loss_fn(model, query)

    def run() -> None:
        inner = diffopt.SGD(model.parameters(), lr=0.01)
        total: Any = 0
        if kind == "chained":
            fast: Any = None
            for batch in batches:
                fast = diffopt.unroll(model, inner, [batch], loss_fn, segment=1, initial=fast)
                total = total + loss_fn(fast, query)
        else:
            loss = with_query if kind == "every step" else loss_fn
            adjoint = diffopt.Segmented()
            fast = diffopt.unroll(model, inner, batches, loss, adjoint=adjoint)
            total = loss_fn(fast, query) if kind == "the end" else sum(fast.aux)
        torch.autograd.grad(total, list(model.parameters()))

    return run


def status(name: str) -> float:
    """A line of this process's status, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def peak(*case: object) -> float:
    """The peak of a case over what the process held before, in MiB."""
    command = [sys.executable, __file__, "one", *map(str, case)]
    found = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **MALLOC}
    )
    return float(found.stdout)


def made(kind: str, first: str, steps: int, optimizer: str) -> Run:
    if kind == "gpt":
        return gpt(int(first), steps, optimizer)
    return gpt(1, steps, optimizer, (1, 1)) if kind == "floor" else every_step(first, steps)


def measured(given: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    kind, first, steps, optimizer = given.case
    made(kind, first, 2, optimizer)()  # what is set up once
    run = made(kind, first, int(steps), optimizer)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = status("VmRSS")
    run()
    print(status("VmHWM") - before)


def in_parts(given: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    for optimizer in ("sgd", "adam"):
        floor = peak("floor", 1, given.steps, optimizer)
        runs = {m: gpt(m, given.steps, optimizer) for m in given.parts}
        times: dict[int, list[float]] = {m: [] for m in given.parts}
        for i in range(given.rounds + 1):
            for m, run in runs.items():
                started = time.process_time()
                run()
                if i:
                    times[m].append(time.process_time() - started)
        first = given.parts[0]
        print(f"{optimizer}, T = {given.steps}; one token: {floor:.0f} MiB")
        whole = 0.0
        for m in given.parts:
            size = peak("gpt", m, given.steps, optimizer)
            whole = whole or size - floor
            ratio = median(b / a for a, b in zip(times[first], times[m], strict=True))
            print(
                f"  {m} parts: peak {size:6.1f} MiB, activations {size - floor:6.1f} "
                f"({(size - floor) / whole:.2f}); {median(times[m]):.2f} s ({ratio:.2f})",
                flush=True,
            )


def over_steps(given: argparse.Namespace) -> None:
    for steps in given.steps:
        print(f"T = {steps}")
        for kind in ("the end", "every step", "chained"):
            if kind != "chained" or steps <= given.chained:
                print(f"  {kind:10} {peak('mlp', kind, steps, '-'):7.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    kinds = parser.add_subparsers(required=True)
    parts = kinds.add_parser("parts")
    parts.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8])
    parts.add_argument("--steps", type=int, default=3)
    parts.add_argument("--rounds", type=int, default=7)
    parts.set_defaults(run=in_parts)
    steps = kinds.add_parser("steps")
    steps.add_argument("--steps", type=int, nargs="+", default=[20, 1000])
    steps.add_argument("--chained", type=int, default=100, help="the most steps to chain")
    steps.set_defaults(run=over_steps)
    one = kinds.add_parser("one")
    one.add_argument("case", nargs=4)
    one.set_defaults(run=measured)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
