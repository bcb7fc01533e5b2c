"""Second moments of zero, and gradients that are NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import Case, assert_same, every_case, every_optimizer
from torch import Tensor
from torch.autograd import forward_ad as fwAD

from diffopt import optim


@pytest.mark.parametrize("anomaly", [False, True], ids=["", "anomaly"])
@every_case
def test_weights_that_never_had_a_gradient_have_a_finite_derivative(
    case: Case, anomaly: bool
) -> None:
    grads = [torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(7)]
    start = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    opt = case.ours([start])
    with torch.autograd.set_detect_anomaly(anomaly, check_nan=anomaly):
        params, state = {"w": start}, opt.init({"w": start})
        for grad in grads:
            params, state = opt.update(params, {"w": grad}, state)
        once = torch.autograd.grad(params["w"].sum(), [start, *grads], create_graph=True)
        assert all(x.isfinite().all() for x in once)
        ends = [(x**2).sum() for x in once if x.requires_grad]
        if ends:
            total: Tensor = torch.stack(ends).sum()
            twice = torch.autograd.grad(total, [start, *grads], allow_unused=True)
            assert all(x is None or x.isfinite().all() for x in twice)


@pytest.mark.parametrize(
    ("make", "slope"),
    [
        (lambda p: optim.Adam(p, lr=0.1, eps=1e-3), -0.1 / 1e-3),
        (lambda p: optim.Adam(p, lr=0.1, eps=1e-3, amsgrad=True), -0.1 / 1e-3),
        (lambda p: optim.NAdam(p, lr=0.1, eps=1e-3, momentum_decay=0.0), None),
        (lambda p: optim.RMSprop(p, lr=0.1, eps=1e-3), -0.1 / 1e-3),
        (lambda p: optim.RMSprop(p, lr=0.1, eps=1e-3, centered=True), -0.1 / 1e-3),
        (lambda p: optim.Adagrad(p, lr=0.1, eps=1e-3), -0.1 / 1e-3),
    ],
    ids=["Adam", "AMSGrad", "NAdam", "RMSprop", "centered", "Adagrad"],
)
def test_the_derivative_at_a_zero_second_moment_is_the_limit(
    make: Callable[[Any], optim.Optimizer], slope: float | None
) -> None:
    def after(g: Tensor) -> Tensor:
        w = torch.zeros(1, dtype=torch.float64)
        opt = make([w])
        new, _ = opt.update({"w": w}, {"w": g}, opt.init({"w": w}))
        return new["w"].sum()

    def derivative(at: float) -> float:
        g = torch.tensor([at], dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(after(g), g)[0].item()

    assert derivative(0.0) == pytest.approx(derivative(1e-12), rel=1e-6)
    assert derivative(0.0) == pytest.approx(derivative(-1e-12), rel=1e-6)
    if slope is not None:
        assert derivative(0.0) == pytest.approx(slope)


def test_square_root_keeps_values_and_nan() -> None:
    x = torch.tensor([0.0, 4.0, math.nan, -1.0, 2.0, math.inf])
    y = x.clone().requires_grad_()
    plain, differentiable = optim.lists.sqrt([x])[0], optim.lists.sqrt([y])[0]
    assert torch.equal(plain.nan_to_num(7.0), x.sqrt().nan_to_num(7.0))
    assert torch.equal(differentiable.detach().nan_to_num(7.0), plain.nan_to_num(7.0))
    (slope,) = torch.autograd.grad(differentiable.sum(), y)
    assert slope[0] == 0
    assert slope[1] == 0.25
    assert slope[2:4].isnan().all()


@every_optimizer
def test_a_nan_gradient_is_treated_as_in_torch_optim(case: Case) -> None:
    w = torch.ones(2, dtype=torch.float64)
    grad = torch.tensor([math.nan, 1.0], dtype=torch.float64, requires_grad=True)
    opt = case.ours([w])
    new, _ = opt.update({"w": w}, {"w": grad}, opt.init({"w": w}))
    reference = case.theirs([w])
    w.grad = grad.detach()
    reference.step()
    assert new["w"].isnan().tolist() == w.isnan().tolist() == [case.name != "Rprop", False]


@every_case
def test_forward_mode_agrees_at_a_zero_second_moment(case: Case) -> None:
    w = torch.zeros(1, dtype=torch.float64)
    opt = case.ours([w])

    def after(g: Tensor) -> Tensor:
        params, state = opt.update({"w": w}, {"w": g}, opt.init({"w": w}))
        return opt.update(params, {"w": 0.0 * g}, state)[0]["w"]

    zero = torch.zeros(1, dtype=torch.float64)
    with fwAD.dual_level():
        slope = fwAD.unpack_dual(after(fwAD.make_dual(zero, torch.ones_like(zero)))).tangent
    expected = torch.autograd.functional.jacobian(after, zero).reshape(1)
    assert expected.isfinite().all()
    assert_same(torch.zeros_like(zero) if slope is None else slope, expected)
