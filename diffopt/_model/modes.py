"""The global settings a step runs under, the same in the first pass and in every recomputation.

The backward pass runs wherever the caller happens to call it: outside the ``autocast`` block that
surrounded the forward pass, in another thread. What influences arithmetic is therefore read once,
at the call, and entered again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from diffopt._derivatives.table import math_attention, with_second_derivatives
from diffopt._torch.modes import default_device
from diffopt._torch.replaced import Shared, replaced


class Modes:
    """The settings present at construction, and the settings that second derivatives need."""

    def __init__(self, model: nn.Module, devices: Iterable[torch.device]) -> None:
        kinds = {"cpu", *(device.type for device in devices)} - {"meta"}
        self._autocast = {
            kind: torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        }
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        # Where that is imported, the loss may call something compiled as well.
        self._compiled = "torch._dynamo" in sys.modules or any(map(_is_compiled, model.modules()))
        self._dtype = torch.get_default_dtype()
        self._device = default_device()

    @property
    def autocast_dtypes(self) -> set[torch.dtype]:
        """The dtypes that operations are cast to."""
        return {dtype for dtype in self._autocast.values() if dtype is not None}

    @contextmanager
    def active(self, *, routed: bool) -> Iterator[None]:
        """Enter the settings: autocast as it was, and kernels that can be differentiated twice.

        Args:
            routed: False where another mode calls the replacements of operations, or none is used.

        Attention runs on the math kernel, recurrent layers without cuDNN, compiled modules
        uncompiled: otherwise there is no second derivative. The weight cache of autocast is off,
        as every step has new weights.
        """
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():  # whose tensors know no gradient, even of a step
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())  # leaving that mode alone would switch it on
            stack.enter_context(math_attention)
            if routed:
                stack.enter_context(with_second_derivatives)
            if self._compiled and hasattr(torch.compiler, "set_stance"):
                stack.enter_context(_uncompiled)
            if self._recurrent:
                stack.enter_context(_without_cudnn)
            stack.enter_context(_default_dtype(self._dtype))
            if default_device() != self._device:
                stack.enter_context(self._device)
            for kind, dtype in self._autocast.items():
                if dtype is not None:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
                elif torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    if before == dtype:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_uncompiled = Shared(lambda: torch.compiler.set_stance("force_eager"))
_without_cudnn = Shared(lambda: replaced((torch.backends.cudnn, "enabled", False)))
