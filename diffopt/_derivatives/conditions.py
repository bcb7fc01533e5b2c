"""When an operation has its derivatives from here, and when it is written out."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffopt._torch.autograd import in_forward_mode
from diffopt._torch.functorch import in_derivative, in_functorch

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.float64)


class _Orders(threading.local):
    beyond_second = False


_orders = _Orders()


def is_beyond_second() -> bool:
    """Whether this is inside ``beyond_second_derivatives(True)``."""
    return _orders.beyond_second


@contextmanager
def beyond_second_derivatives(wanted: bool) -> Iterator[None]:
    """Where what is evaluated may be differentiated three times and more, if ``wanted``."""
    before = _orders.beyond_second
    _orders.beyond_second = wanted
    try:
        yield
    finally:
        _orders.beyond_second = before


def to_be_written_out() -> bool:
    """Whether to write an operation out in others where ``differentiated`` is false.

    PyTorch's own normalisations (2.13) have wrong third derivatives. A loss that takes a
    derivative itself, with ``torch.func``, is differentiated twice beyond that.
    """
    return torch.is_grad_enabled() and (_orders.beyond_second or in_derivative())


def differentiated(*operands: Tensor | None) -> bool:
    """Whether reverse mode, and nothing else, is to differentiate an operation on ``operands``.

    Elsewhere (batched, with tangents, under autocast, in low precision, on subclasses of tensors)
    PyTorch's own operation is called, which knows how.
    """
    tensors = [x for x in operands if x is not None]
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        return False
    first = tensors[0]
    return (
        all(x.dtype == first.dtype for x in tensors)
        and first.dtype in _DTYPES
        and not _autocast(first)
        and reversed_only(tensors)
    )


def reversed_only(operands: Sequence[Tensor]) -> bool:
    """Whether gradients are recorded of plain tensors, and no transform and no tangent is there."""
    return (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in operands)
        and all(type(x) in _PLAIN for x in operands)
        and operands[0].numel() > 0
        and not in_functorch()
        and not in_forward_mode()
    )


def normalised(
    x: Tensor, dims: list[int], eps: float, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """(x − μ) / √(σ² + ε) · weight + bias, in single precision at least, as PyTorch computes it."""
    wide = x if x.dtype in _DTYPES else x.float()
    centred = wide - wide.mean(dims, keepdim=True)
    y: Tensor = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y if _autocast(x) else y.to(x.dtype)


def _autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
