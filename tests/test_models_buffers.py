"""Buffers are part of the state: advanced once a step, whatever is recomputed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import plain
from torch import Tensor, nn

import diffopt

ADJOINTS = [diffopt.StoreAll(), diffopt.Segmented(1), diffopt.Segmented(2), diffopt.Segmented()]
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)

X = torch.linspace(-1.0, 1.5, 24, dtype=torch.double).sin().reshape(8, 3)


class NormBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.double)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class ThroughData(nn.Module):
    """Changes its buffer as old code does: PyTorch's version counter does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.double))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale + self.seen
        self.seen.data.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return y


class Reassigned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.double))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0], dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x * self.scale * self.mask + self.count


class Held(nn.Module):
    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.register_buffer("buffer", buffer)


class TiedAndLate(nn.Module):
    """One buffer in two modules, of which one changes it, and another that comes to be late."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.double))
        shared = torch.zeros(3, dtype=torch.double)
        self.one, self.two = Held(shared), Held(shared)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros((), dtype=torch.double))
        with torch.no_grad():
            self.one.buffer += 0.1 * x.mean(0)
            self.late += 1
        return x * self.scale + self.two.buffer + self.late


def loss_fn(model: Any, t: int) -> Tensor:
    return model(X + 0.1 * t).pow(3).mean()


def torch_loop(model: nn.Module, steps: int) -> nn.Module:
    model = copy.deepcopy(model)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for t in range(steps):
        opt.zero_grad()
        loss_fn(model, t).backward()
        opt.step()
    return model


@every_adjoint
@pytest.mark.parametrize("make", [NormBuffers, ThroughData, Reassigned, TiedAndLate])
def test_buffers_are_those_of_a_torch_optim_loop(
    make: Callable[[], nn.Module], adjoint: diffopt.Adjoint
) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    expected = torch_loop(model, 5)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    fast = diffopt.unroll(model, inner, 5, loss_fn, adjoint=adjoint)

    def check() -> None:
        for name, x in expected.named_buffers():
            torch.testing.assert_close(fast.buffers[name], x, rtol=1e-12, atol=1e-14)
        for name, x in expected.named_parameters():
            torch.testing.assert_close(fast.params[name], x, rtol=1e-12, atol=1e-14)
        for name, x in model.state_dict().items():
            assert torch.equal(x, before[name])

    check()
    loss_fn(fast, 5).backward()  # neither the call nor the way back advances them
    check()


class Averaged(nn.Module):
    """Adds a running average of its weight, which keeps its graph."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("average", torch.zeros(1, 3))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.average.mul_(0.8).add_(0.2 * self.layer.weight)
        else:
            self.average = 0.8 * self.average + 0.2 * self.layer.weight
        return self.layer(x) + x @ self.average.T


@every_adjoint
@pytest.mark.parametrize("in_place", [False, True])
def test_a_buffer_may_have_a_graph(in_place: bool, adjoint: diffopt.Adjoint) -> None:
    model = Averaged(in_place).double()
    options = {"lr": 0.1, "momentum": 0.5}
    expected = plain(model, options, 4, loss_fn)
    inner = torch.optim.SGD(model.parameters(), **options)
    fast = diffopt.unroll(model, inner, 4, loss_fn, adjoint=adjoint)
    torch.testing.assert_close(fast.buffers["average"], expected.buffers["average"])
    for found, wanted in zip(*(gradients(model, x) for x in (fast, expected)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def gradients(model: nn.Module, trained: Any) -> tuple[Tensor, ...]:
    outer = loss_fn(trained, 5) + trained.buffers["average"].square().sum()
    return torch.autograd.grad(outer, list(model.parameters()))
