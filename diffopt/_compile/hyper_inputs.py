"""An optimizer's hyperparameters as inputs of compiled code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from diffopt.optim import Optimizer
from diffopt.optim.options import SWITCHES

_CONSTANTS = SWITCHES | {"ns_coefficients"}


def entries(options: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Every number, tensor or switch among the options, those in tuples one by one."""
    for group in options:
        for name, value in group.items():
            if isinstance(value, tuple):
                yield from ((name, v) for v in value)
            else:
                yield name, value


def is_input(name: str, value: Any) -> bool:
    """Whether an option is passed to compiled code, as a tensor.

    Not so a zero, for which rules leave terms out, except that a learning rate may warm up from it;
    nor coefficients for which PyTorch has one operation, with one rounding, if they are numbers.
    """
    if isinstance(value, Tensor):
        return True
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and name not in _CONSTANTS and (value != 0 or name == "lr")


def constants(opt: Optimizer, options: Sequence[Mapping[str, Any]]) -> tuple[bool, ...]:
    """Of each input whether it is a tensor that the user gave, and no schedule computes."""
    given = {id(x) for _, x in entries(opt.param_groups) if isinstance(x, Tensor)}
    return tuple(id(x) in given for name, x in entries(options) if is_input(name, x))


def with_hyper(
    opt: Optimizer, options: Sequence[Mapping[str, Any]], hyper: Sequence[Tensor]
) -> Optimizer:
    """``opt`` with these tensors for options."""
    given = iter(hyper)

    def put(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(put(name, v) for v in value)
        return next(given) if is_input(name, value) else value

    rule = object.__new__(type(opt))
    rule.__dict__.update(opt.__dict__)
    rule.param_groups = [
        {**group, **{name: put(name, value) for name, value in values.items()}}
        for group, values in zip(opt.param_groups, options, strict=True)
    ]
    return rule
