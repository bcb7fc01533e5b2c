"""From ``torch.optim`` and back."""

from __future__ import annotations

import pytest
import torch
from optimizers import (
    Case,
    assert_same,
    every_case,
    some_params,
    step_in_place,
    step_purely,
)
from torch import nn

import diffopt
from diffopt import optim
from diffopt.optim.convert import load_state_into


@every_case
def test_conversion_in_the_middle_of_training(case: Case) -> None:
    theirs = some_params()
    reference = case.theirs(theirs.values())
    step_in_place(reference, theirs, range(4))
    opt = optim.convert(reference)
    assert type(opt) is getattr(optim, case.name.replace("Momentum", "SGD"))
    params = {n: p.clone() for n, p in theirs.items()}
    state = {n: {k: x.clone() for k, x in opt.state[p].items()} for n, p in theirs.items()}
    step_in_place(reference, theirs, range(4, 8))
    assert_same(step_purely(opt, params, state, range(4, 8))[0], theirs)


@pytest.mark.parametrize("target", ["torch", "diffopt"])
@every_case
def test_state_written_back_continues(case: Case, target: str) -> None:
    whole, split = some_params(), some_params()
    step_in_place(case.theirs(whole.values()), whole, range(8))
    opt = case.ours(split.values())
    values, state = step_purely(opt, split, opt.init(split), range(4))
    into = case.theirs(split.values()) if target == "torch" else case.ours(split.values())
    load_state_into(into, {split[n]: state[n] for n in split}, steps=4)
    for n, p in split.items():
        p.copy_(values[n])
    kept = {n: {k: x.clone() for k, x in s.items()} for n, s in state.items()}
    step_in_place(into, split, range(4, 8))
    assert_same(split, whole)
    assert_same(state, kept)


@every_case
def test_initial_state_written_back_is_no_state(case: Case) -> None:
    whole, other = some_params(), some_params()
    reference = case.theirs(whole.values())
    into = case.theirs(other.values())
    step_in_place(into, other, range(2))
    opt = case.ours(other.values())
    load_state_into(into, {p: opt.init(other)[n] for n, p in other.items()})
    for n, p in some_params().items():
        other[n].copy_(p)
    step_in_place(reference, whole, range(4))
    step_in_place(into, other, range(4))
    assert_same(other, whole)


def test_the_step_number_is_written_back() -> None:
    w = nn.Parameter(torch.ones(1))
    seen: list[int] = []
    opt = optim.SGD([w], lr=lambda t: seen.append(t) or 0.1)  # type: ignore[func-returns-value]
    load_state_into(opt, {w: {}}, steps=4)
    w.grad = torch.ones(1)
    opt.step()
    assert seen[-1] == 4


def test_conversion_keeps_groups_schedulers_and_tensors() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    lr = torch.tensor(0.4)
    reference = torch.optim.SGD(
        [{"params": [("a", a)], "lr": lr}, {"params": [("b", b)], "momentum": 0.5}], lr=0.2
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(reference, gamma=0.5)
    reference.step()
    scheduler.step()
    opt = optim.convert(reference)
    first, second = opt.param_groups
    assert first["lr"] is reference.param_groups[0]["lr"]
    assert second["lr"] == 0.1
    assert second["initial_lr"] == 0.2
    assert second["momentum"] == 0.5
    assert [g["param_names"] for g in opt.param_groups] == [["a"], ["b"]]
    second["lr"] = 9.0
    assert reference.param_groups[1]["lr"] == 0.1
    assert optim.convert(opt) is opt


def test_conversion_of_non_leaf_parameters() -> None:
    w = torch.ones(2, requires_grad=True) * 2
    opt = optim.convert(torch.optim.SGD([w], differentiable=True))
    assert opt.param_groups[0]["params"][0] is w


def test_a_momentum_buffer_of_none_is_absent() -> None:
    w = nn.Parameter(torch.ones(2))
    reference = torch.optim.SGD([w], momentum=0.9, dampening=0.1)
    reference.state[w]["momentum_buffer"] = None
    assert dict(optim.convert(reference).state[w]) == {}


def test_register_teaches_a_class() -> None:
    class Mine(torch.optim.Adam):
        pass

    w = nn.Parameter(torch.ones(2))
    known = r"does not know how .*Mine steps: call diffopt.register\(Mine, fn\)"
    with pytest.raises(TypeError, match=known + r".*fn is diffopt.optim.Adam.from_torch"):
        optim.convert(Mine([w]))
    optim.register(Mine, optim.Adam.from_torch)
    assert type(optim.convert(Mine([w], lr=0.5))) is optim.Adam
    optim.register(Mine, lambda opt: opt)
    with pytest.raises(TypeError, match="registered for Mine must return a diffopt optimizer"):
        optim.convert(Mine([w]))


def test_conversion_refuses_the_unknown() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"LBFGS steps: call diffopt.register\(LBFGS, fn\)"):
        optim.convert(torch.optim.LBFGS([w]))
    with pytest.raises(TypeError, match=r"opt is a float: pass a diffopt or torch.optim optim"):
        optim.convert(0.1)
    with pytest.raises(TypeError, match="'SGD' is not a class"):
        optim.register("SGD", optim.SGD.from_torch)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="None is not callable"):
        optim.register(torch.optim.LBFGS, None)  # type: ignore[arg-type]


def test_everyday_steps_do_not_count_for_an_unroll_but_loaded_ones_do() -> None:
    model = nn.Linear(1, 1)
    seen: list[int] = []
    opt = optim.SGD(model.parameters(), lr=lambda t: seen.append(t) or 0.1)  # type: ignore[func-returns-value]

    def unrolled() -> diffopt.Unrolled:
        seen.clear()
        with torch.no_grad():
            return diffopt.unroll(model, opt, 2, lambda m, t: m.weight.sum() * (t + 1))

    model.weight.grad = torch.ones(1, 1)
    opt.step()
    assert unrolled().step == 2
    unrolled().load_into(model, opt)
    assert unrolled().step == 4
    assert set(seen) - {0} == {2, 3}
