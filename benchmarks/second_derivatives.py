"""What the second derivatives of ``diffopt._derivatives`` save, in a plain double backward pass.

    python benchmarks/second_derivatives.py

For each network: the loss and its gradient with a graph, and then a product with the Hessian, once
with PyTorch's derivatives and once with diffopt's, in turns in one process. The medians over the
rounds are shown, and the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from cases import Case, build

from diffopt._derivatives.table import with_second_derivatives

NETWORKS = ("mlp", "conv4", "resnet18", "gpt")


def measure(workload: str, rounds: int) -> None:
    problem = build(Case(workload, "sgd", 1))
    model, batch = problem.model, problem.batches[0][0]
    params = list(model.parameters())
    directions = [torch.randn_like(p) for p in params]

    def once() -> tuple[float, float]:
        started = time.perf_counter()
        loss = problem.loss_fn(model, batch)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        between = time.perf_counter()
        torch.autograd.grad(grads, params, directions)
        return between - started, time.perf_counter() - between

    found: list[tuple[float, ...]] = []
    for _ in range(rounds + 2):
        theirs = once()
        with with_second_derivatives:
            ours = once()
        found.append((*theirs, *ours))
    columns = list(zip(*found[2:], strict=True))
    first, second, own_first, own_second = (1e3 * median(column) for column in columns)
    first_ratio, second_ratio = (
        median(b / a for a, b in zip(columns[i], columns[i + 2], strict=True)) for i in (0, 1)
    )
    print(
        f"{workload:9} loss and gradient {first:6.1f} ms, {own_first:6.1f} ms ({first_ratio:.2f});"
        f"  product with the Hessian {second:6.1f} ms, {own_second:6.1f} ms ({second_ratio:.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print("PyTorch's derivatives, diffopt's (ratio)")
    for workload in NETWORKS:
        measure(workload, given.rounds)


if __name__ == "__main__":
    main()
