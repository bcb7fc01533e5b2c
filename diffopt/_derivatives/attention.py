"""Attention, by the one of PyTorch's ways to compute it that has a second derivative."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffopt._torch.attention import only_math
from diffopt._torch.replaced import Shared

_attention: Any = F.scaled_dot_product_attention

#: Where attention is computed by separate operations, in the whole process.
math_attention = Shared(only_math)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``.

    A model may choose ways of its own by ``sdpa_kernel([...])``, inside of ``math_attention``. If
    the model allows ``MATH``, attention is computed so. If not, PyTorch says that there is no
    second derivative.
    """
    enabled: Any = torch.backends.cuda
    others = (
        enabled.flash_sdp_enabled()
        or enabled.mem_efficient_sdp_enabled()
        or enabled.cudnn_sdp_enabled()
    )
    if others and enabled.math_sdp_enabled():
        with only_math():
            return _attention(query, key, value, *args, **kwargs)  # type: ignore[no-any-return]
    return _attention(query, key, value, *args, **kwargs)  # type: ignore[no-any-return]
