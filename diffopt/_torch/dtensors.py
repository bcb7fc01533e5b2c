"""``DTensor``, without importing it: where the caller has not, no tensor is one."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from diffopt._torch.feature import optional

_PLAIN = (Tensor, nn.Parameter)
_MODULE = "torch.distributed.tensor"
_API = "torch.distributed.tensor._api"
_REDISTRIBUTE = "torch.distributed.tensor._redistribute"


def is_dtensor(x: Any) -> bool:
    """Whether ``x`` is a ``DTensor``, a parameter or not."""
    if type(x) in _PLAIN:
        return False
    kind = getattr(sys.modules.get(_MODULE), "DTensor", None)
    return kind is not None and isinstance(x, kind)


def stored(x: Tensor) -> Tensor:
    """The tensor in whose memory ``x`` lies: of a ``DTensor``, this process's part."""
    while type(x) not in _PLAIN:
        inner = getattr(x, "_local_tensor", None)
        if inner is None:
            inner = getattr(x, "elem", None) if _is_awaited(x) else None
        if inner is None:
            break
        x = inner
    return x


def local_part(x: Any) -> Tensor:
    """This process's part of a ``DTensor``, without a graph, once it has arrived."""
    part: Any = x._local_tensor
    arrived: Tensor = part.wait() if _is_awaited(part) else part
    return arrived


def has_own_memory(x: Tensor) -> bool:
    """Whether ``x`` is no wrapper around other tensors."""
    return type(x) in _PLAIN or not hasattr(type(x), "__tensor_flatten__")


def has_plain_placements(x: Any) -> bool:
    """Whether every placement of a ``DTensor`` is ``Shard`` or ``Replicate``, and no kind of it."""
    tensor = torch.distributed.tensor
    return all(type(p) in (tensor.Shard, tensor.Replicate) for p in x.placements)


def can_redistribute_twice() -> bool:
    """Whether the derivative of a change of placements is itself differentiable."""
    return optional(_REDISTRIBUTE, "NestedRedistribute") is not None


def is_imported() -> bool:
    """Whether there may be a ``DTensor``."""
    return _MODULE in sys.modules


def as_now() -> list[tuple[Any, str, Any]]:
    """The attribute of PyTorch's to replace, so that ``DTensor.from_local`` has a derivative twice.

    PyTorch (2.13) changes the placements of what flows back through it by an operation that is not
    recorded: where the input of a layer is replicated and its cotangent a sum still to be taken, as
    between two pairs of ``ColwiseParallel`` and ``RowwiseParallel``, a second derivative is cut.
    """
    if not is_imported() or optional(_API, "_FromTorchTensor") is None:
        return []
    return [(sys.modules[_API], "_FromTorchTensor", _from_local())]


@cache
def _from_local() -> Any:
    original: Any = optional(_API, "_FromTorchTensor")

    class FromLocal(original):  # type: ignore[misc]
        """``DTensor.from_local``, whose backward pass is recorded."""

        @staticmethod
        def backward(ctx: Any, cotangent: Any) -> Any:
            nothing = (None,) * (len(ctx.needs_input_grad) - 1)
            if cotangent is None:
                return None, *nothing
            given = getattr(ctx, "grad_placements", None) or ctx.forward_input_placements
            replicate = torch.distributed.tensor.Replicate()
            placements = [replicate if p.is_partial() else p for p in given]
            cotangent = cotangent.redistribute(ctx.forward_input_device_mesh, placements)
            return cotangent.to_local(), *nothing

    return FromLocal


def _is_awaited(x: Any) -> bool:
    return type(x).__name__ == "AsyncCollectiveTensor"
