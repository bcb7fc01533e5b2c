"""The names under which ATen's operations can be called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt._torch.feature import optional

Operation = Callable[..., Any]

#: Where ``torch`` and ``torch.nn.functional`` have their operations from.
_HOLDERS = ("_VariableFunctions", "_nn")


def builtins(name: str) -> Iterator[Operation]:
    """The functions in C++ that ``torch`` and ``torch.nn.functional`` export as ``name``."""
    for holder in _HOLDERS:
        function = getattr(getattr(torch._C, holder, None), name, None)
        if function is not None:
            yield function


def overloads(name: str) -> Iterator[Operation]:
    """``torch.ops.aten.<name>``, and its overloads that write into no tensor of the caller's."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is not None:
        yield packet
        for overload in packet.overloads():
            if not overload.endswith("out"):
                yield getattr(packet, overload)


_flatten = optional("torch._C._nn", "flatten_dense_tensors")


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """The entries of dense tensors of one dtype, one after the other, in one dimension."""
    if _flatten is None:
        return torch.cat([x.reshape(-1) for x in tensors])
    found: Tensor = _flatten(tensors)
    return found


_fused_adam = optional("torch", "_fused_adam_")
_fused_adamw = optional("torch", "_fused_adamw_")


def fused_adam(decoupled_weight_decay: bool) -> Any:
    """The kernel of Adam, or of AdamW, which writes into what it is given; None without one."""
    return _fused_adamw if decoupled_weight_decay else _fused_adam
