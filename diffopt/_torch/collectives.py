"""Collectives below autograd.

Those that write in place are no operations to autograd, whose graph goes on as before.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from diffopt._torch.dispatch import TorchDispatchMode
from diffopt._torch.pytree import tree_leaves


def sum_now(x: Tensor, group: Any) -> Tensor:
    """The sum over a process group, without a graph, in memory of its own."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    real = torch.view_as_real(total) if total.is_complex() else total
    torch.distributed.all_reduce(real, group=group)
    return total


class _NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d" and any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves(args)
        ):
            name = func.__name__.partition(".")[0]
            raise NotImplementedError(
                f"a collective that writes in place ({name}) was given a tensor that requires "
                "grad, and autograd does not see it, so that the meta-gradient would be wrong: use "
                "diffopt.distributed.mean(x, group), or torch.distributed.nn.functional, which are "
                "differentiable; or detach what is only logged"
            )
        return func(*args, **(kwargs or {}))


def no_collectives() -> AbstractContextManager[object]:
    """Where a collective in place on a tensor that requires grad is an error."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return _NoCollectives()  # type: ignore[no-untyped-call]
    return nullcontext()
