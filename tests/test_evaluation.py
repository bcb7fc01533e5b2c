"""Gradients whose values nobody reads: left out where that is so, and nowhere else.

The oracle is a loop that keeps the graph of every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import diffopt
from diffopt._derivatives import evaluation as _evaluation
from diffopt._derivatives import linear as _linear

STEPS = 4
X = torch.linspace(-1.0, 1.5, 24, dtype=torch.double).mul(7).sin().reshape(8, 3)
Y = torch.linspace(0.3, -0.7, 8, dtype=torch.double).mul(5).cos().reshape(8, 1)
MASK = torch.tensor([0.4, 1.0, 1.7], dtype=torch.double, requires_grad=True)

Loss = Callable[[Any, int], Tensor]


@pytest.fixture(autouse=True)
def left_out(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What gradients were left out of, by layers of any size."""
    found: list[Tensor] = []

    def noted(x: Tensor) -> Tensor:
        found.append(x)
        return _evaluation.nothing_like(x)

    monkeypatch.setattr(_linear, "WORTHWHILE", 0)
    monkeypatch.setattr(_linear, "nothing_like", noted)
    return found


def mlp() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def plain(model: Any, t: int) -> Tensor:
    return (model(X + 0.1 * t) - Y).square().mean()


def hooked_gradients(model: Any, t: int) -> Tensor:
    """A learned mask on the gradient: its own gradient needs the values."""
    if model[0].weight.requires_grad:
        model[0].weight.register_hook(lambda g: g * MASK)
    return plain(model, t) + 0 * MASK.sum()


def penalised_gradients(model: Any, t: int) -> Tensor:
    """The loss itself takes gradients of the parameters, and reads their values."""
    with torch.enable_grad():
        value = plain(model, t)
        weights = [model[0].weight, model[2].weight]
        grads = torch.autograd.grad(value, weights, create_graph=True)
    return value + 0.1 * sum(g.pow(4).sum() for g in grads)


def shared_weights(model: Any, t: int) -> Tensor:
    hidden = model[0](X + 0.1 * t).tanh()
    again = F.linear(hidden, model[0].weight.t(), None).sin()  # not a leaf
    twice = F.linear(again, model[0].weight).tanh()
    return (model[2](hidden + twice) - Y).square().mean()


def the_weight_as_an_input(model: Any, t: int) -> Tensor:
    rows = F.linear(model[2].weight, model[0].weight.t())
    return plain(model, t) + 0.1 * rows.cos().mean()


def checkpointed(model: Any, t: int) -> Tensor:
    hidden = checkpoint(model[0], X + 0.1 * t, use_reentrant=False)
    return (model[2](hidden.tanh()) - Y).square().mean()


def in_double_precision(model: Any, t: int) -> Tensor:
    """Weights that are no leaves: computed from the parameters."""
    hidden = F.linear(X + 0.1 * t, model[0].weight * 1.5, model[0].bias).tanh()
    return (model[2](hidden) - Y).square().mean()


def nested(model: Any, t: int) -> Tensor:
    """Another training inside the loss, one step by hand."""
    inner = plain(model, t + 1)
    (g,) = torch.autograd.grad(inner, [model[2].weight], create_graph=True)
    hidden = model[0](X + 0.1 * t).tanh()
    return (F.linear(hidden, model[2].weight - 0.3 * g, model[2].bias) - Y).square().mean()


LOSSES: dict[str, Loss] = {
    f.__name__: f
    for f in (
        plain,
        hooked_gradients,
        penalised_gradients,
        shared_weights,
        the_weight_as_an_input,
        checkpointed,
        in_double_precision,
        nested,
    )
}

ADJOINTS = diffopt.Segmented(1), diffopt.Segmented(2), diffopt.Binomial(2)


def outer(model: Any) -> Tensor:
    return (model(X.flip(0)) - Y).pow(4).mean()


def by_hand(loss: Loss, lr: Any, momentum: float, decay: float) -> list[Tensor]:
    """The gradients of the initial parameters, the mask and the learning rate."""
    model = mlp()
    start = dict(model.named_parameters())
    params: dict[str, Tensor] = dict(start)
    buffers: dict[str, Tensor] = {}
    for t in range(STEPS):
        seen = {name: p.view_as(p) for name, p in params.items()}
        value = torch.func.functional_call(_Called(model, loss), _under(seen), (t,))
        grads = torch.autograd.grad(value, list(seen.values()), create_graph=True)
        for p in seen.values():  # hooks are for the inner gradient, not for its derivative
            (p._backward_hooks or {}).clear()
        for (name, p), g in zip(params.items(), grads, strict=True):
            g = g + decay * p
            buffers[name] = g if t == 0 else momentum * buffers[name] + g
            params[name] = p - lr * buffers[name]
    value = torch.func.functional_call(_Called(model, lambda m, t: outer(m)), _under(params), (0,))
    wanted = [*start.values(), MASK, *([lr] if isinstance(lr, Tensor) else [])]
    return list(torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True))


class _Called(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, t: int) -> Tensor:
        return self.loss(self.model, t)


def _under(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": p for name, p in params.items()}


def unrolled(loss: Loss, adjoint: Any, lr: Any = 0.3, **options: Any) -> list[Tensor]:
    model = mlp()
    opt = diffopt.SGD(model.parameters(), lr=lr, **options)
    value = outer(diffopt.unroll(model, opt, STEPS, loss, adjoint=adjoint))
    wanted = [*model.parameters(), MASK, *([lr] if isinstance(lr, Tensor) else [])]
    return list(torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True))


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("name", LOSSES)
def test_exact(name: str, adjoint: Any, left_out: list[Tensor]) -> None:
    assert_equal(unrolled(LOSSES[name], adjoint), by_hand(LOSSES[name], 0.3, 0, 0))
    assert left_out


@pytest.mark.parametrize("name", LOSSES)
def test_exact_with_momentum_and_decay(name: str, left_out: list[Tensor]) -> None:
    options = {"momentum": 0.8, "weight_decay": 0.1}
    found = unrolled(LOSSES[name], diffopt.Segmented(1), **options)
    assert_equal(found, by_hand(LOSSES[name], 0.3, 0.8, 0.1))
    assert left_out


def test_where_the_values_are_read_they_are_there(left_out: list[Tensor]) -> None:
    lr = torch.tensor(0.3, dtype=torch.double, requires_grad=True)
    assert_equal(unrolled(plain, diffopt.Segmented(1), lr), by_hand(plain, lr, 0, 0))
    model = mlp()
    for opt, transform in (
        (diffopt.Adam(model.parameters()), None),
        (diffopt.SGD(model.parameters(), lr=lambda t: lr / (1 + t)), None),
        (diffopt.SGD(model.parameters()), lambda g: {k: x.tanh() for k, x in g.items()}),
    ):
        trained = diffopt.unroll(model, opt, STEPS, plain, segment=1, grad_transform=transform)
        outer(trained).backward()
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        outer(diffopt.unroll(model, diffopt.SGD(model.parameters()), 2, plain, segment=1))
    assert not left_out


def test_detect_anomaly_sees_no_nan(left_out: list[Tensor]) -> None:
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        found = unrolled(plain, diffopt.Segmented(1))
    assert_equal(found, by_hand(plain, 0.3, 0, 0))
    assert not left_out


def test_a_schedule_of_numbers_reads_nothing(left_out: list[Tensor]) -> None:
    found = unrolled(plain, diffopt.Segmented(1), lambda t: 0.3 / (1 + t))
    stored = unrolled(plain, diffopt.StoreAll(), lambda t: 0.3 / (1 + t))
    assert_equal(found, stored)
    assert len(left_out) == 2 * STEPS


def test_small_layers_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, left_out: list[Tensor]
) -> None:
    monkeypatch.setattr(_linear, "WORTHWHILE", 8 * 4 * 3)
    unrolled(plain, diffopt.Segmented(1))
    assert [x.shape for x in left_out] == [(3, 4)] * STEPS  # turned


class Products(TorchDispatchMode):
    """Counts the multiplications in products of matrices."""

    multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def test_the_products_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    with Products() as fewer:
        unrolled(plain, diffopt.Segmented(1))
    monkeypatch.setattr(_linear, "WORTHWHILE", float("inf"))
    with Products() as all_of_them:
        unrolled(plain, diffopt.Segmented(1))
    saved = all_of_them.multiplications - fewer.multiplications
    assert saved == STEPS * 8 * (3 * 4 + 4 * 1)


def test_no_more_is_computed_than_a_pass_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the model's input, in the loss, does not need those of its weights."""

    def slope(model: Any, t: int) -> Tensor:
        x = X.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), [x], create_graph=True)
        return plain(model, t) + g.square().mean()

    with Products() as ours:
        unrolled(slope, diffopt.StoreAll())
    monkeypatch.setattr(_linear, "WORTHWHILE", float("inf"))
    with Products() as theirs:
        unrolled(slope, diffopt.StoreAll())
    assert ours.multiplications == theirs.multiplications
