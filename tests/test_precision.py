"""Parameters in bfloat16 and float16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adjoints import every_adjoint
from torch import Tensor, nn

import diffopt

LOW = [torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", LOW, ids=str)


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).bfloat16()
    return model.to(dtype)


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(12, 6).bfloat16().to(dtype), torch.randn(12, 1).bfloat16().to(dtype)


def mse(model: Any, pair: Any) -> Tensor:
    wide = torch.float64 if pair[0].dtype == torch.float64 else torch.float32
    return F.mse_loss(model(pair[0]).to(wide), pair[1].to(wide))


@every_dtype
def test_trajectory_is_that_of_torch_optim_to_rounding(dtype: torch.dtype) -> None:
    model, pair = network(dtype), data(dtype)
    fast = diffopt.unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), [pair] * 20, mse)
    expected = copy.deepcopy(model)
    opt = torch.optim.SGD(expected.parameters(), lr=0.1)
    for _ in range(20):
        opt.zero_grad()
        mse(expected, pair).backward()
        opt.step()
    for name, p in expected.named_parameters():
        assert fast.params[name].dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(fast.params[name], p, rtol=4 * eps, atol=4 * eps)


@every_dtype
@every_adjoint
def test_gradient_is_near_that_of_float64(dtype: torch.dtype, adjoint: diffopt.Adjoint) -> None:
    """Adam's second moment would be 0 in float16, and the gradient NaN."""

    def gradient(dtype: torch.dtype) -> Tensor:
        model, pair = network(dtype), data(dtype)
        inner = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-4)
        fast = diffopt.unroll(model, inner, [pair] * 10, mse, adjoint=adjoint)
        grads = torch.autograd.grad(mse(fast, pair), list(model.parameters()))
        assert all(g.dtype == dtype for g in grads)
        assert (
            dtype == torch.float64 or fast.opt_state["0.weight"]["exp_avg_sq"].dtype == torch.float
        )
        return torch.cat([g.flatten().double() for g in grads])

    exact = gradient(torch.float64)
    error = (gradient(dtype) - exact).norm() / exact.norm()
    assert 0 < error < (0.03 if dtype == torch.bfloat16 else 0.01)


class Quadratic(nn.Module):
    """Half the square of its only weight."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self) -> Tensor:
        return 0.5 * self.theta.float().square().sum()


@every_dtype
@every_adjoint
def test_cotangents_gather_small_terms(dtype: torch.dtype, adjoint: diffopt.Adjoint) -> None:
    """1 - 0.001 is 1 in bfloat16; the derivative of 300 such steps is 0.999 ** 300 = 0.74."""
    model = Quadratic(dtype)
    inner = diffopt.SGD(model.parameters(), lr=1e-3)
    theta = diffopt.unroll(model, inner, 300, adjoint=adjoint).params["theta"]
    (found,) = torch.autograd.grad(theta.sum(), model.theta)
    assert found.item() == pytest.approx(0.999**300, rel=0.01)


@every_dtype
def test_adjoints_agree_to_the_last_bit(dtype: torch.dtype) -> None:
    model, pair = network(dtype), data(dtype)

    def gradient(adjoint: diffopt.Adjoint) -> tuple[Tensor, ...]:
        inner = diffopt.Momentum(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, inner, [pair] * 7, mse, adjoint=adjoint, verify=True)
        return torch.autograd.grad(mse(fast, pair), list(model.parameters()))

    want = gradient(diffopt.StoreAll())
    for adjoint in (diffopt.Segmented(3), diffopt.Binomial(2)):
        assert all(torch.equal(g, w) for g, w in zip(gradient(adjoint), want, strict=True))


@every_dtype
def test_second_derivative(dtype: torch.dtype) -> None:
    def second(dtype: torch.dtype) -> Tensor:
        model, pair = network(dtype), data(dtype)
        lr = torch.tensor(0.1, requires_grad=True)
        inner = diffopt.SGD(model.parameters(), lr=lr)
        fast = diffopt.unroll(model, inner, [pair] * 4, mse, segment=2)
        (first,) = torch.autograd.grad(mse(fast, pair), lr, create_graph=True)
        return torch.autograd.grad(first, lr)[0]

    torch.testing.assert_close(second(dtype), second(torch.float64), rtol=0.05, atol=0)


@every_dtype
@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_training_goes_on_in_torch_optim(dtype: torch.dtype, name: str) -> None:
    model, pair = network(dtype), data(dtype)
    options = {"lr": 0.01, **({"momentum": 0.9} if name == "SGD" else {"eps": 1e-3})}
    opt = getattr(torch.optim, name)(model.parameters(), **options)
    fast = diffopt.unroll(model, opt, [pair] * 3, mse)
    fast.load_into(model, opt)
    mse(model, pair).backward()
    opt.step()
    (state, *_) = opt.state.values()
    assert {x.dtype for key, x in state.items() if key != "step"} == {dtype}
    more = diffopt.unroll(model, opt, [pair] * 2, mse, initial=fast)
    assert more.step == 5
    more.losses.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
