"""MAML on sine curves: what all of the paper's meta-iterations take, by three libraries.

usage: maml.py [--rounds N] [--threads N] [--tasks 25] [--steps 5]

Method: a whole meta-iteration of Finn et al. (2017), section 5.1, is timed: new curves are drawn,
the network of the README (1-80-80-1) adapts to each by gradient steps on ten points, and Adam takes
an outer step along the gradient of the mean loss on ten further points. ``diffopt`` adapts to all
curves at once (``tasks=``, ``compile=True``), ``higher`` to one after the other, JAX by ``vmap`` of
``scan`` with ``checkpoint``, under ``jit``. First the meta-gradients on the same curves are
compared; then all take turns, in a new random order in every round. What is reported is the least
time over the rounds, of wall time and of the processor time of all threads, and the latter times
60,000.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffopt

META_ITERATIONS = 60_000

#: Points that the network adapts to, then points that it is judged by: inputs and targets.
Curves = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def sine_curves(count: int) -> Curves:
    """Ten and ten points of each of so many curves, shape (count, 10, 1)."""
    amplitude = 0.1 + 4.9 * torch.rand(count, 1, 1)
    phase = math.pi * torch.rand(count, 1, 1)
    x = 10 * torch.rand(count, 20, 1) - 5
    y = amplitude * torch.sin(x - phase)
    return (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(1, 80), nn.Tanh(), nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 1)
    )


def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


class Run:
    """A meta-learner. ``gradient`` fills the parameters' ``.grad``."""

    def __init__(self, steps: int) -> None:
        self.model, self.steps = network(), steps
        self.outer = torch.optim.Adam(self.model.parameters(), lr=0.001)

    def gradient(self, curves: Curves) -> None:
        raise NotImplementedError

    def __call__(self, tasks: int) -> None:
        """One meta-iteration."""
        self.outer.zero_grad()
        self.gradient(sine_curves(tasks))
        self.outer.step()

    def gradients(self, curves: Curves) -> list[Tensor]:
        self.outer.zero_grad()
        self.gradient(curves)
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


class OfDiffopt(Run):
    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.inner = diffopt.SGD(self.model.parameters(), lr=0.02)

    def gradient(self, curves: Curves) -> None:
        support, query = curves
        fast = diffopt.unroll(
            self.model,
            self.inner,
            [support] * self.steps,
            loss_fn,
            segment=1,
            tasks=len(query[0]),
            compile=True,
        )
        fast.apply(loss_fn, query).mean().backward()


class OfHigher(Run):
    def gradient(self, curves: Curves) -> None:
        import higher

        support, query = curves
        inner = torch.optim.SGD(self.model.parameters(), lr=0.02)
        count = len(query[0])
        for i in range(count):
            with higher.innerloop_ctx(self.model, inner, copy_initial_weights=False) as (f, opt):
                for _ in range(self.steps):
                    opt.step(loss_fn(f, (support[0][i], support[1][i])))
                (loss_fn(f, (query[0][i], query[1][i])) / count).backward()


class OfJax(Run):
    """Its own Adam is not counted in JAX's favour: it takes the one that the others take."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        import jax
        import jax.numpy as jnp

        def loss(w: Any, x: Any, y: Any) -> Any:
            h = jnp.tanh(x @ w[0].T + w[1])
            return jnp.square(jnp.tanh(h @ w[2].T + w[3]) @ w[4].T + w[5] - y).mean()

        def adapted(w: Any, support: Any, query: Any) -> Any:
            def step(w: Any, _: Any) -> Any:
                return [
                    a - 0.02 * g for a, g in zip(w, jax.grad(loss)(w, *support), strict=True)
                ], None

            return loss(jax.lax.scan(jax.checkpoint(step), w, length=steps)[0], *query)

        def mean(w: Any, support: Any, query: Any) -> Any:
            return jax.vmap(adapted, (None, 0, 0))(w, support, query).mean()

        self._gradient, self._jax = jax.jit(jax.grad(mean)), jax

    def gradient(self, curves: Curves) -> None:
        params = list(self.model.parameters())
        w = [p.detach().numpy() for p in params]
        data = [tuple(x.numpy() for x in pair) for pair in curves]
        found = self._jax.device_get(self._gradient(w, *data))
        for p, g in zip(params, found, strict=True):
            p.grad = torch.tensor(g)


LIBRARIES: dict[str, type[Run]] = {
    "diffopt tasks=, compile=True": OfDiffopt,
    "higher": OfHigher,
    "JAX vmap of scan": OfJax,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("--rounds", 30), ("--threads", 1), ("--tasks", 25), ("--steps", 5)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs: dict[str, Run] = {}
    curves, first = sine_curves(options.tasks), list[Tensor]()
    for name, kind in LIBRARIES.items():
        try:
            runs[name] = kind(options.steps)
            grads = runs[name].gradients(curves)
        except ImportError as error:
            print(f"{name}: left out, {error}")
            del runs[name]
            continue
        first = first or grads
        apart = max(float((a - b).norm() / b.norm()) for a, b in zip(grads, first, strict=True))
        print(f"{name}: {apart:.1e} from the first meta-gradient")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name in random.sample(sorted(runs), len(runs)):
            start, used = time.perf_counter(), time.process_time()
            runs[name](options.tasks)
            times[name].append((time.perf_counter() - start, time.process_time() - used))
    least = {name: [min(x) for x in zip(*each, strict=True)] for name, each in times.items()}
    ours = least[next(iter(least))]
    for name, (wall, processor) in least.items():
        whole, ratio = processor * META_ITERATIONS, ours[1] / processor
        print(
            f"{name}: {wall * 1e3:.2f} ms a meta-iteration, {processor * 1e3:.2f} of processor "
            f"time; {META_ITERATIONS:,} of them {whole:,.0f} s; diffopt takes {ratio:.3f} of it"
        )


if __name__ == "__main__":
    main()
