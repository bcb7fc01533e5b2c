"""``step()`` in place, and saving."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import (
    Case,
    assert_same,
    every_case,
    every_optimizer,
    some_params,
    step_in_place,
)
from torch import Tensor, nn

from diffopt import optim


def test_step_returns_the_loss_of_a_closure_with_gradients() -> None:
    w = nn.Parameter(torch.tensor([2.0]))
    opt = optim.SGD([w], lr=0.5)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (w**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.no_grad():
        assert opt.step(closure).item() == 4.0
    assert w.tolist() == [0.0]


def test_the_momentum_buffer_is_not_the_gradient_itself() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    opt = optim.SGD([w], lr=0.1, momentum=0.9, dampening=0.5)
    w.grad = torch.tensor([2.0])
    opt.step()
    opt.zero_grad(set_to_none=False)
    assert opt.state[w]["momentum_buffer"].tolist() == [2.0]


def test_step_leaves_what_a_pending_graph_holds() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    opt = optim.Adam([w])
    w.grad = torch.tensor([2.0])
    opt.step()
    before = opt.state[w]["exp_avg"]
    opt.step()
    assert before._version == 0


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


@every_case
def test_state_dict_round_trip(case: Case) -> None:
    torch.set_default_dtype(torch.float64)  # loading casts 0-d state to the parameter's dtype
    whole, first = some_params(), some_params()
    step_in_place(case.ours(whole.values()), whole, range(6))
    opt = case.ours(first.values())
    step_in_place(opt, first, range(3))
    second = {n: p.clone() for n, p in first.items()}
    resumed = getattr(optim, case.name)(second.values())
    resumed.load_state_dict(through_a_file(opt.state_dict()))
    step_in_place(resumed, second, range(3, 6))
    assert_same(second, whole)


@every_case
def test_state_dicts_of_torch_optim_load(case: Case) -> None:
    torch.set_default_dtype(torch.float64)
    theirs = some_params()
    reference = case.theirs(theirs.values())
    step_in_place(reference, theirs, range(3))
    ours = {n: p.clone() for n, p in theirs.items()}
    opt = case.ours(ours.values())
    opt.load_state_dict(copy.deepcopy(reference.state_dict()))
    step_in_place(reference, theirs, range(3, 6))
    step_in_place(opt, ours, range(3, 6))
    assert_same(ours, theirs)


def test_what_ties_hyperparameters_to_the_program_survives_loading() -> None:
    w = nn.Parameter(torch.ones(1))

    def make(beta: Tensor) -> optim.Optimizer:
        return optim.Adam([w], lr=lambda t: beta.exp() / (1 + t), betas=(beta, 0.9), eps=beta.exp())

    source, target = torch.tensor(0.25, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    saved_from, opt = make(source), make(target)
    w.grad = torch.ones(1)
    saved_from.step()
    saved_from.step()
    saved = through_a_file(saved_from.state_dict())
    assert saved["param_groups"][0]["lr"] is None
    assert not saved["param_groups"][0]["betas"][0].requires_grad
    callable_before, computed = opt.param_groups[0]["lr"], opt.param_groups[0]["eps"]
    opt.load_state_dict(saved)
    group = opt.param_groups[0]
    assert group["lr"] is callable_before
    assert group["betas"][0] is target
    assert target.item() == 0.25  # the value saved, in the leaf that was there
    assert group["betas"][1] == 0.9
    assert group["eps"] is computed
    seen: list[int] = []
    group["lr"] = lambda t: seen.append(t) or 0.1
    opt.step()
    assert seen == [2]


def test_the_step_number_is_found_in_a_state_dict_of_torch_optim() -> None:
    w = nn.Parameter(torch.ones(1))
    reference = torch.optim.Adam([w])
    w.grad = torch.ones(1)
    for _ in range(3):
        reference.step()
    seen: list[int] = []
    opt = optim.Adam([w], lr=lambda t: seen.append(t) or 0.1)  # type: ignore[func-returns-value]
    opt.load_state_dict(reference.state_dict())
    opt.step()
    assert seen == [3]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@every_optimizer
def test_copies_continue(case: Case, duplicate: Callable[[Any], Any]) -> None:
    params = some_params()
    opt = case.ours(params.values())
    step_in_place(opt, params, range(3))
    twin = duplicate(opt)
    copies = dict(zip(params, twin.param_groups[0]["params"], strict=True))
    assert twin._steps == 3
    step_in_place(opt, params, range(3, 5))
    step_in_place(twin, copies, range(3, 5))
    assert_same(copies, params)
