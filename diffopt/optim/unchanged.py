"""Whether an optimizer's options are what they were when an unroll began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class UnchangedOptions:
    """The options of optimizers, as they are now.

    An unroll takes them as they are at the call. A scheduler that is stepped inside of a step, or
    anything else that writes into ``param_groups``, would have no effect, and would do so again
    with each step that is computed again.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self._before = [_options(opt) for opt in optimizers]
        self._objects = self._present()
        self._tensors = [x for x in self._items() if isinstance(x, Tensor)]
        self._versions = _versions(self._tensors)

    def _present(self) -> list[Any]:
        return [
            value
            for opt in self._optimizers
            for group in opt.param_groups
            for key, value in group.items()
            if key not in _NO_OPTIONS
        ]

    def _items(self) -> list[Any]:
        pairs = [x if isinstance(x, (tuple, list)) else (x,) for x in self._objects]
        return [item for pair in pairs for item in pair]

    def end(self) -> None:
        """Nothing is to be checked any more: let the optimizers go."""
        self._optimizers, self._before = [], []
        self._objects, self._tensors, self._versions = [], [], _versions([])

    def check(self, step: int) -> None:
        """Raise where an option is another one after ``step``.

        Raises:
            ValueError: naming the optimizer and the option.
        """
        now = self._present()
        same = len(now) == len(self._objects) and all(map(_is_same, now, self._objects))
        if same and _versions(self._tensors) == self._versions:
            return
        for opt, before in zip(self._optimizers, self._before, strict=True):
            now = _options(opt)
            if now != before:
                raise ValueError(
                    f"step {step} changes {_changed(before, now)} of {type(opt).__name__}, as a "
                    "scheduler does that is stepped inside of loss_fn or grad_transform: an unroll "
                    "takes the param groups as they are at the call. Give the rates of all steps "
                    "instead, lr=lambda t: rates[t], or lr=diffopt.from_scheduler(...)"
                )


def _options(opt: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {key: _comparable(value) for key, value in group.items() if key not in _NO_OPTIONS}
        for group in opt.param_groups
    ]


def _is_same(a: Any, b: Any) -> bool:
    return a is b and type(a) is not list  # whose entries may be others now


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if x.is_inference() else x._version for x in tensors]


_NO_OPTIONS = {"params", "param_names", "initial_lr"}


def _comparable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, (tuple, list)):
        return tuple(map(_comparable, value))
    return value if isinstance(value, (int, float, str)) else id(value)


def _changed(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    for i, (a, b) in enumerate(zip(before, now, strict=False)):
        for key in a.keys() | b.keys():
            if a.get(key) != b.get(key):
                return f"{key!r} in param group {i}"
    return "the param groups"
