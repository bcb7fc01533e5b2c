"""Implicit against closed forms: ridge regression, a proximal quadratic, a saddle point."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffopt
from diffopt import CG, ConvergenceWarning, Implicit, Neumann, NormalCG, Solution

SOLVERS = [CG(50, 1e-12), NormalCG(100, 1e-12), Neumann(300, 0.4)]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)

Loss = Callable[[nn.Module, int], Tensor]


@pytest.fixture(autouse=True)
def _float64() -> None:
    torch.set_default_dtype(torch.float64)


def train(model: nn.Module, loss_fn: Loss, steps: int = 250, **options: Any) -> diffopt.Unrolled:
    opt = diffopt.SGD(model.parameters(), lr=options.pop("lr", 0.4))
    return diffopt.unroll(model, opt, steps, loss_fn, **options)


class Ridge:
    """Least squares with a penalty λ ‖θ‖² / 2 and a weight for every example, in closed form."""

    def __init__(self) -> None:
        self.x, self.y = torch.randn(20, 4), torch.randn(20)
        self.log_penalty = torch.tensor(-1.0, requires_grad=True)
        self.weights = torch.rand(20).add(0.5).requires_grad_()
        self.model = nn.Linear(4, 1, bias=False)

    def loss(self, model: nn.Module, t: int) -> Tensor:
        errors = (model(self.x)[:, 0] - self.y).square()
        penalty = self.log_penalty.exp() * model.weight.square().sum()
        return (self.weights * errors).mean() / 2 + penalty / 2

    def solution(self) -> Tensor:
        weighted = self.weights[:, None] * self.x / 20
        hessian = self.x.T @ weighted + self.log_penalty.exp() * torch.eye(4)
        return torch.linalg.solve(hessian, weighted.T @ self.y)

    def gradients(self, theta: Tensor) -> list[Tensor]:
        outer = (theta.flatten() * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().sin()
        return list(torch.autograd.grad(outer, [self.log_penalty, self.weights]))


@every_solver
def test_ridge_regression(solver: diffopt.Solver) -> None:
    ridge = Ridge()
    fast = train(ridge.model, ridge.loss, adjoint=Implicit(solver, gradient_tol=1e-12))
    found = ridge.gradients(fast.params["weight"])
    for a, b in zip(found, ridge.gradients(ridge.solution()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_differs_from_the_exact_gradient_before_convergence() -> None:
    ridge = Ridge()
    exact, implicit = (
        ridge.gradients(train(ridge.model, ridge.loss, 5, adjoint=adjoint).params["weight"])
        for adjoint in (diffopt.Segmented(), Implicit(gradient_tol=10))
    )
    for a, b in zip(exact, implicit, strict=True):
        assert (a - b).norm() > 1e-3 * a.norm()


def test_the_damped_system() -> None:
    ridge, damping = Ridge(), 0.4
    theta = ridge.solution().detach().requires_grad_()
    hessian = torch.autograd.functional.hessian(lambda w: loss_at(ridge, w), theta)
    outer = torch.tensor([1.0, -2.0, 0.5, 3.0])
    gradient = torch.autograd.grad(loss_at(ridge, theta), theta, create_graph=True)[0]
    v = torch.linalg.solve(hessian + damping * torch.eye(4), outer)
    expected = -torch.autograd.grad(gradient, ridge.log_penalty, v)[0]
    for solver in (CG(20, 1e-12, damping), NormalCG(20, 1e-12, damping)):
        fast = train(ridge.model, ridge.loss, adjoint=Implicit(solver))
        total = (fast.params["weight"][0] * outer).sum()
        found = torch.autograd.grad(total, ridge.log_penalty)[0]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def loss_at(ridge: Ridge, theta: Tensor) -> Tensor:
    errors = (ridge.x @ theta - ridge.y).square()
    penalty = ridge.log_penalty.exp() * theta.square().sum()
    return (ridge.weights * errors).mean() / 2 + penalty / 2


@every_solver
def test_imaml_delivers_to_captured_initial_parameters(solver: diffopt.Solver) -> None:
    """θ* = (A + λI)⁻¹ (b + λ θ₀) minimizes θᵀAθ/2 − bᵀθ + λ/2 ‖θ − θ₀‖²."""
    model = nn.Linear(3, 1, bias=False)
    prior = next(iter(model.parameters()))
    root = torch.randn(3, 3)
    a, b, strength = root @ root.T / 3, torch.randn(3), torch.tensor(0.5, requires_grad=True)

    def loss_fn(model: nn.Module, t: int) -> Tensor:
        theta = model.weight[0]
        proximal = strength / 2 * (theta - prior[0]).square().sum()
        return theta @ a @ theta / 2 - b @ theta + proximal

    def gradients(theta: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(theta.square().sum(), [prior, strength])

    fast = train(model, loss_fn, adjoint=Implicit(solver))
    system = a + strength * torch.eye(3)
    by_hand = torch.linalg.solve(system, b + strength * prior[0])
    for found, expected in zip(gradients(fast.params["weight"]), gradients(by_hand), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-14)


def test_neumann_is_backpropagation_through_steps_at_the_solution() -> None:
    ridge, terms, lr = Ridge(), 6, 0.4
    at_solution = {"weight": ridge.solution().detach()[None]}
    found = []
    for adjoint in (
        Implicit(Neumann(terms, scale=lr)),
        diffopt.Truncated(terms),
    ):
        fast = train(ridge.model, ridge.loss, 10, initial=at_solution, adjoint=adjoint)
        found.append(ridge.gradients(fast.params["weight"]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


def saddle(model: nn.Module, phi: Tensor) -> Tensor:
    """Stationary at (φ, 2φ), where the Hessian has the eigenvalues 1 and −1."""
    u, v = model.weight[0]
    return (u - phi).square() / 2 - (v - 2 * phi).square() / 2


def test_an_indefinite_hessian() -> None:
    phi = torch.tensor(0.7, requires_grad=True)
    model = nn.Linear(2, 1, bias=False)
    start = {"weight": torch.stack([phi, 2 * phi]).detach()[None]}

    def gradient(solver: diffopt.Solver) -> Tensor:
        fast = train(model, lambda m, t: saddle(m, phi), 1, initial=start, adjoint=Implicit(solver))
        return torch.autograd.grad((fast.params["weight"] * torch.tensor([3.0, 5.0])).sum(), phi)[0]

    assert gradient(NormalCG(10, 1e-12)).item() == pytest.approx(3 + 2 * 5)
    with pytest.warns(ConvergenceWarning, match=r"CG.*not positive definite: use NormalCG"):
        gradient(CG(10, 1e-12))
    with pytest.warns(ConvergenceWarning, match=r"Neumann.*diverges: write a smaller scale"):
        gradient(Neumann(10, 0.5))


def test_delivers_nothing_to_the_start_and_to_the_learning_rate() -> None:
    ridge, lr = Ridge(), torch.tensor(0.4, requires_grad=True)
    fast = train(ridge.model, ridge.loss, lr=lr, adjoint=Implicit())
    total = fast.params["weight"].sum()
    inputs = [ridge.model.weight, lr, ridge.log_penalty]
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    assert found[:2] == (None, None)
    assert found[2] is not None


def test_the_last_batch_alone_counts() -> None:
    batches = [torch.randn(5, 4).requires_grad_() for _ in range(3)]
    model = nn.Linear(4, 1, bias=False)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - 1).square().mean() + model.weight.square().sum()

    fast = diffopt.unroll(
        model,
        diffopt.SGD(model.parameters(), lr=0.1),
        batches,
        loss_fn,
        adjoint=Implicit(gradient_tol=10),
    )
    found = torch.autograd.grad(fast.params["weight"].sum(), batches, allow_unused=True)
    assert found[:2] == (None, None)
    assert found[2] is not None
    assert found[2].any()


def test_the_random_numbers_are_those_of_the_last_step() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5))

    model, x, phi = Noisy(4, 1, bias=False), torch.randn(8, 4), torch.ones(8, requires_grad=True)
    masks: list[Tensor] = []

    def loss_fn(model: nn.Module, t: int) -> Tensor:
        out = model(x)[:, 0]
        masks.append(out.detach() / model.weight.detach().norm())
        return (phi * out.square()).mean() + model.weight.square().sum()

    fast = train(model, loss_fn, 3, lr=0.0, adjoint=Implicit(gradient_tol=10))
    fast.params["weight"].sum().backward()
    assert len(masks) == 4
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[1], masks[2])


def test_buffers_are_those_of_the_end() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2, affine=False))
    x, phi = torch.randn(8, 3), torch.tensor(1.0, requires_grad=True)
    fast = train(
        model,
        lambda m, t: (phi * m(x)[:, 0]).sum() + m[0].weight.square().sum(),
        3,
        adjoint=Implicit(gradient_tol=100),
    )
    before = {name: b.clone() for name, b in fast.buffers.items()}
    fast.params["0.weight"].sum().backward()
    assert all(torch.equal(before[name], b) for name, b in fast.buffers.items())
    assert not model[1].running_mean.any()


def test_reports_the_residual() -> None:
    ridge, solutions = Ridge(), list[Solution]()
    solver = CG(2, 1e-12)
    fast = train(ridge.model, ridge.loss, adjoint=Implicit(solver, report=solutions.append))
    outer = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    with pytest.warns(ConvergenceWarning, match=r"CG.*max_steps=2\. The first time its"):
        (fast.params["weight"] * outer).sum().backward()
    (solution,) = solutions
    hessian = torch.autograd.functional.hessian(
        lambda w: loss_at(ridge, w), ridge.solution().detach()
    )
    left = outer[0] - hessian @ solution.x[0][0]
    assert solution.residual == pytest.approx((left.norm() / outer.norm()).item())
    assert solution.products == 2


@pytest.mark.parametrize("solver", [NormalCG(3, 1e-12), Neumann(5, 0.1)])
def test_the_residual_is_the_solutions(solver: diffopt.Solver) -> None:
    root = torch.randn(6, 6)
    a, b = root @ root.T / 6 + 0.2 * torch.eye(6), torch.randn(6)
    solution = solver.solve(lambda v: [a @ v[0]], [b])
    left = (b - a @ solution.x[0]).norm() / b.norm()
    assert solution.residual == pytest.approx(left.item())
    assert solution.products <= solver.most_products
    assert bool(solution.trouble) == isinstance(solver, NormalCG)


def test_warns_where_the_inner_gradient_is_not_small() -> None:
    ridge = Ridge()
    fast = train(ridge.model, ridge.loss, 2, adjoint=Implicit())
    message = r"inner gradient is above gradient_tol=0\.001 at the end: its norm was .* minibatches"
    with pytest.warns(ConvergenceWarning, match=message):
        fast.params["weight"].sum().backward()


def test_no_warning_where_all_is_well() -> None:
    ridge = Ridge()
    fast = train(ridge.model, ridge.loss, adjoint=Implicit())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.params["weight"].sum().backward()


@pytest.mark.parametrize("kind", ["losses", "opt_state", "buffers"])
def test_gradients_that_cannot_be_delivered_are_refused(kind: str) -> None:
    model = nn.Linear(2, 1)
    model.register_buffer("scale", torch.ones((), requires_grad=True))
    fast = diffopt.unroll(
        model,
        diffopt.Momentum(model.parameters(), lr=0.1),
        3,
        lambda m, t: m.scale * m.weight.square().sum(),
        adjoint=Implicit(),
    )
    total = {
        "losses": fast.losses.sum(),
        "opt_state": fast.opt_state["weight"]["momentum_buffer"].sum(),
        "buffers": fast.buffers["scale"],
    }[kind]
    with pytest.raises(NotImplementedError, match=f"flows to {kind} of the result, but Implicit"):
        total.backward()


def test_refuses_a_second_derivative_and_a_bound_on_cotangents() -> None:
    ridge = Ridge()
    fast = train(ridge.model, ridge.loss, adjoint=Implicit())
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice: use diffopt"):
        torch.autograd.grad(fast.params["weight"].sum(), ridge.log_penalty, create_graph=True)
    with pytest.raises(ValueError, match=r"max_cotangent_norm=1.0 bounds .* Implicit goes back"):
        train(ridge.model, ridge.loss, 2, adjoint=Implicit(), max_cotangent_norm=1.0)


def test_verify_does_not_take_the_last_loss_for_a_recomputed_step() -> None:
    ridge = Ridge()
    fast = train(ridge.model, ridge.loss, 5, verify=True, adjoint=Implicit(gradient_tol=10))
    fast.params["weight"].sum().backward()
    assert ridge.log_penalty.grad is not None


def test_no_steps_give_the_start() -> None:
    ridge = Ridge()
    fast = train(ridge.model, ridge.loss, 0, adjoint=Implicit())
    assert torch.equal(fast.params["weight"], ridge.model.weight)


def test_plan_counts_products_and_goes_one_way() -> None:
    plan = Implicit(CG(10)).plan(100)
    assert [str(action) for action in plan.actions] == ["advance 0 100"]
    assert (plan.peak_states, plan.recomputed_steps) == (1, 0)
    assert plan.relative_cost == pytest.approx((100 + 4 + 2 * 10) / 300)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CG(0), "max_steps is 0, but must be at least 1"),
        (lambda: CG(5, -1.0), r"tol is -1.0, but must be at least 0"),
        (lambda: NormalCG(5, 1e-3, -1), "damping is -1, but must be at least 0"),
        (lambda: Neumann(0), "terms is 0, but must be at least 1"),
        (lambda: Neumann(3, 0.0), r"scale is 0.0, but must be above 0"),
        (lambda: Implicit(gradient_tol=-1.0), r"gradient_tol is -1.0: pass a number from 0 on"),
    ],
)
def test_wrong_values(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_kinds() -> None:
    with pytest.raises(TypeError, match=r"solver is a str: pass one such as diffopt.CG\(\)"):
        Implicit("cg")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tol is '1e-3', of type str, but must be a number"):
        CG(5, "1e-3")  # type: ignore[arg-type]


def test_warns_once_for_each_line_of_the_callers() -> None:
    ridge = Ridge()
    inner = diffopt.SGD(ridge.model.parameters(), lr=0.1)

    def meta_step(steps: int, threaded: bool) -> int:
        fast = diffopt.unroll(ridge.model, inner, steps, ridge.loss, adjoint=Implicit(CG(1, 1e-9)))
        line = sys._getframe().f_lineno - 1
        total = torch.cat([p.flatten() for p in fast.params.values()]).square().sum()
        if threaded:
            thread = threading.Thread(target=total.backward)
            thread.start()
            thread.join()
        else:
            total.backward()
        return line

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        lines = {meta_step(steps, steps == 3) for steps in (1, 2, 3, 2)}
    assert len(lines) == 1
    assert [w.category for w in shown] == 2 * [ConvergenceWarning]
    assert {(w.filename, w.lineno) for w in shown} == {(__file__, *lines)}
    assert {str(w.message).split()[0] for w in shown} == {"Implicit", "the"}
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        meta_step(1, threaded=False)
        meta_step(1, threaded=False)
    assert len(shown) == 4


def test_a_solution_is_shown_in_one_line() -> None:
    found = CG().solve(lambda v: [2 * x for x in v], [torch.ones(100, 100)])
    assert repr(found) == f"Solution(residual={found.residual}, products=1, trouble='')"
