"""Many tasks at once: mapping a function of values and a batch over a leading dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

Values = Mapping[str, Tensor]


def over_tasks(
    function: Callable[[Values, Values, Any], Any], params: Values, buffers: Values, tree: Any
) -> Any:
    """``function(params, buffers, tree)`` for every task, by ``torch.vmap``.

    All tensors lead with the task dimension, also those in the pytrees ``tree`` and in the result.
    Anything else in them is the same for all tasks. Each task draws its own random numbers.
    """
    leaves, spec = pytree.tree_flatten(tree)
    result: list[Any] = []

    def one(params: Values, buffers: Values, tensors: list[Tensor]) -> list[Tensor]:
        given = iter(tensors)
        own = [next(given) if isinstance(x, Tensor) else x for x in leaves]
        result[:] = pytree.tree_flatten(function(params, buffers, pytree.tree_unflatten(own, spec)))
        return [x for x in result[0] if isinstance(x, Tensor)]

    mapped = [x for x in leaves if isinstance(x, Tensor)]
    run = torch.vmap(one, randomness="different")
    found = iter(run(dict(params), dict(buffers), mapped))
    rest, out_spec = result
    return pytree.tree_unflatten(
        [next(found) if isinstance(x, Tensor) else x for x in rest], out_spec
    )


def check_leads(tree: Any, tasks: int, what: str) -> None:
    """Raise where a tensor of ``tree`` does not lead with the task dimension."""
    for x in pytree.tree_leaves(tree):
        if isinstance(x, Tensor) and (x.dim() == 0 or x.shape[0] != tasks):
            raise ValueError(
                f"with tasks={tasks} every tensor leads with {tasks}, one entry a task, but "
                f"{what} has one of shape {tuple(x.shape)}: stack the tasks' tensors, or let the "
                "function capture what they share"
            )
