"""Exchanges between the processes of a group, as functions that can be differentiated twice.

The processes compute a total: of an exchange's result, each process's cotangent is that of the sum
of all processes' outputs. So the adjoint of a sum over the processes is again a sum over them.
Every function here is collective: all processes of the group have to call it, in the same order,
with tensors of one shape and dtype; and so is its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from diffopt._torch.collectives import sum_now

#: A ``torch.distributed`` process group; None for that of all processes.
ProcessGroup = Any


def check_group(group: Any) -> None:
    """Raise where ``group`` is no process group that this process belongs to."""
    if not dist.is_available():
        raise RuntimeError("this PyTorch was built without torch.distributed")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        if group is getattr(dist.GroupMember, "NON_GROUP_MEMBER", object()):
            raise ValueError(
                "this process does not belong to the group that it was given: call with it only "
                "in the processes that were named when the group was made"
            )
        raise TypeError(
            f"group is a {type(group).__name__}: pass a torch.distributed process group, such as "
            "torch.distributed.group.WORLD"
        )
    if not dist.is_initialized():
        raise RuntimeError(
            "no process group was started: call torch.distributed.init_process_group first, in a "
            "script started by torchrun"
        )


def size_of(group: ProcessGroup) -> int:
    """How many processes there are."""
    return dist.get_world_size(group)


def rank_in(group: ProcessGroup) -> int:
    """Which of them this is, from 0."""
    return dist.get_rank(group)


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all processes' ``x``, on each of them; shape and dtype of ``x``."""
    result: Tensor = _Sum.apply(x, group)  # type: ignore[no-untyped-call]
    return result


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return sum_now(x, group)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return summed(cotangent, ctx.group), None


def gathered(part: Tensor, group: ProcessGroup) -> Tensor:
    """The flat parts of all processes, one after the other: shape (n,) to (W·n,).

    What flows back to a part is the *mean* over the processes of what flows to its place, so that
    the gradient of a part, computed once, is that of the mean of the processes' outputs; while a
    tensor that every process holds has its own share of that gradient on each.
    """
    result: Tensor = _Gathered.apply(part, group)  # type: ignore[no-untyped-call]
    return result


def scattered(whole: Tensor, group: ProcessGroup) -> Tensor:
    """This process's part of the mean over the group: shape (W·n,) to (n,)."""
    result: Tensor = _Scattered.apply(whole, group)  # type: ignore[no-untyped-call]
    return result


class _Gathered(torch.autograd.Function):
    """Parts are scaled so: their cotangent is 1/W of that of the processes' total.

    With it, the backward pass of each of this class and of ``_Scattered`` is the other, unscaled.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        whole = part.new_empty(size_of(group), part.numel())
        mine = part.detach().contiguous()
        if part.is_complex():
            dist.all_gather(list(torch.view_as_real(whole)), torch.view_as_real(mine), group=group)
        else:
            dist.all_gather(list(whole), mine, group=group)
        return whole.flatten()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return scattered(cotangent, ctx.group), None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        processes = size_of(group)
        # gloo has no reduce-scatter of every version of PyTorch; a sum of the whole is the same.
        part = sum_now(whole, group).view(processes, -1)[rank_in(group)]
        return part / processes

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return gathered(cotangent, ctx.group), None
