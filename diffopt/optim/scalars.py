"""Numbers that enter a rule: hyperparameters, step counts and what a rule computes from both.

A ``Scalar`` is a Python number where it can be and a tensor where it must be: a tensor that a
gradient flows to, or one whose value is not known because the step is being traced. Formulas such
as ``1 - beta ** t`` read the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from diffopt._torch.autograd import in_forward_mode
from diffopt._torch.functorch import in_functorch

#: A number, a 0-d tensor, or a tensor that broadcasts against the parameter it multiplies.
Scalar = float | Tensor
#: One scalar for all parameters of a group, or one for each.
Coefficient = Scalar | Sequence[Scalar]


def values_unknown() -> bool:
    """Whether tensors may have no value to read, because they are being traced or batched."""
    return get_proxy_mode() is not None or torch.compiler.is_compiling() or in_functorch()


def has_tangent(x: Tensor) -> bool:
    """Whether ``x`` carries a forward-mode tangent."""
    unpack: Any = forward_ad.unpack_dual
    return in_forward_mode() and unpack(x).tangent is not None


def as_numbers(xs: Sequence[Tensor]) -> Coefficient:
    """0-d tensors of the optimizer state (step counts) as numbers in double precision.

    Python floats where they are constants, so that bias corrections cost no tensor operation, as in
    ``torch.optim``; one for all where they are equal. Where a derivative flows through one, or its
    value is unknown, a tensor: a 0-d one in float64, any other as it is.
    """
    unknown = values_unknown()

    def number(x: Tensor) -> Scalar:
        if x.dim():
            return x
        if unknown or type(x) is not Tensor or x.requires_grad or has_tangent(x):
            return x.double()
        return x.item()

    values = [number(x) for x in xs]
    first = values[0]
    if any(isinstance(value, Tensor) or value != first for value in values):
        return values
    return first


def is_zero(value: Coefficient) -> bool:
    """Whether ``value`` is the number zero; a tensor never is, its derivative being wanted."""
    return isinstance(value, (float, int)) and value == 0


def at(t: Coefficient, function: Callable[[Scalar], Scalar]) -> Coefficient:
    """``function`` of a step count, or of each of several."""
    if isinstance(t, Sequence):
        return [function(value) for value in t]
    return function(t)


def each_of(value: Coefficient, number: int) -> Sequence[Scalar]:
    """One scalar for each of a number of parameters."""
    return value if isinstance(value, Sequence) else [value] * number


def select(condition: bool | Tensor, a: Scalar, b: Scalar) -> Scalar:
    """``a`` where the condition holds, ``b`` elsewhere."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def at_least_one(x: Scalar) -> Scalar:
    """``max(x, 1)``."""
    return x.clamp(min=1) if isinstance(x, Tensor) else max(x, 1.0)
