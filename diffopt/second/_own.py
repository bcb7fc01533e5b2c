"""When an operation may have its derivatives from here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from diffopt.optim.scalars import in_functorch

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.float64)


def differentiated(*operands: Tensor | None) -> bool:
    """Whether reverse mode, and nothing else, is to differentiate an operation on ``operands``.

    Elsewhere (batched, with tangents, under autocast, in low precision, on subclasses of tensors)
    PyTorch's own operation is called, which knows how.
    """
    given = [x for x in operands if x is not None]
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in given):
        return False
    first = given[0]
    return (
        all(type(x) in _PLAIN and x.dtype == first.dtype for x in given)
        and first.dtype in _DTYPES
        and first.numel() > 0
        and not in_functorch()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled(first.device.type)
    )


def seen_by_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, shown to the ``TorchFunctionMode`` that is active, as PyTorch's own are."""

    def shown(*args: Any, **kwargs: Any) -> Any:
        if has_torch_function(()):
            return handle_torch_function(function, (), *args, **kwargs)
        return function(*args, **kwargs)

    return shown
