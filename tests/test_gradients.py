"""Gradients reach everything that the training was made of.

Each problem below is solved by ``diffopt.unroll`` and by a plain loop that keeps its graph, and
the plain loop's gradient is in turn compared with central differences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from adjoints import every_adjoint
from helpers import Train, assert_all_close, batch, batches, differences, mse, tiny, unrolled
from oracle import plain
from torch import Tensor, nn

import diffopt

SGD = {"lr": 0.2}
T = 4


class Problem(NamedTuple):
    """A scalar that depends on trained weights, and the leaves it depends on through them."""

    outcome: Callable[[Train], Tensor]
    inputs: list[Tensor]


def leaf(*values: float) -> Tensor:
    """0-d for one value."""
    x = torch.tensor(values, dtype=torch.float64)
    return (x if len(values) > 1 else x[0].clone()).requires_grad_()


PROBLEMS: dict[str, Callable[[], Problem]] = {}


def problem(make: Callable[[], Problem]) -> Callable[[], Problem]:
    PROBLEMS[make.__name__] = make
    return make


# The start.


@problem
def initial_parameters() -> Problem:
    model, data, query = tiny(), batches(T), batch()
    return Problem(lambda train: mse(train(model, SGD, data, mse), query), list(model.parameters()))


@problem
def initial_values_computed_by_a_hypernetwork() -> Problem:
    model, data, query, z = tiny(), batches(T), batch(), leaf(0.3, -0.2)

    def outcome(train: Train) -> Tensor:
        initial = {"0.weight": z.tanh() * torch.ones(3, 1), "2.bias": z}
        return mse(train(model, SGD, data, mse, initial=initial), query)

    return Problem(outcome, [z, model[0].bias, model[2].weight])


@problem
def initial_optimizer_state() -> Problem:
    model, data, query = tiny(), batches(T), batch()
    state = {n: torch.randn_like(p).requires_grad_() for n, p in model.named_parameters()}
    options = {"lr": 0.1, "momentum": 0.8}
    return Problem(
        lambda train: mse(train(model, options, data, mse, state=state), query),
        [*state.values()],
    )


@problem
def some_parameters_are_left_alone_at_some_steps() -> Problem:
    model, data, query = tiny(), batches(T), batch()

    def loss_fn(model: Any, pair: Any) -> Tensor:
        even = pair is data[0] or pair is data[2]
        return mse(model, pair) if even else model[0](pair[0]).square().mean()

    options = {"lr": 0.1, "momentum": 0.8}
    return Problem(
        lambda train: mse(train(model, options, data, loss_fn), query), list(model.parameters())
    )


# Hyperparameters.


@problem
def tensor_hyperparameters() -> Problem:
    model, data, query = tiny(), batches(T), batch()
    lr, mu, decay = leaf(0.1), leaf(0.7), leaf(0.05)
    options = {"lr": lr, "momentum": mu, "weight_decay": decay}
    return Problem(lambda train: mse(train(model, options, data, mse), query), [lr, mu, decay])


@problem
def hyperparameters_that_are_computed() -> Problem:
    model, data, query, log_lr = tiny(), batches(T), batch(), leaf(-2.0)
    return Problem(
        lambda train: mse(train(model, {"lr": log_lr.exp()}, data, mse), query), [log_lr]
    )


@problem
def elementwise_hyperparameters_by_group() -> Problem:
    model, data, query = tiny(), batches(T), batch()
    rows, column, mu = leaf(0.1, 0.2), leaf(0.1, 0.05, 0.2), leaf(0.5)
    options = [
        ("0.weight", {"lr": rows}),
        ("0.bias", {"lr": column, "momentum": 0.5}),
        ("2", {"lr": 0.2, "momentum": mu}),
    ]
    return Problem(lambda train: mse(train(model, options, data, mse), query), [rows, column, mu])


@problem
def schedules() -> Problem:
    model, data, query, log_lr, rates = tiny(), batches(T), batch(), leaf(-2.0), leaf(0.1, 0.2)

    early = [0.1, 0.2]

    def outcome(train: Train) -> Tensor:
        doubled = rates * 2
        options = [
            ("0", {"lr": lambda t: log_lr.exp() / (1 + t), "momentum": lambda t: 0.5}),
            ("2", {"lr": lambda t: doubled[t - 2] if t >= 2 else early[t]}),
        ]
        return mse(train(model, options, data, mse), query)

    return Problem(outcome, [log_lr, rates])


# Batches.


@problem
def batch_tensors() -> Problem:
    model, query = tiny(), batch()
    data = [tuple(x.requires_grad_() for x in pair) for pair in batches(T)]
    return Problem(
        lambda train: mse(train(model, SGD, data, mse), query), [x for pair in data for x in pair]
    )


@problem
def batches_that_are_computed_and_nested() -> Problem:
    model, data, query, shift = tiny(), batches(T), batch(), leaf(0.1, -0.3)

    def loss_fn(model: Any, item: Any) -> Tensor:
        return mse(model, item["pair"]) * item["weights"][1][0]

    def outcome(train: Train) -> Tensor:
        items = [
            {"pair": [x + shift, y], "weights": (None, [shift.exp().sum() * t], "text")}
            for t, (x, y) in enumerate(data, start=1)
        ]
        return mse(train(model, {"lr": 0.02}, items, loss_fn), query)

    return Problem(outcome, [shift])


@problem
def one_tensor_of_batches() -> Problem:
    model, query, xs = tiny(), batch(), torch.randn(T, 5, 2).double().requires_grad_()
    return Problem(
        lambda train: mse(train(model, SGD, xs * 2, lambda m, x: m(x).square().mean()), query),
        [xs],
    )


# The model's other parameters, and its buffers.


@problem
def parameters_outside_the_optimizer() -> Problem:
    model, data, query = tiny(), batches(T), batch()
    return Problem(
        lambda train: mse(train(model, [("2", SGD)], data, mse), query), list(model.parameters())
    )


class Gated(nn.Module):
    """Buffers that gradients flow through: one given requiring grad, one computed by each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2).double()
        self.register_buffer("gate", leaf(0.4, 0.7))
        self.register_buffer("memory", torch.zeros(2).double())

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * self.gate + self.memory
        self.memory = 0.5 * self.memory + y.mean(0)
        return y


@problem
def buffers_that_carry_gradients() -> Problem:
    model, data, query = Gated(), batches(T), batch()

    def outcome(train: Train) -> Tensor:
        fast = train(model, SGD, data, mse)
        return mse(fast, query) + fast.buffers["memory"].square().sum()

    return Problem(outcome, [model.gate, *model.parameters()])


# What loss_fn captured.


@problem
def captured_leaf() -> Problem:
    model, data, query, scale = tiny(), batches(T), batch(), leaf(0.7)
    return Problem(
        lambda train: mse(train(model, SGD, data, lambda m, b: mse(m, b) * scale), query), [scale]
    )


@problem
def captured_function_of_a_leaf() -> Problem:
    model, data, query, log_scale = tiny(), batches(T), batch(), leaf(-0.3)

    def outcome(train: Train) -> Tensor:
        scale = log_scale.exp()
        return mse(train(model, SGD, data, lambda m, b: mse(m, b) * scale), query)

    return Problem(outcome, [log_scale])


@problem
def captured_leaf_and_functions_of_it() -> Problem:
    model, data, query, a = tiny(), batches(T), batch(), leaf(0.3)

    def outcome(train: Train) -> Tensor:
        b = a.exp()
        c = b * a
        options = {"lr": lambda t: 0.1 * b}
        fast = train(model, options, data, lambda m, pair: mse(m, pair) * (a + b * c) + c)
        return mse(fast, query) * a + fast.losses.sum()

    return Problem(outcome, [a])


@problem
def captured_outputs_of_one_function() -> Problem:
    model, data, query, pair = tiny(), batches(T), batch(), leaf(0.4, 0.8)

    def outcome(train: Train) -> Tensor:
        first, second = (pair * 2).unbind()
        fast = train(model, SGD, data, lambda m, b: mse(m, b) * first * (1 + second) * pair[0])
        return mse(fast, query)

    return Problem(outcome, [pair])


@problem
def captured_in_a_partial_and_a_default() -> Problem:
    model, data, query, scale, shift = tiny(), batches(T), batch(), leaf(0.7), leaf(0.1)

    def outcome(train: Train) -> Tensor:
        def loss_fn(model: Any, pair: Any, shift: Any = shift * 2, *, scale: Any = None) -> Tensor:
            return (model(pair[0]) + shift).square().mean() * scale

        fast = train(model, SGD, data, functools.partial(loss_fn, scale=scale.sin()))
        return mse(fast, query)

    return Problem(outcome, [scale, shift])


captured_globally = leaf(0.6)


@problem
def captured_global() -> Problem:
    model, data, query = tiny(), batches(T), batch()
    return Problem(
        lambda train: mse(
            train(model, SGD, data, lambda m, b: mse(m, b) * captured_globally), query
        ),
        [captured_globally],
    )


@problem
def captured_through_an_attribute_of_the_model() -> Problem:
    model, data, query, scale = tiny(), batches(T), batch(), leaf(0.7)
    extra = nn.Linear(2, 1).double()

    def outcome(train: Train) -> Tensor:
        model.scale, model.extra = scale.exp(), [extra]  # type: ignore[assignment]
        fast = train(
            model, SGD, data, lambda m, b: mse(m, b) * m.scale + m.extra[0](m(b[0])).mean()
        )
        return mse(fast, query)

    return Problem(outcome, [scale, extra.weight])


@problem
def captured_module() -> Problem:
    model, data, query = tiny(), batches(T), batch()
    learned_loss = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    def loss_fn(model: Any, pair: Any) -> Tensor:
        return learned_loss(torch.cat([model(pair[0]), pair[1]], dim=1)).square().mean()

    return Problem(
        lambda train: mse(train(model, SGD, data, loss_fn), query),
        list(learned_loss.parameters())[:3],
    )


@problem
def captured_at_some_steps() -> Problem:
    model, data, query = tiny(), batches(T), batch()
    first, last, never = leaf(0.7), leaf(0.3), leaf(0.5)

    def outcome(train: Train) -> Tensor:
        computed, unused = last.exp(), never.exp()

        def loss_fn(model: Any, t: int) -> Tensor:
            loss = mse(model, data[t])
            if t == 0:
                loss = loss * first
            elif t == T - 1:
                loss = loss * computed
            elif t > T:
                loss = loss * unused
            return loss

        return mse(train(model, SGD, T, loss_fn), query) + 0 * unused

    return Problem(outcome, [first, last, never])


@problem
def captured_at_each_step_another() -> Problem:
    model, data, query, weights = tiny(), batches(T), batch(), leaf(0.2, 0.4, 0.6, 0.8)

    def outcome(train: Train) -> Tensor:
        each = [w.exp() for w in weights]
        return mse(train(model, SGD, T, lambda m, t: mse(m, data[t]) * each[t]), query)

    return Problem(outcome, [weights])


@problem
def captured_initial_parameters() -> Problem:
    """The proximal term of implicit MAML."""
    model, data, query = tiny(), batches(T), batch()
    start = dict(model.named_parameters())

    def loss_fn(model: Any, pair: Any) -> Tensor:
        pull = [(p - start[n]).square().sum() for n, p in model.named_parameters()]
        return mse(model, pair) + torch.stack(pull).sum() + start["2.bias"].exp().sum()

    return Problem(
        lambda train: mse(train(model, SGD, data, loss_fn), query), list(model.parameters())
    )


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, b = ctx.saved_tensors
        return g * b, g * a


@problem
def captured_by_a_custom_function() -> Problem:
    model, data, query, scale = tiny(), batches(T), batch(), leaf(0.7)

    def outcome(train: Train) -> Tensor:
        computed = scale.exp()

        def loss_fn(model: Any, pair: Any) -> Tensor:
            return Product.apply(Product.apply(mse(model, pair), computed), scale)

        return mse(train(model, SGD, data, loss_fn), query)

    return Problem(outcome, [scale])


class Reversed(torch.autograd.Function):
    """Gradient reversal of a learned strength, which only the backward pass uses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: Tensor) -> Tensor:
        ctx.save_for_backward(strength)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return -g * ctx.saved_tensors[0], None


@problem
def captured_by_the_backward_pass_of_the_loss() -> Problem:
    model, data, query, strength = tiny(), batches(T), batch(), leaf(0.7)

    def loss_fn(model: Any, pair: Any) -> Tensor:
        hidden = Reversed.apply(model[0](pair[0]), strength)
        return F.mse_loss(model[2](model[1](hidden)), pair[1])

    return Problem(lambda train: mse(train(model, SGD, data, loss_fn), query), [strength])


@problem
def captured_by_grad_transform() -> Problem:
    model, data, query, log_scale, most = tiny(), batches(T), batch(), leaf(-0.3), leaf(0.5)

    def outcome(train: Train) -> Tensor:
        scale = log_scale.exp()

        def clipped(grads: dict[str, Tensor]) -> dict[str, Tensor]:
            norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
            return {n: g * scale * torch.minimum(most / norm, one) for n, g in grads.items()}

        one = torch.ones(()).double()
        return mse(train(model, SGD, data, mse, grad_transform=clipped), query)

    return Problem(outcome, [log_scale, most, *model.parameters()])


@problem
def captured_inner_gradient_of_the_loss() -> Problem:
    """A gradient penalty: the loss takes a derivative of its own."""
    model, data, query, strength = tiny(), batches(T), batch(), leaf(0.7)

    def outcome(train: Train) -> Tensor:
        computed = strength.exp()

        def loss_fn(model: Any, pair: Any) -> Tensor:
            x = pair[0].detach().requires_grad_()
            (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            return mse(model, pair) + computed * slope.square().mean()

        return mse(train(model, {"lr": 0.05}, data, loss_fn), query)

    return Problem(outcome, [strength, *model.parameters()])


# Where it flows from.


@problem
def through_losses() -> Problem:
    model, data, weights = tiny(), batches(T), torch.linspace(0.1, 1.0, T).double()
    lr = leaf(0.1)
    return Problem(
        lambda train: (train(model, {"lr": lr}, data, mse).losses * weights).sum(),
        [lr, *model.parameters()],
    )


@problem
def through_optimizer_state() -> Problem:
    model, data, mu = tiny(), batches(T), leaf(0.7)

    def outcome(train: Train) -> Tensor:
        fast = train(model, {"lr": 0.1, "momentum": mu}, data, mse)
        held = fast.opt_state["0.weight"]["momentum_buffer"]
        return held.square().sum() + fast.losses[1] * fast.params["2.bias"].sum()

    return Problem(outcome, [mu, *model.parameters()])


@problem
def through_bounded_cotangents() -> Problem:
    # Linear in what was trained: otherwise a second derivative has two passes through the bound,
    # which the plain loop joins.
    model, data, lr = tiny(), batches(T), leaf(0.3)

    def outcome(train: Train) -> Tensor:
        fast = train(model, {"lr": lr}, data, mse, max_cotangent_norm=0.05)
        total = torch.stack([(x * (x.detach() + 1).cos()).sum() for x in fast.params.values()])
        return total.sum() + 0.1 * fast.losses.sum()

    return Problem(outcome, [lr, *model.parameters()])


@problem
def through_two_unrolls() -> Problem:
    model, data, query, lr = tiny(), batches(2), batch(), leaf(0.2)

    def outcome(train: Train) -> Tensor:
        half = train(model, {"lr": lr}, data, mse)
        return mse(train(model, {"lr": lr * lr}, data, mse, initial=half.params), query)

    return Problem(outcome, [lr, *model.parameters()])


INEXACT_ON_PURPOSE = {
    "through_bounded_cotangents",
    "captured_by_the_backward_pass_of_the_loss",
}
every_problem = pytest.mark.parametrize("name", PROBLEMS)


@every_adjoint
@every_problem
def test_gradient_is_the_plain_loops(name: str, adjoint: diffopt.Adjoint) -> None:
    outcome, inputs = PROBLEMS[name]()
    want_outcome = outcome(plain)
    want = torch.autograd.grad(want_outcome, inputs)
    got_outcome = outcome(unrolled(adjoint))
    torch.testing.assert_close(got_outcome, want_outcome, rtol=1e-12, atol=0)
    got = torch.autograd.grad(got_outcome, inputs)
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)
    assert all(x.grad is None for x in inputs)
    outcome(unrolled(adjoint)).backward()
    assert_all_close([x.grad for x in inputs], want, rtol=1e-10, atol=1e-13)
    for x in inputs:
        x.grad = None


@pytest.mark.parametrize("name", sorted(PROBLEMS.keys() - INEXACT_ON_PURPOSE))
def test_the_plain_loops_gradient_is_that_of_finite_differences(name: str) -> None:
    outcome, inputs = PROBLEMS[name]()
    inputs = inputs[:5]
    want = differences(lambda: outcome(plain), inputs)
    assert_all_close(torch.autograd.grad(outcome(plain), inputs), want, rtol=1e-6, atol=1e-9)


# The plain loop bounds what flows back in a second derivative as well: see test_adjoints_clipped.
@pytest.mark.parametrize("name", sorted(PROBLEMS.keys() - {"through_bounded_cotangents"}))
def test_second_derivative_is_the_plain_loops(name: str) -> None:
    outcome, inputs = PROBLEMS[name]()

    def of_gradient(train: Train) -> list[Tensor | None]:
        first = torch.autograd.grad(outcome(train), inputs, create_graph=True)
        norm = torch.stack([(g * g.detach().cos()).sum() for g in first]).sum()
        return list(torch.autograd.grad(norm, inputs, allow_unused=True))

    want = of_gradient(plain)
    for adjoint in (diffopt.StoreAll(), diffopt.Segmented(3)):
        got = of_gradient(unrolled(adjoint))
        for a, b in zip(got, want, strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(
                zero.double() if a is None else a,
                (zero.double() if a is None else torch.zeros_like(a)) if b is None else b,
                rtol=1e-9,
                atol=1e-11,
            )
