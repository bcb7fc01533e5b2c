"""What a step costs beyond its arithmetic, on a network so small that little else is left.

Method: an MLP of 1,002 parameters (20-32-10, tanh), batches of 16, cross entropy, float32, one
thread. A round runs every case once, in turn: unroll T steps, take the loss of the result on
another batch, and its gradient in the initial parameters. CPU time of the process, so that
neighbours on the machine count little, divided by T. Reported are medians over the rounds, and of
each round's ratio to the bare arithmetic of the same optimizer.

Cases:
    bare: what ``Segmented(1)`` computes, written by hand: for each step the gradient of the loss
        and the update; on the way back, for each step the gradient with its graph, the update's
        vector-Jacobian product by hand and that of the gradient by autograd.
    segmented-1, segmented, store-all, default: ``diffopt.unroll``.
    higher: ``higher.innerloop_ctx``, which stores all graphs. Only where it is installed.

With ``--against PATH`` the same cases of the package in another checkout run in a second process,
which takes turns with the first. Every run has a model and a loss function of its own, so
that nothing learned in an earlier call is of use. ``--first`` measures first calls instead, of five
steps: each run is in a process of its own, and importing is not counted.

    python benchmarks/bookkeeping.py --steps 20 1000 --rounds 15 --against ../before
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPTIMIZERS = ("SGD", "Adam")
ADJOINTS = ("segmented-1", "segmented", "store-all", "default")
LR = {"SGD": 0.1, "Adam": 1e-3}


class Worker:
    """Another process that runs cases with the package of one checkout."""

    def __init__(self, root: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, optimizer: str, case: str, steps: int) -> float:
        """CPU seconds of one run."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(optimizer, case, steps, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def serve() -> None:
    """Run the cases that come in by standard input; print what each took."""
    for line in sys.stdin:
        optimizer, case, steps = line.split()
        run = case_of(optimizer, case, int(steps))
        before = time.process_time()
        run()
        print(time.process_time() - before, flush=True)


def case_of(optimizer: str, case: str, steps: int) -> Callable[[], Any]:
    """A run of ``steps`` steps: the gradient of a loss after them in the initial parameters."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    batches = [(torch.randn(16, 20), torch.randint(10, (16,))) for _ in range(steps + 1)]
    query = batches.pop()

    def loss_fn(model: Any, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1])

    if case == "bare":
        return lambda: bare(model, loss_fn, batches, query, optimizer)
    if case == "higher":
        return lambda: with_higher(model, loss_fn, batches, query, optimizer)
    import diffopt

    adjoint = {
        "segmented-1": diffopt.Segmented(1),
        "segmented": diffopt.Segmented(),
        "store-all": diffopt.StoreAll(),
        "default": None,
    }[case]

    def run() -> Any:
        opt = getattr(diffopt, optimizer)(model.parameters(), lr=LR[optimizer])
        fast = diffopt.unroll(model, opt, batches, loss_fn, adjoint=adjoint)
        return torch.autograd.grad(loss_fn(fast, query), [*model.parameters()])

    return run


def with_higher(model: Any, loss_fn: Any, batches: Any, query: Any, optimizer: str) -> Any:
    """The peer that stores the graph of every step."""
    import higher
    import torch

    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=LR[optimizer])
    with higher.innerloop_ctx(model, opt) as (fmodel, dopt):
        for batch in batches:
            dopt.step(loss_fn(fmodel, batch))
        return torch.autograd.grad(loss_fn(fmodel, query), [*fmodel.parameters(time=0)])


def bare(model: Any, loss_fn: Any, batches: Any, query: Any, optimizer: str) -> Any:
    """Every step's gradient; and backwards, every step's gradient again and one product."""
    import torch

    places = [(m._parameters, key) for m in model.modules() for key in m._parameters]
    own = [table[key] for table, key in places]

    def loss_at(params: Any, batch: Any) -> tuple[Any, list[Any]]:
        leaves = [p.detach().requires_grad_() for p in params]
        for (table, key), leaf in zip(places, leaves, strict=True):
            table[key] = leaf
        return loss_fn(model, batch), leaves

    update, pull = (sgd, sgd_vjp) if optimizer == "SGD" else (adam, adam_vjp)
    state: Any = (own, [torch.zeros_like(p) for p in own], [torch.zeros_like(p) for p in own])
    states = []
    for t, batch in enumerate(batches):
        states.append(state)
        loss, leaves = loss_at(state[0], batch)
        grads = torch.autograd.grad(loss, leaves)
        with torch.no_grad():
            state = update(state, grads, t + 1)
    loss, leaves = loss_at(state[0], query)
    cotangent: Any = (torch.autograd.grad(loss, leaves), None, None)
    for t in reversed(range(len(batches))):
        loss, leaves = loss_at(states[t][0], batches[t])
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        with torch.no_grad():
            values = [g.detach() for g in grads]
            (to_params, *others), to_grads = pull(states[t], values, cotangent, t + 1)
        products = torch.autograd.grad(grads, leaves, to_grads)
        cotangent = (torch._foreach_add(to_params, products), *others)
    for (table, key), p in zip(places, own, strict=True):
        table[key] = p
    return cotangent[0]


def sgd(state: Any, grads: Any, t: int) -> Any:
    return torch_()._foreach_add(state[0], grads, alpha=-LR["SGD"]), None, None


def sgd_vjp(state: Any, grads: Any, cotangent: Any, t: int) -> Any:
    return cotangent, torch_()._foreach_mul(cotangent[0], -LR["SGD"])


B1, B2, EPS = 0.9, 0.999, 1e-8


def adam(state: Any, grads: Any, t: int) -> Any:
    torch = torch_()
    params, m, v = state
    m = torch._foreach_lerp(m, grads, 1 - B1)
    v = torch._foreach_mul(v, B2)
    torch._foreach_addcmul_(v, grads, grads, 1 - B2)
    root = torch._foreach_sqrt(v)
    torch._foreach_div_(root, (1 - B2**t) ** 0.5)
    torch._foreach_add_(root, EPS)
    return torch._foreach_addcdiv(params, m, root, -LR["Adam"] / (1 - B1**t)), m, v


def adam_vjp(state: Any, grads: Any, cotangent: Any, t: int) -> Any:
    torch = torch_()
    cot, cot_m, cot_v = cotangent
    m = torch._foreach_lerp(state[1], grads, 1 - B1)
    v = torch._foreach_mul(state[2], B2)
    torch._foreach_addcmul_(v, grads, grads, 1 - B2)
    root = torch._foreach_sqrt(v)
    bias = (1 - B2**t) ** 0.5
    rate = LR["Adam"] * bias / (1 - B1**t)
    divisor = torch._foreach_add(root, EPS * bias)
    quotient = torch._foreach_div(cot, divisor)
    through = torch._foreach_mul(m, quotient)
    torch._foreach_div_(through, divisor)
    torch._foreach_div_(through, root)
    through = [x.masked_fill_(r == 0, 0.0) for x, r in zip(through, root, strict=True)]
    torch._foreach_mul_(through, 0.5 * rate)
    torch._foreach_mul_(quotient, -rate)
    if cot_m is not None:
        torch._foreach_add_(quotient, cot_m)
        torch._foreach_add_(through, cot_v)
    to_grads = torch._foreach_mul(quotient, 1 - B1)
    torch._foreach_addcmul_(to_grads, grads, through, 2 * (1 - B2))
    torch._foreach_mul_(quotient, B1)
    torch._foreach_mul_(through, B2)
    return (cot, quotient, through), to_grads


def torch_() -> Any:
    return sys.modules["torch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 1000])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--first", action="store_true", help="first calls, of five steps")
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS)
    parser.add_argument("--cases", nargs="+", default=ADJOINTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        serve()
        return
    roots = {"": Path(__file__).resolve().parents[1]}
    if chosen.against is not None:
        roots["before: "] = chosen.against.resolve()
    cases = [("", "bare")]
    if importlib.util.find_spec("higher") is not None:
        cases.append(("", "higher"))
    cases += [(where, case) for case in chosen.cases for where in roots]
    for steps in [5] if chosen.first else chosen.steps:
        for optimizer in chosen.optimizers:
            report(roots, cases, optimizer, steps, chosen.rounds, first=chosen.first)


def report(
    roots: dict[str, Path],
    cases: list[tuple[str, str]],
    optimizer: str,
    steps: int,
    rounds: int,
    *,
    first: bool,
) -> None:
    """Measure in turns, and print medians."""
    times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    workers = {} if first else {where: Worker(root) for where, root in roots.items()}
    for number in range(rounds + 1):
        for where, case in cases:
            worker = Worker(roots[where]) if first else workers[where]
            seconds = worker.run(optimizer, case, steps)
            if first:
                worker.close()
            if number:  # the first round warms up
                times[where, case].append(seconds / steps * 1e6)
    for worker in workers.values():
        worker.close()
    print(f"{optimizer}, T = {steps}")
    for (where, case), found in times.items():
        ratio = statistics.median(x / y for x, y in zip(found, times["", "bare"], strict=True))
        shown = f"{where + case:22} {statistics.median(found):9.1f} us a step"
        print(f"  {shown}   {ratio:5.2f} x bare   least {min(found):9.1f}", flush=True)


if __name__ == "__main__":
    main()
