"""Optimizers in use: second moments of zero, transforms, groups, saving, conversion, errors."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import CASES, Case
from torch import Tensor, nn
from torch.autograd import forward_ad as fwAD
from torch.fx.experimental.proxy_tensor import make_fx

from diffopt import optim
from diffopt.optim.convert import load_state_into

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
OPTIMIZERS = {case.name: case for case in CASES}
# PyTorch's forward mode compiles its decompositions with torch.jit.script, and warns of it.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
every_optimizer = pytest.mark.parametrize("case", OPTIMIZERS.values(), ids=OPTIMIZERS)

Named = dict[str, Tensor]


def some_params(dtype: torch.dtype = torch.float64) -> Named:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (3,), "b": (2, 3), "c": ()}
    return {n: torch.randn(s, dtype=dtype, generator=generator) for n, s in shapes.items()}


def grads_at(t: int, params: Named) -> Named:
    generator = torch.Generator().manual_seed(10 + t)
    return {
        n: 0.5 * p.detach() + torch.randn(p.shape, dtype=p.dtype, generator=generator)
        for n, p in params.items()
    }


def step_in_place(opt: torch.optim.Optimizer, params: Named, times: range) -> None:
    for t in times:
        for (_, p), grad in zip(params.items(), grads_at(t, params).values(), strict=True):
            p.grad = grad
        opt.step()


def step_purely(
    opt: optim.Optimizer, params: Named, state: Any, times: range
) -> tuple[Named, optim.base.OptState]:
    for t in times:
        params, state = opt.update(params, grads_at(t, params), state, step=t)
    return params, state


def assert_same(actual: Any, expected: Any, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# Second moments of zero.


@pytest.mark.parametrize("anomaly", [False, True], ids=["", "anomaly"])
@every_case
def test_weights_that_never_had_a_gradient_have_a_finite_derivative(
    case: Case, anomaly: bool
) -> None:
    grads = [torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(7)]
    start = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    opt = case.ours([start])
    with torch.autograd.set_detect_anomaly(anomaly, check_nan=anomaly):
        params, state = {"w": start}, opt.init({"w": start})
        for grad in grads:
            params, state = opt.update(params, {"w": grad}, state)
        once = torch.autograd.grad(params["w"].sum(), [start, *grads], create_graph=True)
        assert all(x.isfinite().all() for x in once)
        ends = [(x**2).sum() for x in once if x.requires_grad]
        if ends:
            total: Tensor = torch.stack(ends).sum()
            twice = torch.autograd.grad(total, [start, *grads], allow_unused=True)
            assert all(x is None or x.isfinite().all() for x in twice)


@pytest.mark.parametrize(
    ("make", "slope"),
    [
        (lambda p: optim.Adam(p, lr=0.1, eps=1e-3), -0.1 / 1e-3),
        (lambda p: optim.Adam(p, lr=0.1, eps=1e-3, amsgrad=True), -0.1 / 1e-3),
        (lambda p: optim.NAdam(p, lr=0.1, eps=1e-3, momentum_decay=0.0), None),
        (lambda p: optim.RMSprop(p, lr=0.1, eps=1e-3), -0.1 / 1e-3),
        (lambda p: optim.RMSprop(p, lr=0.1, eps=1e-3, centered=True), -0.1 / 1e-3),
        (lambda p: optim.Adagrad(p, lr=0.1, eps=1e-3), -0.1 / 1e-3),
    ],
    ids=["Adam", "AMSGrad", "NAdam", "RMSprop", "centered", "Adagrad"],
)
def test_the_derivative_at_a_zero_second_moment_is_the_limit(
    make: Callable[[Any], optim.Optimizer], slope: float | None
) -> None:
    def after(g: Tensor) -> Tensor:
        w = torch.zeros(1, dtype=torch.float64)
        opt = make([w])
        new, _ = opt.update({"w": w}, {"w": g}, opt.init({"w": w}))
        return new["w"].sum()

    def derivative(at: float) -> float:
        g = torch.tensor([at], dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(after(g), g)[0].item()

    assert derivative(0.0) == pytest.approx(derivative(1e-12), rel=1e-6)
    assert derivative(0.0) == pytest.approx(derivative(-1e-12), rel=1e-6)
    if slope is not None:
        assert derivative(0.0) == pytest.approx(slope)


def test_square_root_keeps_values_and_nan() -> None:
    x = torch.tensor([0.0, 4.0, math.nan, -1.0, 2.0, math.inf])
    y = x.clone().requires_grad_()
    plain, differentiable = optim.lists.sqrt([x])[0], optim.lists.sqrt([y])[0]
    assert torch.equal(plain.nan_to_num(7.0), x.sqrt().nan_to_num(7.0))
    assert torch.equal(differentiable.detach().nan_to_num(7.0), plain.nan_to_num(7.0))
    (slope,) = torch.autograd.grad(differentiable.sum(), y)
    assert slope[0] == 0
    assert slope[1] == 0.25
    assert slope[2:4].isnan().all()


@every_optimizer
def test_a_nan_gradient_is_treated_as_in_torch_optim(case: Case) -> None:
    w = torch.ones(2, dtype=torch.float64)
    grad = torch.tensor([math.nan, 1.0], dtype=torch.float64, requires_grad=True)
    opt = case.ours([w])
    new, _ = opt.update({"w": w}, {"w": grad}, opt.init({"w": w}))
    reference = case.theirs([w])
    w.grad = grad.detach()
    reference.step()
    assert new["w"].isnan().tolist() == w.isnan().tolist() == [case.name != "Rprop", False]


@forward_mode
@every_case
def test_forward_mode_agrees_at_a_zero_second_moment(case: Case) -> None:
    w = torch.zeros(1, dtype=torch.float64)
    opt = case.ours([w])

    def after(g: Tensor) -> Tensor:
        params, state = opt.update({"w": w}, {"w": g}, opt.init({"w": w}))
        return opt.update(params, {"w": 0.0 * g}, state)[0]["w"]

    zero = torch.zeros(1, dtype=torch.float64)
    with fwAD.dual_level():
        slope = fwAD.unpack_dual(after(fwAD.make_dual(zero, torch.ones_like(zero)))).tangent
    expected = torch.autograd.functional.jacobian(after, zero).reshape(1)
    assert expected.isfinite().all()
    assert_same(torch.zeros_like(zero) if slope is None else slope, expected)


# Purity.


@every_case
def test_inputs_are_not_written_to(case: Case) -> None:
    params = some_params()
    opt = case.ours(params.values())
    _, state = step_purely(opt, params, opt.init(params), range(2))
    grads = grads_at(2, params)
    tensors = [*params.values(), *grads.values(), *(x for s in state.values() for x in s.values())]
    versions = [x._version for x in tensors]
    keys = {name: list(entries) for name, entries in state.items()}
    opt.update(params, grads, state)
    assert [x._version for x in tensors] == versions
    assert {name: list(entries) for name, entries in state.items()} == keys


@every_case
def test_without_gradients_everything_is_returned_as_it_is(case: Case) -> None:
    params = some_params()
    opt = case.ours(params.values())
    state = opt.init(params)
    new_params, new_state = opt.update(params, {"a": None}, state)
    assert all(new_params[n] is params[n] and new_state[n] is state[n] for n in params)


# Transforms and traces.


@every_case
def test_vmap_is_a_loop(case: Case) -> None:
    torch.set_default_dtype(torch.float64)  # the dtype of 0-d state
    batch = torch.randn(3, 4, 2, dtype=torch.float64)
    start = torch.randn(3, 2, dtype=torch.float64)
    lr = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)

    def run(w: Tensor, grads: Tensor, lr: Tensor) -> Tensor:
        opt = case.ours([torch.zeros(2)])
        hyper = [{**opt.hyperparameters(0)[0], "lr": lr}]
        params, state = {"w": w}, opt.init({"w": w})
        for grad in grads.unbind():
            params, state = opt.update(params, {"w": grad}, state, hyper=hyper)
        return params["w"]

    expected = torch.stack([run(*x) for x in zip(start, batch, lr, strict=True)])
    assert_same(torch.vmap(run)(start, batch, lr), expected)


@every_case
def test_vmap_with_numbers_is_a_loop(case: Case) -> None:
    batch = torch.randn(3, 7, 2, dtype=torch.float64)

    def run(grads: Tensor) -> tuple[Named, Any]:
        params = {"w": torch.ones(2, dtype=torch.float64)}
        opt = case.ours(params.values())
        state = opt.init(params)
        for grad in grads.unbind():
            params, state = opt.update(params, {"w": grad}, state)
        return params, state

    expected = torch.stack([run(x)[0]["w"] for x in batch])
    assert_same(torch.vmap(lambda x: run(x)[0]["w"])(batch), expected)


@forward_mode
@every_case
def test_functional_derivatives_in_the_learning_rate_from_the_first_step_on(case: Case) -> None:
    torch.set_default_dtype(torch.float64)  # the dtype of 0-d state
    grads = torch.randn(3, 2)

    def run(lr: Tensor) -> Tensor:
        opt = case.ours([torch.zeros(2)])
        hyper = [{**opt.hyperparameters(0)[0], "lr": lr}]
        params = {"w": torch.ones(2)}
        state = opt.init(params)
        for grad in grads:
            params, state = opt.update(params, {"w": grad + 0.1 * params["w"]}, state, hyper=hyper)
        return params["w"]

    lr, h = torch.tensor(0.13), 1e-6
    expected = (run(lr + h) - run(lr - h)) / (2 * h)
    for slope in (torch.func.jacrev(run)(lr), torch.func.jacfwd(run)(lr)):
        assert_same(slope, expected, rtol=1e-6, atol=1e-8)
    curvature = torch.func.jacrev(torch.func.jacrev(run))(lr)
    assert_same(torch.func.jacfwd(torch.func.jacrev(run))(lr), curvature)


@every_case
def test_a_trace_holds_for_other_step_counts(case: Case) -> None:
    params = some_params()
    opt = case.ours(params.values())
    _, early = step_purely(opt, params, opt.init(params), range(2))
    _, late = step_purely(opt, params, opt.init(params), range(9))

    def step(params: Named, grads: Named, state: Any) -> Any:
        return opt.update(params, grads, state)

    traced = make_fx(step)(params, grads_at(3, params), early)
    grads = grads_at(4, params)
    assert_same(traced(params, grads, late), step(params, grads, late))


# Hyperparameters.


@every_optimizer
def test_callables_are_called_with_the_step(case: Case) -> None:
    theirs, ours, pure = some_params(), some_params(), some_params()
    reference = case.theirs(theirs.values())
    rates = [0.1 / (1 + t) for t in range(6)]
    opt = case.ours(ours.values(), lr=lambda t: torch.tensor(rates[t], dtype=torch.float64))
    numbers = case.ours(pure.values(), lr=lambda t: np.float64(rates[t]))
    for t, rate in enumerate(rates):
        reference.param_groups[0]["lr"] = rate
        step_in_place(reference, theirs, range(t, t + 1))
    step_in_place(opt, ours, range(6))
    assert_same(ours, theirs)
    assert_same(step_purely(numbers, pure, numbers.init(pure), range(6))[0], theirs)


def test_callables_inside_tuples_and_numpy_scalars() -> None:
    opt = optim.Adam(
        [torch.zeros(1)], lr=np.float32(0.5), betas=(lambda t: 1 / (2 + t), 0.9), eps=lambda t: t
    )
    (options,) = opt.hyperparameters(2)
    assert options["betas"] == (0.25, 0.9)
    assert options["eps"] == 2
    assert type(options["lr"]) is float


@every_optimizer
def test_learning_rate_schedulers(case: Case) -> None:
    theirs, ours = some_params(), some_params()
    for opt, params in ((case.theirs(theirs.values()), theirs), (case.ours(ours.values()), ours)):
        scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
        for t in range(6):
            step_in_place(opt, params, range(t, t + 1))
            scheduler.step()
    assert_same(ours, theirs)


def test_a_tensor_of_higher_precision_does_not_upcast() -> None:
    params = some_params(torch.float32)
    for lr in (torch.tensor(0.1).double(), torch.full((1,), 0.1).double()):
        for name in OPTIMIZERS:
            opt: optim.Optimizer = getattr(optim, name)(params.values(), lr=lr)
            new, state = step_purely(opt, params, opt.init(params), range(7))
            entries = [x for s in state.values() for x in s.values()]
            assert {x.dtype for x in (*new.values(), *entries)} == {torch.float32}
            assert {n: x.shape for n, x in new.items()} == {n: x.shape for n, x in params.items()}


def test_an_elementwise_learning_rate_scales_each_weight() -> None:
    w = torch.zeros(2, 3)
    lr = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    opt = optim.SGD([w], lr=lr)
    new, _ = opt.update({"w": w}, {"w": torch.ones(2, 3)}, opt.init({"w": w}))
    assert new["w"].dtype == torch.float32
    assert_same(new["w"].detach(), torch.tensor([[-0.1, -0.2, -0.3]] * 2), rtol=1e-6)
    (slope,) = torch.autograd.grad(new["w"].sum(), lr)
    assert_same(slope, torch.full_like(lr, -2.0))


def test_hyperparameters_are_passed_on_as_they_are() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    opt = optim.SGD([torch.zeros(1)], lr=lr)
    (options,) = opt.hyperparameters(3)
    assert options["lr"] is lr
    assert "params" not in options
    assert options.keys() == opt.defaults.keys()


# Param groups.


def test_groups_by_names_by_position_and_as_given() -> None:
    a, b = torch.ones(2), torch.ones(3)
    grads = {"a": torch.ones(2), "b": torch.ones(3)}
    layouts = [
        ([{"params": [("b", b)], "lr": 1.0}, {"params": [("a", a)], "lr": 2.0}], None),
        ([{"params": [b], "lr": 1.0}, {"params": [a], "lr": 2.0}], [["b"], ["a"]]),
        ([{"params": [a], "lr": 2.0}, {"params": [b], "lr": 1.0}], None),
    ]
    for layout, groups in layouts:
        opt = optim.SGD(layout)  # type: ignore[arg-type]
        params = {"a": a, "b": b}
        new, _ = opt.update(params, grads, opt.init(params, groups=groups), groups=groups)
        assert new["a"].tolist() == [-1.0] * 2
        assert new["b"].tolist() == [0.0] * 3
        assert list(new) == ["a", "b"]


# In place.


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


# Saving.


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

    def make(log_lr: Tensor) -> optim.Optimizer:
        return optim.Adam(
            [w], lr=lambda t: log_lr.exp() / (1 + t), betas=(log_lr, 0.9), eps=log_lr.exp()
        )

    source, target = torch.tensor(-1.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
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
    assert target.item() == -1.0  # the value saved, in the leaf that was there
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


# From torch.optim and back.


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
    with pytest.raises(TypeError, match=r"expected a diffopt or torch.optim .*, got .*float"):
        optim.convert(0.1)
    with pytest.raises(TypeError, match="'SGD' is not a class"):
        optim.register("SGD", optim.SGD.from_torch)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="None is not callable"):
        optim.register(torch.optim.LBFGS, None)  # type: ignore[arg-type]


# Constructors and errors.


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "Momentum"])
def test_constructors_are_those_of_torch_optim(name: str) -> None:
    def arguments(cls: type) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(cls).parameters.values()
        return [(p.name, p.default, p.kind) for p in found]

    assert arguments(getattr(optim, name)) == arguments(getattr(torch.optim, name))


def test_momentum_is_sgd_with_a_default() -> None:
    mine = optim.Momentum([torch.zeros(1)])
    assert isinstance(mine, optim.SGD)
    assert mine.defaults == {**torch.optim.SGD([torch.zeros(1)]).defaults, "momentum": 0.9}


BAD_NUMBERS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"lr": -1.0}) for name in OPTIMIZERS if name != "Momentum"),
    ("SGD", {"momentum": -0.1}),
    ("SGD", {"weight_decay": -0.1}),
    ("SGD", {"nesterov": True}),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    ("Adam", {"betas": (1.0, 0.9)}),
    ("Adam", {"betas": (0.9, -0.1)}),
    ("Adam", {"eps": -1.0}),
    ("AdamW", {"weight_decay": -1.0}),
    ("RMSprop", {"alpha": -1.0}),
    ("RMSprop", {"momentum": -1.0}),
    ("Adadelta", {"rho": 1.5}),
    ("Adagrad", {"lr_decay": -1.0}),
    ("Adagrad", {"initial_accumulator_value": -1.0}),
    ("Rprop", {"etas": (1.1, 1.2)}),
    ("Rprop", {"etas": (0.5, 0.9)}),
    ("NAdam", {"momentum_decay": -1.0}),
]


@pytest.mark.parametrize(("name", "options"), BAD_NUMBERS, ids=str)
def test_bad_numbers_raise_as_in_torch_optim(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Invalid|Nesterov") as theirs:
        getattr(torch.optim, name)([torch.zeros(1)], **options)
    with pytest.raises(ValueError, match=f"^{re.escape(str(theirs.value))}$"):
        getattr(optim, name)([torch.zeros(1)], **options)


def two_groups() -> optim.Optimizer:
    return optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(2)]}])


def sparse_step() -> None:
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optim.Adagrad(embedding.parameters()).step()


ERRORS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (
        NotImplementedError,
        "Adam: amsgrad is a switch and has no derivative: pass a bool, not a Tensor",
        lambda: optim.Adam([torch.zeros(1)], amsgrad=torch.tensor(True)),  # type: ignore[arg-type]
    ),
    (
        NotImplementedError,
        "SGD: maximize is a switch",
        lambda: optim.SGD([torch.zeros(1)], maximize=lambda t: True),  # type: ignore[arg-type]
    ),
    (
        NotImplementedError,
        "parameter 'w' is complex: optimize its torch.view_as_real instead",
        lambda: optim.SGD([("w", torch.zeros(1, dtype=torch.complex64))]),
    ),
    (
        NotImplementedError,
        "parameter 'w' is complex",
        lambda: optim.SGD([torch.zeros(1)]).init({"w": torch.zeros(1, dtype=torch.complex64)}),
    ),
    (NotImplementedError, "gradient of 'parameter 0' is sparse .*sparse=False", sparse_step),
    (
        TypeError,
        "SGD: lr must be a number, a tensor or a callable .* not 'fast'",
        lambda: optim.SGD([torch.zeros(1)], lr="fast"),  # type: ignore[arg-type]
    ),
    (
        ValueError,
        r"SGD: lr of shape \(3,\) does not broadcast to parameter 'w' of shape \(2,\)",
        lambda: optim.SGD([torch.zeros(2)], lr=torch.ones(3)).init({"w": torch.zeros(2)}),
    ),
    (
        ValueError,
        r"lr of shape \(2,\) does not broadcast to parameter 'w' of shape \(1,\)",
        lambda: optim.SGD([torch.zeros(1)], lr=torch.ones(2)).update(
            {"w": torch.zeros(1)}, {"w": torch.zeros(1)}, {"w": {}}
        ),
    ),
    (
        ValueError,
        r"cannot tell which of 2 param groups each of 3 .*model.named_parameters\(\).* groups=",
        lambda: two_groups().init(some_params()),
    ),
    (
        ValueError,
        "each of the 2 param groups; got 1 lists",
        lambda: two_groups().init({"a": torch.zeros(1)}, groups=[["a"]]),
    ),
    (
        ValueError,
        "got 2 lists, with 'b', which params does not have",
        lambda: two_groups().init({"a": torch.zeros(1)}, groups=[["a"], ["b"]]),
    ),
    (
        ValueError,
        r"no entry for 'w': start from init\(params\)",
        lambda: optim.SGD([torch.zeros(1)]).update(
            {"w": torch.zeros(1)}, {"w": torch.zeros(1)}, {}
        ),
    ),
]


@pytest.mark.parametrize(("error", "message", "act"), ERRORS, ids=[m for _, m, _ in ERRORS])
def test_errors_say_what_to_write(
    error: type[Exception], message: str, act: Callable[[], Any]
) -> None:
    with pytest.raises(error, match=message):
        act()


def test_a_refused_param_group_is_not_added() -> None:
    opt = optim.SGD([torch.zeros(1)])
    with pytest.raises(TypeError, match="momentum must be"):
        opt.add_param_group({"params": [torch.zeros(2)], "momentum": None})
    assert len(opt.param_groups) == 1


# On an accelerator.


@pytest.mark.cuda
@every_case
def test_on_cuda(case: Case) -> None:
    theirs = {n: p.cuda() for n, p in some_params().items()}
    reference = case.theirs(theirs.values())
    params = {n: p.clone() for n, p in theirs.items()}
    opt = case.ours(params.values())
    lr = torch.tensor(case.options.get("lr", 1.0), dtype=torch.float64, requires_grad=True)
    hyper = [{**opt.hyperparameters(0)[0], "lr": lr}]
    state, learned = opt.init(params), opt.init(params)
    moved = {n: p.clone().requires_grad_() for n, p in params.items()}
    start = moved
    for _ in range(7):
        grads = {n: torch.randn_like(p) for n, p in params.items()}
        for n, p in theirs.items():
            p.grad = grads[n]
        reference.step()
        params, state = opt.update(params, grads, state)
        moved, learned = opt.update(moved, grads, learned, hyper=hyper)
    assert_same(params, theirs)
    assert_same({n: p.detach() for n, p in moved.items()}, theirs, rtol=1e-6, atol=1e-7)
    for n, p in theirs.items():
        expected = {k: x for k, x in reference.state[p].items() if x is not None}
        assert_same(state[n], expected)  # devices included
    total = torch.stack([p.sum() for p in moved.values()]).sum()
    slopes = torch.autograd.grad(total, [lr, *start.values()])
    assert [x.device.type for x in slopes] == ["cpu", "cuda", "cuda", "cuda"]
