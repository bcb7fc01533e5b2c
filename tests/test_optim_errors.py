"""Constructors, and errors that say what to write."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import (
    OPTIMIZERS,
    some_params,
)
from torch import nn

from diffopt import optim


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
        r"SGD: lr of shape \(3,\) does not broadcast to parameter 'w' of shape \(2,\): one value "
        r"for each step is lr=lambda t: rates\[t\], one for each task",
        lambda: optim.SGD([("w", torch.zeros(2))], lr=torch.ones(3)),
    ),
    (
        ValueError,
        r"lr of shape \(2,\) does not broadcast to parameter 'w' of shape \(1,\)",
        lambda: optim.SGD([torch.zeros(1)], lr=lambda t: torch.ones(2)).update(
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
