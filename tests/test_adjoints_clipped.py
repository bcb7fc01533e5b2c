"""``max_cotangent_norm`` and a second derivative: the clipped gradient is a function, and it is
differentiated as such. The oracles are a plain loop of vector-Jacobian products with the bound
between them, and central differences of the first gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from adjoints import every_adjoint
from helpers import assert_all_close, batches, mse, tiny
from torch import Tensor, nn

import diffopt

T, BOUND, MOMENTUM = 4, 0.3, 0.6
DATA = list[tuple[Tensor, Tensor]]


def problem() -> tuple[nn.Module, DATA, list[Tensor], list[Tensor]]:
    """A model, its data, the inputs, and the cotangent of the result."""
    torch.manual_seed(0)
    model, data = tiny(), batches(T)
    lr = torch.tensor(0.4, dtype=torch.double, requires_grad=True)
    scale = torch.tensor(1.7, dtype=torch.double, requires_grad=True)
    outer = [2 * torch.randn_like(p) for p in model.parameters()]
    return model, data, [lr, scale, *model.parameters()], outer


def gradient(
    model: nn.Module,
    data: DATA,
    inputs: Sequence[Tensor],
    outer: Sequence[Tensor],
    adjoint: diffopt.Adjoint,
    losses: bool = True,
) -> tuple[Tensor, ...]:
    """The clipped gradient, a function of ``inputs`` and of ``outer``."""
    lr, scale, *params = inputs
    inner = diffopt.Momentum(model.parameters(), lr=lr, momentum=MOMENTUM)
    names = [name for name, _ in model.named_parameters()]
    fast = diffopt.unroll(
        model,
        inner,
        data,
        lambda m, pair: scale * mse(m, pair),
        initial=dict(zip(names, params, strict=True)),
        adjoint=adjoint,
        max_cotangent_norm=BOUND,
    )
    results = [*fast.params.values(), *([fast.losses] if losses else [])]
    cotangents = [*outer, *([torch.ones(T, dtype=torch.double)] if losses else [])]
    return torch.autograd.grad(results, inputs, cotangents, create_graph=True)


def gradient_plainly(
    model: nn.Module, data: DATA, inputs: Sequence[Tensor], outer: Sequence[Tensor]
) -> list[Tensor]:
    """Heavy ball, b ← μ b + g, θ ← θ − γ b; then one VJP a step, of bounded cotangents."""
    n = len(outer)
    names = [name for name, _ in model.named_parameters()]

    def step(lr: Tensor, scale: Tensor, state: Sequence[Tensor], pair: Any) -> list[Tensor]:
        params, averages = state[:n], state[n:]
        out = torch.func.functional_call(model, dict(zip(names, params, strict=True)), pair[0])
        loss = scale * (out - pair[1]).square().mean()
        grads = torch.autograd.grad(loss, params, create_graph=True)
        averages = [MOMENTUM * b + g for b, g in zip(averages, grads, strict=True)]
        return [*(p - lr * b for p, b in zip(params, averages, strict=True)), *averages, loss]

    states = [[*inputs[2:], *(torch.zeros_like(c, requires_grad=True) for c in outer)]]
    for pair in data:
        states.append(step(*inputs[:2], states[-1], pair)[:-1])
    flowing = [*outer, *(torch.zeros_like(c) for c in outer)]
    total = [torch.zeros_like(x) for x in inputs[:2]]
    for state, pair in zip(states[-2::-1], reversed(data), strict=True):
        norm = torch.cat([c.flatten() for c in flowing[:n]]).norm()
        factor = torch.minimum(torch.ones_like(norm), BOUND / norm)
        flowing = [factor * c for c in flowing[:n]] + flowing[n:]
        own = [x.view_as(x) for x in (*inputs[:2], *state)]  # so that the graph ends there
        after = step(own[0], own[1], own[2:], pair)
        ones = torch.ones((), dtype=torch.double)
        found = torch.autograd.grad(
            after, own, [*flowing, ones], create_graph=True, materialize_grads=True
        )
        total = [a + b for a, b in zip(total, found[:2], strict=True)]
        flowing = list(found[2:])
    return [*total, *flowing[:n]]


def direction_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    torch.manual_seed(7)
    return [torch.randn_like(x) for x in tensors]


@every_adjoint
def test_the_clipped_gradient_and_its_derivative_are_a_plain_loops(
    adjoint: diffopt.Adjoint,
) -> None:
    model, data, inputs, outer = problem()
    outer = [c.requires_grad_() for c in outer]
    got = gradient(model, data, inputs, outer, adjoint)
    want = gradient_plainly(model, data, inputs, outer)
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)
    v = direction_like(got)
    arguments = [*inputs, *outer]
    assert_all_close(
        torch.autograd.grad(got, arguments, v),
        torch.autograd.grad(want, arguments, v),
        rtol=1e-9,
        atol=1e-12,
    )


@every_adjoint
def test_the_second_derivative_is_that_of_finite_differences(adjoint: diffopt.Adjoint) -> None:
    """Along a direction in the inputs and in the outer cotangent."""
    model, data, inputs, outer = problem()
    outer = [c.requires_grad_() for c in outer]
    arguments = [*inputs, *outer]
    u, v = direction_like(arguments), direction_like([*inputs])

    def value(h: float) -> Tensor:
        moved = [(x + h * d).detach().requires_grad_() for x, d in zip(arguments, u, strict=True)]
        found = gradient(model, data, moved[: len(inputs)], moved[len(inputs) :], adjoint)
        return torch.stack([(g * d).sum() for g, d in zip(found, v, strict=True)]).sum().detach()

    h = 1e-5
    expected = (value(h) - value(-h)) / (2 * h)
    got = gradient(model, data, inputs, outer, adjoint)
    second = torch.autograd.grad(got, arguments, v)
    found = sum((g * d).sum() for g, d in zip(second, u, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@every_adjoint
def test_the_second_derivative_is_linear_in_its_vector(adjoint: diffopt.Adjoint) -> None:
    model, data, inputs, outer = problem()
    got = gradient(model, data, inputs, outer, adjoint, losses=False)
    v = direction_like(got)
    once = torch.autograd.grad(got, inputs, v, retain_graph=True)
    tenfold = torch.autograd.grad(got, inputs, [10 * x for x in v])
    assert_all_close(tenfold, [10 * g for g in once], rtol=1e-11, atol=1e-12)


def test_the_bound_takes_effect_here() -> None:
    model, data, inputs, outer = problem()
    clipped = gradient(model, data, inputs, outer, diffopt.StoreAll())
    assert math.hypot(*(float(c.norm()) for c in outer)) > 2 * BOUND
    doubled = gradient(model, data, inputs, [2 * c for c in outer], diffopt.StoreAll())
    assert_all_close(clipped, doubled, rtol=1e-12, atol=1e-14)
