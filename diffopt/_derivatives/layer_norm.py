"""Layer normalisation.

With x̂ = (x − μ) r, r = 1/√(σ² + ε), the mean over the normalised dimensions written ⟨·⟩ and
P a = a − ⟨a⟩ − x̂ ⟨a x̂⟩, the first derivative takes the cotangent g of y = w x̂ + b to r P(w g) for
x, Σ g x̂ for w and Σ g for b, summed over the rest. Cotangents u, v, s of these three go on, with
h = w g, to

    g:  w r P u + v x̂ + s
    x:  r P X − r² C x̂  with  X = v g − r ⟨h x̂⟩ u − r ⟨u x̂⟩ h
    w:  Σ g r P u       and   C = ⟨u h⟩ − ⟨u⟩⟨h⟩ − ⟨u x̂⟩⟨h x̂⟩.

PyTorch's kernel of the first derivative computes r P a. Unlike PyTorch's (2.13), these can be
differentiated again: there the statistics count as constants from the third derivative on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffopt._derivatives.conditions import differentiated, normalised, to_be_written_out
from diffopt._derivatives.low_precision import by_kernel, in_low_precision
from diffopt._torch.modes import unseen

_layer_norm: Any = F.layer_norm
_forward: Any = torch.ops.aten.native_layer_norm.default
_backward: Any = torch.ops.aten.native_layer_norm_backward.default


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.layer_norm``."""
    shape = tuple(normalized_shape)
    fits = input.shape[input.dim() - len(shape) :] == shape
    if fits and differentiated(input, weight, bias):
        result: Tensor = _LayerNorm.apply(  # type: ignore[no-untyped-call]
            input, shape, weight, bias, eps
        )
        return result
    if fits and in_low_precision(input, weight, bias):
        return by_kernel(
            lambda x, w, b: _layer_norm(x, shape, w, b, eps),
            lambda x, w, b: layer_norm(x, shape, w, b, eps),
            input,
            weight,
            bias,
        )
    if fits and to_be_written_out():
        inner = list(range(input.dim() - len(shape), input.dim()))
        return normalised(input, inner, eps, weight, bias)
    return _layer_norm(input, normalized_shape, weight, bias, eps)  # type: ignore[no-any-return]


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        y, mean, rate = _forward(x, shape, weight, bias, eps)
        ctx.shape, ctx.eps = shape, eps
        ctx.save_for_backward(x, weight, bias, mean, rate)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, mean, rate = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]

        def first(grad: Tensor) -> tuple[Tensor | None, ...]:
            inputs = grad, x, ctx.shape, mean, rate, weight, bias
            with unseen():
                return _backward(*inputs, wanted)  # type: ignore[no-any-return]

        if torch.is_grad_enabled():
            to_x, to_weight, to_bias = _LayerNormBackward.apply(  # type: ignore[no-untyped-call]
                grad, x, weight, mean, rate, ctx.shape, ctx.eps, first
            )
        else:
            to_x, to_weight, to_bias = first(grad)
        return to_x, None, to_weight, to_bias, None


class _LayerNormBackward(torch.autograd.Function):
    """(g, x, w) to the cotangents of x, w and the bias, by ``first``, PyTorch's kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rate: Tensor,
        shape: tuple[int, ...],
        eps: float,
        first: Callable[[Tensor], tuple[Tensor | None, ...]],
    ) -> tuple[Tensor | None, ...]:
        ctx.shape, ctx.eps = shape, eps
        ctx.save_for_backward(grad, x, weight, mean, rate)
        ctx.set_materialize_grads(False)
        to_x, to_weight, to_bias = first(grad)
        return to_x, to_weight, to_bias

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, s: Tensor | None) -> Any:
        grad, x, weight, mean, rate = ctx.saved_tensors
        inner = list(range(x.dim() - len(ctx.shape), x.dim()))

        def average(a: Tensor) -> Tensor:
            return a.mean(inner, keepdim=True)

        if torch.is_grad_enabled():
            mean = average(x)
            rate = torch.rsqrt(average((x - mean).square()) + ctx.eps)
        normal = (x - mean) * rate

        def projected(a: Tensor) -> Tensor:
            """r P a."""
            result: Tensor
            if torch.is_grad_enabled():
                result = rate * (a - average(a) - normal * average(a * normal))
            else:
                needed = [True, False, False]
                result, _, _ = _backward(a, x, ctx.shape, mean, rate, None, None, needed)
            return result

        to_grad = to_weight = None
        source = None if v is None else v * grad  # X
        along: Tensor | None = None  # −r² C
        if v is not None:
            to_grad = v * normal
        if u is not None:
            h = grad if weight is None else weight * grad
            through = projected(u)
            to_grad = _plus(to_grad, through if weight is None else weight * through)
            if weight is not None:
                to_weight = (grad * through).sum_to_size(weight.shape)
            u_normal, h_normal = average(u * normal), average(h * normal)
            source = _plus(source, (u * h_normal + h * u_normal) * -rate)
            mixed = average(u * h) - average(u) * average(h) - u_normal * h_normal
            along = -rate.square() * mixed
        if s is not None:
            to_grad = s.expand_as(grad) if to_grad is None else to_grad + s
        to_x = None if source is None else projected(source)
        if along is not None:
            assert to_x is not None
            to_x = torch.addcmul(to_x, normal, along)
        return to_grad, to_x, to_weight, None, None, None, None, None


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
