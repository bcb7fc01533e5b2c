"""Whether an optimizer's options are what they were when an unroll began."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: What tells each option of a param group from another value of the option.
_Marks = dict[str, Any]

_NUMBERS = {bool, int, float, type(None)}
_NO_OPTIONS = {"params", "param_names", "initial_lr"}


class UnchangedOptions:
    """The options of optimizers, as they are now.

    An unroll takes the options as they are at the call. A scheduler that is stepped inside of a
    step, or anything else that writes into ``param_groups``, would have no effect, and would write
    again with each step that is computed again.

    Limits: of a callable the object counts, not what it gives. What it gives is compared where a
    step is computed again.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._before = [(opt, _marks(opt)) for opt in optimizers]

    def end(self) -> None:
        """Nothing is to be checked any more: let the optimizers go."""
        self._before = []

    def check(self, step: int) -> None:
        """Raise where an option is another one after ``step``.

        Raises:
            ValueError: naming the optimizer and the option.
        """
        for opt, before in self._before:
            now = _marks(opt)
            if now != before:
                raise ValueError(
                    f"step {step} changes {_changed(before, now)} of {type(opt).__name__}, as a "
                    "scheduler does that is stepped inside of loss_fn or grad_transform: an unroll "
                    "takes the param groups as they are at the call. Give the rates of all steps "
                    "instead, lr=lambda t: rates[t], or lr=diffopt.from_scheduler(...)"
                )


def _marks(opt: torch.optim.Optimizer) -> list[_Marks]:
    return [
        {
            key: value if type(value) in _NUMBERS else _mark(value)
            for key, value in group.items()
            if key not in _NO_OPTIONS
        }
        for group in opt.param_groups
    ]


def _mark(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_mark, value))
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    return value if isinstance(value, (int, float, str)) else id(value)


def _changed(before: Sequence[_Marks], now: Sequence[_Marks]) -> str:
    for i, (a, b) in enumerate(zip(before, now, strict=False)):
        for key in a.keys() | b.keys():
            if a.get(key) != b.get(key):
                return f"{key!r} in param group {i}"
    return "the param groups"
