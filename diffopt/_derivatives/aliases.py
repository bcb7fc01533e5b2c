"""Replaced operations with the arguments and results that they have under their other names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor

from diffopt._derivatives import batch_norm as _batch_norm
from diffopt._derivatives import layer_norm as _layer_norm
from diffopt._derivatives import missing as _missing

Operation = Callable[..., Any]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """``torch.layer_norm``, whose last argument does nothing."""
    return _layer_norm.layer_norm(input, normalized_shape, weight, bias, eps)


def native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Any:
    """``torch.native_layer_norm``: the result, μ and r, which PyTorch takes for constants."""
    if not _learning(input, weight, bias):
        return torch.native_layer_norm(input, normalized_shape, weight, bias, eps)
    y = _layer_norm.layer_norm(input, normalized_shape, weight, bias, eps)
    dims = list(range(input.dim() - len(normalized_shape), input.dim()))
    return (y, *_statistics(input, dims, eps))


def _in_order_of_aten(replacement: Operation, of_batch: str) -> Operation:
    """The replacement, of whose arguments ATen has another order and one more, which does nothing.

    Args:
        of_batch: the name of the argument that asks for the statistics of the batch.
    """
    kind = Parameter.POSITIONAL_OR_KEYWORD
    names = ["input", "weight", "bias", "running_mean", "running_var"]
    names += [of_batch, "momentum", "eps", "cudnn_enabled"]
    signature = Signature([Parameter(name, kind) for name in names])

    def called(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        del arguments["cudnn_enabled"]
        return replacement(**arguments)

    return called


batch_norm = _in_order_of_aten(_batch_norm.batch_norm, "training")
instance_norm = _in_order_of_aten(_batch_norm.instance_norm, "use_input_stats")


def native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """``torch.native_batch_norm``: the result, μ and r, which PyTorch takes for constants."""
    statistics = running_mean, running_var
    if not (training and _learning(input, weight, bias)):
        return torch.native_batch_norm(input, weight, bias, *statistics, training, momentum, eps)
    y = _batch_norm.batch_norm(input, *statistics, weight, bias, True, momentum, eps)
    mean, rate = _statistics(input, [0, *range(2, input.dim())], eps)
    return y, mean.flatten(), rate.flatten()


def native_batch_norm_legit(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> Any:
    """``torch.ops.aten._native_batch_norm_legit``, of whose arguments two may be absent."""
    running = rest[:2] if len(rest) == 5 else (None, None)
    return native_batch_norm(input, weight, bias, *running, *rest[-3:])


def weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """``torch._weight_norm_interface``: the weight, and the norms of the directions."""
    return _missing.weight_norm(v, g, dim), torch.norm_except_dim(v, 2, dim)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Any:
    """``torch.ops.aten.cdist``, which counts the ways to compute it."""
    ways = {1: "use_mm_for_euclid_dist", 2: "donot_use_mm_for_euclid_dist"}
    if not compute_mode:
        return _missing.cdist(x1, x2, p)
    return _missing.cdist(x1, x2, p, ways[compute_mode])


def of_self(replacement: Operation) -> Operation:
    """The replacement called with its first argument by ATen's name for it, or by position."""

    @wraps(replacement)
    def called(*args: Any, **kwargs: Any) -> Any:
        if "self" in kwargs:
            args = (kwargs.pop("self"), *args)
        return replacement(*args, **kwargs)

    return called


def unless_out(operation: Operation, replacement: Operation) -> Operation:
    """``replacement``, or ``operation`` where it writes its result into a tensor given as ``out``.

    PyTorch differentiates no such call, and says so.
    """

    def called(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("out") is not None:
            return operation(*args, **kwargs)
        kwargs.pop("out", None)
        return replacement(*args, **kwargs)

    return called


def refused(operation: Operation, name: str, instead: str) -> Operation:
    """``operation``, refused where it would be differentiated."""

    def called(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if _learning(*tensors):
            raise NotImplementedError(
                f"the loss calls {name}, whose third derivative PyTorch has wrong: call {instead} "
                "instead, whose derivatives of all orders are right"
            )
        return operation(*args, **kwargs)

    return called


def _learning(*operands: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)


def _statistics(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor]:
    mean = x.mean(dims, keepdim=True)
    return mean, torch.rsqrt((x - mean).square().mean(dims, keepdim=True) + eps)
