"""Unrolled training is that of ``torch.optim``, and so is its gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from adjoints import EXACT
from helpers import assert_all_close, batch, batches, differences, mse, tiny
from optimizers import CASES, Case
from torch import Tensor, nn

import diffopt

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def train(model: nn.Module, opt: torch.optim.Optimizer, data: Iterable[Any]) -> list[Tensor]:
    """The everyday loop; gives the losses."""
    losses = []
    for pair in data:
        opt.zero_grad()
        loss = mse(model, pair)
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    return losses


def assert_same_values(fast: diffopt.Unrolled, model: nn.Module, opt: Any) -> None:
    for name, p in model.named_parameters():
        torch.testing.assert_close(fast.params[name], p, rtol=1e-12, atol=1e-14)
        wanted = {key: x for key, x in opt.state[p].items() if x is not None}
        assert fast.opt_state[name].keys() == wanted.keys()
        for key, x in wanted.items():
            got = fast.opt_state[name][key]
            torch.testing.assert_close(
                got.double(), torch.as_tensor(x).double(), rtol=1e-12, atol=1e-14
            )


@every_case
def test_twenty_steps_and_then_torch_optim_goes_on(case: Case) -> None:
    torch.set_default_dtype(torch.float64)
    model, data = tiny(), batches(25)
    expected = copy.deepcopy(model)
    theirs = case.theirs(expected.parameters())
    losses = train(expected, theirs, data[:20])

    fast = diffopt.unroll(model, case.theirs(model.parameters()), data[:20], mse)
    assert_same_values(fast, expected, theirs)
    torch.testing.assert_close(fast.losses, torch.stack(losses), rtol=1e-12, atol=0)
    assert fast.step == 20

    other = tiny()
    for opt in (case.theirs(other.parameters()), case.ours(other.parameters())):
        fast.load_into(other, opt)
        train(other, opt, data[20:])
        after = copy.deepcopy(expected)
        reference = case.theirs(after.parameters())
        reference.load_state_dict(copy.deepcopy(theirs.state_dict()))
        train(after, reference, data[20:])
        for p, q in zip(other.parameters(), after.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@every_case
def test_an_optimizer_in_the_middle_of_its_training(case: Case) -> None:
    torch.set_default_dtype(torch.float64)
    model, data = tiny(), batches(10)
    opt = case.theirs(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}]
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.7)
    for pair in data[:5]:
        train(model, opt, [pair])
        scheduler.step()
    before = copy.deepcopy((model.state_dict(), opt.state_dict()))
    fast = diffopt.unroll(model, opt, data[5:], mse)
    for now, then in zip((model.state_dict(), opt.state_dict()), before, strict=True):
        assert_same_tree(now, then)
    train(model, opt, data[5:])
    assert_same_values(fast, model, opt)


def assert_same_tree(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tree(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_tree(x, y)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


STEPS = 5


@every_case
def test_gradient_is_that_of_the_torch_optim_loop(case: Case) -> None:
    """Central differences of the everyday loop; and every exact adjoint agrees with StoreAll."""
    torch.set_default_dtype(torch.float64)
    model, data, query = tiny(), batches(STEPS), batch()
    lr = torch.tensor(case.options.get("lr", 1.0))
    inputs = [model[0].bias, model[2].weight, lr]

    def by_hand() -> Tensor:
        other = copy.deepcopy(model)
        losses = train(other, case.theirs(other.parameters(), lr=lr.item()), data)
        return (mse(other, query) + losses[2]).detach()

    want = differences(by_hand, inputs)
    lr.requires_grad_()
    results = []
    for _, adjoint in EXACT:
        opt = case.ours(model.parameters(), lr=lr)
        fast = diffopt.unroll(model, opt, data, mse, adjoint=adjoint)
        results.append(torch.autograd.grad(mse(fast, query) + fast.losses[2], inputs))
    assert_all_close(results[0], want, rtol=2e-5, atol=1e-8)
    for result in results[1:]:
        assert_all_close(result, results[0], rtol=1e-10, atol=1e-15)
    # With numbers alone, some rules have derivatives written by hand.
    fast = diffopt.unroll(model, case.ours(model.parameters()), data, mse)
    found = torch.autograd.grad(mse(fast, query) + fast.losses[2], inputs[:2])
    assert_all_close(found, results[0][:2], rtol=1e-10, atol=1e-15)
