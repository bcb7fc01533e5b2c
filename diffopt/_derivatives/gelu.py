"""The Gaussian error linear unit."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffopt._derivatives.conditions import differentiated
from diffopt._torch.modes import unseen

_gelu: Any = F.gelu
_gelu_backward: Any = torch.ops.aten.gelu_backward.default


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``torch.nn.functional.gelu``."""
    if differentiated(input):
        result: Tensor = _Gelu.apply(input, approximate)  # type: ignore[no-untyped-call]
        return result
    return _gelu(input, approximate=approximate)  # type: ignore[no-any-return]


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.approximate = approximate
        ctx.save_for_backward(x)
        return _gelu(x, approximate=approximate)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            to_x = _GeluBackward.apply(grad, x, ctx.approximate)  # type: ignore[no-untyped-call]
        else:
            with unseen():
                to_x = _gelu_backward(grad, x, approximate=ctx.approximate)
        return to_x, None


class _GeluBackward(torch.autograd.Function):
    """(g, x) to g·f'(x)."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, approximate: str) -> Tensor:
        ctx.approximate = approximate
        ctx.save_for_backward(grad, x)
        with unseen():
            return _gelu_backward(grad, x, approximate=approximate)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        grad, x = ctx.saved_tensors
        to_grad = to_x = None
        if ctx.needs_input_grad[0]:
            to_grad = _gelu_backward(cotangent, x, approximate=ctx.approximate)
        if ctx.needs_input_grad[1]:
            to_x = _second_derivative(x, ctx.approximate) * (cotangent * grad)
        return to_grad, to_x, None


def _second_derivative(x: Tensor, approximate: str) -> Tensor:
    """f″.

    Of f = x Φ(x), it is (2 − x²) φ(x). Of f = x (1 + τ)/2, where τ = tanh z and
    z = c (x + a x³), it is (1 − τ²) (z′ + x z″/2 − x τ z′²).
    """
    square = x * x
    if approximate == "none":
        density = (square * -0.5).exp() * (1 / math.sqrt(2 * math.pi))
        return (2 - square) * density
    c, a = math.sqrt(2 / math.pi), 0.044715
    tanh = ((square * (c * a) + c) * x).tanh()
    slope = square * (3 * c * a) + c  # z′, and x z″/2 = z′ − c
    bend = torch.addcmul(2 * slope - c, x * tanh, slope * slope, value=-1)
    return (1 - tanh * tanh) * bend
