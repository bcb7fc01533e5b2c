"""Each rule against ``torch.optim``, and each derivative against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import CASES, Case
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
# Each optimizer once, with the last of its lines in the table.
every_optimizer = pytest.mark.parametrize(
    "case", {case.name: case for case in CASES}.values(), ids=lambda case: case.id
)

SHAPES = {"a": (3,), "b": (2, 3), "c": ()}
STEPS = 20

Named = dict[str, Tensor]


def some_params(dtype: torch.dtype = torch.float64) -> Named:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in SHAPES.items()
    }


def grad_at(t: int, name: str, param: Tensor) -> Tensor | None:
    """A gradient that depends on step and parameter, is zero in places, and is None at times."""
    if (name == "b" and t in (0, 1, 7)) or (name == "c" and t == 5):
        return None
    generator = torch.Generator().manual_seed(100 * t + ord(name))
    noise = torch.randn(param.shape, dtype=param.dtype, generator=generator)
    return 0.5 * param + torch.where(noise.abs() < 0.2, 0.0, noise)


def trajectory(opt: torch.optim.Optimizer, params: Named, steps: int = STEPS) -> list[Named]:
    """The parameters after each in-place step of an optimizer over ``params``."""
    values = []
    for t in range(steps):
        for name, p in params.items():
            p.grad = grad_at(t, name, p)
        opt.step()
        values.append({name: p.clone() for name, p in params.items()})
    return values


def assert_same(actual: Any, expected: Any, dtype: torch.dtype = torch.float64) -> None:
    rtol, atol = (1e-10, 1e-12) if dtype == torch.float64 else (2e-4, 2e-5)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_case
def test_update_follows_torch_optim(case: Case, dtype: torch.dtype) -> None:
    theirs = some_params(dtype)
    reference = case.theirs(theirs.values())
    params = some_params(dtype)
    opt = case.ours(params.values())
    state = opt.init(params)
    for t, expected in enumerate(trajectory(reference, theirs)):
        grads = {name: grad_at(t, name, p) for name, p in params.items()}
        new_params, new_state = opt.update(params, grads, state, step=t)
        for name, grad in grads.items():
            if grad is None:
                assert new_params[name] is params[name]
                assert new_state[name] is state[name]
        params, state = new_params, new_state
        assert_same(params, expected, dtype)
    for name, p in theirs.items():
        wanted = {k: x for k, x in reference.state[p].items() if x is not None}
        assert state[name].keys() == wanted.keys()
        assert_same(state[name], wanted, dtype)


@every_case
def test_step_in_place_follows_torch_optim(case: Case) -> None:
    theirs, ours = some_params(), some_params()
    expected = trajectory(case.theirs(theirs.values()), theirs)
    assert_same(trajectory(case.ours(ours.values()), ours), expected)


@every_case
def test_options_of_torch_optim_are_the_options(case: Case) -> None:
    params = list(some_params().values())
    ours, theirs = case.ours(params), case.theirs(params)
    assert {**ours.defaults} == {**theirs.defaults}
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()


# Derivatives.


Slot = tuple[str, int | None]


def numeric_slots(options: dict[str, Any]) -> list[Slot]:
    """Every number among the options, as (key, index in the tuple)."""
    slots: list[Slot] = []
    for key, value in options.items():
        if isinstance(value, tuple):
            slots += [(key, index) for index in range(len(value))]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            slots.append((key, None))
    return slots


def with_slot(options: dict[str, Any], slot: Slot, value: Any) -> dict[str, Any]:
    key, index = slot
    if index is not None:
        value = (*options[key][:index], value, *options[key][index + 1 :])
    return {**options, key: value}


def flat(function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> Any:
    """A function of many tensors as one of a vector, with a random sum of its results."""
    weights: list[Tensor] = []

    def of_vector(vector: Tensor) -> Tensor:
        parts = vector.split([x.numel() for x in inputs])
        results = function(*(v.reshape(x.shape) for v, x in zip(parts, inputs, strict=True)))
        if not weights:
            weights.extend(torch.randn_like(y) for y in results)
        return torch.stack([(w * y).sum() for w, y in zip(weights, results, strict=True)]).sum()

    return of_vector, torch.cat([x.detach().reshape(-1) for x in inputs]).requires_grad_()


def assert_differentiable(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]
) -> None:
    """In reverse and in forward mode, once and twice, against finite differences."""
    of_vector, vector = flat(function, inputs)
    assert gradcheck(of_vector, vector, check_forward_ad=True)
    assert gradgradcheck(of_vector, vector, check_fwd_over_rev=True, fast_mode=True)


def one_step(case: Case, *, elementwise: bool) -> tuple[Callable[..., Any], list[Tensor]]:
    """One step, as a function of all that it depends on, and where to evaluate it."""
    params = {"a": torch.randn(2), "b": torch.randn(2) if elementwise else torch.randn(())}
    opt = case.ours(params.values())
    state = opt.init(params)
    for t in range(3):
        grads = {name: torch.randn_like(p) for name, p in params.items()}
        if t == 1:
            del grads["b"]  # so that the step counts differ
        params, state = opt.update(params, grads, state, step=t)
    options = opt.hyperparameters(0)[0]
    slots = numeric_slots(options)
    entries = [(n, k) for n in state for k in state[n] if k != "step"]

    def hyper_at(slot: Slot) -> Tensor:
        value = options[slot[0]] if slot[1] is None else options[slot[0]][slot[1]]
        # Not near 0, from where finite differences would leave the domain.
        return torch.full((2,) if elementwise else (), max(float(value), 0.1))

    inputs = [
        *params.values(),
        *(torch.randn_like(p) for p in params.values()),
        *(state[n][k].masked_fill(state[n][k] == 0, 0.5) for n, k in entries),  # no kinks
        *map(hyper_at, slots),
    ]

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        rest = iter(args)
        p = {name: next(rest) for name in params}
        g = {name: next(rest) for name in params}
        s = {name: dict(state[name]) for name in state}
        for n, k in entries:
            s[n][k] = next(rest)
        hyper = options
        for slot in slots:
            hyper = with_slot(hyper, slot, next(rest))
        new, after = opt.update(p, g, s, hyper=[hyper])
        return (*new.values(), *(x for n in after for k, x in after[n].items() if k != "step"))

    return function, inputs


@every_case
def test_derivative_in_params_grads_state_and_every_hyperparameter(case: Case) -> None:
    torch.set_default_dtype(torch.float64)
    assert_differentiable(*one_step(case, elementwise=False))


@every_optimizer
def test_derivative_where_hyperparameters_are_elementwise(case: Case) -> None:
    torch.set_default_dtype(torch.float64)
    assert_differentiable(*one_step(case, elementwise=True))


@every_case
def test_derivative_where_hyperparameters_are_numbers(case: Case) -> None:
    torch.set_default_dtype(torch.float64)
    params = {"a": torch.randn(2), "c": torch.randn(())}
    opt = case.ours(params.values())

    def two_steps(a: Tensor, c: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        p, s = {"a": a, "c": c}, opt.init(params)
        p, s = opt.update(p, {"a": grads[0], "c": grads[1]}, s)
        p, s = opt.update(p, {"a": grads[2]}, s)
        p, s = opt.update(p, {"a": grads[3], "c": grads[4]}, s)
        return tuple(p.values())

    grads = [torch.randn(2), torch.randn(()), torch.randn(2), torch.randn(2), torch.randn(())]
    assert_differentiable(two_steps, [*params.values(), *grads])
