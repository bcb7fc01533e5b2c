"""Second derivatives, of which an unroll takes one in every step.

Those that PyTorch does not have or has wrong (``_missing``), and those that it has but puts
together from many operations, derived by hand here instead (``_gelu``, ``_batch_norm``,
``_layer_norm``): much of a step's time goes there. Values and first derivatives come from PyTorch's
own kernels, and are the same to the last bit. ``_linear`` can leave out what nobody reads
(``_evaluation``).
"""

from __future__ import annotations

import torch.nn.functional as F

from diffopt._replaced import Shared, replaced
from diffopt.second._batch_norm import batch_norm, instance_norm
from diffopt.second._evaluation import Evaluation
from diffopt.second._gelu import gelu
from diffopt.second._layer_norm import layer_norm
from diffopt.second._linear import linear
from diffopt.second._missing import CALLED_FROM, WRONG, WRONG_BEYOND, refuse_missing
from diffopt.second._own import beyond_second_derivatives, is_beyond_second

#: Where these operations have their derivatives from here.
with_second_derivatives = Shared(
    lambda: replaced(
        *CALLED_FROM,
        (F, "gelu", gelu),
        (F, "batch_norm", batch_norm),
        (F, "instance_norm", instance_norm),
        (F, "layer_norm", layer_norm),
        (F, "linear", linear),
    )
)

__all__ = [
    "WRONG",
    "WRONG_BEYOND",
    "Evaluation",
    "beyond_second_derivatives",
    "is_beyond_second",
    "refuse_missing",
    "with_second_derivatives",
]
