"""Linear layers, y = x Wᵀ + b, whose weight's gradient may be left out.

The first derivative takes the cotangent g of y to g W for x, xᵀ g for Wᵀ and Σ g for b.
Cotangents u, v, s of these three go on to u Wᵀ + x v + s for g, g vᵀ for x and uᵀ g for Wᵀ. These
are PyTorch's own to the last bit.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffopt._derivatives.evaluation import Evaluation, current_evaluation, nothing_like, wanted
from diffopt._derivatives.own import differentiated, seen_by_modes

#: The multiplications from which on leaving a product out is worth two functions in Python.
WORTHWHILE = 4_000_000

_linear: Any = F.linear


@seen_by_modes
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``."""
    evaluation = current_evaluation()
    if evaluation is None or not _is_large(input, weight, bias):
        return _linear(input, weight, bias)  # type: ignore[no-any-return]
    rows: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        input if input.dim() == 2 else input.view(-1, input.shape[-1]),
        weight.t(),
        bias,
        _Layer(weight, evaluation),
    )
    return rows if input.dim() == 2 else rows.view(*input.shape[:-1], -1)


class _Layer(NamedTuple):
    """The weight as the layer was given it, and the evaluation that it is part of."""

    weight: Tensor
    evaluation: Evaluation


def _is_large(x: Any, weight: Any, bias: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and (x.dim() == 2 or (x.dim() > 2 and x.is_contiguous()))
        and x.numel() * weight.shape[0] >= WORTHWHILE
        and differentiated(x, weight, bias)
        and all(operand.layout is torch.strided for operand in (x, weight))
    )


class _Linear(torch.autograd.Function):
    """x, Wᵀ and b to y: of the same tensors as PyTorch's, so that sums are in its order, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turned: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, turned)
        return _linear(x, layer.weight, bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, turned = ctx.saved_tensors
        weight, evaluation = ctx.layer
        needed = wanted(ctx, 2)[:3]
        if torch.is_grad_enabled():
            found = _LinearBackward.apply(  # type: ignore[no-untyped-call]
                grad, x, turned, needed, evaluation.leaves_out(weight)
            )
        else:
            found = _first(grad, x, turned, needed)
        return *found, None


def _first(
    grad: Tensor, x: Tensor, turned: Tensor, needed: list[bool], left_out: bool = False
) -> tuple[Tensor | None, ...]:
    to_x = grad @ turned.t() if needed[0] else None
    to_turned = None
    if needed[1]:
        to_turned = nothing_like(turned) if left_out else (grad.t() @ x).t()
    to_bias = grad.sum(0) if needed[2] else None
    return to_x, to_turned, to_bias


class _LinearBackward(torch.autograd.Function):
    """(g, x, Wᵀ) to the cotangents of x, Wᵀ and b."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, turned: Tensor, needed: list[bool], left_out: bool
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(grad, x, turned)
        ctx.set_materialize_grads(False)
        return _first(grad, x, turned, needed, left_out)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, s: Tensor | None) -> Any:
        grad, x, turned = ctx.saved_tensors
        needed = wanted(ctx, 3)
        to_grad = to_x = to_turned = None
        if needed[0]:
            to_grad = _summed(x, turned, u, v, s)
        if v is not None and needed[1]:
            to_x = grad @ v.t()
        if u is not None and needed[2]:
            to_turned = (grad.t() @ u).t()
        return to_grad, to_x, to_turned, None, None


def _summed(
    x: Tensor, turned: Tensor, u: Tensor | None, v: Tensor | None, s: Tensor | None
) -> Tensor | None:
    """u Wᵀ + x v + s, of those that there are, added up as PyTorch does."""
    terms = [
        None if s is None else s.expand(x.shape[0], -1),
        None if v is None else x @ v,
        None if u is None else u @ turned,
    ]
    present = [term for term in terms if term is not None]
    return reduce(torch.add, present) if present else None
