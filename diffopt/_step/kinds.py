"""What an observer has to know of the functions of PyTorch that a step calls."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffopt._derivatives.table import REPLACEMENTS
from diffopt._torch.modes import opened


class Kind:
    """What an observer has to know of a function.

    Attributes:
        inspects: whether it only says something about a tensor, such as its shape.
        writes: whether it may change its first argument in place, going by its name.
        replacement: what has the right derivatives, where it has not; see ``_derivatives``.
        opened: a function in Python, without its handing itself over to a mode.
    """

    __slots__ = ("inspects", "opened", "replacement", "writes")

    def __init__(self, function: Any) -> None:
        name = getattr(function, "__name__", "")
        attribute = getattr(function, "__self__", None)
        self.inspects = name in _INSPECTING or (name == "__get__" and attribute not in _VIEWS)
        self.writes = (
            (name.endswith("_") and not name.startswith("__") and name not in _HARMLESS)
            or name in ("__setitem__", "__setstate__")
            or (name == "__set__" and attribute is Tensor.data)
        )
        self.replacement = REPLACEMENTS.get(function)
        opens = type(function) is FunctionType and function not in _OF_ONE
        self.opened = opened(function) if opens else None


def kind_of(function: Any) -> Kind:
    """What there is to know of ``function``, looked at once."""
    kind = _KINDS.get(function)
    if kind is None:
        kind = _KINDS[function] = Kind(function)
    return kind


_VIEWS = [Tensor.data, Tensor.grad, Tensor.T, Tensor.mT, Tensor.H, Tensor.mH, Tensor.real]
_VIEWS += [Tensor.imag]
_INSPECTING = {"dim", "ndimension", "size", "numel", "nelement", "stride", "is_contiguous"}
_INSPECTING |= {"element_size", "storage_offset", "data_ptr", "get_device", "is_floating_point"}
_INSPECTING |= {"is_complex", "is_signed", "is_inference", "__len__", "__hash__", "has_names"}
_INSPECTING |= {"untyped_storage", "is_pinned", "is_shared", "_is_view", "is_same_size"}
#: The types of arguments in which nothing is to be seen.
PLAIN = {type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device}
_HARMLESS = {"requires_grad_", "detach_"}
#: Functions in Python of which nothing has to be seen but what they are given and what they give.
_OF_ONE: set[Any] = {
    F.cross_entropy,
    F.nll_loss,
    F.mse_loss,
    F.l1_loss,
    F.binary_cross_entropy_with_logits,
}
_OF_ONE |= {F.softmax, F.log_softmax}
_KINDS: dict[Any, Kind] = {}
