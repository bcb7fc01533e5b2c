"""A network of ``DTensor``s and what is learned with it: for the tests on several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adjoints import WITH_GROUP
from helpers import close
from oracle import plain
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import diffopt
from diffopt import FirstOrder, Truncated
from diffopt._torch.dtensors import can_redistribute_twice

served = pytest.mark.skipif(
    not can_redistribute_twice(), reason="changes of placement have no second derivative"
)

STEPS = 4


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


class Net(nn.Module):
    """Two pairs of linear layers, uneven parts, a replicated parameter and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)
        self.c, self.d = nn.Linear(3, 4), nn.Linear(4, 2)
        self.w = nn.Parameter(torch.randn(5, 2))
        self.shift = nn.Parameter(torch.randn(5))
        self.gain = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.d(self.c(self.b(self.a(x).tanh()).tanh()).tanh())
        if isinstance(self.w, DTensor):
            x = DTensor.from_local(x, self.w.device_mesh, [Replicate()])
        return whole(F.linear(x, self.w) + self.shift) * self.gain


def sharded(net: Net, mesh: Any) -> Net:
    plan = {"a": ColwiseParallel(), "b": RowwiseParallel()}
    parallelize_module(net, mesh, plan | {"c": ColwiseParallel(), "d": RowwiseParallel()})
    for name, placement in (("w", Shard(0)), ("shift", Replicate())):
        x = distribute_tensor(getattr(net, name).detach(), mesh, [placement])
        setattr(net, name, nn.Parameter(x))
    return net


class Problem:
    """What is learned beside the start: a rate, and a factor that the loss captures."""

    def __init__(self, mesh: Any = None) -> None:
        self.net = Net() if mesh is None else sharded(Net(), mesh)
        self.lr = torch.tensor(0.1, requires_grad=True)
        self.decay = torch.tensor(0.02, requires_grad=True)
        data = torch.Generator().manual_seed(5)
        self.x, self.y = torch.randn(6, 3, generator=data), torch.randn(6, 5, generator=data)

    @property
    def inputs(self) -> list[Tensor]:
        return [*self.net.parameters(), self.lr, self.decay]

    def loss(self, model: Any, t: int) -> Tensor:
        value = (model(self.x + 0.1 * t) - self.y).square().mean()
        return value + self.decay * sum(whole(p.square().sum()) for p in model.parameters())

    def outer(self, fast: Any) -> Tensor:
        value: Tensor = (fast(self.x - 1) - self.y).square().mean() + fast.losses.sum()
        return value + sum(whole(p.pow(3).sum()) for p in fast.params.values())

    def unrolled(self, make: Any, **options: Any) -> diffopt.Unrolled:
        opt = make(self.net.parameters(), self.lr)
        return diffopt.unroll(self.net, opt, STEPS, self.loss, **options)

    def gradient(self, make: Any, **options: Any) -> list[Tensor]:
        """By ``backward()``; what it leaves at a parameter is placed as the parameter is."""
        for x in self.inputs:
            x.grad = None
        self.outer(self.unrolled(make, **options)).backward()
        return [grad_of(x) for x in self.inputs]


def grad_of(x: Tensor) -> Tensor:
    if x.grad is None:  # with FirstOrder, of what the loss captures
        return torch.zeros_like(x)
    assert type(x.grad) is type(x.data), (type(x.grad), type(x))
    if isinstance(x, DTensor):
        assert x.grad.placements == x.placements
    return whole(x.grad)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        close(whole(a), b)


def mesh_of(world: int) -> Any:
    return init_device_mesh("cpu", (world,))


# The rules as their authors state them: of state s, by parameter, and of g and θ.


def rule(update: Callable[..., Tensor]) -> Callable[[Tensor], Any]:
    def of(lr: Tensor) -> Any:
        state: dict[str, dict[str, Tensor]] = {}

        def step(params: Mapping[str, Tensor], grads: Mapping[str, Tensor], t: int) -> Any:
            return {
                n: update(p, grads[n], state.setdefault(n, {}), lr, t) for n, p in params.items()
            }

        return step

    return of


def momentum(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: Tensor, t: int) -> Tensor:
    s["b"] = 0.9 * s["b"] + g if "b" in s else g
    return p - lr * s["b"]


def adam(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: Tensor, t: int) -> Tensor:
    s["m"] = 0.9 * s.get("m", torch.zeros_like(p)) + 0.1 * g
    s["v"] = 0.999 * s.get("v", torch.zeros_like(p)) + 0.001 * g * g
    mean, square = s["m"] / (1 - 0.9 ** (t + 1)), s["v"] / (1 - 0.999 ** (t + 1))
    return p - lr * mean / (square.sqrt() + 1e-3)


def adamw(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: Tensor, t: int) -> Tensor:
    return adam(p * (1 - lr * 0.2), g, s, lr, t)


def rmsprop(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: Tensor, t: int) -> Tensor:
    s["v"] = 0.9 * s.get("v", torch.zeros_like(p)) + 0.1 * g * g
    return p - lr * g / (s["v"].sqrt() + 1e-3)


def adagrad(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: Tensor, t: int) -> Tensor:
    s["v"] = s.get("v", torch.zeros_like(p)) + g * g
    return p - lr * g / (s["v"].sqrt() + 1e-3)


RULES: dict[str, tuple[Any, Any]] = {
    "sgd": (
        lambda ps, lr: diffopt.SGD(ps, lr=lr),
        rule(lambda p, g, s, lr, t: p - lr * g),
    ),
    "momentum": (lambda ps, lr: diffopt.Momentum(ps, lr=lr), rule(momentum)),
    "adam": (lambda ps, lr: diffopt.Adam(ps, lr=lr, eps=1e-3), rule(adam)),
    "adamw": (
        lambda ps, lr: diffopt.AdamW(ps, lr=lambda t: lr, eps=1e-3, weight_decay=0.2),
        rule(adamw),
    ),
    "rmsprop": (
        lambda ps, lr: diffopt.RMSprop(ps, lr=lr, alpha=0.9, eps=1e-3),
        rule(rmsprop),
    ),
    "adagrad": (
        lambda ps, lr: diffopt.optim.Adagrad(ps, lr=lr, eps=1e-3),
        rule(adagrad),
    ),
}
ADJOINTS = [a for a in WITH_GROUP if not isinstance(a, (Truncated, FirstOrder))]
APPROXIMATE = [a for a in WITH_GROUP if isinstance(a, (Truncated, FirstOrder))]


def of_plain_loop(name: str) -> list[Tensor]:
    """On one process, without ``DTensor``s and without diffopt."""
    problem = Problem()
    result = plain(problem.net, {}, STEPS, problem.loss, rule=RULES[name][1](problem.lr))
    return list(torch.autograd.grad(problem.outer(result), problem.inputs))
