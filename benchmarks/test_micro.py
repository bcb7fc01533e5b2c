"""The pieces that an unroll is made of, timed on their own.

    pytest benchmarks/test_micro.py --benchmark-group-by=group,param:workload

Needs pytest-benchmark. The test suite does not collect this file. ``loss and gradient`` is what
any training loop has to compute; what the other times have on top is what they cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, Case, Problem, build
from torch import Tensor

import diffopt
from diffopt._values.outputs import StepCotangents

STEPS = 20
WORKLOADS = ("small", "mlp", "gpt")

Benchmark = Callable[..., Any]


@pytest.fixture(autouse=True, scope="module")
def _two_threads() -> None:
    torch.set_num_threads(2)


@dataclass(frozen=True)
class _Shown(diffopt.Segmented):
    """``Segmented(1)`` that shows the loop it is given."""

    segment: int | None = 1
    loops: list[Any] = field(default_factory=list, hash=False, compare=False)

    def forward(self, loop: Any) -> Any:
        self.loops.append(loop)
        return super().forward(loop)


def _inner(problem: Problem) -> diffopt.Optimizer:
    rule = getattr(diffopt, problem.optimizer)
    return rule(problem.model.parameters(), **problem.options)


def _loop(workload: str, optimizer: str) -> Any:
    problem, shown = build(Case(workload, optimizer, 1)), _Shown()
    diffopt.unroll(
        problem.model, _inner(problem), problem.batches[0], problem.loss_fn, adjoint=shown
    )
    return shown.loops[0]


@pytest.mark.benchmark(group="loss and gradient")
@pytest.mark.parametrize("workload", WORKLOADS)
def test_loss_and_gradient(benchmark: Benchmark, workload: str) -> None:
    problem = build(Case(workload, "sgd", 1))
    params = list(problem.model.parameters())

    def run() -> Any:
        return torch.autograd.grad(
            problem.loss_fn(problem.model, problem.batches[0][0]), params, allow_unused=True
        )

    benchmark(run)


@pytest.mark.benchmark(group="one step, first time: captured tensors are looked for")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_first_step(benchmark: Benchmark, workload: str, optimizer: str) -> None:
    loop = _loop(workload, optimizer)
    with loop.session():
        benchmark(lambda: loop.first(loop.start, 0))


@pytest.mark.benchmark(group="one step, again")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_step_again(benchmark: Benchmark, workload: str, optimizer: str) -> None:
    loop = _loop(workload, optimizer)
    with loop.session():
        benchmark(lambda: loop.again(loop.start, 0))


@pytest.mark.benchmark(group="one step's vector-Jacobian product")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_step_vjp(benchmark: Benchmark, workload: str, optimizer: str) -> None:
    loop = _loop(workload, optimizer)
    cotangent = {
        path: torch.ones_like(x)
        for path, x in loop.start.differentiable().items()
        if path[0] == "params"
    }
    with loop.session():
        benchmark(lambda: loop.vjp(loop.linearize(loop.start, 0), 0, cotangent, StepCotangents()))


def _update(problem: Problem) -> tuple[dict[str, Tensor], Callable[[], Any]]:
    """An optimizer's rule at a state in mid-training, and its inputs."""
    inner = _inner(problem)
    inputs = {
        name: torch.randn_like(x).requires_grad_() for name, x in problem.model.named_parameters()
    }
    grads = {name: torch.randn_like(x).requires_grad_() for name, x in inputs.items()}
    _, state = inner.update(inputs, grads, inner.init(inputs))
    state = {name: {k: v.detach() for k, v in held.items()} for name, held in state.items()}
    return inputs, lambda: inner.update(inputs, grads, state, step=1)


@pytest.mark.benchmark(group="update rule")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_update(benchmark: Benchmark, workload: str, optimizer: str) -> None:
    _, update = _update(build(Case(workload, optimizer, 1)))
    with torch.no_grad():
        benchmark(update)


@pytest.mark.benchmark(group="update rule and its vector-Jacobian product")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_update_vjp(benchmark: Benchmark, workload: str, optimizer: str) -> None:
    inputs, update = _update(build(Case(workload, optimizer, 1)))

    def run() -> Any:
        params, _ = update()
        cotangents = [torch.ones_like(x) for x in params.values()]
        return torch.autograd.grad(list(params.values()), list(inputs.values()), cotangents)

    benchmark(run)


@pytest.mark.benchmark(group=f"a meta-gradient through {STEPS} steps")
@pytest.mark.parametrize("adjoint", [diffopt.Segmented(1), diffopt.StoreAll()], ids=repr)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_unroll(benchmark: Benchmark, optimizer: str, adjoint: diffopt.Adjoint) -> None:
    problem = build(Case("small", optimizer, STEPS))

    def run() -> Any:
        fast = diffopt.unroll(
            problem.model, _inner(problem), problem.batches[0], problem.loss_fn, adjoint=adjoint
        )
        loss = fast.apply(problem.loss_fn, problem.queries[0])
        return torch.autograd.grad(loss, list(problem.model.parameters()))

    benchmark(run)
