"""Many tasks at once: mapping a function of values and a batch over a leading dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from diffopt._derivatives.routing import Routed
from diffopt._torch import functorch, pytree
from diffopt._torch.operations import Operation, builtins
from diffopt._values.hidden import hidden_tensors

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
    with _by_tasks:
        mapped_tensors = iter(run(dict(params), dict(buffers), mapped))
    rest, out_spec = result
    return pytree.tree_unflatten(
        [next(mapped_tensors) if isinstance(x, Tensor) else x for x in rest], out_spec
    )


def check_leads(tree: Any, tasks: int, what: str) -> None:
    """Raise where a tensor of ``tree`` does not lead with the task dimension."""
    for leaf, _ in hidden_tensors(tree):
        write = "dict(batch)" if isinstance(leaf, Mapping) else "its tensors in a tuple or a dict"
        raise TypeError(
            f"with tasks={tasks} the tensors of every batch are mapped over, but {what} is a "
            f"{type(leaf).__name__} or holds one, in which PyTorch's pytrees see none: pass {write}"
        )
    for x in pytree.tree_leaves(tree):
        if isinstance(x, Tensor) and (x.dim() == 0 or x.shape[0] != tasks):
            raise ValueError(
                f"with tasks={tasks} every tensor leads with {tasks}, one entry a task, but "
                f"{what} has one of shape {tuple(x.shape)}: stack the tasks' tensors, or let the "
                "function capture what they share"
            )


#: Batch normalisation goes task by task from so many numbers on; below, the loop costs more.
_LARGE = 1 << 18


def _by_task(function: Operation, position: int, name: str, least: int = 0) -> Operation:
    """``function``, mapped on the CPU by a loop over the tasks.

    ``torch.vmap`` makes one convolution of many, with the tasks as groups, and one normalisation,
    whose second derivative is PyTorch's: on the CPU each takes several times as long as the tasks
    one after the other.

    Args:
        position, name: of the argument that decides: it has to be mapped over.
        least: how many numbers that argument has to be of.
    """

    def mapped(*args: Any, **kwargs: Any) -> Any:
        level = functorch.only_level()
        if level is None or get_proxy_mode() is not None:  # compiled code would be N times longer
            return function(*args, **kwargs)
        decides = functorch.unwrapped(
            args[position] if len(args) > position else kwargs.get(name), level
        )
        if decides is None or decides[0].device.type != "cpu" or decides[0].numel() < least:
            return function(*args, **kwargs)
        value, dim = decides
        leaves, spec = pytree.tree_flatten((args, kwargs))
        with functorch.outside():
            tasks = zip(*(_parts(leaf, level, value.shape[dim]) for leaf in leaves), strict=True)
            results = []
            for task in tasks:
                own_args, own_kwargs = pytree.tree_unflatten(list(task), spec)
                results.append(function(*own_args, **own_kwargs))
            stacked: Any = _Stacked.apply(*results)  # type: ignore[no-untyped-call]
        return functorch.wrapped(stacked, level)

    return mapped


class _Stacked(torch.autograd.Function):
    """``torch.stack``; the derivative of PyTorch's own fills a whole tensor for each of ``tensors``
    when it is differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.unbind()


def _parts(x: Any, level: int, tasks: int) -> Iterable[Any]:
    """What each task has for an argument."""
    inside = functorch.unwrapped(x, level)
    if inside is None:
        return repeat(x, tasks)
    value, dim = inside
    return value.unbind(dim)


def _rows() -> Iterator[tuple[Operation, Operation]]:
    for kind in ("", "_transpose"):
        for n in (1, 2, 3):
            for operation in builtins(f"conv{kind}{n}d"):
                yield operation, _by_task(operation, 1, "weight")
    yield F.batch_norm, _by_task(F.batch_norm, 0, "input", least=_LARGE)
    for operation in builtins("batch_norm"):
        yield operation, _by_task(operation, 0, "input", least=_LARGE)


#: Operations that go task by task, by their function object.
BY_TASK: dict[Operation, Operation] = dict(_rows())
_by_tasks = Routed(BY_TASK)
