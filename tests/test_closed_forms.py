"""Training that has a formula: a quadratic of one variable in float64, through 1000 steps."""

from __future__ import annotations

import math

import pytest
import torch
from adjoints import every_adjoint
from torch import Tensor, nn

import diffopt

T = 1000
A, ETA, MU, W0, B0 = 0.7, 2e-3, 0.9, 1.3, 0.4

ADJOINTS = [
    diffopt.StoreAll(),
    *(diffopt.Segmented(k) for k in (1, 7, 32, 1000)),
    diffopt.Binomial(12),
]


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(W0, dtype=torch.float64))


def variable(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def assert_close(got: Tensor | None, want: float | Tensor) -> None:
    assert got is not None
    assert got.item() == pytest.approx(float(want), rel=1e-10, abs=0)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_gradient_descent(adjoint: diffopt.Adjoint) -> None:
    """w_t = (1 − ηa)^t w₀, and L_t = a w_t² / 2."""
    model, a, eta = Scalar(), variable(A), variable(ETA)
    opt = diffopt.SGD(model.parameters(), lr=eta)
    fast = diffopt.unroll(model, opt, T, lambda m, t: a * m.w**2 / 2, adjoint=adjoint)
    (fast.params["w"] + fast.losses.sum()).backward()

    f = 1 - ETA * A
    q, by_q = f**2, [t * f ** (2 * t - 2) for t in range(T)]
    half = A / 2 * W0**2
    losses = half * math.fsum(q**t for t in range(T))
    assert_close(fast.params["w"], f**T * W0)
    assert_close(fast.losses.sum(), losses)
    assert_close(model.w.grad, f**T + 2 * losses / W0)
    assert_close(eta.grad, -T * A * f ** (T - 1) * W0 - 2 * f * A * half * math.fsum(by_q))
    by_a = losses / A - 2 * f * ETA * half * math.fsum(by_q)
    assert_close(a.grad, -T * ETA * f ** (T - 1) * W0 + by_a)


def power_and_slope(m: list[list[float]], dm: list[list[float]]) -> tuple[Tensor, Tensor]:
    """M^T, and its derivative in the direction dM: a corner of the power of [[M, dM], [0, M]]."""
    square, direction = (torch.tensor(x, dtype=torch.float64) for x in (m, dm))
    block = torch.block_diag(square, square)
    block[:2, 2:] = direction
    power = torch.linalg.matrix_power(block, T)
    return power[:2, :2], power[:2, 2:]


@pytest.mark.parametrize("adjoint", ADJOINTS[::2], ids=repr)
def test_heavy_ball(adjoint: diffopt.Adjoint) -> None:
    """(w, b) ← M (w, b), with M = [[1 − ηa, −ημ], [a, μ]]: b ← μb + aw, then w ← w − ηb."""
    model, a, eta, mu, b0 = Scalar(), variable(A), variable(ETA), variable(MU), variable(B0)
    opt = diffopt.SGD(model.parameters(), lr=eta, momentum=mu)
    opt.state[model.w] = {"momentum_buffer": b0}
    fast = diffopt.unroll(model, opt, T, lambda m, t: a * m.w**2 / 2, adjoint=adjoint)
    outcome = fast.params["w"] + 0.3 * fast.opt_state["w"]["momentum_buffer"]
    outcome.backward()

    m = [[1 - ETA * A, -ETA * MU], [A, MU]]
    start, weights = torch.tensor([[W0, B0], [1.0, 0.3]], dtype=torch.float64)
    power, by_eta = power_and_slope(m, [[-A, -MU], [0.0, 0.0]])
    _, by_a = power_and_slope(m, [[-ETA, 0.0], [1.0, 0.0]])
    _, by_mu = power_and_slope(m, [[0.0, -ETA], [0.0, 1.0]])
    assert_close(outcome, weights @ power @ start)
    assert_close(model.w.grad, (weights @ power)[0])
    assert_close(b0.grad, (weights @ power)[1])
    for x, slope in ((eta, by_eta), (a, by_a), (mu, by_mu)):
        assert_close(x.grad, weights @ slope @ start)


@every_adjoint
def test_second_and_third_derivative(adjoint: diffopt.Adjoint) -> None:
    """Of (1 − ηa)^n w₀ in η."""
    n = 12
    model, eta = Scalar(), variable(0.1)
    opt = diffopt.SGD(model.parameters(), lr=eta)
    fast = diffopt.unroll(model, opt, n, lambda m, t: A * m.w**2 / 2, adjoint=adjoint)
    shrink = 1 - 0.1 * A
    (first,) = torch.autograd.grad(fast.params["w"], eta, create_graph=True)
    (second,) = torch.autograd.grad(first, eta, create_graph=True)
    third, mixed = torch.autograd.grad(second, [eta, model.w])
    assert_close(first, -n * A * shrink ** (n - 1) * W0)
    assert_close(second, n * (n - 1) * A**2 * shrink ** (n - 2) * W0)
    assert_close(third, -n * (n - 1) * (n - 2) * A**3 * shrink ** (n - 3) * W0)
    assert_close(mixed, n * (n - 1) * A**2 * shrink ** (n - 2))


@every_adjoint
def test_a_schedule_is_a_product(adjoint: diffopt.Adjoint) -> None:
    """w_T = ∏ (1 − η_t a) w₀, with η_t = c / (t + 1)."""
    n = 30
    model, c = Scalar(), variable(0.3)
    opt = diffopt.SGD(model.parameters(), lr=lambda t: c / (t + 1))
    fast = diffopt.unroll(model, opt, n, lambda m, t: A * m.w**2 / 2, adjoint=adjoint)
    factors = [1 - 0.3 / (t + 1) * A for t in range(n)]
    assert_close(fast.params["w"], math.prod(factors) * W0)
    fast.params["w"].backward()
    logarithmic = sum(-A / (t + 1) / f for t, f in enumerate(factors))
    assert_close(c.grad, math.prod(factors) * W0 * logarithmic)
