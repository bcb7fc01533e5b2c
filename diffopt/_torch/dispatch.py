"""A mode that sees the operations that run once autograd has taken its part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffopt._torch.feature import optional, private

_MODULE, _NAME = "torch.utils._python_dispatch", "TorchDispatchMode"

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
else:
    TorchDispatchMode = optional(_MODULE, _NAME)
    if TorchDispatchMode is None:

        class TorchDispatchMode:
            """Cannot be made."""

            __init__ = private(_MODULE, _NAME, "measuring what a step takes")
