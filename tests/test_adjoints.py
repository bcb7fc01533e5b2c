"""Every exact adjoint over the table of optimizers, and runs that keep to their plans."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from adjoints import EXACT
from helpers import new_objects_only
from optimizers import CASES, Case
from oracle import plain
from plans import CountedSnapshots
from torch import Tensor, nn

import diffopt
from diffopt import schedule
from diffopt._step.linearization import Linearization
from diffopt.adjoint import Checkpointed

STEPS = 7
OTHERS = [(name, adjoint) for name, adjoint in EXACT if name != "store-all"]
every_other_adjoint = pytest.mark.parametrize(
    "adjoint", [adjoint for _, adjoint in OTHERS], ids=[name for name, _ in OTHERS]
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def problem(case: Case, adjoint: diffopt.Adjoint) -> tuple[Tensor, list[Tensor]]:
    """A function of all results of a small unroll, and what it is made of."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Dropout(0.2), nn.Linear(3, 1))
    x, y = torch.randn(5, 2), torch.randn(5, 1)
    weight = torch.rand(5, 1).add(0.5).requires_grad_()
    lr = torch.tensor(case.options.get("lr", 0.1), requires_grad=True)
    fast = diffopt.unroll(
        model,
        case.ours(model.parameters(), lr=lr),
        STEPS,
        lambda m, t: (weight * (m(x) - y).square()).mean(),
        adjoint=adjoint,
    )
    params = torch.cat([p.flatten() for p in fast.params.values()])
    total = params.cos().sum() + (fast.losses * torch.arange(STEPS)).sum()
    return total, [lr, weight, *model.parameters()]


def first(case: Case, adjoint: diffopt.Adjoint) -> list[Tensor]:
    total, inputs = problem(case, adjoint)
    return list(torch.autograd.grad(total, inputs))


def second(case: Case, adjoint: diffopt.Adjoint) -> list[Tensor]:
    total, inputs = problem(case, adjoint)
    gradients = torch.autograd.grad(total, inputs, create_graph=True)
    return list(torch.autograd.grad(sum(g.sin().sum() for g in gradients), inputs))


expected_first = cache(lambda index: first(CASES[index], diffopt.StoreAll()))
expected_second = cache(lambda index: second(CASES[index], diffopt.StoreAll()))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm() + 1e-14


@every_other_adjoint
@every_case
def test_equals_store_all(case: Case, adjoint: diffopt.Adjoint) -> None:
    assert_same(first(case, adjoint), expected_first(CASES.index(case)))


# One case of each optimizer: that all options are differentiated twice is tested with the rules.
LAST = {case.name: case for case in CASES}


@every_other_adjoint
@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_second_derivative_equals_store_alls(name: str, adjoint: diffopt.Adjoint) -> None:
    case = LAST[name]
    assert_same(second(case, adjoint), expected_second(CASES.index(case)))


# --- A run keeps to its plan ------------------------------------------------------------------


@dataclass(frozen=True)
class Following(Checkpointed):
    """Follows the plan of another adjoint, and counts its snapshots."""

    other: diffopt.Adjoint
    snapshots: CountedSnapshots

    def plan(self, steps: int) -> schedule.Plan:
        return self.other.plan(steps)

    def new_snapshots(self) -> CountedSnapshots:
        return self.snapshots


def counted(steps: int, other: diffopt.Adjoint) -> tuple[int, int, int]:
    """Peak states, peak graphs, and evaluations of the loss."""
    model, snapshots, graphs = nn.Linear(1, 1), CountedSnapshots(), []
    following = Following(other, snapshots)

    def loss_fn(model: nn.Module, t: int) -> Tensor:  # once a graph is there, it is one more
        graphs.append(sum(isinstance(x, Linearization) for x in gc.get_objects()) + 1)
        return model.weight.square().sum() + model.bias.sum()

    with new_objects_only():
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, steps, loss_fn, adjoint=following)
        fast.params["weight"].sum().backward()
    assert not len(snapshots)
    return max(snapshots.peak, 1), max(graphs), len(graphs)  # the loop holds the start


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13, 30])
@pytest.mark.parametrize(
    "other",
    [
        diffopt.StoreAll(),
        diffopt.Segmented(),
        *(diffopt.Segmented(k) for k in (1, 2, 3, 7, 40)),
        *(diffopt.Binomial(c) for c in (1, 2, 3, 5, 40)),
    ],
    ids=repr,
)
def test_states_and_evaluations_counted_in_a_run_are_the_plans(
    steps: int, other: diffopt.Adjoint
) -> None:
    plan = other.plan(steps)
    states, graphs, calls = counted(steps, other)
    assert states == plan.peak_states
    assert graphs == plan.peak_graphs
    # Every step is evaluated once with a graph; in the plan that is a vjp or a record.
    assert calls == plan.counts.advanced + steps


# --- With the other arguments of unroll -------------------------------------------------------

ANY = [
    diffopt.Binomial(2),
    diffopt.MemoryBudget("1GiB"),
    diffopt.Truncated(3),
    diffopt.FirstOrder(),
    diffopt.Implicit(gradient_tol=1e9),
]


@pytest.mark.parametrize("adjoint", ANY, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("options", [{"verify": True}, {"tasks": 2}], ids=["verify", "tasks"])
def test_goes_with_other_arguments(adjoint: diffopt.Adjoint, options: dict[str, Any]) -> None:
    """``tasks`` equals a loop over the tasks; ``verify`` changes nothing."""
    torch.set_default_dtype(torch.float64)
    model, x = nn.Linear(3, 1), torch.randn(2, 4, 5, 3)  # task, step, row, column
    scale = torch.tensor(1.3, requires_grad=True)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        fit = (scale * model(batch) - 1).square().mean()
        return fit + model.weight.square().sum() + model.bias.square().sum()

    def gradient(x: list[Tensor], **more: Any) -> Tensor:
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, x, loss_fn, adjoint=adjoint, **more)
        total = torch.cat([p.flatten() for p in fast.params.values()]).square().sum()
        found = torch.autograd.grad(total, scale, allow_unused=True)[0]
        return torch.zeros(()) if found is None else found

    separate = [gradient(list(x[i])) for i in range(2)]
    if "tasks" in options:
        found, expected = gradient(list(x.transpose(0, 1)), **options), sum(separate)
    else:
        found, expected = gradient(list(x[0]), **options), separate[0]
    # Solving for all tasks at once takes other steps of CG than for each.
    rtol = 1e-4 if isinstance(adjoint, diffopt.Implicit) else 1e-10
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)


class Counting(nn.Module):
    """A running mean that is changed in place and used, and a call counter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        with torch.no_grad():
            self.mean.mul_(0.7).add_(0.3 * y.mean(0))
            self.calls.add_(1)
        return (y - self.mean).sin() * (1 + 0.1 * self.calls)


CHANGING = {
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
    "in place": lambda: nn.Sequential(Counting(), nn.Linear(2, 1)),
}


@pytest.mark.parametrize(
    "adjoint",
    [
        *(adjoint for _, adjoint in EXACT),
        diffopt.MemoryBudget(),
        diffopt.Truncated(9, inner=diffopt.StoreAll()),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", CHANGING)
def test_tasks_with_buffers_that_change_equal_plain_loops(
    name: str, adjoint: diffopt.Adjoint
) -> None:
    torch.set_default_dtype(torch.float64)
    model, x = CHANGING[name](), torch.randn(2, 4, 6, 3)  # task, step, row, column
    scale = torch.tensor(1.3, requires_grad=True)
    inputs = [scale, *model.parameters()]

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return (scale * model(batch) - 1).square().mean()

    def outcome(params: Any) -> Tensor:
        return torch.cat([p.flatten() for p in params.values()]).square().sum()

    opt = diffopt.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, opt, list(x.transpose(0, 1)), loss_fn, tasks=2, adjoint=adjoint)
    separate = [plain(model, {"lr": 0.1}, list(x[i]), loss_fn) for i in range(2)]
    for buffer, values in fast.buffers.items():
        for i in range(2):
            torch.testing.assert_close(values[i], separate[i].buffers[buffer])
    found = torch.autograd.grad(outcome(fast.params), inputs)
    expected = torch.autograd.grad(sum(outcome(each.params) for each in separate), inputs)
    assert_same(list(found), list(expected))


def test_forward_mode_goes_with_tasks() -> None:
    torch.set_default_dtype(torch.float64)
    model, x = nn.Linear(3, 1), torch.randn(4, 2, 5, 3)
    lr = torch.tensor(0.1, requires_grad=True)
    found = []
    for adjoint in (diffopt.StoreAll(), diffopt.ForwardMode([lr])):
        opt = diffopt.Adam(model.parameters(), lr=lr)
        fast = diffopt.unroll(
            model, opt, list(x), lambda m, b: m(b).square().mean(), adjoint=adjoint, tasks=2
        )
        found.append(torch.autograd.grad((fast.losses * torch.arange(4)).sum(), lr)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


# --- Other ways to ask for a gradient -----------------------------------------------------------


def rates(kind: str) -> Any:
    return torch.tensor(0.1, requires_grad=True) if kind == "tensor" else 0.1


@pytest.mark.parametrize("bound", [None, 0.3])
@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("name", ["SGD", "Momentum", "Adam"])
@pytest.mark.parametrize(
    "adjoint",
    [*(adjoint for _, adjoint in EXACT), diffopt.FirstOrder(), diffopt.Truncated(2)],
    ids=repr,
)
def test_many_cotangents_at_once(
    adjoint: diffopt.Adjoint, name: str, kind: str, bound: float | None
) -> None:
    """``is_grads_batched=True``, with random numbers in the steps that are computed again."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.Tanh()), torch.randn(5, 3)
    scale = torch.tensor(1.3, requires_grad=True)
    fast = diffopt.unroll(
        model,
        getattr(diffopt, name)(model.parameters(), lr=rates(kind)),
        4,
        lambda m, t: (scale * m(x) - 1).square().mean(),
        adjoint=adjoint,
        max_cotangent_norm=bound,
    )
    results = [*fast.params.values(), fast.losses]
    inputs = [scale, *model.parameters()]
    cotangents = [torch.randn(6, *y.shape) for y in results]
    found = torch.autograd.grad(
        results,
        inputs,
        cotangents,
        is_grads_batched=True,
        retain_graph=True,
        allow_unused=True,
    )
    for i in range(6):
        one = torch.autograd.grad(
            results,
            inputs,
            [c[i] for c in cotangents],
            retain_graph=True,
            allow_unused=True,
        )
        for many, alone in zip(found, one, strict=True):
            assert (many is None) == (alone is None)
            if alone is not None:
                assert_same([many[i]], [alone])


@pytest.mark.parametrize(
    "adjoint", [diffopt.StoreAll(), diffopt.Segmented(2), diffopt.MemoryBudget()], ids=repr
)
def test_a_vectorized_jacobian_of_a_gradient(adjoint: diffopt.Adjoint) -> None:
    torch.set_default_dtype(torch.float64)
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.randn(5, 2)

    def gradient(lr: Tensor) -> Tensor:
        inner = diffopt.SGD(model.parameters(), lr=lr)
        fast = diffopt.unroll(model, inner, 3, lambda m, t: m(x).square().sum(), adjoint=adjoint)
        total = fast.params["0.weight"].sin().sum()
        found = torch.autograd.grad(total, list(model.parameters()), create_graph=True)
        return torch.cat([g.flatten() for g in found])

    lr = torch.tensor([0.1])
    found, expected = (
        torch.autograd.functional.jacobian(gradient, lr, vectorize=vectorize)
        for vectorize in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_forward_modes_product_with_many_cotangents_at_once() -> None:
    torch.set_default_dtype(torch.float64)
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    lr = torch.tensor([0.1, 0.2], requires_grad=True)
    fast = diffopt.unroll(
        model,
        diffopt.SGD(model.parameters(), lr=lambda t: lr[t % 2]),
        4,
        lambda m, t: m(x).square().mean(),
        adjoint=diffopt.ForwardMode([lr]),
    )
    y = fast.params["weight"]
    c = torch.randn(4, *y.shape)
    (found,) = torch.autograd.grad(y, lr, c, is_grads_batched=True, retain_graph=True)
    for i in range(4):
        one = torch.autograd.grad(y, lr, c[i], retain_graph=True)
        assert_same([found[i]], list(one))


def test_implicits_solver_takes_one_cotangent_at_a_time() -> None:
    model, scale = nn.Linear(3, 2), torch.tensor(1.3, requires_grad=True)
    fast = diffopt.unroll(
        model,
        diffopt.SGD(model.parameters(), lr=0.1),
        4,
        lambda m, t: sum((p - scale).square().sum() for p in m.parameters()),
        adjoint=diffopt.Implicit(gradient_tol=1e9),
    )
    y = fast.params["weight"]
    with pytest.raises(NotImplementedError, match="is_grads_batched=True gives Implicit many"):
        torch.autograd.grad(y, scale, torch.ones(4, *y.shape), is_grads_batched=True)


class KeepsNothing(diffopt.Adjoint):
    """Of one step, p ← p − 0.1 · 2 p, whose derivative needs nothing kept."""

    def forward(self, loop: Any) -> Any:
        return loop.first(loop.start, 0), None

    def backward(self, loop: Any, kept: Any, cotangent: Any, outputs: Any, *, keep: bool) -> Any:
        assert kept is None
        unused: list[Tensor | None] = [None] * len(loop.captured.tensors)
        return {path: 0.8 * c for path, c in cotangent.items()}, unused


def test_an_adjoint_may_keep_nothing() -> None:
    model = nn.Linear(3, 2)
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(
        model,
        inner,
        1,
        lambda m, t: sum(p.square().sum() for p in m.parameters()),
        adjoint=KeepsNothing(),
    )
    total = fast.params["weight"].sum()
    for retain in (True, False):
        (found,) = torch.autograd.grad(total, model.weight, retain_graph=retain)
        torch.testing.assert_close(found, torch.full((2, 3), 0.8))


def test_implicit_of_no_steps_delivers_nothing() -> None:
    model = nn.Linear(3, 2)
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, inner, 0, lambda m, t: m.weight.sum(), adjoint=diffopt.Implicit())
    total = fast.params["weight"].sum()
    assert torch.autograd.grad(total, model.weight, allow_unused=True) == (None,)
