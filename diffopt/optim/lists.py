"""The vocabulary that the rules are written in: arithmetic on lists of tensors.

Every operation returns new tensors and can be differentiated to any order, in reverse and in
forward mode. Coefficients are scalars in the sense of ``diffopt.optim.scalars``. Where every
coefficient is a number, one ``torch._foreach_*`` call serves the whole list. Where a coefficient is
a tensor, or under a ``torch.func`` transform (``vmap`` knows no ``_foreach`` operation), each
tensor gets an operation of its own. This file alone makes the choice.

``give_up=True`` says that x is not needed any more: the result then takes x's memory where nothing
records the operation. Without a graph a rule is memory traffic, and reuse halves the traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import repeat
from typing import Any, TypeGuard

import torch
from torch import Tensor

from diffopt._torch.autograd import in_forward_mode
from diffopt._torch.functorch import in_functorch
from diffopt.optim.scalars import Coefficient, Scalar, has_tangent, values_unknown

Tensors = list[Tensor]

_one_by_one = ContextVar("one_by_one", default=False)


@contextmanager
def one_by_one() -> Iterator[None]:
    """Within it every tensor gets its own operation.

    Autograd saves all operands of a ``_foreach`` operation, whether a derivative needs them or not.
    """
    token = _one_by_one.set(True)
    try:
        yield
    finally:
        _one_by_one.reset(token)


def fit(value: Scalar, x: Tensor) -> Scalar:
    """Move ``value`` so that arithmetic with ``x`` keeps ``x``'s device, dtype and shape."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() and value.numel() == 1:
        value = value.reshape(())
    if value.device != x.device and (value.dim() or value.device.type != "cpu"):
        value = value.to(x.device)
    if value.dtype != x.dtype and (value.dim() or not x.dim()):
        value = value.to(x.dtype)  # a 0-d tensor does not upcast one that has dimensions
    return value


def _each(value: Coefficient, xs: Tensors) -> Iterable[Scalar]:
    values = value if isinstance(value, Sequence) else repeat(value, len(xs))
    return (fit(v, x) for v, x in zip(values, xs, strict=True))


def _one_call() -> bool:
    return not in_functorch() and not _one_by_one.get()


def _one_call_with(c: Coefficient) -> TypeGuard[Any]:
    """Whether one call serves an operation that takes a number."""
    # Python's own numbers first: to ask whether something is a Sequence takes longer than the rest.
    return (isinstance(c, (float, int)) or not isinstance(c, (Tensor, Sequence))) and _one_call()


def _one_call_with_many(c: Coefficient) -> TypeGuard[Any]:
    """Whether one call serves an operation that takes a number, or one for each tensor."""
    if isinstance(c, (float, int)):
        return _one_call()
    values = c if isinstance(c, Sequence) else (c,)
    return not any(isinstance(v, Tensor) for v in values) and _one_call()


def may_overwrite(*operands: Tensors) -> bool:
    """Whether to write into memory that is given up: nothing records the operation."""
    if torch.is_grad_enabled() and any(x.requires_grad for xs in operands for x in xs):
        return False
    return not in_forward_mode() and not in_functorch()


def _computed(
    new: Callable[..., Any],
    in_place: Callable[..., None],
    operands: Sequence[Tensors],
    *numbers: Coefficient,
    give_up: bool,
) -> Tensors:
    """One call of ``new``, or of ``in_place`` where the first operand's memory may be reused."""
    if give_up and may_overwrite(*operands):
        in_place(*operands, *numbers)
        return operands[0]
    return list(new(*operands, *numbers))


def _operand(c: Any, xs: Tensors) -> Any:
    """A factor for one call over ``xs``, with the same result and in half of the time.

    On the CPU, where it is made a tensor for each of ``xs`` otherwise. Not where that is recorded:
    autograd would save it.
    """
    dtype = xs[0].dtype
    is_number = (
        type(c) in (int, float)
        and dtype in WIDE
        and all(x.is_cpu and x.dtype is dtype and not x.requires_grad for x in xs)
    )
    return torch.scalar_tensor(c, dtype=dtype) if is_number and not values_unknown() else c


#: The dtypes that numbers of double precision are computed with as they are.
WIDE = (torch.float32, torch.float64)


def neg(xs: Tensors) -> Tensors:
    """−x."""
    return list(torch._foreach_neg(xs)) if _one_call() else [-x for x in xs]


def magnitude(xs: Tensors) -> Tensors:
    """``|x|``, with derivative 0 at 0."""
    return list(torch._foreach_abs(xs)) if _one_call() else [x.abs() for x in xs]


def add(xs: Tensors, ys: Tensors, c: Coefficient = 1.0, *, give_up_ys: bool = False) -> Tensors:
    """x + c·y."""
    if _one_call_with(c):
        if give_up_ys and may_overwrite(xs, ys):
            torch._foreach_mul_(ys, c)
            torch._foreach_add_(ys, xs)
            return ys
        return list(torch._foreach_add(xs, ys, alpha=c))
    return [x + k * y for x, y, k in zip(xs, ys, _each(c, xs), strict=True)]


def shift(xs: Tensors, c: Coefficient, *, give_up: bool = False) -> Tensors:
    """x + c."""
    if _one_call_with_many(c):
        return _computed(torch._foreach_add, torch._foreach_add_, [xs], c, give_up=give_up)
    return [x + k for x, k in zip(xs, _each(c, xs), strict=True)]


def scale(
    xs: Tensors, c: Coefficient, *, give_up: bool = False, into: Tensors | None = None
) -> Tensors:
    """c·x. ``into`` are tensors that are not needed any more, of the same shapes as x."""
    if _one_call_with_many(c):
        if into is not None and may_overwrite(xs, into):
            torch._foreach_copy_(into, xs)
            xs, give_up = into, True
        factor = _operand(c, xs)
        return _computed(torch._foreach_mul, torch._foreach_mul_, [xs], factor, give_up=give_up)
    return [k * x for x, k in zip(xs, _each(c, xs), strict=True)]


def divide(xs: Tensors, c: Coefficient, *, give_up: bool = False) -> Tensors:
    """x / c."""
    if _one_call_with_many(c):
        divisor = _operand(c, xs)
        return _computed(torch._foreach_div, torch._foreach_div_, [xs], divisor, give_up=give_up)
    return [x / k for x, k in zip(xs, _each(c, xs), strict=True)]


def mul(xs: Tensors, ys: Tensors, *, give_up: bool = False) -> Tensors:
    """x·y."""
    if _one_call():
        return _computed(torch._foreach_mul, torch._foreach_mul_, [xs, ys], give_up=give_up)
    return [x * y for x, y in zip(xs, ys, strict=True)]


def div(xs: Tensors, ys: Tensors, *, give_up: bool = False) -> Tensors:
    """x / y."""
    if _one_call():
        return _computed(torch._foreach_div, torch._foreach_div_, [xs, ys], give_up=give_up)
    return [x / y for x, y in zip(xs, ys, strict=True)]


def lerp(xs: Tensors, ys: Tensors, weight: Coefficient) -> Tensors:
    """x + weight·(y − x)."""
    if _one_call_with(weight):
        return list(torch._foreach_lerp(xs, ys, weight))
    return [x + k * (y - x) for x, y, k in zip(xs, ys, _each(weight, xs), strict=True)]


def addcmul(
    xs: Tensors, ys: Tensors, zs: Tensors, c: Coefficient = 1.0, *, give_up: bool = False
) -> Tensors:
    """x + c·y·z."""
    if _one_call_with_many(c):
        new, in_place = torch._foreach_addcmul, torch._foreach_addcmul_
        return _computed(new, in_place, [xs, ys, zs], c, give_up=give_up)
    return [x + k * y * z for x, y, z, k in zip(xs, ys, zs, _each(c, xs), strict=True)]


def addcdiv(xs: Tensors, ys: Tensors, zs: Tensors, c: Coefficient = 1.0) -> Tensors:
    """x + c·y/z."""
    # The backward pass of torch._foreach_addcdiv raises IndexError for more tensors than the first
    # has rows (seen in PyTorch 2.13): it serves where there is none.
    if _one_call_with_many(c) and not carry_derivative(zs):
        return list(torch._foreach_addcdiv(xs, ys, zs, c))
    apart = _one_by_one.get()  # torch.addcdiv, too, saves more than is needed
    return [
        x + k * y / z if apart or isinstance(k, Tensor) else torch.addcdiv(x, y, z, value=k)
        for x, y, z, k in zip(xs, ys, zs, _each(c, xs), strict=True)
    ]


def maximum(xs: Tensors, ys: Tensors) -> Tensors:
    """max(x, y); where they are equal each gets half of the derivative."""
    if _one_call():
        return list(torch._foreach_maximum(xs, ys))
    return [torch.maximum(x, y) for x, y in zip(xs, ys, strict=True)]


def sqrt(xs: Tensors, *, give_up: bool = False) -> Tensors:
    """√x, with every derivative 0 at x = 0.

    The square root is a second moment's: x holds sums of squares g², and in m / (√x + ε) its own
    derivative, infinite at 0, is multiplied by m, which vanishes there with g. The limit of the
    product is 0, which autograd would compute as 0·∞ = NaN. Zeros are therefore kept away from the
    square root. The value is unchanged, and NaN (of a negative x, too) stays NaN.
    """
    if _one_call() and not carry_derivative(xs):
        return _computed(torch._foreach_sqrt, torch._foreach_sqrt_, [xs], give_up=give_up)
    return [_sqrt(x) for x in xs]


def divide_by_roots(xs: Tensors, roots: Tensors) -> Tensors:
    """x / √y of the roots √y, 0 where they are 0: in derivatives of ``sqrt``. x is given up."""
    quotients = div(xs, roots, give_up=True)
    fill = Tensor.masked_fill_ if may_overwrite(xs, roots) else Tensor.masked_fill
    return [fill(q, root == 0, 0.0) for q, root in zip(quotients, roots, strict=True)]


def carry_derivative(xs: Tensors) -> bool:
    recording = torch.is_grad_enabled()
    return any((recording and x.requires_grad) or has_tangent(x) for x in xs)


def _sqrt(x: Tensor) -> Tensor:
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
