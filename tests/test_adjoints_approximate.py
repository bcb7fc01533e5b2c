"""Truncated and FirstOrder: each is its own definition, stated by a loop that cuts graphs by hand.

The loops below share no code with the package: the rules are written out, the model is called
through ``torch.func.functional_call``, and what an adjoint takes as a constant is detached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from plans import CountedSnapshots
from torch import Tensor, nn
from torch.func import functional_call

import diffopt
from diffopt import FirstOrder, Segmented, StoreAll, Truncated

T = 7


@dataclass
class Problem:
    """A small regression with a loss weight and hyperparameters to learn."""

    model: nn.Module = field(
        default_factory=lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    )
    x: Tensor = field(default_factory=lambda: torch.randn(T, 6, 2))
    y: Tensor = field(default_factory=lambda: torch.randn(T, 6, 1))
    weight: Tensor = field(default_factory=lambda: torch.rand(6, 1).add(0.5).requires_grad_())
    lr: Tensor = field(default_factory=lambda: torch.tensor(0.07, requires_grad=True))
    decay: Tensor = field(default_factory=lambda: torch.tensor(0.3, requires_grad=True))

    def loss(self, call: Callable[[Tensor], Tensor], t: int) -> Tensor:
        return (self.weight * (call(self.x[t]) - self.y[t]).square()).mean()

    def outer(self, params: dict[str, Tensor]) -> Tensor:
        return torch.stack([(p * p.detach().cos()).sum() for p in params.values()]).sum()

    def inputs(self) -> list[Tensor]:
        return [self.lr, self.decay, self.weight, *self.model.parameters()]


@pytest.fixture
def problem() -> Problem:
    torch.set_default_dtype(torch.float64)
    return Problem()


Rule = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def sgd(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, lr: Tensor, decay: Tensor) -> Any:
    b = 0.9 * s["b"] + g + decay * p if s else g + decay * p
    return p - lr * b, {"b": b}


def adamw(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, lr: Tensor, decay: Tensor) -> Any:
    m = 0.1 * g + (0.9 * s["m"] if s else 0)
    v = 0.001 * g * g + (0.999 * s["v"] if s else 0)
    p = p - lr * decay * p
    step = lr * (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
    return p - step, {"m": m, "v": v}


OPTIMIZERS = {
    "sgd": (sgd, diffopt.Momentum),
    "adamw": (adamw, diffopt.AdamW),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def by_hand(
    problem: Problem,
    rule: Rule,
    *,
    constant_at: int | None = None,
    first_order: bool = False,
    losses_from: int = T,
) -> list[Tensor | None]:
    """Gradients by a loop that keeps every graph but those it is told to cut."""
    params = dict(problem.model.named_parameters())
    state: dict[str, dict[str, Tensor]] = {n: {} for n in params}
    losses = []
    for t in range(T):
        if t == constant_at:
            params = {n: p.detach().requires_grad_() for n, p in params.items()}
            state = {n: {k: x.detach() for k, x in s.items()} for n, s in state.items()}
        loss = problem.loss(lambda x, p=params: functional_call(problem.model, p, (x,)), t)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        for (n, p), g in zip(list(params.items()), grads, strict=True):
            g = g.detach() if first_order else g
            params[n], state[n] = rule(p, g, state[n], t, problem.lr, problem.decay)
        losses.append(loss)
    total = problem.outer(params) + sum(losses[losses_from:])
    return list(torch.autograd.grad(total, problem.inputs(), allow_unused=True))


def by_unroll(
    problem: Problem, opt: type, adjoint: diffopt.Adjoint, *, losses_from: int = T
) -> list[Tensor | None]:
    inner = opt(problem.model.parameters(), lr=problem.lr, weight_decay=problem.decay)
    fast = diffopt.unroll(problem.model, inner, T, problem.loss, adjoint=adjoint)
    total = problem.outer(fast.params) + fast.losses[losses_from:].sum()
    return list(torch.autograd.grad(total, problem.inputs(), allow_unused=True))


def assert_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            assert a is b is None or not (a if b is None else b).any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


# --- Truncated --------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("window", [1, 3, T, T + 1])
def test_truncated_is_a_loop_whose_state_is_detached(
    problem: Problem, name: str, window: int
) -> None:
    rule, opt = OPTIMIZERS[name]
    expected = by_hand(problem, rule, constant_at=T - window, losses_from=T - 1)
    assert_same(by_unroll(problem, opt, Truncated(window), losses_from=T - 1), expected)


@pytest.mark.parametrize("inner", [StoreAll(), diffopt.Binomial(2), Segmented(2), FirstOrder()])
def test_truncated_takes_any_adjoint_for_the_window(
    problem: Problem, inner: diffopt.Adjoint
) -> None:
    rule, opt = OPTIMIZERS["adamw"]
    first_order = isinstance(inner, FirstOrder)
    expected = by_hand(problem, rule, constant_at=T - 4, first_order=first_order)
    assert_same(by_unroll(problem, opt, Truncated(4, inner)), expected)


def test_truncated_differs_from_the_exact_gradient(problem: Problem) -> None:
    _, opt = OPTIMIZERS["sgd"]
    exact, cut = (by_unroll(problem, opt, adjoint) for adjoint in (Segmented(), Truncated(3)))
    for a, b in zip(exact[:3], cut[:3], strict=True):
        assert (a - b).norm() > 0.05 * a.norm()


def test_truncated_bias_is_the_terms_left_out() -> None:
    """Gradient descent on aθ²/2 − φθ: dθ_T/dφ = α Σ (1 − αa)^i, over i < T, or i < window."""
    torch.set_default_dtype(torch.float64)
    model = nn.Linear(1, 1, bias=False)
    phi = torch.tensor(0.7, requires_grad=True)
    alpha, a, steps = 0.1, 2.0, 12

    def loss_fn(model: nn.Module, t: int) -> Tensor:
        theta = model.weight[0, 0]
        return a * theta**2 / 2 - phi * theta

    for window in (1, 5, 11):
        inner = diffopt.SGD(model.parameters(), lr=alpha)
        fast = diffopt.unroll(model, inner, steps, loss_fn, adjoint=Truncated(window))
        found = torch.autograd.grad(fast.params["weight"].sum(), phi)[0]
        terms = alpha * (1 - alpha * a) ** torch.arange(steps)
        torch.testing.assert_close(found, terms[:window].sum(), rtol=1e-12, atol=0)
        assert terms.sum() - found > 1e-3


def test_truncated_second_derivative(problem: Problem) -> None:
    _, opt = OPTIMIZERS["sgd"]

    def second(params: dict[str, Tensor]) -> list[Tensor | None]:
        first = torch.autograd.grad(problem.outer(params), [problem.lr], create_graph=True)
        return list(torch.autograd.grad(first[0].sin(), problem.inputs(), allow_unused=True))

    def trained(adjoint: diffopt.Adjoint) -> dict[str, Tensor]:
        inner = opt(problem.model.parameters(), lr=problem.lr, weight_decay=problem.decay)
        return diffopt.unroll(problem.model, inner, T, problem.loss, adjoint=adjoint).params

    assert_same(second(trained(Truncated(T + 1))), second(trained(StoreAll())))
    assert_same(second(trained(Truncated(3))), second(trained(Truncated(3, StoreAll()))))


def test_truncated_plan_passes_over_the_steps_before() -> None:
    plan = Truncated(2, Segmented(1)).plan(5)
    assert [str(action) for action in plan.forward_actions] == [
        *("advance 0 3", "save 3", "advance 3 4", "save 4", "advance 4 5"),
    ]
    assert (plan.peak_states, plan.recomputed_steps, plan.steps) == (2, 0, 5)
    assert plan.relative_cost == pytest.approx((3 * 1 + 2 * 4) / (3 * 5))
    assert Truncated(7, Segmented(1)).plan(5) == Segmented(1).plan(5)


def test_truncated_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="window is 0, but must be at least 1"):
        Truncated(0)
    with pytest.raises(TypeError, match=r"window is 2\.0, of type float"):
        Truncated(2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inner is a str: pass an adjoint"):
        Truncated(2, "all")  # type: ignore[arg-type]


# --- FirstOrder -------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("losses_from", [T, 2])
def test_first_order_is_a_loop_with_detached_gradients(
    problem: Problem, name: str, losses_from: int
) -> None:
    rule, opt = OPTIMIZERS[name]
    expected = by_hand(problem, rule, first_order=True, losses_from=losses_from)
    assert_same(by_unroll(problem, opt, FirstOrder(), losses_from=losses_from), expected)


@every_optimizer
def test_first_order_with_numbers_for_hyperparameters(problem: Problem, name: str) -> None:
    rule, opt = OPTIMIZERS[name]
    problem.lr, problem.decay = torch.tensor(0.07), torch.tensor(0.3)
    params = [problem.weight, *problem.model.parameters()]
    for losses_from in (T, 2):
        problem.inputs = lambda: params  # type: ignore[method-assign]
        expected = by_hand(problem, rule, first_order=True, losses_from=losses_from)
        inner = opt(problem.model.parameters(), lr=0.07, weight_decay=0.3)
        fast = diffopt.unroll(problem.model, inner, T, problem.loss, adjoint=FirstOrder())
        total = problem.outer(fast.params) + fast.losses[losses_from:].sum()
        found = torch.autograd.grad(total, params, allow_unused=True)
        assert_same(list(found), expected)


def test_first_order_maml_gives_the_gradient_at_the_result_to_the_start(problem: Problem) -> None:
    inner = diffopt.SGD(problem.model.parameters(), lr=0.1)
    fast = diffopt.unroll(problem.model, inner, T, problem.loss, adjoint=FirstOrder())
    at_result = torch.autograd.grad(
        problem.outer(fast.params), list(fast.params.values()), retain_graph=True
    )
    at_start = torch.autograd.grad(problem.outer(fast.params), list(problem.model.parameters()))
    for a, b in zip(at_result, at_start, strict=True):
        assert torch.equal(a, b)


def test_first_order_differs_from_the_exact_gradient() -> None:
    """Gradient descent on aθ²/2: dθ_T/dθ_0 = (1 − αa)^T, where first order says 1."""
    model = nn.Linear(1, 1, bias=False).double()
    for adjoint, expected in ((Segmented(), (1 - 0.1 * 2.0) ** 6), (FirstOrder(), 1.0)):
        inner = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(
            model, inner, 6, lambda m, t: m.weight.square().sum(), adjoint=adjoint
        )
        found = torch.autograd.grad(fast.params["weight"].sum(), model.weight)[0]
        assert found.item() == pytest.approx(expected, rel=1e-12)


def test_first_order_builds_no_second_order_graph(problem: Problem) -> None:
    for adjoint, expected in ((FirstOrder(), {False}), (Segmented(), {False, True})):
        with_graph = set()

        def look(grads: dict[str, Tensor], seen: set[bool] = with_graph) -> dict[str, Tensor]:
            # Without a graph of theirs, gradients are copies of leaves of their own.
            alone = ("NoneType", "CloneBackward0")
            seen.update(type(g.grad_fn).__name__ not in alone for g in grads.values())
            return grads

        inner = diffopt.SGD(problem.model.parameters(), lr=problem.lr)
        fast = diffopt.unroll(
            problem.model, inner, 3, problem.loss, adjoint=adjoint, grad_transform=look
        )
        problem.outer(fast.params).backward()
        assert with_graph == expected


@pytest.mark.parametrize(
    ("make", "states"),
    [
        (lambda p: diffopt.SGD(p.model.parameters(), lr=0.1), 1),
        (lambda p: diffopt.Momentum(p.model.parameters(), lr=0.1, weight_decay=0.1), 1),
        (lambda p: diffopt.Adam(p.model.parameters(), lr=0.1), 1),
        (lambda p: diffopt.AdamW(p.model.parameters(), lr=lambda t: 0.1 / (t + 1)), 1),
        (lambda p: diffopt.Adam(p.model.parameters(), lr=0.1, weight_decay=0.1), 3),
        (lambda p: diffopt.SGD(p.model.parameters(), lr=p.lr), 3),
        (lambda p: diffopt.SGD(p.model.parameters(), lr=lambda t: p.lr if t > 3 else 0.1), 3),
    ],
    ids=["sgd", "decayed", "adam", "schedule", "adam-coupled", "learned-lr", "learned-later"],
)
def test_first_order_keeps_one_state_where_only_the_weights_learn(
    problem: Problem,
    make: Callable[[Problem], Any],
    states: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gradients, snapshots = [], CountedSnapshots()
    monkeypatch.setattr("diffopt.adjoint._first_order.Snapshots", lambda: snapshots)
    for adjoint in (FirstOrder(), StoreAll()):
        fast = diffopt.unroll(
            problem.model,
            make(problem),
            T,
            # With a loss that is linear in the weights the inner gradients are constants indeed.
            lambda model, t: sum((p * (t + 1.0)).sum() for p in model.parameters()),
            adjoint=adjoint,
        )
        gradients.append(
            torch.autograd.grad(problem.outer(fast.params), problem.inputs(), allow_unused=True)
        )
    assert snapshots.peak == states
    assert FirstOrder().plan(T).peak_states == 3
    assert_same(*map(list, gradients))


def test_first_order_respects_max_cotangent_norm(problem: Problem) -> None:
    norms = []
    for lr in (0.1, problem.lr):
        inner = diffopt.SGD(problem.model.parameters(), lr=lr, weight_decay=0.5)
        fast = diffopt.unroll(
            problem.model, inner, T, problem.loss, adjoint=FirstOrder(), max_cotangent_norm=0.2
        )
        found = torch.autograd.grad(problem.outer(fast.params), list(problem.model.parameters()))
        norms.append(torch.cat([g.flatten() for g in found]).norm())
    # Clipped once, at the end, and then shrunk by each step of weight decay.
    assert norms[0].item() == pytest.approx(0.2 * (1 - 0.1 * 0.5) ** T)
    assert norms[1].item() == pytest.approx(0.2 * (1 - 0.07 * 0.5) ** T)


def test_first_order_goes_back_twice(problem: Problem) -> None:
    inner = diffopt.SGD(problem.model.parameters(), lr=0.1)
    fast = diffopt.unroll(problem.model, inner, T, problem.loss, adjoint=FirstOrder())
    params = list(problem.model.parameters())

    def gradient(total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, params, retain_graph=True))

    for total in (problem.outer(fast.params), fast.losses.sum()):
        for a, b in zip(gradient(total), gradient(total), strict=True):
            assert torch.equal(a, b)
