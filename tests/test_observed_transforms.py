"""A ``grad_transform`` that takes gradients, and leaves that a loss makes for itself."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from observed import (
    ADJOINTS,
    Inputs,
    Train,
    cases,
    data,
    every_adjoint,
    learned,
    outcome,
    small,
    squares,
)
from torch import Tensor, nn

import diffopt

STEPS = 4
Grads = dict[str, Tensor]


def _flat(grads: Grads) -> Tensor:
    return torch.cat([g.flatten() for g in grads.values()])


def _normalized(grads: Grads, phi: Tensor) -> Grads:
    """∂‖φg‖/∂φ, taken where φ is captured."""
    norm = (phi * _flat(grads)).square().sum().sqrt()
    (size,) = torch.autograd.grad(norm, phi, create_graph=True)
    return {n: g * size for n, g in grads.items()}


def _own_leaf(grads: Grads, phi: Tensor) -> Grads:
    scale = torch.ones((), dtype=phi.dtype, requires_grad=True)
    value = (scale * phi * _flat(grads)).tanh().sum()
    (size,) = torch.autograd.grad(value, scale, create_graph=True)
    return {n: g * (1 + 0.1 * size) for n, g in grads.items()}


def _through_the_gradients(grads: Grads, phi: Tensor) -> Grads:
    """The gradient of a function of the gradients, in them."""
    value = sum((phi * g).tanh().square().sum() for g in grads.values())
    found = torch.autograd.grad(value, list(grads.values()), create_graph=True)
    return {n: g + 0.1 * h for (n, g), h in zip(grads.items(), found, strict=True)}


def _surgery(grads: Grads, phi: Tensor) -> Grads:
    """Project onto what agrees with another gradient (PCGrad)."""
    flat = _flat(grads)
    direction = torch.linspace(-1, 1, len(flat), dtype=flat.dtype)
    point = direction.clone().requires_grad_()
    (other,) = torch.autograd.grad((phi * point.tanh()).sum(), point, create_graph=True)
    share = (flat @ other).clamp(max=0) / other.square().sum()
    parts = (flat - share * other).split([g.numel() for g in grads.values()])
    return {n: p.view_as(g) for (n, g), p in zip(grads.items(), parts, strict=True)}


def _first_order(grads: Grads, phi: Tensor) -> Grads:
    """Without ``create_graph``: the size is a constant."""
    norm = (phi * _flat(grads)).square().sum()
    (size,) = torch.autograd.grad(norm, phi, retain_graph=True)
    return {n: g * (1 + 0.1 * size) for n, g in grads.items()}


def _by_func(grads: Grads, phi: Tensor) -> Grads:
    size = torch.func.grad(lambda k: (k * _flat(grads)).tanh().sum())(phi)
    return {n: g * (1 + 0.1 * size) for n, g in grads.items()}


def _enabled(grads: Grads, phi: Tensor) -> Grads:
    assert torch.is_grad_enabled(), "grad mode is to be on in grad_transform"
    assert not torch.is_inference_mode_enabled()
    return {n: phi * g for n, g in grads.items()}


def _two_orders(grads: Grads, phi: Tensor) -> Grads:
    value = (phi**3 * _flat(grads)).sin().sum()
    (first,) = torch.autograd.grad(value, phi, create_graph=True)
    (second,) = torch.autograd.grad(first, phi, create_graph=True)
    return {n: g * (1 + 0.05 * second) for n, g in grads.items()}


def _by_a_module(grads: Grads, phi: Tensor) -> Grads:
    """A learned optimizer that is told the slope of its own output."""
    g = _flat(grads)
    x = g.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad((phi * x).tanh().sum(), x, create_graph=True)
    parts = (g * slope).split([v.numel() for v in grads.values()])
    return {n: p.view_as(v) for (n, v), p in zip(grads.items(), parts, strict=True)}


def _cut(grads: Grads, phi: Tensor) -> Grads:
    with torch.no_grad():
        size = _flat(grads).norm()
    return {n: phi * g / (1 + size) for n, g in grads.items()}


TRANSFORMS = {
    "slope of a norm": _normalized,
    "leaf of its own": _own_leaf,
    "in the gradients": _through_the_gradients,
    "surgery": _surgery,
    "first order": _first_order,
    "torch.func.grad": _by_func,
    "grad mode is on": _enabled,
    "second order": _two_orders,
    "slope of a module": _by_a_module,
    "no_grad within": _cut,
}


@cases("transform", TRANSFORMS)
@pytest.mark.parametrize("learns", [True, False], ids=["learned", "constant"])
@every_adjoint
def test_transform_that_takes_a_gradient(adjoint: str, learns: bool, transform: Any) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x, phi = small(), data(), learned(0.7)
        inputs = [*model.parameters(), *([phi] if learns else [])]

        def change(grads: Grads) -> Grads:
            # An alias: what earlier steps made of φ is a constant of this step's derivative.
            found: Grads = transform(grads, phi.view_as(phi))
            return found

        fast = train(model, STEPS, lambda m, t: squares(m(x) - 1), grad_transform=change)
        return squares(fast(x)), inputs

    outcome(experiment, adjoint)


@cases("transform", {k: TRANSFORMS[k] for k in ("slope of a norm", "second order")})
@every_adjoint
def test_gradient_in_a_captured_leaf_does_not_depend_on_the_adjoint(
    adjoint: str, transform: Any
) -> None:
    """As above, without the alias: earlier steps' weights stay constants of a step's derivative."""

    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x, phi = small(), data(), learned(0.7)

        def change(grads: Grads) -> Grads:
            found: Grads = transform(grads, phi if train.ours else phi.view_as(phi))
            return found

        fast = train(model, STEPS, lambda m, t: squares(m(x) - 1), grad_transform=change)
        return squares(fast(x)), [*model.parameters(), phi]

    outcome(experiment, adjoint, "either", r"(?i)grad")


@every_adjoint
def test_transform_is_called_in_grad_mode_where_nothing_is_learned(adjoint: str) -> None:
    model, x = small(), data()
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    modes = []

    def change(grads: Grads) -> Grads:
        modes.append(torch.is_grad_enabled())
        return grads

    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            diffopt.unroll(
                model,
                inner,
                STEPS,
                lambda m, t: squares(m(x)),
                adjoint=ADJOINTS[adjoint],
                grad_transform=change,
            )
    assert all(modes)


# Leaves that the loss makes, and something holds.


class Holding(torch.autograd.Function):
    """Keeps its input on its context, as an attribute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.x.cos()


def _penalty(m: nn.Module, x: Tensor, hold: Any) -> Tensor:
    leaf = x.clone().requires_grad_()
    hold(leaf)
    (slope,) = torch.autograd.grad(m(leaf).sum(), leaf, create_graph=True)
    return squares(m(x) - 1) + squares(slope)


def _in_a_list(m: nn.Module, x: Tensor, held: Any) -> Tensor:
    return _penalty(m, x, held.items.append)


def _in_an_attribute(m: nn.Module, x: Tensor, held: Any) -> Tensor:
    return _penalty(m, x, lambda leaf: setattr(held, "leaf", leaf))


def _by_a_hook(m: nn.Module, x: Tensor, held: Any) -> Tensor:
    def hold(leaf: Tensor) -> None:
        leaf.register_hook(lambda g: held.items.append(leaf))

    return _penalty(m, x, hold)


def _by_a_hook_of_another(m: nn.Module, x: Tensor, held: Any) -> Tensor:
    leaf = x.clone().requires_grad_()
    out = m(leaf)
    out.register_hook(lambda g: g + 0 * leaf.sum())
    (slope,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    return squares(out - 1) + squares(slope)


def _by_a_function(m: nn.Module, x: Tensor, held: Any) -> Tensor:
    leaf = x.clone().requires_grad_()
    out = m(Holding.apply(leaf))
    (slope,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    return squares(m(x) - 1) + squares(slope)


def _by_a_partial(m: nn.Module, x: Tensor, held: Any) -> Tensor:
    return _penalty(m, x, lambda leaf: held.items.append(functools.partial(torch.sin, leaf)))


def _as_a_parameter(m: nn.Module, x: Tensor, held: Any) -> Tensor:
    made = nn.Parameter(x.mean(0))
    held.leaf = made
    out = m(x + made)
    (slope,) = torch.autograd.grad(out.sum(), made, create_graph=True)
    return squares(out - 1) + squares(slope)


def _unused(m: nn.Module, x: Tensor, held: Any) -> Tensor:
    leaf = x.clone().requires_grad_()
    held.items.append(leaf)
    return squares(m(leaf) - 1)


def _computed_from(m: nn.Module, x: Tensor, held: Any) -> Tensor:
    return _penalty(m, x, lambda leaf: held.items.append(leaf * 2))


def _in_a_cache(m: nn.Module, x: Tensor, held: Any) -> Tensor:
    return _penalty(m, x, lambda leaf: held.table.__setitem__(len(held.table), leaf))


def _inner_layer(m: nn.Module, x: Tensor, held: Any) -> Tensor:
    """A model made within the loss, of whose weights a gradient is taken."""
    layer = nn.Linear(2, 2).double()
    held.leaf = layer
    out = layer(m(x))
    found = torch.autograd.grad(squares(out), list(layer.parameters()), create_graph=True)
    return squares(out - 1) + sum(squares(g) for g in found)


def _nested_unroll(m: nn.Module, x: Tensor, held: Any) -> Tensor:
    layer = nn.Linear(2, 2).double()
    aim = m(x)
    if held.ours:
        inner = diffopt.SGD(layer.parameters(), lr=0.1)
        fast = diffopt.unroll(layer, inner, 2, lambda h, t: squares(h(x) - aim), segment=1)
        return squares(fast(x) - 1) + squares(aim)
    w, b = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    for _ in range(2):
        loss = squares(x @ w.t() + b - aim)
        gw, gb = torch.autograd.grad(loss, [w, b], create_graph=True)
        w, b = w - 0.1 * gw, b - 0.1 * gb
    return squares(x @ w.t() + b - 1) + squares(aim)


def _nested_unroll_of_a_given_start(m: nn.Module, x: Tensor, held: Any) -> Tensor:
    """The nested start is a leaf that the loss makes from its input."""
    start = x.mean(0).clone().requires_grad_()
    aim = m(x)
    if held.ours:
        layer = nn.Module()
        layer.w = nn.Parameter(torch.zeros(2, dtype=x.dtype))
        inner = diffopt.SGD(layer.parameters(), lr=0.1)
        fast = diffopt.unroll(
            layer, inner, 2, lambda h, t: squares(x * h.w - aim), initial={"w": start}
        )
        return squares(x * fast.params["w"] - 1) + squares(aim)
    w = start
    for _ in range(2):
        (g,) = torch.autograd.grad(squares(x * w - aim), w, create_graph=True)
        w = w - 0.1 * g
    return squares(x * w - 1) + squares(aim)


LEAVES = {
    "in a list": _in_a_list,
    "in an attribute": _in_an_attribute,
    "its own hook": _by_a_hook,
    "another's hook": _by_a_hook_of_another,
    "a Function's attribute": _by_a_function,
    "a partial": _by_a_partial,
    "a parameter": _as_a_parameter,
    "no gradient taken": _unused,
    "what is computed from it": _computed_from,
    "a cache": _in_a_cache,
    "a layer": _inner_layer,
    "a nested unroll": _nested_unroll,
    "the start of a nested unroll": _nested_unroll_of_a_given_start,
}


@cases("loss", LEAVES)
@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@every_adjoint
def test_leaf_that_the_loss_makes(adjoint: str, late: bool, loss: Any) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = small(), data()
        held = types.SimpleNamespace(items=[], table={}, leaf=None, ours=train.ours)

        def loss_fn(m: nn.Module, t: int) -> Tensor:
            if late and t < 2:
                return squares(m(x) - 1)
            found: Tensor = loss(m, x, held)
            return found

        fast = train(model, STEPS, loss_fn)
        return squares(fast(x)), list(model.parameters())

    outcome(experiment, adjoint)
