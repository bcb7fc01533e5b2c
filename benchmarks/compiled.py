"""Compiled loops against peers, on one small network, in one process, taking turns.

usage: compiled.py [--rounds N] [--threads N] [--steps 20 100 1000] [--optimizers SGD Adam]
                   [--libraries "diffopt compile=True" TorchOpt ...]

Method: an MLP of 1,002 parameters, a new batch of 16 examples in every step, a meta-gradient (the
gradient of a query loss of the trained network in the initial parameters) per call. Every library
computes it once to warm up, compilation included, which is timed apart; the gradients are compared
with one another; then all take turns, in a new random order in every round. What is reported is, in
microseconds a step, the median and the least over the rounds: of wall time, and of the processor
time of all threads, which another load on the machine disturbs less. The least is what the machine
can do when nothing disturbs it. Then the least times of the first library over those of each other.
Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffopt

Run = Callable[[], list[Tensor]]


class Problem:
    """A network, the data and the optimizer of the inner loop."""

    def __init__(self, steps: int, optimizer: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 10))
        self.batches = [self._batch() for _ in range(steps)]
        self.query = self._batch()
        self.optimizer = optimizer
        self.lr = {"SGD": 0.1, "Adam": 0.01}[optimizer]

    def _batch(self) -> tuple[Tensor, Tensor]:
        return torch.randn(16, 20), torch.randint(10, (16,))


def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def of_diffopt(problem: Problem, compile: bool) -> Run:
    model = problem.model
    kind = getattr(diffopt, problem.optimizer)

    def run() -> list[Tensor]:
        opt = kind(model.parameters(), lr=problem.lr)
        fast = diffopt.unroll(model, opt, problem.batches, loss_fn, segment=1, compile=compile)
        return list(torch.autograd.grad(loss_fn(fast, problem.query), list(model.parameters())))

    return run


def of_higher(problem: Problem) -> Run:
    import higher

    model = problem.model

    def run() -> list[Tensor]:
        opt = getattr(torch.optim, problem.optimizer)(model.parameters(), lr=problem.lr)
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, dopt):
            for batch in problem.batches:
                dopt.step(loss_fn(fmodel, batch))
            return list(
                torch.autograd.grad(loss_fn(fmodel, problem.query), list(model.parameters()))
            )

    return run


def of_torchopt(problem: Problem) -> Run:
    import torchopt

    model = problem.model
    kind = getattr(torchopt, f"Meta{problem.optimizer}")

    def run() -> list[Tensor]:
        start = torchopt.extract_state_dict(model, by="reference")
        inner = kind(model, lr=problem.lr)
        initial = list(model.parameters())
        for batch in problem.batches:
            inner.step(loss_fn(model, batch))
        grads = torch.autograd.grad(loss_fn(model, problem.query), initial)
        torchopt.recover_state_dict(model, start)
        return list(grads)

    return run


def of_jax(problem: Problem) -> Run:
    """``jit`` of ``grad`` through ``scan`` with ``checkpoint``."""
    import jax
    import jax.numpy as jnp

    def loss(w: Any, x: Any, y: Any) -> Any:
        logits = jnp.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
        return -chosen.mean()

    lr, adam = problem.lr, problem.optimizer == "Adam"

    def step(carry: Any, batch: Any) -> Any:
        w, m, v, t = carry
        g = jax.grad(loss)(w, *batch)
        t = t + 1
        if not adam:
            return ([a - lr * b for a, b in zip(w, g, strict=True)], m, v, t), None
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
        v = [0.999 * a + 0.001 * b * b for a, b in zip(v, g, strict=True)]
        scale, root = lr / (1 - 0.9**t), jnp.sqrt(1 - 0.999**t)
        # Away from 0, where the derivative of the root is infinite.
        w = [
            a - scale * b / (jnp.sqrt(c + 1e-24) / root + 1e-8)
            for a, b, c in zip(w, m, v, strict=True)
        ]
        return (w, m, v, t), None

    def outer(w: Any, xs: Any, ys: Any, query: Any) -> Any:
        zeros = [jnp.zeros_like(a) for a in w]
        carry, _ = jax.lax.scan(jax.checkpoint(step), (w, zeros, zeros, 0.0), (xs, ys))
        return loss(carry[0], *query)

    gradient = jax.jit(jax.grad(outer))
    w = [jnp.asarray(p.detach().numpy()) for p in problem.model.parameters()]
    xs = jnp.stack([jnp.asarray(x.numpy()) for x, _ in problem.batches])
    ys = jnp.stack([jnp.asarray(y.numpy()) for _, y in problem.batches])
    query = tuple(jnp.asarray(x.numpy()) for x in problem.query)

    def run() -> list[Tensor]:
        found = jax.block_until_ready(gradient(w, xs, ys, query))
        return [torch.tensor(jax.device_get(g)) for g in found]

    return run


LIBRARIES: dict[str, Callable[[Problem], Run]] = {
    "diffopt compile=True": lambda problem: of_diffopt(problem, compile=True),
    "diffopt": lambda problem: of_diffopt(problem, compile=False),
    "higher": of_higher,
    "TorchOpt": of_torchopt,
    "JAX jit + checkpoint": of_jax,
}


def measure(problem: Problem, rounds: int, libraries: Sequence[str]) -> None:
    """Print the times of all libraries that are there."""
    runs: dict[str, Run] = {}
    for name in libraries:
        try:
            runs[name] = LIBRARIES[name](problem)
        except ImportError as error:
            print(f"  {name}: left out, {error}")
    reference: list[Tensor] = []
    first = {}
    for name, run in runs.items():
        start = time.perf_counter()
        grads = run()
        first[name] = time.perf_counter() - start
        reference = reference or grads
        apart = max(float((a - b).norm() / b.norm()) for a, b in zip(grads, reference, strict=True))
        print(f"  {name}: first call {first[name]:.2f} s, {apart:.1e} from the first gradient")
    wall: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(sorted(runs), len(runs)):
            start, used = time.perf_counter(), time.process_time()
            runs[name]()
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - used)
    scale = 1e6 / len(problem.batches)
    for name in runs:
        median, least = (
            [f(times[name]) * scale for times in (wall, processor)]
            for f in (statistics.median, min)
        )
        print(
            f"  {name}: {median[0]:.1f} us a step, {median[1]:.1f} of processor time; "
            f"at least {least[0]:.1f}, {least[1]:.1f}"
        )
    ours = libraries[0]
    for name in [name for name in runs if name != ours]:
        ratios = [min(times[ours]) / min(times[name]) for times in (wall, processor)]
        print(f"  {ours} / {name}: {ratios[0]:.3f} of wall, {ratios[1]:.3f} of processor time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100, 1000])
    parser.add_argument("--optimizers", nargs="+", default=["SGD", "Adam"])
    parser.add_argument("--libraries", nargs="+", default=[*LIBRARIES], choices=[*LIBRARIES])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for optimizer in options.optimizers:
        for steps in options.steps:
            print(f"{optimizer}, T = {steps}:")
            measure(Problem(steps, optimizer), options.rounds, options.libraries)


if __name__ == "__main__":
    main()
