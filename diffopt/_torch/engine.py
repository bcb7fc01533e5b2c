"""Autograd's engine without ``torch.autograd.grad`` around it.

A ``TorchFunctionMode`` is handed a call of ``torch.autograd.grad`` and is off while that runs. So
what hooks and custom Functions do in a backward pass would not be shown to the mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph as _graph

from diffopt._torch.feature import private
from diffopt._torch.modes import unseen

_graph_task = private("torch._C", "_current_graph_task_id", "differentiating twice with group")


def gradient(
    loss: Tensor, inputs: Sequence[Tensor], *, retain_graph: bool, create_graph: bool
) -> Sequence[Tensor | None]:
    """The gradient of a scalar, with the modes that are active here active in the backward pass."""
    with unseen():
        ones = torch.ones_like(loss, memory_format=torch.preserve_format)
    gradients: Sequence[Tensor | None] = _graph._engine_run_backward(
        (loss,), (ones,), retain_graph, create_graph, tuple(inputs), True, accumulate_grad=False
    )
    return gradients


def pulled_back(
    roots: Sequence[Any], cotangents: Sequence[Tensor], inputs: Sequence[Any], *, retain_graph: bool
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad`` of tensors or gradient edges, without its checks of the arguments."""
    results: Sequence[Tensor | None] = _graph._engine_run_backward(
        tuple(roots),
        tuple(cotangents),
        retain_graph,
        False,
        tuple(inputs),
        True,
        accumulate_grad=False,
    )
    return results


def shielded() -> AbstractContextManager[object]:
    """Where hooks of the caller's on saved tensors are not asked: for an unroll's own graphs."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return nullcontext()
    return _graph.saved_tensors_hooks(_same, _same)


def _same(x: Tensor) -> Tensor:
    return x


def keeps_graph() -> bool:
    """Whether the backward pass now running was asked to retain the graph."""
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:  # pragma: no cover - a PyTorch without it: keep, to be safe
        return True


def graph_task() -> int:
    """A number for the backward pass now running; below 0 where there is none."""
    return int(_graph_task())


def at_its_end(call: Callable[[], None]) -> None:
    """Have ``call`` called when the backward pass now running has come to its end, if it does."""
    torch.autograd.Variable._execution_engine.queue_callback(call)
