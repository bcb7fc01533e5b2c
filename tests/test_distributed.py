"""``diffopt.distributed``: averages and shards over gloo processes, against one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import close
from processes import Processes
from torch import Tensor, nn
from torch import distributed as dist

import diffopt
from diffopt.distributed import mean, mean_grads, shard


def split(x: Tensor, rank: int, world: int) -> Tensor:
    return x.tensor_split(world)[rank]


# --- Means ------------------------------------------------------------------------------------


def mean_of_values_and_second_derivatives(rank: int, world: int) -> None:
    xs = [torch.arange(3.0) + r for r in range(world)]

    def together(values: list[Tensor]) -> list[Tensor]:
        """Each process's output, on one process: the oracle."""
        average = sum(x.sin() for x in values) / world
        return [average.exp().sum() * (r + 1) for r in range(world)]

    leaves = [x.clone().requires_grad_() for x in xs]
    total = sum(together(leaves))
    first = torch.autograd.grad(total, leaves, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)

    x = xs[rank].clone().requires_grad_()
    out = mean(x.sin()).exp().sum() * (rank + 1)
    close(out, together(xs)[rank])
    (g,) = torch.autograd.grad(out, x, create_graph=True)
    close(g, first[rank])
    (h,) = torch.autograd.grad((g**2).sum(), x)
    close(h, second[rank])
    z = torch.complex(x.detach(), -x.detach()).requires_grad_()
    close(mean(z).real, sum(xs) / world)
    with torch.no_grad():
        assert not mean(x).requires_grad


def mean_grads_is_the_mean(rank: int, world: int) -> None:
    a, b, c, d = (torch.zeros(n, requires_grad=True) for n in (2, 3, 1, 4))
    half = torch.zeros(2, dtype=torch.float32, requires_grad=True)
    strided = torch.zeros(2, 3, requires_grad=True)
    a.grad = torch.full((2,), float(rank))
    if rank:
        b.grad = torch.full((3,), float(rank))
        d.grad = torch.full((4,), float("nan"))
    half.grad = torch.ones(2, dtype=torch.float32) * rank
    strided.grad = (torch.arange(6.0).view(3, 2) * rank).T
    mean_grads([a, b, c, half, strided])
    m = (world - 1) / 2
    close(a.grad, torch.full((2,), m))
    close(b.grad, torch.full((3,), m))
    assert c.grad is None
    assert half.grad.tolist() == [m, m]
    close(strided.grad, torch.arange(6.0).view(3, 2).T * m)
    mean_grads([d])
    assert d.grad.isnan().all()
    b.grad = torch.full((3,), float(rank))
    mean_grads([b], dist.group.WORLD, weight=rank * 2)
    close(b.grad, torch.full((3,), sum(r * r for r in range(world)) / sum(range(world))))
    d.grad = torch.full((4,), 1.0 if rank else float("nan"))
    mean_grads([d], weight=rank)  # a process without a share says nothing
    close(d.grad, torch.ones(4))


def mean_grads_refuses(rank: int, world: int) -> list[str]:
    found = []
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    x.grad = torch.ones(2)
    for tensors, weight in (
        ([x, y] if rank else [x], None),
        ([y] if rank else [x], None),
        ([x], -1.0 if rank else 1.0),
        ([x], 0),
    ):
        with pytest.raises(ValueError, match=r"process|weight") as error:
            mean_grads(tensors, weight=weight)
        found.append(str(error.value))
    assert x.grad.tolist() == [1, 1]
    for wrong, message in (
        ((lambda: mean_grads([x, 3])), "tensor 1 is a int"),
        ((lambda: mean_grads([x], "world")), "group is a str"),
        ((lambda: mean_grads([x], weight="1")), "weight is a str"),
        ((lambda: mean(3)), "x is a int"),
        ((lambda: mean(torch.arange(3))), "convert it with x.float"),
    ):
        with pytest.raises(TypeError, match=message):
            wrong()
    part = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match="does not belong to the group"):
            mean_grads([x], part)
    return found


# --- Shards -----------------------------------------------------------------------------------

Make = Callable[[Any], diffopt.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda ps: diffopt.SGD(ps, lr=0.1),
    "momentum": lambda ps: diffopt.Momentum(ps, lr=0.1, weight_decay=0.01),
    "adam": lambda ps: diffopt.Adam(ps, lr=0.05),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01),
}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 3, generator=generator), torch.randn(8, 1, generator=generator)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def sharded_is_whole(rank: int, world: int) -> None:
    x, y = data()
    share = split(x, rank, world), split(y, rank, world)
    for make in OPTIMIZERS.values():
        whole = network()
        fast = diffopt.unroll(whole, make(whole.parameters()), [(x, y)] * 4, loss)
        outer = sum(loss(fast, (split(x, r, world) + 1, split(y, r, world))) for r in range(world))
        expected = torch.autograd.grad(outer / world, list(whole.parameters()))

        for adjoint in (diffopt.StoreAll(), diffopt.Segmented(2), diffopt.Binomial(2)):
            model = network()
            if rank:  # the first process's values are everyone's
                for p in model.parameters():
                    p.data.zero_()
            shard(model)
            length = sum(p.numel() for p in model.parameters())
            assert length < 26 / world + 4
            close(model(x), whole(x))
            opt = make(model.parameters())
            fast = diffopt.unroll(model, opt, [share] * 4, loss, adjoint=adjoint)
            loss(fast, (share[0] + 1, share[1])).backward()
            parts = [p.grad.clone() for p in model.parameters()]
            mean_grads(model.parameters())  # leaves them alone
            for p, part, g in zip(model.parameters(), parts, expected, strict=True):
                assert torch.equal(p.grad, part)
                flat = torch.zeros(len(part) * world)
                flat[: g.numel()] = g.flatten()
                close(part, flat.chunk(world)[rank])
            held = [x.numel() for x in fast.params.values()]
            assert held == [p.numel() for p in model.parameters()]


def shard_is_twice_differentiable(rank: int, world: int) -> None:
    """A gradient of a gradient of the unroll, against the whole model's."""

    def second(model: nn.Module, batch: Any, total: Callable[[Tensor], Tensor]) -> list[Tensor]:
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, [batch] * 2, loss)
        params = list(model.parameters())
        grads = torch.autograd.grad(loss(fast, batch), params, create_graph=True)
        return list(torch.autograd.grad(total(sum((g**2).sum() for g in grads)), params))

    x, y = data()
    expected = second(network(), (x, y), lambda s: s)
    share = split(x, rank, world), split(y, rank, world)
    found = second(shard(network()), share, lambda s: s)
    for part, g in zip(found, expected, strict=True):
        flat = torch.zeros(len(part) * world)
        flat[: g.numel()] = g.flatten()
        # The processes' outputs, of parts, are added and not averaged: no factor.
        close(part, flat.chunk(world)[rank])


def shard_refuses(rank: int, world: int) -> None:
    model = network()
    model[2].weight = nn.Parameter(torch.ones(1, 5))
    tied = nn.ModuleList([model[2], nn.Linear(5, 1)])
    tied[1].weight = tied[0].weight
    with pytest.raises(NotImplementedError, match=r"'0.weight' and '1.weight' are one parameter"):
        shard(tied)
    assert [n for n, _ in tied.named_parameters()] == ["0.weight", "0.bias", "1.bias"]
    shard(model)
    with pytest.raises(ValueError, match="sharded already"):
        shard(model)
    with pytest.raises(TypeError, match="model is a list"):
        shard([model])
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert not any(p.requires_grad for p in shard(frozen).parameters())


@pytest.mark.parametrize(
    ("case", "world"),
    [
        (mean_of_values_and_second_derivatives, 2),
        (mean_of_values_and_second_derivatives, 4),
        (mean_grads_is_the_mean, 2),
        (mean_grads_is_the_mean, 4),
        (sharded_is_whole, 2),
        (shard_is_twice_differentiable, 2),
        (shard_is_twice_differentiable, 4),
        (shard_refuses, 2),
    ],
)
def test_together(case: Any, world: int, processes: Processes) -> None:
    processes.run(case, world)


def test_mean_grads_refuses(processes: Processes) -> None:
    zero, one = processes.run(mean_grads_refuses, 2)
    advice = ": pass the same ones, in the same order, on every process"
    assert zero[:2] == one[:2]
    assert zero[0] == "process 0 has 1 tensors and process 1 2" + advice
    differ = "((2,), torch.float64) on process 0 and ((3,), torch.float64) on process 1"
    assert zero[1] == f"tensor 0 is {differ}{advice}"
    assert one[2] == "weight=-1.0: pass a finite number that is not negative"
    assert zero[2] == f"process 1 has {one[2]}"
    assert zero[3] == one[3] == "weight=0 on every process: pass a number above 0 on one at least"


def test_without_a_group() -> None:
    for call in (lambda: mean(torch.ones(2)), lambda: mean_grads([]), lambda: shard(network())):
        with pytest.raises(RuntimeError, match="no process group was started: call"):
            call()
