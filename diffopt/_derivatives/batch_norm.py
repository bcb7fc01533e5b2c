"""Batch and instance normalisation with the statistics of the batch.

With x̂ = (x − μ) r, r = 1/√(σ² + ε), the mean over a channel written ⟨·⟩ and
P a = a − ⟨a⟩ − x̂ ⟨a x̂⟩, the first derivative takes the cotangent g of y = w x̂ + b to
w r P g for x, n ⟨g x̂⟩ for w and n ⟨g⟩ for b. Cotangents u, v, s of these three go on to

    g:  w r P u + v x̂ + s
    x:  r P X − w r² C x̂  with  X = (v − w r ⟨u x̂⟩) g − w r ⟨g x̂⟩ u
    w:  n r C             and   C = ⟨u g⟩ − ⟨u⟩⟨g⟩ − ⟨u x̂⟩⟨g x̂⟩,

which are, channel by channel, linear combinations of g, u and x̂: a fraction of the passes over
memory that PyTorch takes. Unlike PyTorch's (2.13), they can be differentiated again: there the
statistics count as constants from the third derivative on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffopt._derivatives.conditions import differentiated, normalised, to_be_written_out
from diffopt._derivatives.low_precision import by_kernel, in_low_precision
from diffopt._torch.modes import unseen

_batch_norm: Any = F.batch_norm
_instance_norm: Any = F.instance_norm
_forward: Any = torch.ops.aten._batch_norm_impl_index.default
_backward: Any = torch.ops.aten._batch_norm_impl_index_backward.default
_sums: Any = torch.ops.aten.native_batch_norm_backward.default


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm``."""
    statistics = running_mean, running_var
    of_batch = training and input.dim() > 1 and input.numel() > input.shape[1]
    if of_batch and _constant(statistics) and differentiated(input, weight, bias):
        result: Tensor = _BatchNorm.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, *statistics, momentum, eps
        )
        return result
    dims = [0, *range(2, input.dim())] if of_batch else None
    call = input, statistics, (weight, bias), training, momentum, eps
    return _by_pytorch(_batch_norm, batch_norm, dims, *call)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.instance_norm``: every example's channels are channels of one batch."""
    statistics = running_mean, running_var
    many = input.dim() > 2 and input.numel() > input.shape[0] * input.shape[1]
    of_input = use_input_stats and many
    if not (of_input and _constant(statistics) and differentiated(input, weight, bias)):
        dims = list(range(2, input.dim())) if of_input else None
        call = input, statistics, (weight, bias), use_input_stats, momentum, eps
        return _by_pytorch(_instance_norm, instance_norm, dims, *call)
    n, channels = input.shape[:2]
    mean, var, weight, bias = (x if x is None else x.repeat(n) for x in (*statistics, weight, bias))
    joined = input.contiguous().view(1, n * channels, *input.shape[2:])
    y = batch_norm(joined, mean, var, weight, bias, True, momentum, eps)
    with torch.no_grad():
        for running, new in zip(statistics, (mean, var), strict=True):
            if running is not None and new is not None:
                running.copy_(new.view(n, channels).mean(0))
    return y.view(input.shape)


_Pair = tuple[Tensor | None, Tensor | None]


def _constant(statistics: _Pair) -> bool:
    return not any(x is not None and x.requires_grad for x in statistics)


def _by_pytorch(
    function: Any,
    replacement: Callable[..., Tensor],
    dims: list[int] | None,
    x: Tensor,
    statistics: _Pair,
    affine: _Pair,
    of_batch: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """``function`` where its derivative is not taken by hand.

    Args:
        function, replacement: PyTorch's, and the one from here.
        dims: over which the statistics of the batch are taken; None where none are.
    """
    low = dims is not None and _constant(statistics) and in_low_precision(x, *affine)
    if dims is None or not (low or to_be_written_out()):
        return function(x, *statistics, *affine, of_batch, momentum, eps)  # type: ignore[no-any-return]
    if statistics[0] is not None:  # moves towards x's, by the kernel that the affine map asks for
        with torch.no_grad():
            function(x, *statistics, *affine, True, momentum)
    if low:
        return by_kernel(
            lambda x, w, b: function(x, None, None, w, b, True, momentum, eps),
            lambda x, w, b: replacement(x, None, None, w, b, True, momentum, eps),
            x,
            *affine,
        )
    weight, bias = (a if a is None else a.view(-1, *(1,) * (x.dim() - 2)) for a in affine)
    return normalised(x, dims, eps, weight, bias)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        cudnn = torch.backends.cudnn.enabled
        y, mean, rate, reserve, kernel = _forward(
            x, weight, bias, running_mean, running_var, True, momentum, eps, cudnn
        )
        ctx.eps, ctx.kernel, ctx.biased = eps, kernel, bias is not None
        ctx.save_for_backward(x, weight, mean, rate, reserve)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, mean, rate, reserve = ctx.saved_tensors

        # Without a weight, the kernel on CUDA cannot give the sums that are its gradient.
        scale = torch.ones_like(mean) if weight is None else weight

        def first(grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
            wanted = [ctx.needs_input_grad[0], True, True]
            inputs = (ctx.kernel, x, grad, scale, None, None, mean, rate)
            with unseen():
                found = _backward(*inputs, True, ctx.eps, wanted, reserve)
            return found  # type: ignore[no-any-return]

        if torch.is_grad_enabled():
            to_x, to_weight, to_bias = _BatchNormBackward.apply(  # type: ignore[no-untyped-call]
                grad, x, weight, mean, rate, ctx.eps, first
            )
        else:
            to_x, to_weight, to_bias = first(grad)
        to_weight = None if weight is None else to_weight
        to_bias = to_bias if ctx.biased else None
        return to_x, to_weight, to_bias, None, None, None, None


class _BatchNormBackward(torch.autograd.Function):
    """(g, x, w) to the cotangents of x, w and the bias, by ``first``, PyTorch's kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rate: Tensor,
        eps: float,
        first: Callable[[Tensor], tuple[Tensor | None, Tensor, Tensor]],
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        to_x, to_weight, to_bias = first(grad)
        n = x.numel() // x.shape[1]
        ctx.eps = eps
        ctx.save_for_backward(grad, x, weight, mean, rate, to_bias / n, to_weight / n)
        ctx.set_materialize_grads(False)
        return to_x, to_weight, to_bias

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, s: Tensor | None) -> Any:
        grad, x, weight, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            moments = _Moments.of(x, grad, u, ctx.eps)
        else:
            moments = _Moments.from_kernel(x, grad, u, ctx.eps, *statistics)
        return (*_pulled_back(moments, grad, weight, u, v, s), None, None, None, None)


@dataclass(frozen=True)
class _Moments:
    """Of g, u and x̂, by channel; zero where there is no u."""

    normal: Tensor  # x̂
    rate: Tensor  # r
    g: Tensor
    g_normal: Tensor
    u: Tensor | float = 0.0
    u_normal: Tensor | float = 0.0
    mixed: Tensor | float = 0.0  # C

    @classmethod
    def of(cls, x: Tensor, g: Tensor, u: Tensor | None, eps: float) -> _Moments:
        """By operations that can be differentiated."""
        mean, rate = _average(x), torch.rsqrt(_average((x - _average(x)).square()) + eps)
        normal = (x - mean) * rate
        moments = cls(normal, rate, _average(g), _average(g * normal))
        return moments if u is None else moments._with(u, g, _average(u), _average(u * normal))

    @classmethod
    def from_kernel(
        cls,
        x: Tensor,
        grad: Tensor,
        u: Tensor | None,
        eps: float,
        mean: Tensor,
        rate: Tensor,
        g: Tensor,
        g_normal: Tensor,
    ) -> _Moments:
        """From the sums that the first derivative has taken already."""

        def wide(a: Tensor) -> Tensor:
            return a.view(1, -1, *(1,) * (x.dim() - 2))

        normal = (x - wide(mean)).mul_(wide(rate))
        moments = cls(normal, wide(rate), wide(g), wide(g_normal))
        if u is None:
            return moments
        # The sums do not depend on the weight, but the kernel on CUDA asks for one.
        statistics = (mean, None, None, mean, rate, True, eps)
        _, u_normal, u_sum = _sums(u, x, *statistics, [False, True, True])
        n = x.numel() // x.shape[1]
        return moments._with(u, grad, wide(u_sum / n), wide(u_normal / n))

    def _with(self, u: Tensor, grad: Tensor, u_mean: Tensor, u_normal: Tensor) -> _Moments:
        mixed = _average(u * grad) - u_mean * self.g - u_normal * self.g_normal
        return replace(self, u=u_mean, u_normal=u_normal, mixed=mixed)


def _average(x: Tensor) -> Tensor:
    return x.mean([0, *range(2, x.dim())], keepdim=True)


def _pulled_back(
    of: _Moments,
    grad: Tensor,
    weight: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
    s: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The cotangents of g, x and w."""

    def wide(a: Tensor | None, default: float) -> Tensor | float:
        return default if a is None else a.view(of.rate.shape)

    scale = wide(weight, 1.0) * of.rate  # w r
    along = wide(v, 0.0) - scale * of.u_normal
    to_grad = of.normal * along + (wide(s, 0.0) - scale * of.u)
    mean = along * of.g - scale * of.g_normal * of.u  # of X
    mean_normal = along * of.g_normal - scale * of.g_normal * of.u_normal  # of X x̂
    to_x = of.normal * (-of.rate * (mean_normal + scale * of.mixed)) - of.rate * mean
    to_x = torch.addcmul(to_x, grad, of.rate * along)
    if u is not None:
        to_grad = torch.addcmul(to_grad, u, scale)
        to_x = torch.addcmul(to_x, u, -of.rate * scale * of.g_normal)
    if weight is None or not isinstance(of.mixed, Tensor):
        return to_grad, to_x, None
    n = grad.numel() // grad.shape[1]
    return to_grad, to_x, (n * of.rate * of.mixed).view(weight.shape)
