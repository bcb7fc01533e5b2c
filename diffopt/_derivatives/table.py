"""Second derivatives, of which an unroll takes one in every step.

Those that PyTorch does not have or has wrong (``missing``), and those that it has but puts
together from many operations, derived by hand here instead (``gelu``, ``batch_norm``,
``layer_norm``): much of a step's time goes there. Values and first derivatives come from PyTorch's
own kernels, and are the same to the last bit.
"""

from __future__ import annotations

import torch.nn.functional as F

from diffopt._derivatives.batch_norm import batch_norm, instance_norm
from diffopt._derivatives.gelu import gelu
from diffopt._derivatives.layer_norm import layer_norm
from diffopt._derivatives.missing import CALLED_FROM, WRONG, WRONG_BEYOND, refuse_missing
from diffopt._derivatives.own import beyond_second_derivatives, is_beyond_second
from diffopt._torch.replaced import Shared, replaced

#: Where these operations have their derivatives from here.
with_second_derivatives = Shared(
    lambda: replaced(
        *CALLED_FROM,
        (F, "gelu", gelu),
        (F, "batch_norm", batch_norm),
        (F, "instance_norm", instance_norm),
        (F, "layer_norm", layer_norm),
    )
)

__all__ = [
    "WRONG",
    "WRONG_BEYOND",
    "beyond_second_derivatives",
    "is_beyond_second",
    "refuse_missing",
    "with_second_derivatives",
]
