"""Normalisations in low precision and under autocast.

PyTorch's kernel gives the value and the first derivative. The operation in single precision gives
the derivatives of the first derivative. So derivatives of all orders are right to rounding; PyTorch
takes the statistics for constants from the third derivative on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from diffopt._derivatives.conditions import reversed_only
from diffopt._values.tree import vjp

Operation = Callable[..., Tensor]


def in_low_precision(*operands: Tensor | None) -> bool:
    """Whether reverse mode, and nothing else, is to differentiate an operation on ``operands``."""
    tensors = [x for x in operands if x is not None]
    return reversed_only(tensors) and all(x.dtype.is_floating_point for x in tensors)


def by_kernel(kernel: Operation, wide: Operation, *operands: Tensor | None) -> Tensor:
    """``kernel(*operands)``.

    Args:
        kernel: PyTorch's operation. Called again for the first derivative.
        wide: the same, with derivatives of all orders, for operands of one dtype. Called without
            autocast, in single precision at least.

    Cost: of the first derivative, the kernel once more; of the second, ``wide`` and its two.
    """
    result: Tensor = _Kernel.apply(kernel, wide, *operands)  # type: ignore[no-untyped-call]
    return result


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Operation, wide: Operation, *operands: Tensor | None) -> Tensor:
        kernel = _under_present_autocast(kernel, operands)
        ctx.kernel, ctx.wide = kernel, wide
        ctx.save_for_backward(*operands)
        return kernel(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        operands = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            to_operands = _KernelBackward.apply(  # type: ignore[no-untyped-call]
                ctx.kernel, ctx.wide, needed, grad, *operands
            )
        else:
            to_operands = _first(ctx.kernel, grad, operands, needed)
        return (None, None, *to_operands)


class _KernelBackward(torch.autograd.Function):
    """(g, operands) to the cotangents of the operands."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Operation,
        wide: Operation,
        needed: Sequence[bool],
        grad: Tensor,
        *operands: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.wide, ctx.needed = wide, needed
        ctx.save_for_backward(grad, *operands)
        ctx.set_materialize_grads(False)
        return _first(kernel, grad, operands, needed)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            grad, *operands = (_alias(x, again) for x in ctx.saved_tensors)
            with _without_autocast(grad):
                y = ctx.wide(*_in_one_dtype(operands)).to(grad.dtype)
            needed = list(compress(operands, ctx.needed))
            first = torch.autograd.grad(y, needed, grad, create_graph=True)
            flowing = zip(first, compress(cotangents, ctx.needed), strict=True)
            pairs = [(g, c) for g, c in flowing if c is not None]
            inputs = [x for x in (grad, *operands) if x is not None]
            results = iter(vjp(pairs, inputs, create_graph=again))
        return (None, None, None, *(x if x is None else next(results) for x in (grad, *operands)))


def _under_present_autocast(kernel: Operation, operands: Sequence[Tensor | None]) -> Operation:
    """``kernel`` under the present autocast, also in a backward pass outside of autocast."""
    kind = next(x.device.type for x in operands if x is not None)
    if not torch.amp.is_autocast_available(kind):
        return kernel
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def cast(*operands: Tensor | None) -> Tensor:
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            return kernel(*operands)

    return cast


def _alias(x: Any, again: bool) -> Any:
    """``x`` with derivatives of its own: a cotangent may itself depend on the operands."""
    if x is None:
        return None
    return x.view_as(x) if again and x.requires_grad else x.detach().requires_grad_()


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()


def _in_one_dtype(operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    double = any(x is not None and x.dtype == torch.float64 for x in operands)
    dtype = torch.float64 if double else torch.float32
    return [x if x is None else x.to(dtype) for x in operands]


def _first(
    kernel: Operation, grad: Tensor, operands: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        leaves: list[Any] = [
            x if x is None else x.detach().requires_grad_(is_needed)
            for x, is_needed in zip(operands, needed, strict=True)
        ]
        gradients = iter(torch.autograd.grad(kernel(*leaves), list(compress(leaves, needed)), grad))
    return tuple(next(gradients) if is_needed else None for is_needed in needed)
