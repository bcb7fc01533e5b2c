"""``initial=``: blocks in turn, state dicts with buffers; and going on after ``load_into``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adjoints import every_adjoint
from helpers import assert_all_close, batches, called, differences, mse, tiny
from torch import Tensor, nn

import diffopt

RATE = 0.3


def block(model: Any, i: int, momentum: float = 0.0) -> diffopt.SGD:
    return diffopt.SGD(model[i].parameters(), lr=RATE, momentum=momentum)


def by_hand(model: nn.Module, blocks: list[str], data: list[list[Any]], momentum: float) -> Any:
    """Gradient descent on one block after the other: the values, and how to call the model."""
    values = dict(model.named_parameters())
    moments: dict[str, Tensor] = {}
    for beginning, part in zip(blocks, data, strict=True):
        for pair in part:
            names = [n for n in values if n.startswith(beginning)]
            # Views: the other block, made of this one before, is a constant of its gradient.
            values = {n: x.view_as(x) for n, x in values.items()}
            loss = called(model, values, mse, pair)
            found = torch.autograd.grad(loss, [values[n] for n in names], create_graph=True)
            for n, g in zip(names, found, strict=True):
                moments[n] = momentum * moments[n] + g if n in moments else g
                values = {**values, n: values[n] - RATE * moments[n]}
    return values


@every_adjoint
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_blocks_in_turn(adjoint: diffopt.Adjoint, momentum: float) -> None:
    model, query = tiny(), batches(1)[0]
    data = [batches(3), batches(2), batches(2)]
    order = [0, 2, 0]
    fast = None
    for i, part in zip(order, data, strict=True):
        opt = block(model, i, momentum)
        fast = diffopt.unroll(model, opt, part, mse, initial=fast, adjoint=adjoint)
    assert fast is not None
    values = by_hand(model, [f"{i}." for i in order], data, momentum)
    assert set(fast.params) == set(values)
    assert fast.step == 7
    assert_all_close([fast.params[n] for n in values], values.values(), rtol=1e-12, atol=1e-14)
    if momentum:
        assert set(fast.opt_state) == set(values)
    inputs = list(model.parameters())
    got = torch.autograd.grad(mse(fast, query), inputs)
    want = torch.autograd.grad(called(model, values, mse, query), inputs)
    assert_all_close(got, want, rtol=1e-10, atol=1e-12)


def test_blocks_in_turn_with_differences() -> None:
    model, query, data = tiny(), batches(1)[0], [batches(2), batches(2)]

    def value() -> Tensor:
        first = diffopt.unroll(model, block(model, 0), data[0], mse)
        return mse(diffopt.unroll(model, block(model, 2), data[1], mse, initial=first), query)

    inputs = list(model.parameters())
    got = torch.autograd.grad(value(), inputs)
    assert_all_close(got, differences(value, inputs), rtol=1e-6, atol=1e-8)


def test_what_was_trained_before_stands_in_the_result() -> None:
    model, data, query = tiny(), batches(2), batches(1)[0]
    before = copy.deepcopy(model.state_dict())
    first = diffopt.unroll(model, block(model, 0), data, mse)
    second = diffopt.unroll(model, block(model, 2), data, mse, initial=first)
    x = query[0]
    for made in (second, second.detach()):
        hidden = F.linear(x, first.params["0.weight"], first.params["0.bias"]).tanh()
        want = F.linear(hidden, second.params["2.weight"], second.params["2.bias"])
        torch.testing.assert_close(made(x), want if made is second else want.detach())
        torch.testing.assert_close(made[0].weight, first.params["0.weight"])
    cut = second.detach()
    assert not cut(x).requires_grad
    assert all(torch.equal(y, before[n]) for n, y in model.state_dict().items())
    second.load_into(model, block(model, 2))
    torch.testing.assert_close(model[0].weight.detach(), first.params["0.weight"].detach())
    with pytest.raises(ValueError, match=r"opt does not hold the model's parameter '2.weight'"):
        diffopt.unroll(
            model, diffopt.Adam(model[2].parameters()), data, mse, initial=first
        ).load_into(model, diffopt.Adam(model[0].parameters()))


def test_another_optimizer_starts_its_own_state() -> None:
    model, data = tiny(), batches(2)
    first = diffopt.unroll(model, diffopt.Momentum(model.parameters(), lr=0.1), data, mse)
    adam = diffopt.Adam(model.parameters(), lr=0.1)
    second = diffopt.unroll(model, adam, data, mse, initial=first)
    alone = diffopt.unroll(model, adam, data, mse, initial=dict(first.params))
    assert set(second.opt_state["0.bias"]) == {"step", "exp_avg", "exp_avg_sq"}
    for name, x in alone.params.items():
        torch.testing.assert_close(second.params[name], x, rtol=1e-12, atol=1e-14)


def test_blocks_with_tasks_are_refused() -> None:
    model = tiny()
    data = [(torch.randn(3, 5, 2).double(), torch.randn(3, 5, 2).double())] * 2
    first = diffopt.unroll(model, block(model, 0), data, mse, tasks=3)
    with pytest.raises(ValueError, match=r"initial has trained '0.weight', .*tasks=3.*lr=0"):
        diffopt.unroll(model, block(model, 2), data, mse, tasks=3, initial=first)


def test_the_untrained_value_of_another_block_is_refused() -> None:
    model, data = tiny(), batches(2)
    first = diffopt.unroll(model, block(model, 0), data, mse)
    own = model[0].weight

    def loss_fn(model: Any, pair: Any) -> Tensor:
        return mse(model, pair) + own.square().sum() * model[2].bias.sum()

    with pytest.raises(NotImplementedError, match=r"uses the model's own parameter '0.weight'"):
        diffopt.unroll(model, block(model, 2), data, loss_fn, initial=first)


@every_adjoint
def test_a_block_trained_before_that_the_forward_pass_moves(adjoint: diffopt.Adjoint) -> None:
    """It starts from its trained value and is state from there on."""

    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.teacher = nn.Linear(2, 2), nn.Linear(2, 2)
            self.move = False

        def forward(self, x: Tensor) -> Tensor:
            if self.move:
                with torch.no_grad():
                    self.teacher.weight.mul_(0.9)
            return self.net(x).tanh() + self.teacher(x)

    model, data = Moving().double(), batches(3)
    first = diffopt.unroll(model, diffopt.SGD(model.teacher.parameters(), lr=RATE), data, mse)
    model.move = True
    inner = diffopt.SGD(model.net.parameters(), lr=RATE)
    fast = diffopt.unroll(model, inner, data, mse, initial=first.detach(), adjoint=adjoint)
    work = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in work.teacher.named_parameters():
            p.copy_(first.params[f"teacher.{n}"])
    opt = torch.optim.SGD(work.net.parameters(), lr=RATE)
    for pair in data:
        opt.zero_grad()
        mse(work, pair).backward()
        opt.step()
    for n, p in work.net.named_parameters():
        torch.testing.assert_close(fast.params[f"net.{n}"], p, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fast(data[0][0]), work(data[0][0]), rtol=1e-10, atol=1e-12)


def test_some_of_the_parameters_come_from_another_unroll() -> None:
    """And the others from the model."""
    model, data = tiny(), batches(3)
    first = diffopt.unroll(model, block(model, 0), data, mse)
    both = diffopt.SGD(model.parameters(), lr=RATE)
    got = diffopt.unroll(model, both, data, mse, initial=first)
    want = diffopt.unroll(
        model, both, data, mse, initial={n: first.params[n] for n in ("0.weight", "0.bias")}
    )
    for name, x in want.params.items():
        torch.testing.assert_close(got.params[name], x, rtol=1e-12, atol=1e-14)


# State dicts.


def with_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()


def test_a_state_dict_with_buffers() -> None:
    model, data = with_norm(), batches(3)
    opt = diffopt.SGD(model.parameters(), lr=RATE)
    half = diffopt.unroll(model, opt, data, mse)
    other = with_norm()
    half.load_into(other)
    got = diffopt.unroll(model, opt, data, mse, initial=other.state_dict())
    want = diffopt.unroll(other, diffopt.SGD(other.parameters(), lr=RATE), data, mse)
    assert got.buffers["1.num_batches_tracked"].item() == 6
    for name, x in {**want.params, **want.buffers}.items():
        torch.testing.assert_close({**got.params, **got.buffers}[name], x, rtol=1e-12, atol=1e-14)
    assert other[1].num_batches_tracked.item() == 3


@every_adjoint
def test_gradient_to_a_buffer_that_is_given(adjoint: diffopt.Adjoint) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("shift", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).tanh() + self.shift

    model, data = Shifted().double(), batches(4)
    shift = torch.randn(2).double().requires_grad_()

    def value() -> Tensor:
        opt = diffopt.SGD(model.parameters(), lr=RATE)
        fast = diffopt.unroll(model, opt, data, mse, initial={"shift": shift}, adjoint=adjoint)
        return mse(fast, data[0]) + fast.losses.sum()

    (got,) = torch.autograd.grad(value(), [shift])
    assert_all_close([got], differences(value, [shift]), rtol=1e-6, atol=1e-8)


def test_buffers_for_each_task() -> None:
    model = with_norm().eval()
    data = [(torch.randn(3, 5, 2).double(), torch.randn(3, 5, 2).double())] * 2
    means = torch.randn(3, 3).double()
    opt = diffopt.SGD(model.parameters(), lr=RATE)
    given = {"1.running_mean": means, "0.bias": torch.zeros(3).double()}
    got = diffopt.unroll(model, opt, data, mse, tasks=3, initial=given)
    for i in range(3):
        alone = diffopt.unroll(
            model,
            opt,
            [(x[i], y[i]) for x, y in data],
            mse,
            initial={"1.running_mean": means[i], "0.bias": torch.zeros(3).double()},
        )
        for name, x in alone.params.items():
            torch.testing.assert_close(got.params[name][i], x, rtol=1e-10, atol=1e-12)


def test_a_state_dict_of_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 2)).double()
    model[2].weight = model[0].weight
    data, opt = batches(2), diffopt.SGD(model.parameters(), lr=RATE)
    assert "2.weight" in model.state_dict()
    got = diffopt.unroll(model, opt, data, mse, initial=model.state_dict())
    want = diffopt.unroll(model, opt, data, mse)
    for name, x in want.params.items():
        torch.testing.assert_close(got.params[name], x, rtol=0, atol=0)
    given = {**model.state_dict(), "2.weight": torch.zeros(2, 2).double()}
    with pytest.raises(ValueError, match=r"different values for '0.weight' and '2.weight'"):
        diffopt.unroll(model, opt, data, mse, initial=given)


def test_the_state_dict_of_a_result_is_refused() -> None:
    model = tiny()
    fast = diffopt.unroll(model, block(model, 0), 0, mse)
    with pytest.raises(ValueError, match=r"state_dict\(\) of an Unrolled.*load_state_dict"):
        diffopt.unroll(model, block(model, 0), 0, mse, initial=fast.state_dict())


# Going on.


def test_after_load_into_the_steps_are_numbered_on() -> None:
    model, data = tiny(), batches(6)
    other = copy.deepcopy(model)
    rates = [0.3 / (t + 1) for t in range(6)]
    seen: list[int] = []

    def loss_fn(model: Any, t: int) -> Tensor:
        seen.append(t)
        return mse(model, data[t])

    def momentum(model: nn.Module) -> diffopt.SGD:
        return diffopt.SGD(model.parameters(), lr=lambda t: rates[t], momentum=0.9)

    want = diffopt.unroll(other, momentum(other), 6, loss_fn)
    opt = momentum(model)
    diffopt.unroll(model, opt, 3, loss_fn).load_into(model, opt)
    del seen[:]
    rest = diffopt.unroll(model, opt, 3, loss_fn)
    assert sorted(set(seen)) == [3, 4, 5]
    assert rest.step == 6
    for name, x in want.params.items():
        torch.testing.assert_close(rest.params[name], x, rtol=1e-12, atol=1e-14)
    both = copy.deepcopy((model, opt))
    assert diffopt.unroll(*both, 0, loss_fn).step == 3
    rest.load_into(model, opt)
    assert diffopt.unroll(model, opt, 0, loss_fn).step == 6


def test_an_optimizer_that_was_stepped_by_itself_starts_at_0() -> None:
    model, pair = tiny(), batches(1)[0]
    opt = diffopt.SGD(model.parameters(), lr=RATE)
    mse(model, pair).backward()
    opt.step()
    assert diffopt.unroll(model, opt, 2, lambda m, t: mse(m, pair)).step == 2


def test_generators_go_on_after_load_state_dict() -> None:
    model, data = (
        nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double(),
        batches(6),
    )
    opt = diffopt.SGD(model.parameters(), lr=RATE)
    torch.manual_seed(3)
    half = diffopt.unroll(model, opt, data[:3], mse)
    saved = half.state_dict()
    want = diffopt.unroll(model, opt, data[3:], mse, initial=half)
    torch.manual_seed(11)
    fresh = diffopt.unroll(model, opt, 0, mse)
    fresh.load_state_dict(saved)
    got = diffopt.unroll(model, opt, data[3:], mse, initial=fresh)
    for name, x in want.params.items():
        torch.testing.assert_close(got.params[name], x, rtol=1e-12, atol=1e-14)
    torch.manual_seed(11)
    old = {key: value for key, value in saved.items() if key != "generators"}
    before = torch.get_rng_state()
    fresh.load_state_dict(old)
    assert torch.equal(torch.get_rng_state(), before)
    assert fresh.step == 3


def test_load_into_wrong_things() -> None:
    model = tiny()
    fast = diffopt.unroll(model, block(model, 0), 0, mse)
    for wrong, message in (
        ((None,), "load_into: model is a NoneType: pass the torch.nn.Module"),
        ((fast,), "load_into: model is a Unrolled: pass the torch.nn.Module"),
        ((fast[0],), "load_into: model is a Linear of an Unrolled: pass the torch.nn.Module"),
        ((model.state_dict(),), "load_into: model is a OrderedDict: pass"),
        ((model, 3), "load_into: opt is a int: pass a torch.optim or diffopt optimizer"),
        ((model, diffopt.SGD), "load_into: opt is a type: pass a torch.optim or diffopt"),
    ):
        with pytest.raises(TypeError, match=message):
            fast.load_into(*wrong)
    with pytest.raises(TypeError, match="load_state_dict: got a list: pass what"):
        fast.load_state_dict([1, 2])  # type: ignore[arg-type]
