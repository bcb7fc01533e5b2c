"""The global settings a step runs under, the same in the first pass and in every recomputation.

The backward pass runs wherever the caller happens to call it: outside the ``autocast`` block that
surrounded the forward pass, in another thread. What influences arithmetic is therefore read once,
at the call, and entered again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Modes:
    """The settings present at construction, and those that second derivatives need."""

    def __init__(self, model: nn.Module, devices: Iterable[torch.device]) -> None:
        kinds = {"cpu", *(device.type for device in devices)} - {"meta"}
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        ]
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Enter them: autocast as it was, and kernels that can be differentiated twice.

        Attention runs on the math kernel, recurrent layers without cuDNN: the others have no
        second derivative. The weight cache of autocast is off, as every step has new weights.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self._recurrent:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind) and kind not in dict(self._autocast):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            yield
