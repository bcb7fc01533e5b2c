"""Gradients of parameters that nobody reads: their graph without their values.

To pull a cotangent back through a step of gradient descent, s' = s − γ g(s), takes the graph of g
and no value of it. Of a layer with the weight W, though, computing the value takes a third of the
work of a gradient: the product of the layer's inputs and their cotangents, by which nothing else
goes on. So it is left out where it goes to W alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from diffopt.second._own import differentiated

#: The multiplications from which on leaving a product out is worth two functions in Python.
WORTHWHILE = 4_000_000


class Unread:
    """One evaluation of a loss, of whose gradient the values are not going to be read.

    They are left out of no other pass than that one: the loss may itself take gradients with
    respect to parameters, and will be differentiated once more.
    """

    def __init__(self) -> None:
        self._task: int | None = None

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Where the loss is evaluated."""
        outer, _current.evaluation = _current.evaluation, self
        try:
            yield
        finally:
            _current.evaluation = outer

    @contextmanager
    def differentiated(self, loss: Tensor) -> Iterator[None]:
        """Where the one pass is made that begins at ``loss``."""
        handle = loss.register_hook(self._begin)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            handle.remove()
            self._task = None

    def _begin(self, cotangent: Tensor) -> None:
        self._task = _task()

    def leaves_out(self, x: Tensor) -> bool:
        """Whether the pass going on is that one, and a gradient of ``x`` in it is a result."""
        return (
            self._task is not None
            and self._task == _task()
            and x.is_leaf
            and not x._backward_hooks
            and not torch.is_anomaly_enabled()
        )


class _Current(threading.local):
    evaluation: Unread | None = None


_current = _Current()
_task = torch._C._current_graph_task_id


def evaluation_unread() -> Unread | None:
    """The evaluation going on, if the gradients' values are not going to be read."""
    return _current.evaluation


def worthwhile(multiplications: float, *operands: Tensor | None) -> bool:
    """Whether a layer is large enough, and for reverse mode alone, to be differentiated here."""
    return (
        multiplications >= WORTHWHILE
        and differentiated(*operands)
        and all(x is None or x.layout is torch.strided for x in operands)
    )


def nothing_like(x: Tensor) -> Tensor:
    """In the place of a gradient of ``x`` that is not read; who reads it nevertheless sees NaN."""
    return x.new_full((), torch.nan).expand_as(x)
