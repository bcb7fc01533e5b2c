"""An unroll of a model inside the loss of an unroll of the same model: two levels of learning."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from helpers import assert_all_close, batch, batches, mse, tiny
from oracle import Plain, plain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import diffopt

ADJOINTS = [
    (diffopt.Segmented(), diffopt.Segmented()),
    (diffopt.Segmented(1), diffopt.Segmented(2)),
    (diffopt.StoreAll(), diffopt.Segmented(1)),
    (diffopt.Segmented(2), diffopt.StoreAll()),
    (diffopt.Binomial(2), diffopt.Binomial(2)),
]
every_pair = pytest.mark.parametrize("adjoints", ADJOINTS, ids=repr)


def adapted(m: nn.Module, pair: Any, lr: Tensor, adjoint: diffopt.Adjoint) -> diffopt.Unrolled:
    """Two steps on the last layer alone: what is before it is a constant of the inner loop."""
    params = [p for name, p in m.named_parameters() if name.startswith("2.")]
    inner = diffopt.SGD(params, lr=lr, differentiable=True)  # fast weights are no leaves
    return diffopt.unroll(m, inner, [pair] * 2, mse, adjoint=adjoint)


def adapted_plainly(m: nn.Module, pair: Any, lr: Tensor) -> Plain:
    return plain(m, [("2.", {"lr": lr})], [pair] * 2, mse)


@every_pair
def test_the_same_model_on_both_levels(adjoints: tuple[diffopt.Adjoint, diffopt.Adjoint]) -> None:
    outside, inside = adjoints
    model, data, query = tiny(), batches(3), batch()
    lr = torch.tensor(0.2, dtype=torch.double, requires_grad=True)
    inputs = [lr, *model.parameters()]

    def loss_fn(m: Any, pair: Any) -> Tensor:
        return mse(adapted(m, pair, lr, inside), query)

    def loss_fn_plainly(m: Any, pair: Any) -> Tensor:
        return mse(adapted_plainly(m, pair, lr), query)

    inner = diffopt.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, inner, data, loss_fn, adjoint=outside)
    got = torch.autograd.grad(mse(fast, data[0]), inputs)
    expected = plain(model, {"lr": 0.1}, data, loss_fn_plainly)
    want = torch.autograd.grad(mse(expected, data[0]), inputs)
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)


@every_pair
def test_an_unroll_from_fast_weights_that_stand_no_more(
    adjoints: tuple[diffopt.Adjoint, diffopt.Adjoint],
) -> None:
    """By its backward pass the module holds its own weights again."""
    outside, inside = adjoints
    model, data, query = tiny(), batches(3), batch()
    lr = torch.tensor(0.2, dtype=torch.double, requires_grad=True)
    inputs = [lr, *model.parameters()]

    inner = diffopt.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, inner, data, mse, adjoint=outside)
    final = fast.apply(lambda m: mse(adapted(m, data[0], lr, inside), query))
    got = torch.autograd.grad(final, inputs)
    expected = plain(model, {"lr": 0.1}, data, mse)
    want = torch.autograd.grad(
        expected.apply(lambda m: mse(adapted_plainly(m, data[0], lr), query)), inputs
    )
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)


class Written(nn.Module):
    """A normalisation in operations that PyTorch differentiates rightly to any order."""

    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(self.dims, keepdim=True)
        return centred / (centred.square().mean(self.dims, keepdim=True) + 1e-5).sqrt()


NORMS = {
    "layer": (nn.LayerNorm(4, elementwise_affine=False), [-1]),
    "batch": (nn.BatchNorm1d(3, affine=False), [0, -1]),
    "instance": (nn.InstanceNorm1d(3), [-1]),
}


@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize("norm", NORMS)
def test_a_hypergradient_through_a_normalisation_is_differentiated(
    norm: str, tasks: int | None
) -> None:
    """PyTorch's own third derivatives of these are wrong.

    Of many tasks they are mapped over, and PyTorch's own are in the first derivatives.
    """
    torch.manual_seed(0)
    x = torch.randn(*(() if tasks is None else (tasks,)), 5, 3, 4, dtype=torch.double)
    linear = nn.Linear(4, 4, dtype=torch.double)
    inputs = list(linear.parameters())
    direction = [torch.randn_like(p) for p in inputs]

    def loss_fn(m: Any, batch: Tensor) -> Tensor:
        result: Tensor = m(batch) * torch.linspace(0, 1, batch.numel()).view(batch.shape)
        return result.sin().sum()

    def product(norm: nn.Module) -> tuple[Tensor, ...]:
        model = nn.Sequential(linear, norm.double())
        inner = diffopt.SGD(model.parameters(), lr=0.05)
        fast = diffopt.unroll(model, inner, [x, x.flip(-3)], loss_fn, tasks=tasks)
        loss = fast.apply(loss_fn, x.sin()).sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(grads, inputs, direction)

    theirs, dims = NORMS[norm]
    assert_all_close(product(theirs), product(Written(dims)), rtol=1e-8, atol=1e-8)


def by_autograd(value: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(value(x), x, create_graph=True)[0]


@pytest.mark.parametrize(
    ("take", "tasks"), [(by_autograd, None), (torch.func.grad, None), (torch.func.grad, 2)]
)
@pytest.mark.parametrize("norm", NORMS)
def test_a_loss_that_takes_a_derivative_of_a_normalisation(
    norm: str, take: Any, tasks: int | None
) -> None:
    """The meta-gradient of a gradient penalty is a third derivative."""
    torch.manual_seed(0)
    x = torch.randn(*([] if tasks is None else [tasks]), 5, 3, 4, dtype=torch.double)
    linear = nn.Linear(4, 4, dtype=torch.double)
    inputs = list(linear.parameters())

    def outcome(m: Any, batch: Tensor) -> Tensor:
        result: Tensor = m(batch) * torch.linspace(0, 1, batch.numel()).view(batch.shape)
        return result.sin().sum()

    def loss_fn(m: Any, batch: Tensor) -> Tensor:
        value = functools.partial(outcome, m)
        grad = take(value, batch) if take is by_autograd else take(value)(batch)
        return value(batch) + grad.square().sum()

    def gradient(norm: nn.Module) -> tuple[Tensor, ...]:
        model = nn.Sequential(linear, norm.double())
        inner = diffopt.SGD(model.parameters(), lr=0.01)
        fast = diffopt.unroll(model, inner, [x, x.flip(-2)], loss_fn, tasks=tasks)
        return torch.autograd.grad(fast.losses.sum(), inputs)

    own, dims = NORMS[norm]
    own = copy.deepcopy(own)
    if isinstance(own, nn.BatchNorm1d):
        own.track_running_stats, own.running_mean, own.running_var = False, None, None
    assert_all_close(gradient(own), gradient(Written(dims)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("norm", NORMS)
def test_such_a_loss_of_first_order_and_under_autocast(norm: str) -> None:
    x = torch.randn(5, 3, 4)
    model = nn.Sequential(nn.Linear(4, 4), copy.deepcopy(NORMS[norm][0]).float())

    def loss_fn(m: Any, t: int) -> Tensor:
        return by_autograd(lambda x: m(x).float().sin().sum(), x).square().sum()

    def unrolled(**more: Any) -> diffopt.Unrolled:
        inner = diffopt.SGD(model.parameters(), lr=0.01)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return diffopt.unroll(model, inner, 2, loss_fn, **more)

    params = list(model[0].parameters())
    got = torch.autograd.grad(unrolled().losses.sum(), params)
    model = nn.Sequential(model[0], Written(NORMS[norm][1]))
    want = torch.autograd.grad(unrolled().losses.sum(), params)
    scale = max(w.abs().max() for w in want)
    assert all((g - w).abs().max() < 0.05 * scale for g, w in zip(got, want, strict=True))
    fast = unrolled(adjoint=diffopt.FirstOrder())
    sum(p.sum() for p in fast.params.values()).backward()
    assert all(p.grad is not None for p in model[0].parameters())


def test_a_checkpointed_normalisation_under_autocast_is_differentiated_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    x = torch.randn(3, 4)

    def loss_fn(m: Any, t: int) -> Tensor:
        y: Tensor = checkpoint(m, x, use_reentrant=False)
        return y.float().sin().sum()

    inner = diffopt.SGD(model.parameters(), lr=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = diffopt.unroll(model, inner, 2, loss_fn)
    params = list(model.parameters())
    grads = torch.autograd.grad(fast.losses.sum(), params, create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in grads), params)
    assert all(g.isfinite().all() for g in again)


class Middle(nn.Module):
    """Learns a constant and the rate of an unroll that its own loss contains."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))
        self.log_lr = nn.Parameter(torch.tensor(-1.0))


@pytest.mark.parametrize("segment", [1, 2])
def test_a_rate_read_from_the_module_around(segment: int) -> None:
    """The way back through the inner unroll calls the rate's function after ``apply`` has ended."""
    model, inner = Middle().double(), nn.Linear(3, 1).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()

    def loss_fn(m: Any, t: int) -> Tensor:
        opt = diffopt.SGD(inner.parameters(), lr=lambda t: m.log_lr.exp())
        fast = diffopt.unroll(inner, opt, 2, lambda n, t: (n(x) - y).square().mean(), segment=1)
        return (fast(x) + m.shift - y).square().mean()

    def outer() -> Tensor:
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        value: Tensor = diffopt.unroll(model, opt, 2, loss_fn, segment=segment).apply(loss_fn, 0)
        return value

    (got,) = torch.autograd.grad(outer(), model.log_lr)
    ends = []
    for h in (1e-5, -1e-5):
        with torch.no_grad():
            model.log_lr.add_(h)
            ends.append(outer().item())
            model.log_lr.sub_(h)
    assert got.item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)
