"""Options in ``state_dict()`` and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def packed(value: Any) -> Any:
    """An option as a checkpoint holds it: a tensor's value, and None for a callable."""
    if isinstance(value, (tuple, list)):
        return tuple(map(packed, value))
    if isinstance(value, Tensor):
        return value.detach()  # a checkpoint holds values, and no graph can be pickled
    return None if callable(value) else value


def restored(mine: Any, loaded: Any) -> Any:
    """The option that an optimizer has after loading, of what it had and what was loaded."""
    if isinstance(mine, (tuple, list)):
        return tuple(map(restored, mine, loaded))
    if loaded is None or callable(mine):
        return mine
    if isinstance(mine, Tensor) and mine.requires_grad:
        if mine.is_leaf:
            with torch.no_grad():
                mine.copy_(torch.as_tensor(loaded))
        return mine
    return loaded
