"""How time and memory grow with steps, parameters and processes: `python benchmarks/scaling.py`.

Prints the tables of docs/pages/scaling.md. Every row is the median of some runs in this process,
forward pass and backward pass together; memory is what resident memory had more at its peak than
before, each measured in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import distributed as dist
from torch import nn

import diffopt


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def adjoints(steps: int) -> dict[str, diffopt.Adjoint]:
    return {
        "Segmented()": diffopt.Segmented(),
        "Binomial(8)": diffopt.Binomial(8),
        "MemoryBudget()": diffopt.MemoryBudget(),
    }


def once(width: int, steps: int, adjoint: diffopt.Adjoint, group: object = None) -> float:
    """Seconds of an unroll and its backward pass, with Adam."""
    model = network(width)
    x = torch.randn(32, width)
    opt = diffopt.Adam(model.parameters(), lr=1e-3)
    begun = time.perf_counter()
    fast = diffopt.unroll(
        model, opt, steps, lambda m, t: m(x).square().mean(), adjoint=adjoint, group=group
    )
    fast(x).square().mean().backward()
    return time.perf_counter() - begun


def peak(width: int, steps: int, name: str) -> float:
    """MiB of resident memory more than before, in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, str(width), str(steps)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def exponent(xs: list[int], ys: list[float]) -> float:
    """The slope of log y over log x, by least squares."""
    u, v = [math.log(x) for x in xs], [math.log(max(y, 1e-9)) for y in ys]
    mu, mv = statistics.mean(u), statistics.mean(v)
    return sum((a - mu) * (b - mv) for a, b in zip(u, v, strict=True)) / sum(
        (a - mu) ** 2 for a in u
    )


def table(what: str, values: list[int], width: int | None, steps: int | None, runs: int) -> None:
    print(f"\n| {what} | adjoint | ms a step | peak MiB |\n|---|---|---|---|")
    for name in adjoints(1):
        times, peaks = [], []
        for value in values:
            w, t = width or value, steps or value
            seconds = statistics.median(once(w, t, adjoints(t)[name]) for _ in range(runs))
            times.append(seconds)
            peaks.append(peak(w, t, name))
            print(
                f"| {value:,} | `{name}` | {1000 * seconds / t:.2f} | {peaks[-1]:.0f} |", flush=True
            )
        print(
            f"| grows as | `{name}` | time: {exponent(values, times):.2f} | "
            f"memory: {exponent(values, peaks):.2f} |"
        )


def worker(rank: int, world: int, store: str, width: int, steps: int, runs: int) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit
    )
    group = dist.group.WORLD if world > 1 else None
    times = [once(width, steps, diffopt.Segmented(), group) for _ in range(runs)]
    if rank == 0:
        print(
            f"| {world} | {width:,} | {1000 * statistics.median(times) / steps:.2f} |", flush=True
        )
    dist.destroy_process_group()


def processes(worlds: list[int], widths: list[int], steps: int, runs: int) -> None:
    print("\n| processes | width | ms a step, `Segmented()` |\n|---|---|---|", flush=True)
    for width in widths:
        for world in worlds:
            with tempfile.TemporaryDirectory() as folder:
                args = [str(world), f"{folder}/store", str(width), str(steps), str(runs)]
                started = [
                    subprocess.Popen([sys.executable, __file__, "--worker", str(r), *args])
                    for r in range(world)
                ]
                codes = [process.wait() for process in started]
                if any(codes):
                    raise RuntimeError("a process failed: its message is above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a few seconds, to try it")
    parser.add_argument("--peak", nargs=3, metavar=("ADJOINT", "WIDTH", "STEPS"))
    parser.add_argument("--worker", nargs=6)
    args = parser.parse_args()
    if args.worker:
        rank, world, store, *numbers = args.worker
        worker(int(rank), int(world), store, *map(int, numbers))
        return
    if args.peak:
        name, width, steps = args.peak[0], int(args.peak[1]), int(args.peak[2])
        once(width, 2, adjoints(2)[name])
        before = resident()
        once(width, steps, adjoints(steps)[name])
        print(max(resident() - before, 0.0))
        return
    torch.set_num_threads(1)
    print(f"PyTorch {torch.__version__}, one thread")
    small = args.small
    table("steps", [16, 64] if small else [64, 256, 1024], 64, None, args.runs)
    table("width", [32, 64] if small else [64, 256, 1024], None, 16 if small else 64, args.runs)
    processes([1, 2] if small else [1, 2, 4], [64] if small else [64, 512], 16, args.runs)


if __name__ == "__main__":
    main()
