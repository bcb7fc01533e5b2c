"""An unroll of a model inside the loss of an unroll of the same model: two levels of learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_all_close, batch, batches, called, mse, plain, tiny
from torch import Tensor, nn

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


def adapted_plainly(m: nn.Module, pair: Any, lr: Tensor) -> dict[str, Tensor]:
    params = dict(m.named_parameters())
    for _ in range(2):
        loss = called(m, params, mse, pair)
        last = [name for name in params if name.startswith("2.")]
        grads = torch.autograd.grad(loss, [params[n] for n in last], create_graph=True)
        params.update({n: params[n] - lr * g for n, g in zip(last, grads, strict=True)})
    return params


@every_pair
def test_the_same_model_on_both_levels(adjoints: tuple[diffopt.Adjoint, diffopt.Adjoint]) -> None:
    outside, inside = adjoints
    model, data, query = tiny(), batches(3), batch()
    lr = torch.tensor(0.2, dtype=torch.double, requires_grad=True)
    inputs = [lr, *model.parameters()]

    def loss_fn(m: Any, pair: Any) -> Tensor:
        return mse(adapted(m, pair, lr, inside), query)

    def loss_fn_plainly(m: Any, pair: Any) -> Tensor:
        return called(m, adapted_plainly(m, pair, lr), mse, query)

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
        expected.apply(lambda m: called(m, adapted_plainly(m, data[0], lr), mse, query)), inputs
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


@pytest.mark.parametrize("norm", NORMS)
def test_a_hypergradient_through_a_normalisation_is_differentiated(norm: str) -> None:
    """PyTorch's own third derivatives of these are wrong."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, dtype=torch.double)
    linear = nn.Linear(4, 4, dtype=torch.double)
    inputs = list(linear.parameters())
    direction = [torch.randn_like(p) for p in inputs]

    def loss_fn(m: Any, batch: Tensor) -> Tensor:
        result: Tensor = m(batch) * torch.linspace(0, 1, batch.numel()).view(batch.shape)
        return result.sin().sum()

    def product(norm: nn.Module) -> tuple[Tensor, ...]:
        model = nn.Sequential(linear, norm.double())
        inner = diffopt.SGD(model.parameters(), lr=0.05)
        fast = diffopt.unroll(model, inner, [x, x.flip(0)], loss_fn)
        grads = torch.autograd.grad(loss_fn(fast, x.sin()), inputs, create_graph=True)
        return torch.autograd.grad(grads, inputs, direction)

    own, dims = NORMS[norm]
    assert_all_close(product(own), product(Written(dims)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("norm", NORMS)
def test_so_is_one_of_many_tasks(norm: str) -> None:
    """There the normalisations are mapped over, and PyTorch's own are in the first derivatives."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 4, dtype=torch.double)
    linear = nn.Linear(4, 4, dtype=torch.double)
    inputs = list(linear.parameters())
    direction = [torch.randn_like(p) for p in inputs]

    def loss_fn(m: Any, batch: Tensor) -> Tensor:
        result: Tensor = m(batch) * torch.linspace(0, 1, batch.numel()).view(batch.shape)
        return result.sin().sum()

    def product(norm: nn.Module) -> tuple[Tensor, ...]:
        model = nn.Sequential(linear, norm.double())
        inner = diffopt.SGD(model.parameters(), lr=0.05)
        fast = diffopt.unroll(model, inner, [x, x.flip(1)], loss_fn, tasks=2)
        loss = fast.apply(loss_fn, x.sin()).sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(grads, inputs, direction)

    own, dims = NORMS[norm]
    assert_all_close(product(own), product(Written(dims)), rtol=1e-8, atol=1e-8)
