"""ForwardMode: equal to StoreAll for what it is asked about, and silent about the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import live_bytes, new_objects_only, scripted
from optimizers import CASES, Case
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import diffopt
from diffopt import ForwardMode, StoreAll
from diffopt.adjoint import _tangents

every_optimizer = pytest.mark.parametrize(
    "case", {case.name: case for case in CASES}.values(), ids=lambda case: case.id
)


@pytest.fixture(autouse=True)
def _float64() -> None:
    torch.set_default_dtype(torch.float64)


def assert_equals_store_all(
    unroll: Callable[[diffopt.Adjoint], diffopt.Unrolled], wrt: list[Tensor], rtol: float = 1e-10
) -> None:
    """In the gradients of a function of all results, through ``torch.autograd.grad``."""
    found = []
    for adjoint in (StoreAll(), ForwardMode(wrt)):
        torch.manual_seed(3)
        fast = unroll(adjoint)
        torch.manual_seed(4)
        results = [
            *(x for x in fast.params.values() if x.requires_grad),
            *(x for s in fast.opt_state.values() for k, x in s.items() if k != "step"),
            *(x for x in fast.buffers.values() if x.requires_grad),
            fast.losses,
        ]
        total = torch.stack([(x * torch.randn_like(x)).sum() for x in results]).sum()
        found.append(torch.autograd.grad(total, wrt))
    for exact, forward in zip(*found, strict=True):
        assert exact.any()
        torch.testing.assert_close(forward, exact, rtol=rtol, atol=1e-13)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


@every_optimizer
def test_equals_store_all(case: Case) -> None:
    model, x, y = small(), torch.randn(5, 2), torch.randn(5, 1)
    lr = torch.tensor(case.options.get("lr", 0.1), requires_grad=True)
    log_weight = torch.randn(5, 1, requires_grad=True)
    weight = log_weight.exp()

    def loss_fn(model: nn.Module, t: int) -> Tensor:
        return (weight * (model(x) - y).square()).mean()

    def unroll(adjoint: diffopt.Adjoint) -> diffopt.Unrolled:
        opt = case.ours(model.parameters(), lr=lr)
        return diffopt.unroll(model, opt, 5, loss_fn, adjoint=adjoint)

    assert_equals_store_all(unroll, [lr, weight, model[2].bias])


def test_reaches_everything_that_a_step_uses() -> None:
    """Batches, constants, buffers, non-leaf starts and optimizer state, schedules, transforms."""
    model = small()
    model.register_buffer("shift", torch.randn(3, 1, requires_grad=True)[:1])
    model[0].bias.requires_grad_()
    opt = diffopt.Momentum(model[2].parameters(), lr=lambda t: log_lr.exp() / (t + 1))
    log_lr = torch.tensor(-2.0, requires_grad=True)
    factor = torch.tensor(0.7, requires_grad=True)
    start = torch.randn(1, 3, requires_grad=True) * 2
    momentum = torch.randn(1, 3, requires_grad=True) * 2
    batches = [torch.randn(4, 2, requires_grad=t == 2) for t in range(4)]

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - model.shift).square().mean()

    def unroll(adjoint: diffopt.Adjoint) -> diffopt.Unrolled:
        opt.state[model[2].weight]["momentum_buffer"] = momentum
        return diffopt.unroll(
            model,
            opt,
            batches,
            loss_fn,
            initial={"2.weight": start},
            grad_transform=lambda grads: {n: factor * g for n, g in grads.items()},
            adjoint=adjoint,
        )

    wrt = [log_lr, factor, start, momentum, batches[2], model.shift, model[0].bias]
    assert_equals_store_all(unroll, wrt)


def test_a_start_that_the_loss_captures_too() -> None:
    model = small()
    prior = list(model.parameters())

    def loss_fn(model: nn.Module, t: int) -> Tensor:
        near = sum((p - q).square().sum() for p, q in zip(model.parameters(), prior, strict=True))
        return model(torch.ones(1, 2)).square().mean() + near

    def unroll(adjoint: diffopt.Adjoint) -> diffopt.Unrolled:
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        return diffopt.unroll(model, opt, 3, loss_fn, adjoint=adjoint)

    assert_equals_store_all(unroll, [model[0].bias, model[2].weight])


class Squared(torch.autograd.Function):
    """An operation without a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Disagreeing(Squared):
    """An operation whose forward derivative is another one than the reverse derivative."""

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        return torch.zeros_like(dx)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)[0]
        return out


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return checkpoint(lambda h: self.second(h.tanh()).tanh(), hidden, use_reentrant=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 1)),
    "batch-norm": lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3), nn.BatchNorm1d(3)),
    "convolution": lambda: nn.Sequential(nn.Conv1d(3, 2, 2), nn.Softplus(), nn.MaxPool1d(2)),
    "attention": Attention,
    "recurrent": Recurrent,
    "checkpointed": Checkpointed,
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model, x = MODELS[name](), torch.randn(5, 3, 4)
    lr = torch.tensor(0.1, requires_grad=True)
    scale = torch.tensor(1.3, requires_grad=True)

    def unroll(adjoint: diffopt.Adjoint) -> diffopt.Unrolled:
        opt = diffopt.SGD(model.parameters(), lr=lr)
        return diffopt.unroll(
            model, opt, 4, lambda m, t: (m(scale * x) ** 2).mean(), adjoint=adjoint
        )

    assert_equals_store_all(unroll, [lr, scale])


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways in which tangents are pushed through steps, once for each call."""
    taken: list[str] = []
    for name in ("pushed", "pushed_by_transposition"):
        way = getattr(_tangents, name)

        def record(*args: Any, name: str = name, way: Any = way) -> Any:
            taken.append(name)
            return way(*args)

        monkeypatch.setattr(_tangents, name, record)
    return taken


@pytest.mark.parametrize(
    ("loss_of", "forward"),
    [
        (lambda model, x: model(x).square().mean(), True),
        (lambda model, x: Squared.apply(model(x)).square().mean(), False),
        (lambda model, x: Disagreeing.apply(model(x)).square().mean(), False),
    ],
    ids=["plain", "no-forward-derivative", "another-forward-derivative"],
)
def test_falls_back_where_forward_mode_does_not_serve(
    loss_of: Callable[[nn.Module, Tensor], Tensor], forward: bool, ways: list[str]
) -> None:
    model, x, lr = small(), torch.randn(5, 2), torch.tensor(0.1, requires_grad=True)
    gradients = []
    for adjoint in (ForwardMode([lr]), StoreAll()):
        opt = diffopt.SGD(model.parameters(), lr=lr)
        fast = diffopt.unroll(model, opt, 4, lambda m, t: loss_of(m, x), adjoint=adjoint)
        gradients.append(torch.autograd.grad(fast.losses.sum(), lr)[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=0)
    assert ways[-1] == ("pushed" if forward else "pushed_by_transposition")
    assert ways.count("pushed") == (5 if forward else 1)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def test_falls_back_where_a_captured_tensor_is_out_of_sight(ways: list[str]) -> None:
    """A scripted module uses its parameters without going through Python."""
    model, x, scale = small(), torch.randn(5, 2), scripted(Scale())

    def unroll(adjoint: diffopt.Adjoint) -> diffopt.Unrolled:
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        return diffopt.unroll(
            model, opt, 4, lambda m, t: scale(m(x)).square().mean(), adjoint=adjoint
        )

    assert_equals_store_all(unroll, [scale.scale])
    assert ways[-1] == "pushed_by_transposition"


class OnceInReverse(torch.autograd.Function):
    """An operation with a forward derivative, and one only in reverse."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * dx

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError("no second derivative in reverse")
        return 2 * x * g


def test_needs_no_second_derivative_in_reverse() -> None:
    model, x, lr = small(), torch.randn(5, 2), torch.tensor(0.1, requires_grad=True)
    gradients = []
    for square, adjoint in (
        (OnceInReverse.apply, ForwardMode([lr])),
        (torch.square, StoreAll()),
    ):
        opt = diffopt.SGD(model.parameters(), lr=lr)
        fast = diffopt.unroll(model, opt, 4, lambda m, t, f=square: f(m(x)).mean(), adjoint=adjoint)
        gradients.append(torch.autograd.grad(fast.losses.sum(), lr)[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=0)


class DropsTangents(OnceInReverse):
    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        return torch.zeros_like(dx)


def test_a_wrong_forward_derivative_is_found_without_a_second_one_in_reverse() -> None:
    model, x, lr = small(), torch.randn(5, 2), torch.tensor(0.1, requires_grad=True)
    opt = diffopt.SGD(model.parameters(), lr=lr)
    message = "no second derivative in reverse.*finite differences say that its forward derivative"
    with pytest.raises(NotImplementedError, match=message):
        diffopt.unroll(
            model,
            opt,
            4,
            lambda m, t: DropsTangents.apply(m(x)).mean(),
            adjoint=ForwardMode([lr]),
        )


def test_what_cannot_be_checked_in_low_precision_is_refused() -> None:
    model, x = small().float(), torch.randn(5, 2).float()
    lr = torch.tensor(0.1, requires_grad=True, dtype=torch.float32)
    opt = diffopt.SGD(model.parameters(), lr=lr)
    with pytest.raises(NotImplementedError, match=r"at step 0.* convert the model and its data to"):
        diffopt.unroll(
            model,
            opt,
            4,
            lambda m, t: OnceInReverse.apply(m(x)).mean(),
            adjoint=ForwardMode([lr]),
        )


@pytest.mark.parametrize("again", [False, True], ids=["first", "second"])
def test_initial_parameters_of_many_tasks(again: bool) -> None:
    """They are one number for all tasks."""
    model, x, scale = small(), torch.randn(2, 5, 2), torch.tensor(0.7, requires_grad=True)
    wrt = [model[2].bias, scale, model[0].weight]
    found = []
    for adjoint in (StoreAll(), ForwardMode(wrt)):
        fast = diffopt.unroll(
            model,
            diffopt.Adam(model.parameters(), lr=0.1),
            [x] * 3,
            lambda m, b: (scale * m(b)).square().mean(),
            adjoint=adjoint,
            tasks=2,
        )
        total = fast.losses.sum() + fast.params["0.bias"].cos().sum()
        gradient = torch.autograd.grad(total, wrt, create_graph=again)
        if again:
            gradient = torch.autograd.grad(sum(g.sin().sum() for g in gradient), wrt)
        found.append(gradient)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_memory_does_not_grow_with_steps() -> None:
    """What stays alive does, by the numbers of a loss and its tangent alone."""
    model, lr = nn.Linear(20, 20), torch.tensor(0.1, requires_grad=True)

    sizes = []
    for steps in (3, 30):
        with new_objects_only():
            opt = diffopt.Adam(model.parameters(), lr=lr)
            fast = diffopt.unroll(
                model,
                opt,
                steps,
                lambda m, t: m(torch.ones(1, 20)).square().mean(),
                adjoint=ForwardMode([lr]),
            )
            sizes.append(live_bytes())
            del fast
    assert 0 < sizes[1] - sizes[0] < 27 * 4 * 20  # less than a bias for each further step


def test_delivers_to_wrt_alone_and_zeros_where_nothing_is_used() -> None:
    model, x = small(), torch.randn(5, 2)
    lr, scale, unused = (torch.tensor(v, requires_grad=True) for v in (0.1, 1.3, 2.0))
    non_leaf = unused * 2
    opt = diffopt.SGD(model.parameters(), lr=lr)
    fast = diffopt.unroll(
        model,
        opt,
        3,
        lambda m, t: (scale * m(x)).square().mean(),
        adjoint=ForwardMode([lr, unused, non_leaf]),
    )
    non_leaf.retain_grad()
    fast.losses.sum().backward()
    assert lr.grad is not None
    assert lr.grad.any()
    assert torch.equal(unused.grad, torch.zeros(()))
    assert torch.equal(non_leaf.grad, torch.zeros(()))
    assert scale.grad is None
    assert all(p.grad is None for p in model.parameters())


def test_a_tensor_used_at_a_later_step_only() -> None:
    model, x = small(), torch.randn(5, 2)
    late = torch.tensor(0.3, requires_grad=True)

    def loss_fn(model: nn.Module, t: int) -> Tensor:
        loss = model(x).square().mean()
        return loss * late if t == 2 else loss

    def unroll(adjoint: diffopt.Adjoint) -> diffopt.Unrolled:
        return diffopt.unroll(
            model, diffopt.SGD(model.parameters(), lr=0.1), 4, loss_fn, adjoint=adjoint
        )

    assert_equals_store_all(unroll, [late])


def test_second_derivative() -> None:
    model, x = small(), torch.randn(5, 2)
    lr, scale = (torch.tensor(v, requires_grad=True) for v in (0.1, 1.3))
    found = []
    for adjoint in (StoreAll(), ForwardMode([lr, scale, model[2].bias])):
        opt = diffopt.Adam(model.parameters(), lr=lr)
        fast = diffopt.unroll(
            model, opt, 4, lambda m, t: (scale * m(x)).square().mean(), adjoint=adjoint
        )
        inputs = [lr, scale, model[2].bias]
        first = torch.autograd.grad(fast.losses.sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.sin().sum() for g in first), inputs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_the_random_numbers_are_as_without() -> None:
    model, x = MODELS["dropout"](), torch.randn(5, 4)
    lr = torch.tensor(0.1, requires_grad=True)
    ends = []
    for adjoint in (StoreAll(), ForwardMode([lr])):
        torch.manual_seed(0)
        opt = diffopt.SGD(model.parameters(), lr=lr)
        fast = diffopt.unroll(model, opt, 3, lambda m, t: m(x).square().mean(), adjoint=adjoint)
        ends.append((torch.rand(2), fast.losses.detach()))
        state = torch.get_rng_state()
        fast.losses.sum().backward()
        assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


def test_goes_back_twice() -> None:
    model, lr = small(), torch.tensor(0.1, requires_grad=True)
    opt = diffopt.SGD(model.parameters(), lr=lr)
    fast = diffopt.unroll(
        model, opt, 3, lambda m, t: m(torch.ones(1, 2)).square().mean(), adjoint=ForwardMode([lr])
    )
    total = fast.losses.sum()
    (first,) = torch.autograd.grad(total, lr, retain_graph=True)
    (second,) = torch.autograd.grad(total, lr)
    assert torch.equal(first, second)


def test_plan_goes_one_way() -> None:
    lr = torch.tensor([0.1, 0.2], requires_grad=True)
    plan = ForwardMode([lr]).plan(50)
    assert [str(action) for action in plan.actions] == ["advance 0 50"]
    assert (plan.peak_states, plan.recomputed_steps) == (1, 0)
    assert plan.relative_cost == pytest.approx((50 + 2 * 3 * 50) / 150)


def test_a_detour_is_refused() -> None:
    model, log_lr = small(), torch.tensor(-2.0, requires_grad=True)
    opt = diffopt.SGD(model.parameters(), lr=log_lr.exp())
    message = r"wrt\[0\] has an influence through a tensor of shape \(\) .* pass that one in wrt"
    with pytest.raises(ValueError, match=message):
        diffopt.unroll(
            model, opt, 2, lambda m, t: m(torch.ones(2)).sum(), adjoint=ForwardMode([log_lr])
        )


def test_refuses_what_it_cannot_use() -> None:
    model, lr = small(), torch.tensor(0.1, requires_grad=True)
    with pytest.raises(TypeError, match=r"wrt is a Tensor: pass a list of tensors, wrt=\[...\]"):
        ForwardMode(lr)
    with pytest.raises(TypeError, match=r"wrt\[1\] is a float: pass a list of tensors"):
        ForwardMode([lr, 0.1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"wrt\[0\], of shape \(2,\), does not require grad"):
        ForwardMode([torch.ones(2)])
    with pytest.raises(ValueError, match="but ForwardMode goes back through none: leave it out"):
        diffopt.unroll(
            model,
            diffopt.SGD(model.parameters(), lr=lr),
            1,
            lambda m, t: m(torch.ones(2)).sum(),
            adjoint=ForwardMode([lr]),
            max_cotangent_norm=1.0,
        )


def test_a_tensor_whose_memory_is_transposed() -> None:
    model, x = small(), torch.randn(5, 2)
    w = torch.randn(2, 3).t().requires_grad_()

    def unroll(adjoint: diffopt.Adjoint) -> diffopt.Unrolled:
        inner = diffopt.SGD(model.parameters(), lr=0.1)
        return diffopt.unroll(
            model,
            inner,
            3,
            lambda m, t: (m[0].weight * w + m(x).sum()).tanh().sum(),
            adjoint=adjoint,
        )

    assert_equals_store_all(unroll, [w])


def test_a_parameter_in_low_precision_is_refused() -> None:
    model, x = small().bfloat16(), torch.randn(5, 2).bfloat16()
    wrt = [model[0].weight]
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NotImplementedError, match="convert the model to float32"):
        diffopt.unroll(
            model, inner, 2, lambda m, t: m(x).float().square().sum(), adjoint=ForwardMode(wrt)
        )
