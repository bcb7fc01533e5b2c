"""Whatever happens in a call or on the way back, the caller's model and optimizer are as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import batch, batches, mse
from torch import Tensor, nn

import diffopt

T = 4


class Model(nn.Module):
    """Tied weights, a submodule with two names, running statistics, hooks and plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3).double()
        self.norm = nn.BatchNorm1d(3).double()
        self.last = nn.Linear(3, 2).double()
        self.again = self.last
        self.tied = nn.Linear(2, 3, bias=False).double()
        self.tied.weight = self.first.weight
        self.register_buffer("calls", torch.zeros(()))
        self.plain = {"a": torch.ones(2)}
        self.seen: Any = None
        self.first.register_forward_hook(lambda module, args, out: out * 1.0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.seen = x
        return self.again(torch.tanh(self.norm(self.first(x) + self.tied(x))))


def description(model: nn.Module, opt: torch.optim.Optimizer) -> list[Any]:
    """Everything that could have changed: by identity, and tensors by value as well."""
    held: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        held.append((name, id(module), module.training))
        for key, value in module.__dict__.items():
            held.append((key, id(value)))
            if isinstance(value, dict):
                held += [(k, id(v)) for k, v in value.items()]
    for x in (*model.parameters(), *model.buffers()):
        grad = None if x.grad is None else (id(x.grad), x.grad.tolist())
        held.append((id(x), x.data_ptr(), x.tolist(), x._version, x.requires_grad, grad))
        held.append(None if x._backward_hooks is None else list(x._backward_hooks.items()))
    for group in opt.param_groups:
        held.append([(k, id(v)) for k, v in group.items()])
    for p, entries in opt.state.items():
        held += [
            (id(p), k, id(v), v.tolist() if isinstance(v, Tensor) else v)
            for k, v in entries.items()
        ]
    held.append(sorted(opt.__dict__))
    return held


def setting() -> tuple[Model, torch.optim.Optimizer, list[Any]]:
    model, data = Model(), batches(T)
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    mse(model, data[0]).backward()
    opt.step()
    model.norm.eval()
    model.first.weight.register_hook(lambda g: g)
    return model, opt, data


@contextmanager
def unchanged(model: nn.Module, opt: torch.optim.Optimizer) -> Iterator[None]:
    before = description(model, opt)
    modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()
    yield
    assert description(model, opt) == before
    assert modes == (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
    )


def meddle(model: Any, pair: Any) -> Tensor:
    """A loss that leaves traces wherever it can."""
    model.train()
    model.first.eval()
    model.new_attribute = torch.ones(1)
    model.plain = None
    model.last.register_forward_hook(lambda module, args, out: None)
    model.last.extra = nn.Linear(1, 1)
    out = model(pair[0])
    model.eval()
    return F.mse_loss(out, pair[1])


@pytest.mark.parametrize("adjoint", [diffopt.StoreAll(), diffopt.Segmented(2)], ids=repr)
@pytest.mark.parametrize("loss_fn", [mse, meddle])
def test_after_success(loss_fn: Callable[..., Any], adjoint: diffopt.Adjoint) -> None:
    model, opt, data = setting()
    with unchanged(model, opt):
        fast = diffopt.unroll(model, opt, data, loss_fn, adjoint=adjoint)
    with unchanged(model, opt):
        outcome = mse(fast, batch()) + fast.apply(meddle, data[0]) + fast.losses.sum()
    rng = torch.get_rng_state()  # meddle draws the weights of a layer
    with unchanged(model, opt):
        torch.autograd.grad(outcome, list(model.parameters()), create_graph=True)
    with unchanged(model, opt):
        torch.autograd.grad(outcome, list(model.parameters()))
    assert torch.equal(torch.get_rng_state(), rng)
    fast.load_into(Model())
    with unchanged(model, opt), torch.no_grad():
        diffopt.unroll(model, opt, data, loss_fn)


def test_the_outcome_fills_grad_and_nothing_else() -> None:
    model, opt, data = setting()
    before = description(model, opt)
    opt.zero_grad()
    mse(diffopt.unroll(model, opt, data, mse), data[0]).backward()
    assert all(p.grad is not None for p in model.parameters())
    for p in model.parameters():
        p.grad = None
    for now, then in zip(description(model, opt), before, strict=True):
        if isinstance(now, tuple) and len(now) == 6:
            assert now[:5] == then[:5]
        else:
            assert now == then


class Stop(Exception):
    pass


def bad_loss(raised: BaseException, when: str, at: int) -> Callable[[Any, Any], Tensor]:
    """Raises at the ``at``-th evaluation: before or after the model, or in its backward pass."""
    calls = iter(range(1000))

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise raised

    def loss_fn(model: Any, pair: Any) -> Tensor:
        due = next(calls) == at
        model.train()
        model.left_behind = 1
        if due and when == "before":
            raise raised
        out = model(pair[0])
        if due and when == "after":
            raise raised
        loss = F.mse_loss(out, pair[1])
        return Fails.apply(loss) if due and when == "in backward" else loss

    return loss_fn


@pytest.mark.parametrize("when", ["before", "after", "in backward"])
@pytest.mark.parametrize("raised", [Stop("here"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("at", [0, 2])
def test_after_an_error_in_the_call(raised: BaseException, when: str, at: int) -> None:
    model, opt, data = setting()
    for adjoint in (diffopt.StoreAll(), diffopt.Segmented(2)):
        with unchanged(model, opt), pytest.raises(type(raised)):
            diffopt.unroll(model, opt, data, bad_loss(raised, when, at), adjoint=adjoint)
    diffopt.unroll(model, opt, data, mse).losses.sum().backward()


@pytest.mark.parametrize("when", ["before", "after", "in backward"])
@pytest.mark.parametrize("raised", [Stop("here"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_after_an_error_on_the_way_back(
    raised: BaseException, when: str, create_graph: bool
) -> None:
    model, opt, data = setting()
    fast = diffopt.unroll(model, opt, data, bad_loss(raised, when, T + 1), segment=2)
    inputs = list(model.parameters())
    with unchanged(model, opt), pytest.raises(type(raised)):
        torch.autograd.grad(fast.losses.sum(), inputs, create_graph=create_graph)
    if create_graph:
        return  # everything is still there
    with pytest.raises(RuntimeError, match=r"was interrupted.*call diffopt\.unroll again"):
        fast.losses.sum().backward()


def test_an_interrupted_backward_pass_can_be_repeated_where_the_graph_is_retained() -> None:
    model, opt, data = setting()
    inputs = list(model.parameters())
    fast = diffopt.unroll(model, opt, data, bad_loss(Stop(), "after", T + 1), segment=2)
    with pytest.raises(Stop):
        torch.autograd.grad(fast.losses.sum(), inputs, retain_graph=True)
    got = torch.autograd.grad(fast.losses.sum(), inputs)
    fast = diffopt.unroll(model, opt, data, bad_loss(Stop(), "after", 1000), segment=2)
    want = torch.autograd.grad(fast.losses.sum(), inputs)
    assert all(map(torch.equal, got, want))


def test_grad_transform_may_raise_too() -> None:
    model, opt, data = setting()

    def failing(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        raise Stop

    with unchanged(model, opt), pytest.raises(Stop):
        diffopt.unroll(model, opt, data, mse, grad_transform=failing)


def test_apply_may_raise_too() -> None:
    model, opt, data = setting()
    fast = diffopt.unroll(model, opt, data, mse)
    with unchanged(model, opt), pytest.raises(Stop):
        fast.apply(bad_loss(Stop(), "after", 0), data[0])
    with unchanged(model, opt), pytest.raises(TypeError):
        fast("not a tensor")


def test_an_optimizer_of_diffopt_stays_as_it_was() -> None:
    model, data = Model(), batches(T)
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    opt = diffopt.Adam(model.parameters(), lr=lambda t: lr / (t + 1))
    with unchanged(model, opt):
        fast = diffopt.unroll(model, opt, data, mse)
    opt.param_groups[0]["lr"] = 100.0  # the call's options hold on the way back
    (got,) = torch.autograd.grad(fast.losses.sum(), lr)
    opt.param_groups[0]["lr"] = lambda t: lr / (t + 1)
    (want,) = torch.autograd.grad(diffopt.unroll(model, opt, data, mse).losses.sum(), lr)
    assert torch.equal(got, want)


def test_what_the_loss_sees_must_not_change_before_it_is_computed_again() -> None:
    model, (x, y) = nn.Linear(2, 2).double(), batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    held = {"x": x}

    def loss_fn(m: Any, t: int) -> Tensor:
        return F.mse_loss(m(held["x"]), y)

    for changed in (x, y):
        fast = diffopt.unroll(model, opt, T, loss_fn)
        changed.mul_(2)
        with pytest.raises(RuntimeError, match=r"shape \(5, 2\).*changed in place.*call backward"):
            fast.losses.sum().backward()
    fast = diffopt.unroll(model, opt, T, loss_fn)
    held["x"] = held["x"] + 1  # another tensor: not a change in place
    del x
    fast.losses.sum().backward()


def test_what_the_loss_counts_itself_may_change() -> None:
    model, data = nn.Linear(2, 2).double(), batch()
    calls = torch.zeros(())

    def loss_fn(m: Any, t: int) -> Tensor:
        calls.add_(1)
        return mse(m, data)

    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, inner, T, loss_fn, segment=1)
    calls.zero_()
    fast.losses.sum().backward(retain_graph=True)
    fast.losses.sum().backward()
    assert calls > 0


def test_a_name_in_the_loss_may_be_bound_later() -> None:
    def outer() -> Tensor:
        model, data = nn.Linear(2, 2).double(), batch()

        def loss_fn(m: Any, t: int) -> Tensor:
            return mse(m, data) if t < T else late

        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        late = diffopt.unroll(model, opt, T, loss_fn).losses.sum()
        return late

    outer().backward()
