"""``unroll(..., group=g)`` on two and four gloo processes, against one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adjoints import WITH_GROUP
from helpers import close
from processes import EXCHANGE, Processes
from torch import Tensor, nn
from torch import distributed as dist

import diffopt
from diffopt import Segmented, StoreAll
from diffopt.distributed import mean_grads

STEPS = 4


Make = Callable[[Any, Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda ps, lr: diffopt.SGD(ps, lr=lr),
    "momentum": lambda ps, lr: diffopt.Momentum(ps, lr=lr, weight_decay=0.01),
    "adam": lambda ps, lr: diffopt.Adam(ps, lr=lr),
    "rmsprop": lambda ps, lr: diffopt.RMSprop(ps, lr=lambda t: lr * 0.1),
}


class Problem:
    """Two parameters, a learning rate and captured tensors; each process has a part of the data."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.lr = torch.tensor(0.1, requires_grad=True)
        self.decay = torch.tensor(0.02, requires_grad=True)
        self.only_first = torch.tensor(0.3, requires_grad=True)
        data = torch.Generator().manual_seed(5)
        self.x, self.y = torch.randn(8, 3, generator=data), torch.randn(8, 1, generator=data)
        self.inputs = [*self.model.parameters(), self.lr, self.decay, self.only_first]

    def loss_of(self, rank: int, world: int) -> Callable[[nn.Module, int], Tensor]:
        x, y = self.x.tensor_split(world)[rank], self.y.tensor_split(world)[rank]

        def loss(model: nn.Module, t: int) -> Tensor:
            value = (model(x) - y).square().mean()
            value = value + self.decay * sum(p.square().sum() for p in model.parameters())
            return value + (self.only_first * model[2].bias.sum() if rank == 0 else 0)

        return loss

    def outer(self, fast: Any, rank: int) -> Tensor:
        return (fast(self.x + rank) - self.y).square().mean() + (rank == 0) * sum(
            p.square().sum() for p in fast.params.values()
        )

    def whole(self, world: int, make: Make, **options: Any) -> list[Tensor]:
        """On one process: the mean of the losses, and the gradient of the mean of the outer ones.

        The unroll with one process's loss, the mean of all, is itself tested elsewhere.
        """
        losses = [self.loss_of(r, world) for r in range(world)]
        fast = diffopt.unroll(
            self.model,
            make(self.model.parameters(), self.lr),
            STEPS,
            lambda model, t: sum(loss(model, t) for loss in losses) / world,
            **options,
        )
        total = sum(self.outer(fast, r) for r in range(world)) / world
        total = total + fast.losses.sum()
        return list(torch.autograd.grad(total, self.inputs, allow_unused=True))

    def mine(self, rank: int, world: int, make: Make, **options: Any) -> list[Tensor | None]:
        for x in self.inputs:
            x.grad = None
        fast = diffopt.unroll(
            self.model,
            make(self.model.parameters(), self.lr),
            STEPS,
            self.loss_of(rank, world),
            group=dist.group.WORLD,
            **options,
        )
        (self.outer(fast, rank) + fast.losses.sum()).backward()
        mean_grads(self.inputs)
        return [x.grad for x in self.inputs]


def plain_loop(problem: Problem, world: int, lr: float) -> list[Tensor]:
    """Gradient descent by hand with every graph kept: no code of diffopt."""
    params = dict(problem.model.named_parameters())
    rate = problem.lr
    losses = [problem.loss_of(r, world) for r in range(world)]
    fast, total = dict(params), torch.zeros(())

    class At:
        def __init__(self, values: dict[str, Tensor]) -> None:
            self.params = values

        def __call__(self, x: Tensor) -> Tensor:
            return torch.func.functional_call(problem.model, self.params, (x,))

        def parameters(self) -> Any:
            return self.params.values()

        def __getitem__(self, i: int) -> Any:
            return type("Part", (), {"bias": self.params[f"{i}.bias"]})

    for t in range(STEPS):
        value = sum(loss(At(fast), t) for loss in losses) / world
        total = total + value
        grads = torch.autograd.grad(value, list(fast.values()), create_graph=True)
        fast = {n: x - rate * g for (n, x), g in zip(fast.items(), grads, strict=True)}
    for r in range(world):
        total = total + problem.outer(At(fast), r) / world
    return list(torch.autograd.grad(total, problem.inputs, allow_unused=True))


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    for a, b in zip(found, expected, strict=True):
        if a is not None or b is not None:
            close(torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b)


def equal_to_one_process(rank: int, world: int) -> None:
    problem = Problem()
    assert_equal(problem.mine(rank, world, OPTIMIZERS["sgd"]), plain_loop(problem, world, 0.1))
    few = world > 2  # what depends on the number of processes is the same for all of them
    for make in list(OPTIMIZERS.values())[:: 2 if few else 1]:
        for adjoint in WITH_GROUP[:: 3 if few else 1]:
            expected = problem.whole(world, make, adjoint=adjoint)
            assert_equal(problem.mine(rank, world, make, adjoint=adjoint), expected)


def clipped(rank: int, world: int) -> None:
    problem = Problem()
    for options in (
        {"max_cotangent_norm": 0.1, "adjoint": Segmented(2)},
        {"max_cotangent_norm": 0.1, "adjoint": StoreAll()},
        {"grad_transform": lambda grads: {n: g.tanh() for n, g in grads.items()}},
        {"verify": True},
    ):
        # The losses of the steps enter each process's outer loss: leave them out of the clipped.
        expected = problem.whole(world, OPTIMIZERS["momentum"], **options)
        assert_equal(problem.mine(rank, world, OPTIMIZERS["momentum"], **options), expected)


def second_derivative(rank: int, world: int) -> None:
    """Of the unroll, by an outer gradient that is taken with a graph."""
    problem = Problem()
    params = list(problem.model.parameters())

    def twice(loss: Any, outer: Any, share: Any, **options: Any) -> list[Tensor]:
        opt = diffopt.SGD(problem.model.parameters(), lr=problem.lr)
        fast = diffopt.unroll(problem.model, opt, 2, loss, **options)
        grads = torch.autograd.grad(outer(fast), params, create_graph=True)
        grads = [share(g) for g in grads]
        total = sum(g.square().sum() for g in grads)
        return list(torch.autograd.grad(total, [*params, problem.lr]))

    losses = [problem.loss_of(r, world) for r in range(world)]
    expected = twice(
        lambda m, t: sum(loss(m, t) for loss in losses) / world,
        lambda fast: sum(problem.outer(fast, r) for r in range(world)) / world,
        lambda g: g,
    )
    found = twice(
        losses[rank],
        lambda fast: problem.outer(fast, rank),
        diffopt.distributed.mean,
        group=dist.group.WORLD,
    )
    for x, e in zip(found, expected, strict=True):
        close(diffopt.distributed.mean(x.detach()), e)


def under_no_grad(rank: int, world: int) -> None:
    problem = Problem()
    losses = [problem.loss_of(r, world) for r in range(world)]
    opt = diffopt.Adam(problem.model.parameters(), lr=0.1)
    with torch.no_grad():
        mine = diffopt.unroll(problem.model, opt, 3, losses[rank], group=dist.group.WORLD)
        whole = diffopt.unroll(
            problem.model, opt, 3, lambda m, t: sum(loss(m, t) for loss in losses) / world
        )
    for name, x in mine.params.items():
        close(x, whole.params[name])
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, [x.tolist() for x in mine.params.values()])
    assert all(values == everyone[0] for values in everyone)  # to the last bit


def errors(rank: int, world: int) -> list[tuple[str, str]]:
    """Each is an error on all processes, soon; and afterwards the group is as good as before."""
    problem = Problem()
    found = []

    def train(loss: Any = None, steps: int = 3, backward: bool = True, **options: Any) -> None:
        opt = options.pop("opt", None) or diffopt.SGD(problem.model.parameters(), lr=0.1)
        options.setdefault("adjoint", Segmented(2))
        loss = loss or problem.loss_of(rank, world)
        fast = diffopt.unroll(problem.model, opt, steps, loss, group=dist.group.WORLD, **options)
        problem.outer(fast, rank).backward()

    def failing(step: int, call: int) -> Any:
        calls = 0

        def loss(model: nn.Module, t: int) -> Tensor:
            nonlocal calls
            calls += t == step
            if rank == 1 and t == step and calls == call:
                raise ZeroDivisionError("on one process")
            return problem.loss_of(rank, world)(model, t)

        return loss

    def note(**options: Any) -> None:
        try:
            train(**options)
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        else:
            found.append(("", ""))

    note(adjoint=Segmented(2 + rank))
    note(steps=3 + rank)
    note(loss=failing(1, 1))
    note(loss=failing(2, 1))
    note(loss=failing(0, 2))
    note(opt=3 if rank else None)
    note(adjoint=diffopt.Implicit(diffopt.CG(3, 1e-3)))
    note(compile=True)
    note()
    return found


def errors_of_the_second_derivative(rank: int, world: int) -> list[tuple[int, list[Any]]]:
    """A backward pass through a recorded one fails on process 1, at each of its evaluations."""
    problem = Problem()
    params = list(problem.model.parameters())
    at, calls = 0, list[int]()

    def loss(model: nn.Module, t: int) -> Tensor:
        calls.append(t)
        if rank == 1 and len(calls) == at:
            raise ZeroDivisionError("on one process")
        return problem.loss_of(rank, world)(model, t)

    def second() -> tuple[int, list[Any]]:
        """The step at which it failed, and with what; step -1 if it did not."""
        nonlocal at
        failing_at, at = at, 0
        opt = diffopt.SGD(params, lr=0.1)
        fast = diffopt.unroll(problem.model, opt, 3, loss, group=dist.group.WORLD, segment=2)
        grads = torch.autograd.grad(problem.outer(fast, rank), params, create_graph=True)
        calls.clear()
        at = failing_at
        try:
            torch.autograd.grad(sum(g.square().sum() for g in grads), params)
        except Exception as error:
            return calls[-1], [type(error).__name__, str(error)]
        return -1, []

    found = [second()]
    evaluations = len(calls)
    for n in range(1, evaluations + 1):
        at = n
        found.append(second())
    at = 0
    return [*found, second()]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", [equal_to_one_process, clipped, second_derivative, under_no_grad])
def test_together(case: Any, world: int, processes: Processes) -> None:
    processes.run(case, world)


def test_errors_are_everyones(processes: Processes) -> None:
    zero, one = processes.run(errors, 2)
    assert zero[0] == one[0]
    assert "adjoints differ between the processes of the group: process 0 has Segm" in zero[0][1]
    assert "numbers of steps differ between the processes of the group: process 0 h" in zero[1][1]
    for n, place in ((2, "at step 1"), (3, "at step 2"), (4, "at step 0")):
        assert one[n] == ("ZeroDivisionError", "on one process")
        assert f"process 1 stopped {place} with ZeroDivisionError: on one pro" in zero[n][1]
    assert one[5][0] == "TypeError"
    assert "process 1 stopped before the first step with TypeError" in zero[5][1]
    assert "Implicit with group: it takes no vector-Jacobian product" in zero[6][1]
    assert "compile=True with group" in zero[7][1]
    assert zero[8] == one[8] == ("", "")


def test_a_second_derivative_fails_on_all(processes: Processes) -> None:
    started = time.monotonic()
    zero, one = processes.run(errors_of_the_second_derivative, 2)
    assert time.monotonic() - started < EXCHANGE  # none of them has waited for the group's timeout
    assert zero[0] == one[0] == zero[-1] == one[-1] == (-1, [])
    assert len(zero) > 8
    for (_, told), (step, own) in zip(zero[1:-1], one[1:-1], strict=True):
        assert own == ["ZeroDivisionError", "on one process"]
        assert told[0] == "GroupError"
        assert f"process 1 stopped at step {step} with ZeroDivisionError: on one pro" in told[1]


def refused_models(rank: int, world: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.ones(2, 4)

    def train(model: nn.Module) -> Any:
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        return diffopt.unroll(model, opt, 2, lambda m, t: m(x).square().mean())

    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(NotImplementedError, match="wrap a module whose forward calls unroll"):
        train(wrapped)


class Outer(nn.Module):
    """What DistributedDataParallel may wrap: a module whose forward pass calls ``unroll``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Linear(3, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        def loss(model: nn.Module, t: int) -> Tensor:
            return (model(x) - y).square().mean()

        opt = diffopt.SGD(self.model.parameters(), lr=0.1)
        return loss(diffopt.unroll(self.model, opt, 3, loss), 0)


def wrapped_outside(rank: int, world: int) -> None:
    """Tasks split over processes: the outer gradients are averaged by DDP itself."""
    data = torch.Generator().manual_seed(5)
    x, y = torch.randn(world, 4, 3, generator=data), torch.randn(world, 4, 1, generator=data)
    whole = Outer()
    (sum(whole(x[r], y[r]) for r in range(world)) / world).backward()
    mine = nn.parallel.DistributedDataParallel(Outer())
    mine(x[rank], y[rank]).backward()
    for a, b in zip(mine.parameters(), whole.parameters(), strict=True):
        close(a.grad, b.grad)


@pytest.mark.parametrize("case", [refused_models, wrapped_outside])
def test_models_of_other_libraries(case: Any, processes: Processes) -> None:
    processes.run(case, 2)
