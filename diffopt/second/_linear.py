"""Linear layers, y = x Wᵀ + b, whose weight's gradient may be left out.

The first derivative takes the cotangent g of y to g W for x, gᵀ x for W and Σ g for b. Cotangents
u, v, s of these three go on to u Wᵀ + x vᵀ + s for g, g v for x and gᵀ u for W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffopt.second._own import seen_by_modes, wanted
from diffopt.second._unread import Unread, evaluation_unread, nothing_like, worthwhile

_linear: Any = F.linear


@seen_by_modes
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``."""
    if isinstance(input, Tensor) and isinstance(weight, Tensor) and weight.dim() == 2:
        multiplications = input.numel() * weight.shape[0]
        if input.dim() > 1 and worthwhile(multiplications, input, weight, bias):
            result: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
                input, weight, bias, evaluation_unread()
            )
            return result
    return _linear(input, weight, bias)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, unread: Unread | None
    ) -> Tensor:
        ctx.unread = unread
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        asked = wanted(ctx, 3)
        if torch.is_grad_enabled():
            left_out = ctx.unread is not None and ctx.unread.leaves_out(weight)
            found = _LinearBackward.apply(  # type: ignore[no-untyped-call]
                grad, x, weight, asked, left_out
            )
        else:
            found = _first(grad, x, weight, asked)
        return *found, None


def _first(
    grad: Tensor, x: Tensor, weight: Tensor, asked: list[bool], left_out: bool = False
) -> tuple[Tensor | None, ...]:
    to_x = grad @ weight if asked[0] else None
    to_weight = None
    if asked[1]:
        to_weight = nothing_like(weight) if left_out else _rows(grad).t() @ _rows(x)
    to_bias = _rows(grad).sum(0) if asked[2] else None
    return to_x, to_weight, to_bias


class _LinearBackward(torch.autograd.Function):
    """(g, x, W) to the cotangents of x, W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        asked: list[bool],
        left_out: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(grad, x, weight)
        ctx.set_materialize_grads(False)
        return _first(grad, x, weight, asked, left_out)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, s: Tensor | None) -> Any:
        grad, x, weight = ctx.saved_tensors
        asked = wanted(ctx, 3)
        to_grad = to_x = to_weight = None
        if u is not None and asked[2]:
            to_weight = _rows(grad).t() @ _rows(u)
        if v is not None and asked[1]:
            to_x = grad @ v
        if asked[0]:
            to_grad = _summed(x, weight, u, v, s)
            to_grad = to_grad if to_grad is None else to_grad.view_as(grad)
        return to_grad, to_x, to_weight, None, None


def _summed(
    x: Tensor, weight: Tensor, u: Tensor | None, v: Tensor | None, s: Tensor | None
) -> Tensor | None:
    """u Wᵀ + x vᵀ + s, of those that there are."""
    total = None if s is None else s.expand(_rows(x).shape[0], -1)
    for a, b in ((u, weight), (x, v)):
        if a is not None and b is not None:
            product = _rows(a), b.t()
            total = torch.mm(*product) if total is None else torch.addmm(total, *product)
    return total


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)
