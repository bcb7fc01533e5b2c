"""Hyperparameters of a wrong kind or out of their range are errors, wherever they come from."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers import batches, mse, tiny
from optimizers import OPTIMIZERS
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import diffopt
from diffopt import optim

#: Optimizer, option, index in its tuple, a value that its rule has no meaning for, and the range.
OUT_OF_RANGE: list[tuple[str, str, int | None, float, str]] = [
    *((name, "lr", None, -0.5, "at least 0 and finite") for name in OPTIMIZERS),
    *((name, "lr", None, math.nan, "at least 0 and finite|finite") for name in OPTIMIZERS),
    ("SGD", "lr", None, math.inf, "at least 0 and finite|finite"),
    ("SGD", "momentum", None, -0.5, "at least 0 and finite"),
    ("SGD", "dampening", None, math.nan, "a number, not NaN"),
    ("SGD", "weight_decay", None, -0.5, "at least 0 and finite"),
    ("Adam", "eps", None, -0.25, "at least 0 and finite"),
    *((n, "betas", 0, 1.0, "at least 0 and below 1") for n in ("Adam", "Adamax", "NAdam", "RAdam")),
    *((n, "betas", 1, 1.5, "at least 0 and below 1") for n in ("Adam", "AdamW", "NAdam", "RAdam")),
    ("Adam", "betas", 1, -0.5, "at least 0 and below 1"),
    ("RMSprop", "alpha", None, 1.5, "at least 0 and at most 1"),
    ("RMSprop", "momentum", None, -0.5, "at least 0 and finite"),
    ("Adadelta", "rho", None, 1.25, "at least 0 and at most 1"),
    ("Adagrad", "initial_accumulator_value", None, -1.0, "at least 0 and finite"),
    ("Adagrad", "lr_decay", None, -1.0, "at least 0 and finite"),
    ("NAdam", "momentum_decay", None, -1.0, "at least 0 and finite"),
    ("ASGD", "t0", None, math.nan, "a number, not NaN"),
    ("Rprop", "etas", 1, 0.75, "above 1"),
    ("Rprop", "etas", 0, 1.0, "above 0 and below 1"),
    ("Rprop", "step_sizes", 0, math.nan, "a number, not NaN"),
]
WAYS = {
    "tensor": torch.tensor,
    "learned": lambda x: torch.tensor(x, requires_grad=True),
    "parameter": lambda x: nn.Parameter(torch.tensor(x)),
    "elementwise": lambda x: torch.tensor([[x, x]]),
    "number by a callable": lambda x: lambda t: x,
    "numpy by a callable": lambda x: lambda t: np.float32(x),
    "tensor by a callable": lambda x: lambda t: torch.tensor(x),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "key", "index", "value", "words"), OUT_OF_RANGE)
def test_out_of_range(
    name: str, key: str, index: int | None, value: float, words: str, way: str
) -> None:
    option: Any = WAYS[way](value)
    label = key
    if index is not None:
        entries = {"etas": [0.5, 1.5], "betas": [0.5, 0.5], "step_sizes": [0.0, 1.0]}[key]
        entries[index] = option
        option, label = tuple(entries), f"{key}[{index}]"
    opt = getattr(optim, name)([torch.zeros(1, 2)], **{key: option})
    if way == "elementwise" and key == "lr" and math.isfinite(value):
        opt.hyperparameters(3)  # allowed: see below
        return
    message = f"{name}: {label} is {value} at step 3, and has to be "
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}({words})"):
        opt.hyperparameters(3)


def test_the_step_of_an_unroll_is_named() -> None:
    model = tiny()
    rates = torch.tensor([0.1, 0.1, 0.1, -0.2], requires_grad=True)
    opt = diffopt.SGD(model.parameters(), lr=lambda t: rates[t])
    with pytest.raises(ValueError, match=r"SGD: lr is -0.2\d* at step 3, .* lr=lambda t: log_lr"):
        diffopt.unroll(model, opt, batches(5), mse)


def test_a_scheduler_that_leaves_the_range() -> None:
    w = nn.Parameter(torch.ones(1))
    opt = optim.SGD([w], lr=0.1)
    opt.param_groups[0]["lr"] = -0.1
    w.grad = torch.ones(1)
    with pytest.raises(ValueError, match=r"SGD: lr is -0\.1 at step 0"):
        opt.step()
    assert w.item() == 1.0


def test_a_learned_direction() -> None:
    """Meta-SGD (Li et al., 2017) learns a rate of either sign for each weight."""
    w = torch.zeros(2)
    opt = optim.SGD([w], lr=torch.tensor([0.5, -0.5], requires_grad=True))
    new, _ = opt.update({"w": w}, {"w": torch.ones(2)}, opt.init({"w": w}))
    assert new["w"].tolist() == [-0.5, 0.5]


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (None, "None"),
        ("fast", "'fast'"),
        (1j, "1j"),
        ([0.1], r"\[0.1\]"),
        ((0.1,), r"\(0.1,\)"),
        (np.ones(2), "array"),
        (lambda t: 0.1, "<function"),
    ],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_a_callable_returns(name: str, returned: Any, shown: str) -> None:
    opt = getattr(optim, name)([torch.zeros(1)], lr=lambda t: returned)
    with pytest.raises(TypeError, match=rf"{name}: lr, called with step 3, returned .*{shown}"):
        opt.hyperparameters(3)


@pytest.mark.parametrize("wrong", [torch.tensor(True), torch.tensor(1 + 1j)])
def test_tensors_that_hold_no_real_numbers(wrong: Tensor) -> None:
    message = f"AdamW: eps is a tensor of {wrong.dtype}: pass one of real numbers"
    with pytest.raises(TypeError, match=message):
        optim.AdamW([torch.zeros(1)], eps=wrong)
    with pytest.raises(TypeError, match=message):
        optim.AdamW([torch.zeros(1)], eps=lambda t: wrong).hyperparameters(0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_integers_do_not_wrap_around(dtype: torch.dtype) -> None:
    w = torch.zeros(2)
    for lr in (torch.tensor(2, dtype=dtype), torch.tensor([2, 2], dtype=dtype)):
        opt = optim.SGD([w], lr=lr)
        new, _ = opt.update({"w": w}, {"w": torch.ones(2)}, opt.init({"w": w}))
        assert new["w"].tolist() == [-2.0, -2.0]


def test_a_tensor_of_a_wrong_shape_by_a_callable() -> None:
    model = tiny()
    opt = diffopt.SGD(model.parameters(), lr=lambda t: torch.full((7,), 0.1))
    with pytest.raises(ValueError, match=r"lr of shape \(7,\) does not broadcast to .*'0.weight'"):
        diffopt.unroll(model, opt, batches(2), mse)


# At construction.


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("rates", "error", "message"),
    [
        ([0.1, 0.2, 0.3], TypeError, r"lr is a list of 3: .* lr=lambda t: rates\[t\]"),
        ((0.1, 0.2, 0.3), TypeError, r"lr is a tuple of 3: .* lr=lambda t: rates\[t\]"),
        (np.full(3, 0.1), TypeError, r"lr is a ndarray of 3: .* lr=lambda t: rates\[t\]"),
        (
            torch.full((3,), 0.1),
            ValueError,
            r"lr of shape \(3,\) does not broadcast to parameter 'w' .* lr=lambda t: rates\[t\], "
            r"one for each task \(tasks=N\) lr=lambda t: rates",
        ),
    ],
    ids=["list", "tuple", "array", "tensor"],
)
def test_a_list_of_rates_is_refused_with_the_spelling_of_a_schedule(
    name: str, rates: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^{name}: {message}"):
        getattr(optim, name)([("w", torch.zeros(2, 4)), ("b", torch.zeros(3))], lr=rates)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"betas": None}, TypeError, "betas is None: pass a tuple of 2"),
        ({"betas": 0.9}, TypeError, "betas is 0.9: pass a tuple of 2"),
        ({"betas": lambda t: (0.9, 0.9)}, TypeError, "betas is a function: pass a tuple of 2"),
        ({"betas": torch.tensor([0.9, 0.9])}, TypeError, "betas is a Tensor: pass a tuple of 2"),
        ({"betas": (0.9,)}, ValueError, "betas has 1 entries: pass a tuple of 2"),
        ({"betas": (0.9, 0.9, 0.9)}, ValueError, "betas has 3 entries: pass a tuple of 2"),
        ({"betas": (0.9, None)}, TypeError, "betas must be a number, .* not None"),
        ({"lr": None}, TypeError, "lr must be a number, .* not None"),
        ({"lr": 1j}, TypeError, "lr must be a number, .* not 1j"),
        ({"amsgrad": "no"}, TypeError, "amsgrad is a switch: pass a bool, not 'no'"),
    ],
)
def test_options_of_a_wrong_kind(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    for name in ("Adam", "AdamW"):
        with pytest.raises(error, match=rf"^{name}: {message}"):
            getattr(optim, name)([torch.zeros(2)], **options)
        opt = getattr(optim, name)([torch.zeros(2)])
        with pytest.raises(error, match=rf"^{name}: {message}"):
            opt.add_param_group({"params": [torch.zeros(3)], **options})
        assert len(opt.param_groups) == 1


def test_numbers_that_torch_optim_lets_through() -> None:
    for name, options in (("SGD", {"lr": math.nan}), ("RMSprop", {"alpha": 1.5})):
        with pytest.raises(ValueError, match=r"^Invalid "):
            getattr(optim, name)([torch.zeros(1)], **options)
    optim.ASGD([torch.zeros(1)], t0=math.inf).hyperparameters(0)  # never averages
    optim.Rprop([torch.zeros(1)], step_sizes=(0.0, math.inf)).hyperparameters(0)
    optim.SGD([torch.zeros(1)], dampening=-1.0).hyperparameters(0)


# Where there is no value to look at.


def test_no_tensor_of_a_device_is_looked_at() -> None:
    class Elsewhere(Tensor):
        """A tensor that cannot be read, as one on an accelerator would make the caller wait."""

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert func not in (Tensor.item, Tensor.aminmax, Tensor.__bool__), func
            return super().__torch_function__(func, types, args, kwargs or {})

    for lr in (torch.tensor(-1.0, device="meta"), torch.tensor(-1.0).as_subclass(Elsewhere)):
        (options,) = optim.SGD([torch.zeros(1)], lr=lr).hyperparameters(0)
        assert options["lr"] is lr


def test_no_tensor_is_looked_at_under_transforms_and_tracers() -> None:
    def after(lr: Tensor) -> Tensor:
        w = torch.zeros(2)
        opt = optim.SGD([w], lr=lambda t: lr)
        return opt.update({"w": w}, {"w": torch.ones(2)}, opt.init({"w": w}))[0]["w"]

    rates = torch.tensor([-1.0, 2.0])
    assert torch.vmap(after)(rates).tolist() == [[1.0, 1.0], [-2.0, -2.0]]
    assert torch.func.jacrev(after)(rates[0]).tolist() == [-1.0, -1.0]
    assert make_fx(after)(torch.tensor(0.5))(rates[0]).tolist() == [1.0, 1.0]


def test_a_tensor_whose_storage_was_freed_is_not_looked_at() -> None:
    lr = torch.tensor(0.1)
    lr.untyped_storage().resize_(0)
    (options,) = optim.SGD([torch.zeros(1)], lr=lr).hyperparameters(0)
    assert options["lr"] is lr


def test_rules_of_the_users_own_have_the_range_they_state() -> None:
    class InLogarithms(diffopt.Optimizer):
        def __init__(self, params: Any, lr: Any, scales: Any = (1.0, 2.0, 3.0)) -> None:
            super().__init__(params, {"lr": lr, "scales": scales})

    opt = InLogarithms([torch.zeros(1)], lr=-3.0)
    assert opt.hyperparameters(0) == [{"lr": -3.0, "scales": (1.0, 2.0, 3.0)}]
    opt = InLogarithms([torch.zeros(1)], lr=torch.tensor(math.nan))
    with pytest.raises(ValueError, match="InLogarithms: lr is nan at step 4"):
        opt.hyperparameters(4)


def test_a_large_tensor_is_looked_at_again_once_it_has_changed() -> None:
    rates = torch.full((2,), 0.1)
    opt = optim.SGD([torch.zeros(2)], lr=0.1, momentum=rates)
    opt.hyperparameters(0)
    opt.hyperparameters(1)
    rates[1] = -0.5
    with pytest.raises(ValueError, match=r"SGD: momentum is -0\.5 at step 2"):
        opt.hyperparameters(2)
    rates[1] = 0.5
    opt.hyperparameters(2)
    looser = optim.ASGD([torch.zeros(2)], t0=rates.neg_())
    looser.hyperparameters(0)
    opt.param_groups[0]["momentum"] = rates
    with pytest.raises(ValueError, match=r"SGD: momentum is -0\.5 at step 3"):
        opt.hyperparameters(3)


def test_a_bool_and_a_numpy_scalar_are_numbers() -> None:
    opt = optim.SGD([torch.zeros(1)], lr=True, momentum=np.float64(0.5), weight_decay=np.int64(1))
    (options,) = opt.hyperparameters(0)
    values = [options[key] for key in ("lr", "momentum", "weight_decay")]
    assert values == [1, 0.5, 1.0]
    assert [type(x) for x in values] == [int, float, float]
