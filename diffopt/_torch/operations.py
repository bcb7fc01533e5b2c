"""The names under which one of ATen's operations can be called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

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
