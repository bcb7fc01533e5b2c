"""Between a ``DTensor`` and this process's part of it, differentiable any number of times.

A function of ``DTensor``s is one function that all processes of a mesh compute together: of its
result each has the whole, and what flows back is the cotangent of the whole as well, laid out over
the processes as the tensor is. What a process computes from its own part alone counts in the sum
over the processes of the dimensions that the tensor is sharded on.

All functions here are collective: all processes of the mesh call them in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.overrides import TorchFunctionMode

from diffopt._torch.collectives import sum_now
from diffopt._torch.dtensors import is_dtensor, is_imported, local_part


@dataclass(frozen=True)
class Layout:
    """How a tensor lies on the processes.

    Attributes:
        mesh: the ``DeviceMesh`` of the processes.
        placements: by the mesh's dimensions.
        shape, stride: of the whole.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, x: Any) -> Layout:
        """That of a ``DTensor``."""
        return cls(x.device_mesh, tuple(x.placements), x.shape, tuple(x.stride()))

    def fits(self, x: Any) -> bool:
        """Whether a ``DTensor`` can be laid out so."""
        return bool(x.device_mesh == self.mesh and x.shape == self.shape)

    @property
    def over(self) -> Processes | None:
        """The processes that have different parts; None where each has the whole."""
        dims = tuple(i for i, p in enumerate(self.placements) if not p.is_replicate())
        return Processes(self.mesh, dims) if dims else None

    @property
    def replicated(self) -> Layout:
        """The same tensor, whole on every process."""
        from torch.distributed.tensor import Replicate

        return replace(self, placements=(Replicate(),) * len(self.placements))


@dataclass(frozen=True)
class Processes:
    """Those of a mesh that lie along some of its dimensions."""

    mesh: Any
    dims: tuple[int, ...]

    @property
    def groups(self) -> list[Any]:
        """The process group of each dimension."""
        return [self.mesh.get_group(dim) for dim in self.dims]

    @property
    def size(self) -> int:
        """How many there are."""
        return math.prod(self.mesh.size(dim) for dim in self.dims)


def stand(part: Tensor, layout: Layout) -> Tensor:
    """The ``DTensor`` of which this process has ``part``."""
    result: Tensor = _Stand.apply(part, layout)  # type: ignore[no-untyped-call]
    return result


def part_of(x: Any, layout: Layout) -> Tensor:
    """This process's part of a ``DTensor``, as a plain tensor, once it lies as ``layout`` says."""
    if tuple(x.placements) != layout.placements:
        x = x.redistribute(layout.mesh, layout.placements)
    result: Tensor = _Part.apply(x, layout)  # type: ignore[no-untyped-call]
    return result


def whole(x: Any) -> Tensor:
    """A ``DTensor`` as a plain tensor that every process has."""
    return part_of(x, Layout.of(x).replicated)


def unsharded(grads: Iterable[Tensor | None], tensors: Iterable[Tensor]) -> list[Tensor | None]:
    """What flows to ``tensors``, as plain tensors to plain ones.

    Where a plain number is used together with ``DTensor``s, and ``Numbers`` does not see it, a
    ``DTensor`` flows back to it.
    """
    if not is_imported():
        return [*grads]
    return [
        whole(g) if is_dtensor(g) and not is_dtensor(x) else g
        for g, x in zip(grads, tensors, strict=True)
    ]


class Numbers(TorchFunctionMode):
    """Makes a plain number a ``DTensor``, where it is used together with one and requires grad.

    PyTorch does so itself, but below autograd: then a ``DTensor`` flows back to the number, on into
    the graph behind it, and meets plain tensors there.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        recorded = torch.is_grad_enabled()
        mesh = _mesh_among((args, tuple(kwargs.values()))) if recorded else None
        if mesh is not None:
            args = _beside(args, mesh)
            kwargs = {key: _beside(x, mesh) for key, x in kwargs.items()}
        return func(*args, **kwargs)


def _mesh_among(values: Iterable[Any]) -> Any:
    """The mesh of the first ``DTensor`` in nested lists and tuples; None if there is none."""
    for x in values:
        if type(x) in (tuple, list):
            found = _mesh_among(x)
            if found is not None:
                return found
        elif is_dtensor(x):
            return x.device_mesh
    return None


def _beside(x: Any, mesh: Any) -> Any:
    if type(x) in (tuple, list):
        return type(x)(_beside(y, mesh) for y in x)
    if not isinstance(x, Tensor) or is_dtensor(x) or not x.requires_grad or x.numel() != 1:
        return x
    return stand(x, Layout(mesh, (None,) * mesh.ndim, x.shape, tuple(x.stride())).replicated)


class _Stand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, layout: Layout) -> Tensor:
        from torch.distributed.tensor import DTensor

        ctx.layout = layout
        ctx.set_materialize_grads(False)
        return DTensor.from_local(
            part.view_as(part),
            layout.mesh,
            layout.placements,
            shape=layout.shape,
            stride=layout.stride,
        )

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        return None if cotangent is None else part_of(cotangent, ctx.layout), None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, layout: Layout) -> Tensor:
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        part = local_part(x)
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> Any:
        if cotangent is None:
            return None, None
        return stand(whole(cotangent) if is_dtensor(cotangent) else cotangent, ctx.layout), None


def spread(x: Tensor, over: Processes) -> Tensor:
    """``x``, which every process has, to be used with its own part of a tensor.

    What flows back is the sum over the processes.
    """
    result: Tensor = _Spread.apply(x, over)  # type: ignore[no-untyped-call]
    return result


def total(x: Tensor, over: Processes) -> Tensor:
    """The sum over the processes of what each computed from its own part: a function of all."""
    result: Tensor = _Total.apply(x, over)  # type: ignore[no-untyped-call]
    return result


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, over: Processes) -> Tensor:
        ctx.over = over
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return total(cotangent, ctx.over), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, over: Processes) -> Tensor:
        ctx.over = over
        for group in over.groups:
            x = sum_now(x, group)
        return x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return spread(cotangent, ctx.over), None


def holds_several(mesh: Any, group: Any) -> bool:
    """Whether several processes of ``group`` are in ``mesh``, that of one ``DTensor``."""
    ranks = {*mesh.mesh.flatten().tolist()}
    return len(ranks.intersection(dist.get_process_group_ranks(group))) > 1


def maximum(number: int, groups: Sequence[Any], device: torch.device) -> int:
    """The greatest of the numbers that the processes of all groups have."""
    x = torch.tensor(number, dtype=torch.int64, device=device)
    for group in groups:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return int(x)
