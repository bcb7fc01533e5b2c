"""Several processes: averages over a group that are exact to differentiate, and sharded weights.

``torch.distributed`` does the work; start it as ever, by ``torchrun`` and
``torch.distributed.init_process_group``. Every function here is collective: all processes of the
group have to call it, in the same order.

The convention of gradients: each process calls ``backward()`` on its own outer loss, and what it
then has in ``.grad`` is its own part. The mean over the group, ``mean_grads``, is the exact
gradient of the mean of the outer losses. A part that ``shard`` keeps on one process alone has that
gradient already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.utils import parametrize

from diffopt._derivatives.sharded import Layout, holds_several, part_of, stand
from diffopt._step.collectives import (
    ProcessGroup,
    check_group,
    gathered,
    rank_in,
    size_of,
    summed,
)
from diffopt._torch.collectives import sum_now
from diffopt._torch.dtensors import is_dtensor, stored
from diffopt.schedule import check_kind

__all__ = ["mean", "mean_grads", "shard"]


def mean(x: Tensor, group: ProcessGroup = None) -> Tensor:
    """The mean of all processes' ``x``, on each of them; differentiable any number of times.

    For use inside losses, where an in-place ``all_reduce`` would give silently wrong gradients.

    Args:
        x: a tensor of one shape and dtype on all processes, floating point or complex.
        group: a process group; None for all processes.

    Raises:
        TypeError: ``x`` is no such tensor, or ``group`` no process group.
        RuntimeError: no process group was started.

    Cost: one exchange of ``x``, and one more in each backward pass through it, in which every
    process has to take part.
    """
    check_group(group)
    check_kind("x", x, Tensor, "pass a tensor")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"x is of dtype {x.dtype}, which has no mean: convert it with x.float()")
    return summed(x, group) / size_of(group)


def mean_grads(
    tensors: Iterable[Tensor], group: ProcessGroup = None, weight: float | None = None
) -> None:
    """Replace the ``.grad`` of each of ``tensors`` by its mean over the group.

    All of one device and dtype go in one exchange. A ``.grad`` that is None counts as zero, and
    stays None where it is so on all processes. Of a ``DTensor``, this process's part is averaged.
    Tensors kept by ``shard`` are left alone: every process has another part of them, and its
    gradient is whole.

    Args:
        tensors: as many on every process, in the same order, of the same shapes and dtypes.
        group: a process group; None for all processes.
        weight: this process's part in the mean, such as how many tasks or examples it has. The
            mean is Σ weight·grad / Σ weight. None: all count the same.

    Raises:
        TypeError: something that is no tensor, or a weight that is no number.
        ValueError: on every process, the tensors of one differ in number, shape, dtype or layout
            from those of another, a ``weight`` is negative or not finite, or all are zero.
        RuntimeError: no process group was started.

    Cost: a small exchange to compare, then one of the gradients' size.

    Examples:
        >>> import torch, diffopt
        >>> from torch.distributed import HashStore, destroy_process_group, init_process_group
        >>> init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        >>> w = torch.ones(2, requires_grad=True)
        >>> w.square().sum().backward()
        >>> diffopt.distributed.mean_grads([w])
        >>> w.grad
        tensor([2., 2.])
        >>> destroy_process_group()
    """
    check_group(group)
    tensors, wrong = list(tensors), ""
    for i, x in enumerate(tensors):
        check_kind(f"tensor {i}", x, Tensor, "pass tensors")
    averaged = [x for x in tensors if not _is_part(x)]
    if weight is not None:
        check_kind("weight", weight, (int, float), "pass a number")
        if not 0 <= weight < math.inf:
            wrong = f"weight={weight}: pass a finite number that is not negative"
    for i, x in enumerate(averaged):
        if is_dtensor(x) and holds_several(Layout.of(x).mesh, group):
            wrong = (
                f"tensor {i}, a DTensor of which the processes of group hold different parts: pass "
                "the group of another dimension of the mesh; its gradient is whole already"
            )
        if x.grad is not None and x.grad.layout != torch.strided:
            wrong = f"tensor {i} has a .grad of layout {x.grad.layout}: make it dense first"
    weights = _compared(averaged, 1.0 if weight is None else float(weight), wrong, group)
    share = weights[rank_in(group)] / sum(weights)
    for kind in dict.fromkeys((x.device, x.dtype) for x in averaged):
        _average([x for x in averaged if (x.device, x.dtype) == kind], share, group)


def _compared(tensors: list[Tensor], weight: float, wrong: str, group: ProcessGroup) -> list[float]:
    """The weights of all processes, which then have equal lists of tensors."""
    forms = [f"{tuple(x.shape)}, {x.dtype}" for x in tensors]
    all_: list[Any] = [None] * size_of(group)
    dist.all_gather_object(all_, (forms, weight, wrong), group=group)
    for rank, (others, _, what) in enumerate(all_):
        if what:
            raise ValueError(what if what == wrong else f"process {rank} has {what}")
        if len(others) != len(all_[0][0]):
            raise ValueError(
                f"process 0 has {len(all_[0][0])} tensors and process {rank} {len(others)}: pass "
                "the same ones, in the same order, on every process"
            )
        for i, (a, b) in enumerate(zip(all_[0][0], others, strict=True)):
            if a != b:
                raise ValueError(
                    f"tensor {i} is ({a}) on process 0 and ({b}) on process {rank}: pass the same "
                    "ones, in the same order, on every process"
                )
    weights = [found[1] for found in all_]
    if not sum(weights):
        raise ValueError("weight=0 on every process: pass a number above 0 on one at least")
    return weights


def _average(tensors: list[Tensor], share: float, group: ProcessGroup) -> None:
    """Average the gradients of tensors of one device and dtype, in one exchange."""
    with torch.no_grad():
        held = [None if x.grad is None else _own_part(x.grad, x) for x in tensors]
        like = [stored(x) for x in tensors]  # of a DTensor, this process's part
        present = like[0].new_tensor([float(g is not None) for g in held])
        parts = [
            x.new_zeros(x.numel()) if g is None or not share else g.flatten() * share
            for x, g in zip(like, held, strict=True)
        ]
        flat = sum_now(torch.cat([present, *parts]), group)
        anywhere = flat[: len(tensors)].real.tolist()
        rest = torch.split(flat[len(tensors) :], [x.numel() for x in like])
        for x, part, found, g in zip(tensors, like, anywhere, rest, strict=True):
            if found:
                mean = g.view_as(part).clone()
                x.grad = stand(mean, Layout.of(x)) if is_dtensor(x) else mean


def _own_part(grad: Tensor, x: Tensor) -> Tensor:
    return part_of(grad, Layout.of(x)) if is_dtensor(x) else grad


class Part(nn.Module):
    """The parametrization of a sharded weight: this process's part to the whole.

    Args:
        shape: of the whole.
        group: the processes that hold the parts.
    """

    def __init__(self, shape: torch.Size, group: ProcessGroup) -> None:
        super().__init__()
        self._shape, self._group = shape, group
        self._length = -(-shape.numel() // size_of(group))

    def forward(self, part: Tensor) -> Tensor:
        return gathered(part, self._group)[: self._shape.numel()].view(self._shape)

    def right_inverse(self, whole: Tensor) -> Tensor:
        flat = whole.detach().flatten()
        start = rank_in(self._group) * self._length
        part = flat.new_zeros(self._length)
        mine = flat[start : start + self._length]
        part[: len(mine)] = mine
        return part


def shard(model: nn.Module, group: ProcessGroup = None) -> nn.Module:
    """Let each process hold 1/W of every parameter of ``model``, in place.

    A parametrization gathers a weight from all processes whenever the module uses it, and what
    flows back is averaged over them, both differentiably. So the optimizer's state, the snapshots
    of an unroll and what is carried back are 1/W, too; a weight is whole only while a step's graph
    holds it. Build the optimizer afterwards. The loss of each process is of its own share of a
    batch, and the steps follow the gradient of the *mean* of these losses, so call ``unroll``
    without a ``group``; the outer gradients, ``.grad`` of the parts, are those of the mean of the
    outer losses, and need no ``mean_grads``.

    The rule of the optimizer has to act element by element, as SGD's, Adam's and RMSprop's do; a
    ``grad_transform`` or ``max_cotangent_norm`` sees this process's part alone.

    Args:
        model: any module; its parameters are taken from the group's first process, and are named
            ``parametrizations.weight.original`` afterwards. Its buffers stay as they are.
        group: a process group; None for all processes.

    Returns:
        ``model``. ``torch.nn.utils.parametrize.remove_parametrizations`` on every process makes a
        weight whole again.

    Raises:
        TypeError: ``model`` is no module.
        NotImplementedError: a parameter has several places, which could not stay one, or is a
            ``DTensor``.
        ValueError: it was sharded before.
        RuntimeError: no process group was started.

    Cost: an exchange of each weight where a step uses it, and as large a one on each way back.
    """
    check_group(group)
    check_kind("model", model, nn.Module, "pass a torch.nn.Module")
    places: dict[Tensor, list[tuple[nn.Module, str, str]]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Part):
            raise ValueError(f"{prefix!r}: the model is sharded already")
        for key, x in module._parameters.items():
            if x is not None:
                places.setdefault(x, []).append((module, key, f"{prefix}.{key}".lstrip(".")))
    for x, several in places.items():
        if is_dtensor(x):
            raise NotImplementedError(
                f"{several[0][2]!r} is a DTensor, of which each process may hold a part already: "
                "shard a plain module, or unroll this one as it is"
            )
        if len(several) > 1:
            names = " and ".join(repr(name) for _, _, name in several)
            raise NotImplementedError(
                f"{names} are one parameter, which a parametrization of each would make two: have "
                "the forward pass use one of them in both places"
            )
    first = dist.get_global_rank(group, 0) if group is not None else 0
    for x, [(module, key, _)] in places.items():
        with torch.no_grad():
            whole = x.detach().clone(memory_format=torch.contiguous_format)
            flat = torch.view_as_real(whole) if whole.is_complex() else whole
            dist.broadcast(flat, first, group=group)
            x.data.copy_(whole)
        part = Part(x.shape, group)
        parametrize.register_parametrization(module, key, part, unsafe=True)
        held: Any = module.parametrizations
        original = held[key].original
        original.requires_grad_(x.requires_grad)
        original._diffopt_part = True
    return model


def _is_part(x: Tensor) -> bool:
    return getattr(x, "_diffopt_part", False)
