"""The rules write into nothing, and under ``torch.func`` and tracers they are what they are."""

from __future__ import annotations

from typing import Any

import torch
from optimizers import (
    Case,
    Named,
    assert_same,
    every_case,
    grads_at,
    some_params,
    step_purely,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx


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
