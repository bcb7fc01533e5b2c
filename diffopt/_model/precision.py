"""Parameters of low precision: the model computes in low precision, the loop in float32.

A bfloat16 number has 8 significant bits: a cotangent that gathers T small terms in bfloat16 loses
most of the terms. Adam's second moment underflows in float16. So the state holds a parameter of
either dtype as the same number in float32, and the optimizer's state and all cotangents are
float32. The loss sees the parameter in its own dtype, and every update is rounded to this dtype, as
by ``torch.optim``; the derivative takes the rounding for the identity.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffopt._values.state import State

#: The dtypes of low precision.
LOW = (torch.bfloat16, torch.float16)


class Precision:
    """Which parameters are of low precision.

    Args:
        params: the model's own, by name.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self._low = {name: x.dtype for name, x in params.items() if x.dtype in LOW}

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of low precision that parameters have."""
        return set(self._low.values())

    def widened(self, state: State) -> State:
        """The same state as the loop holds it."""
        if not self._low:
            return state
        tensors = state.tensors().items()
        low = ((p, x) for p, x in tensors if p[0] != "buffers" and p[1] in self._low)
        return state.replace({path: x.float() for path, x in low if x.dtype in LOW})

    def narrowed(self, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The parameters as the model has them."""
        if not self._low:
            return params
        return {name: x.to(self._low.get(name, x.dtype)) for name, x in params.items()}

    def rounded(
        self, params: dict[str, Tensor], grads: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """Updated parameters with values that the model can have, and the derivative they had.

        Args:
            grads: every parameter that was updated has one.
        """
        for name, dtype in self._low.items():
            if grads.get(name) is None:
                continue
            x = params[name]
            exact = x.detach()
            params[name] = x + (exact.to(dtype).to(x.dtype) - exact)
        return params
