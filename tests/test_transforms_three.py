"""``grad_transform(grads, model, batch)``: its derivative, what it may be, what is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from adjoints import every_adjoint
from helpers import assert_all_close, batches, mse, tiny
from torch import Tensor
from torch.func import functional_call

import diffopt

DATA = batches(3)
Grads = dict[str, Tensor]


def at(model: Any, values: Grads, batch: Any) -> Tensor:
    return mse(lambda x: functional_call(model, values, (x,)), batch)


def sam(radius: Tensor, grads: Grads, model: Any, batch: Any) -> Grads:
    """The gradient at the worst point nearby (Foret et al., 2021)."""
    norm = sum(g.square().sum() for g in grads.values()) ** 0.5
    worst = {n: p + radius * grads[n] / norm for n, p in model.named_parameters()}
    return torch.func.grad(lambda values: at(model, values, batch))(worst)


def plain(model: Any, data: Any, radius: Tensor, lr: float) -> Grads:
    weights: Grads = dict(model.named_parameters())
    for batch in data:
        now = {n: w.view_as(w) for n, w in weights.items()}
        grads = torch.autograd.grad(at(model, now, batch), [*now.values()], create_graph=True)
        norm = sum(g.square().sum() for g in grads) ** 0.5
        worst = {n: w + radius * g / norm for (n, w), g in zip(now.items(), grads, strict=True)}
        worst = {n: w.view_as(w) for n, w in worst.items()}
        found = torch.autograd.grad(at(model, worst, batch), [*worst.values()], create_graph=True)
        weights = {n: w - lr * g for (n, w), g in zip(weights.items(), found, strict=True)}
    return weights


class Sharpness:
    def __init__(self, radius: Tensor) -> None:
        self.radius = radius

    def __call__(self, grads: Grads, model: Any, batch: Any, scale: float = 1.0) -> Grads:
        return sam(self.radius * scale, grads, model, batch)


@every_adjoint
@pytest.mark.parametrize("made", ["partial", "object"])
@pytest.mark.parametrize("several", [False, True])
def test_sharpness_aware_steps(adjoint: diffopt.Adjoint, made: str, several: bool) -> None:
    torch.manual_seed(0)
    model, radius = tiny(), torch.tensor(0.05, dtype=torch.double, requires_grad=True)
    transform = functools.partial(sam, radius) if made == "partial" else Sharpness(radius)
    parts = [list(model[0].parameters()), list(model[2].parameters())]
    one: Any = diffopt.SGD(model.parameters(), lr=0.1)
    opt = [diffopt.SGD(part, lr=0.1) for part in parts] if several else one
    fast = diffopt.unroll(model, opt, DATA, mse, adjoint=adjoint, grad_transform=transform)
    inputs = [radius, *model.parameters()]
    found = torch.autograd.grad(mse(fast, DATA[0]), inputs)
    expected = torch.autograd.grad(at(model, plain(model, DATA, radius, 0.1), DATA[0]), inputs)
    assert_all_close(found, expected, rtol=1e-10, atol=1e-12)


def test_with_tasks() -> None:
    torch.manual_seed(0)
    model, radius = tiny(), torch.tensor(0.05, dtype=torch.double, requires_grad=True)
    data = [(x + torch.randn(2, 1, 1), y.expand(2, *y.shape)) for x, y in DATA]
    inputs = [radius, *model.parameters()]
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    transform = functools.partial(sam, radius)
    fast = diffopt.unroll(model, inner, data, mse, tasks=2, grad_transform=transform)
    found = torch.autograd.grad(fast.apply(mse, data[0]).sum(), inputs)
    total: Any = 0
    for k in range(2):
        own = [(x[k], y[k]) for x, y in data]
        total = total + at(model, plain(model, own, radius, 0.1), own[0])
    assert_all_close(found, torch.autograd.grad(total, inputs), rtol=1e-10, atol=1e-12)


def by_autograd(grads: Grads, model: Any, batch: Any) -> Grads:
    loss = mse(model, batch)
    names = list(grads)
    found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return dict(zip(names, found, strict=True))


def by_backward(grads: Grads, model: Any, batch: Any) -> Grads:
    mse(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters()}


class TestRefused:
    def unroll(self, transform: Any, **more: Any) -> None:
        model = tiny()
        inner = diffopt.SGD(model.parameters(), lr=0.1)
        data = [(x.expand(2, *x.shape), y.expand(2, *y.shape)) for x, y in DATA]
        steps = data if "tasks" in more else DATA
        diffopt.unroll(model, inner, steps, mse, grad_transform=transform, **more)
        assert all(p.grad is None for p in model.parameters())

    def test_two_arguments(self) -> None:
        with pytest.raises(TypeError, match=r"takes 2 arguments: .* or as f\(grads, model, batch"):
            self.unroll(lambda grads, model: grads)

    def test_a_gradient_without_its_graph(self) -> None:
        """It would be a constant of the loop, without a word."""
        for more in ({}, {"adjoint": diffopt.StoreAll()}, {"microbatches": 2}):
            with pytest.raises(RuntimeError, match=r"into .grad at step 0.*create_graph=True"):
                self.unroll(by_backward, **more)

    def test_a_graph_under_vmap(self) -> None:
        self.unroll(by_autograd)
        with pytest.raises(
            RuntimeError, match=r"with tasks=2, .* take the gradient with torch\.func"
        ):
            self.unroll(by_autograd, tasks=2)
