"""``unroll(..., microbatches=, group=)``: shares of a batch, in parts, against one batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from adjoints import WITH_GROUP
from helpers import close
from oracle import plain
from processes import Processes
from torch import Tensor, nn
from torch import distributed as dist

import diffopt
from diffopt import Microbatches, Segmented, StoreAll
from diffopt.distributed import mean, mean_grads

STEPS, EXAMPLES = 3, 11
#: By number of processes, the ends of their shares of each batch.
ENDS = {1: [0, 11], 2: [0, 7, 11], 4: [0, 4, 5, 8, 11]}


Make = Callable[[Any, Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda ps, lr: diffopt.SGD(ps, lr=lr),
    "momentum": lambda ps, lr: diffopt.Momentum(ps, lr=0.1, weight_decay=0.01),
    "adam": lambda ps, lr: diffopt.Adam(ps, lr=0.05, eps=1e-3),
    "adam, rate learned": lambda ps, lr: diffopt.Adam(ps, lr=lr, eps=1e-3),
    "rmsprop": lambda ps, lr: diffopt.RMSprop(ps, lr=lambda t: lr * 0.1, eps=1e-3),
}


def masked(part: Any) -> Tensor:
    return part["mask"].sum()


#: What the loss is over its examples: a mean, a mean over a mask that may learn, a sum.
KINDS = {
    "mean": Microbatches(3),
    "mask": Microbatches(2, weight=masked),
    "sum": Microbatches(3, reduction="sum"),
}


class Problem:
    """Every example has its own loss. One captured tensor is used for process 0's alone."""

    def __init__(self, world: int, kind: str, learned: bool = False) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        self.lr = torch.tensor(0.05, requires_grad=True)
        self.scale = torch.tensor(0.3, requires_grad=True)
        self.only_first = torch.tensor(0.2, requires_grad=True)
        self.mask = torch.rand(STEPS, EXAMPLES) + 0.2
        if not learned:
            self.mask[:, [2, 3, 9]] = 0.0
        self.mask.requires_grad_(learned)
        self.kind, self.world = kind, world
        self.x, self.y = torch.randn(STEPS, EXAMPLES, 2), torch.randn(STEPS, EXAMPLES, 1)
        self.query = torch.randn(4, 2)
        self.inputs = [*self.model.parameters(), self.lr, self.scale, self.only_first]
        self.inputs += [self.mask] if learned else []

    def batches(self, rank: int | None) -> list[Any]:
        ends = ENDS[self.world]
        start, stop = (0, EXAMPLES) if rank is None else ends[rank : rank + 2]
        whose = torch.tensor([r for r in range(self.world) for _ in range(ends[r], ends[r + 1])])
        return [
            {
                "x": self.x[t, start:stop],
                "y": self.y[t, start:stop],
                "mask": self.mask[t, start:stop],
                "rank": whose[start:stop],
            }
            for t in range(STEPS)
        ]

    def each(self, model: Any, item: Any) -> Tensor:
        out = model(item["x"])
        losses = ((out - item["y"]) ** 2 * self.scale.exp()).squeeze(1)
        first = item["rank"] == 0
        if first.any():
            losses = losses + first * self.only_first * out.squeeze(1)
        return losses

    def loss(self, model: Any, item: Any) -> Tensor:
        losses = self.each(model, item)
        if self.kind == "mask":
            return (item["mask"] * losses).sum() / item["mask"].sum()
        return losses.sum() * 0.1 if self.kind == "sum" else losses.mean()

    def with_each(self, model: Any, item: Any) -> Any:
        """The loss of the whole batch, and as aux those of the processes' shares."""
        ends = ENDS[self.world]
        shares = [{k: x[i:j] for k, x in item.items()} for i, j in pairwise(ends)]
        return self.loss(model, item), [self.loss(model, share) for share in shares]

    def outer(self, fast: Any, rank: int) -> Tensor:
        value: Tensor = fast(self.query + rank).square().mean()
        return value + (rank == 0) * sum(p.square().sum() for p in fast.params.values())

    def whole(self, make: Make, **options: Any) -> list[Tensor]:
        opt = make(self.model.parameters(), self.lr)
        fast = diffopt.unroll(self.model, opt, self.batches(None), self.with_each, **options)
        total = sum(self.outer(fast, r) for r in range(self.world)) / self.world
        total = total + sum(x.sin() for losses in fast.aux for x in losses) / self.world
        return list(torch.autograd.grad(total, self.inputs, allow_unused=True))

    def mine(self, make: Make, **options: Any) -> list[Tensor | None]:
        rank = dist.get_rank()
        options = {"microbatches": KINDS[self.kind], "group": dist.group.WORLD, **options}
        opt = make(self.model.parameters(), self.lr)
        fast = diffopt.unroll(self.model, opt, self.batches(rank), self.loss, **options)
        total = self.outer(fast, rank) + fast.losses.sin().sum()
        for x in self.inputs:
            x.grad = None
        total.backward()
        mean_grads(self.inputs)
        return [x.grad for x in self.inputs]


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    for a, b in zip(found, expected, strict=True):
        if a is not None or b is not None:
            close(torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b)


def equal_to_a_plain_loop(rank: int, world: int) -> None:
    for kind, learned in (("mean", False), ("mask", False), ("mask", True), ("sum", False)):
        problem = Problem(world, kind, learned)
        end = plain(problem.model, {"lr": problem.lr}, problem.batches(None), problem.loss)
        total = sum(problem.outer(end, r) for r in range(world)) / world
        expected = list(torch.autograd.grad(total, problem.inputs))
        for adjoint in (Segmented(2), StoreAll()):
            opt = OPTIMIZERS["sgd"](problem.model.parameters(), problem.lr)
            fast = diffopt.unroll(
                problem.model,
                opt,
                problem.batches(rank),
                problem.loss,
                microbatches=KINDS[kind],
                group=dist.group.WORLD,
                adjoint=adjoint,
            )
            for x in problem.inputs:
                x.grad = None
            problem.outer(fast, rank).backward()
            mean_grads(problem.inputs)
            assert_equal([x.grad for x in problem.inputs], expected)


def equal_to_one_process(rank: int, world: int) -> None:
    few = world > 2
    for i, (kind, learned) in enumerate(
        (("mean", False), ("mask", False), ("mask", True), ("sum", False))
    ):
        problem = Problem(world, kind, learned)
        for j, make in enumerate(OPTIMIZERS.values()):
            for k, adjoint in enumerate(WITH_GROUP):
                if (i + j + k) % (6 if few else 3):
                    continue
                assert_equal(
                    problem.mine(make, adjoint=adjoint), problem.whole(make, adjoint=adjoint)
                )


def with_options(rank: int, world: int) -> None:
    for options in (
        {"max_cotangent_norm": 0.1, "adjoint": Segmented(2)},
        {"max_cotangent_norm": 0.1, "adjoint": StoreAll()},
        {"grad_transform": lambda grads: {n: g.tanh() for n, g in grads.items()}},
        {"verify": True},
    ):
        for learned in (False, True):
            problem, make = Problem(world, "mask", learned), OPTIMIZERS["adam, rate learned"]
            assert_equal(problem.mine(make, **options), problem.whole(make, **options))


def second_derivative(rank: int, world: int) -> None:
    for learned in (False, True):
        problem = Problem(world, "mask", learned)
        params = list(problem.model.parameters())
        found = []
        for group in (None, dist.group.WORLD):
            opt = OPTIMIZERS["momentum"](params, problem.lr)
            fast = diffopt.unroll(
                problem.model,
                opt,
                problem.batches(rank if group else None),
                problem.loss,
                group=group,
                microbatches=KINDS["mask"] if group else None,
            )
            outer = problem.outer(fast, rank)
            if group is None:
                outer = sum(problem.outer(fast, r) for r in range(world)) / world
            grads = torch.autograd.grad(outer, params, create_graph=True)
            total = sum((g if group is None else mean(g)).sin().sum() for g in grads)
            second = torch.autograd.grad(total, problem.inputs, materialize_grads=True)
            found.append([g if group is None else mean(g) for g in second])
        assert_equal(found[1], found[0])


def differently_differentiable(rank: int, world: int) -> None:
    """One process alone has a learning rate that learns: all evaluate steps again together."""
    problem = Problem(world, "mean")
    free = torch.tensor(0.05, requires_grad=rank == 0)
    expected = problem.whole(lambda ps, lr: diffopt.Momentum(ps, lr=problem.lr))
    found = problem.mine(lambda ps, lr: diffopt.Momentum(ps, lr=free), segment=2)
    assert_equal(found[:4], expected[:4])


def errors(rank: int, world: int) -> list[tuple[str, str]]:
    found = []

    def note(kind: str = "mean", fails: int | None = None, **options: Any) -> None:
        problem, calls = Problem(world, kind), 0
        loss = problem.loss

        def failing(model: Any, item: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if rank == 1 and calls == fails:
                step = item["x"].storage_offset() // problem.x[0].numel()
                raise ZeroDivisionError(f"in step {step}")
            return loss(model, item)

        problem.loss = failing  # type: ignore[method-assign]
        try:
            problem.mine(OPTIMIZERS["adam"], **options)
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        else:
            found.append(("", ""))

    note(microbatches=KINDS["sum" if rank else "mean"])
    note(microbatches=None if rank else 2)
    for call in (5, 11, 15):  # forwards, computing again, in a vector-Jacobian product
        note(fails=call, segment=2)
    note("mask", microbatches=Microbatches(2, weight=lambda part: float(rank == 0)))
    note()
    return found


@pytest.mark.parametrize(
    ("case", "world"),
    [
        (equal_to_a_plain_loop, 2),
        (equal_to_a_plain_loop, 4),
        (equal_to_one_process, 2),
        (with_options, 2),
        (second_derivative, 2),
        (second_derivative, 4),
    ],
)
def test_together(case: Any, world: int, processes: Processes) -> None:
    processes.run(case, world)


def test_one_process_reads_gradients(processes: Processes) -> None:
    processes.run(differently_differentiable, 2)


def test_errors_are_everyones(processes: Processes) -> None:
    zero, one = processes.run(errors, 2)
    for n in (0, 1):
        assert zero[n] == one[n]
        assert "ways of weighting microbatches differ between the processes" in zero[n][1]
    for n in (2, 3, 4):
        kind, text = one[n]
        assert kind == "ZeroDivisionError"
        step = text.removeprefix("in ")
        assert f"process 1 stopped at {step} with ZeroDivisionError: in {step}. So" in zero[n][1]
    assert "the weights of the parts of step 0 sum to 0" in one[5][1]
    assert "process 1 stopped at step 0 with ValueError: the weights of the parts" in zero[5][1]
    assert zero[6] == one[6] == ("", "")
