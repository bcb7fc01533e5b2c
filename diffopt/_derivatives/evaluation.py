"""A loss that is evaluated for the graph of its gradient, as the layers in it know.

To pull a cotangent back through a step of gradient descent, s' = s − γ g(s), takes no value of g.
But to compute that of a layer's weight takes a third of the work of the gradient, the product of
the layer's inputs and their cotangents, by which nothing else goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Evaluation:
    """A loss that is evaluated, its gradient, which is taken once, and the graphs of both.

    Attributes:
        unread: whether the values of the gradient are not going to be read. They are left out of
            that one pass alone: the loss may itself take gradients with respect to parameters, and
            will be differentiated once more.
    """

    def __init__(self) -> None:
        self.unread = False
        self._task: int | None = None

    @contextmanager
    def of_loss(self) -> Iterator[None]:
        """Where the loss is evaluated."""
        outer, _current.evaluation = _current.evaluation, self
        try:
            yield
        finally:
            _current.evaluation = outer

    @contextmanager
    def of_gradient(self, loss: Tensor) -> Iterator[None]:
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
        """Whether the pass going on is that one, and a gradient of ``x`` in it is not read."""
        return (
            self.unread
            and self._task is not None
            and self._task == _task()
            and x.is_leaf
            and not x._backward_hooks
            and not torch.is_anomaly_enabled()
        )


class _Current(threading.local):
    evaluation: Evaluation | None = None


_current = _Current()
_task = torch._C._current_graph_task_id
_saved_tensors_hooks: Callable[[bool], Any] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)


def current_evaluation() -> Evaluation | None:
    """The evaluation going on, where its layers may know of it.

    What is checkpointed may not: it is computed again later, and as it was the first time.
    """
    if _saved_tensors_hooks is None or _current.evaluation is None:
        return None
    return None if _saved_tensors_hooks(False) is not None else _current.evaluation


def wanted(ctx: Any, count: int) -> list[bool]:
    """Of which inputs of a ``Function`` the pass going on needs the cotangents.

    ``needs_input_grad`` only tells whether any pass could; PyTorch's own nodes know more, and so do
    the first ``count`` inputs, all tensors, here.
    """
    needed: list[bool] = list(ctx.needs_input_grad)
    for i, (node, _) in enumerate(ctx.next_functions[:count]):
        needed[i] = needed[i] and _goes_on(node)
    return needed


def _goes_on(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf whose cotangent is a result
        return True


def nothing_like(x: Tensor) -> Tensor:
    """In the place of a gradient of ``x`` that is not read; who reads it nevertheless sees NaN."""
    return x.new_full((), torch.nan).expand_as(x)
