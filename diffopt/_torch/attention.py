"""Which ways of computing attention are allowed, for the whole process."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffopt._torch.feature import optional

#: The ways that ``sdpa_kernel`` knows, in PyTorch 2.13.
_KNOWN = ("cudnn", "flash", "mem_efficient", "math", "overrideable")
_READ: list[Any] = [optional("torch._C", f"_get_{name}_sdp_enabled") for name in _KNOWN]
_SET: list[Any] = [optional("torch._C", f"_set_sdp_use_{name}") for name in _KNOWN]
_ARE_KNOWN = {*getattr(attention, "_backend_names", ())} == {*_KNOWN} and None not in _READ + _SET


class _OnlyMath:
    """``sdpa_kernel(SDPBackend.MATH)``, in a tenth of the time."""

    def __enter__(self) -> None:
        self._before = [read() for read in _READ]
        for name, allow in zip(_KNOWN, _SET, strict=True):
            allow(name == "math")

    def __exit__(self, *exception: object) -> None:
        for allow, before in zip(_SET, self._before, strict=True):
            allow(before)


def only_math() -> AbstractContextManager[Any]:
    """Where attention is computed by separate operations alone."""
    return _OnlyMath() if _ARE_KNOWN else sdpa_kernel(SDPBackend.MATH)
