"""Models that are refused, because their meta-gradient would be wrong or missing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from diffopt._model.memory import check_shared_memory
from diffopt._torch.dtensors import can_redistribute_twice, has_plain_placements, is_dtensor

_PLAIN = (Tensor, nn.Parameter)
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


def check_model(model: nn.Module) -> None:
    """Raise ``NotImplementedError`` or ``ValueError`` where ``model`` cannot be unrolled."""
    for name, module in model.named_modules():
        where = f"submodule {name!r}" if name else "the model"
        for reason in _reasons(module):
            raise NotImplementedError(f"{where} {reason}")
        for kind, x in chain(module._parameters.items(), module._buffers.items()):
            if type(x) in _PLAIN and not (x.is_meta or x.is_inference()):
                continue
            if x is not None and is_lazy(x):
                raise ValueError(
                    f"{where} is a {type(module).__name__} whose {kind!r} has no shape yet: call "
                    "the model on a batch first, and build the optimizer afterwards"
                )
            if x is not None and x.device.type == "meta":
                raise ValueError(
                    f"{where} has a {kind!r} on the meta device, which has no values to train: "
                    "call model.to_empty(device=...) and initialise it first"
                )
            if is_dtensor(x):
                _check_dtensor(x, f"{where} has a {kind!r}", buffer=kind in module._buffers)
            if x is not None and x.is_inference():
                raise NotImplementedError(
                    f"{where} has a {kind!r} that was made in torch.inference_mode(), which cannot "
                    "be trained: build the model outside of it"
                )
    check_shared_memory(dict(model.named_parameters()), dict(model.named_buffers()))
    if getattr(parametrize, "_cache_enabled", 0):
        raise NotImplementedError(
            "torch.nn.utils.parametrize.cached() is active, which would keep the parametrized "
            "weights of the first step: enter it inside loss_fn"
        )


def _check_dtensor(x: Any, where: str, *, buffer: bool) -> None:
    if buffer:
        raise NotImplementedError(
            f"{where} that is a DTensor and a buffer, and parameters alone may be sharded: make it "
            "a plain tensor on every process, buffer.full_tensor()"
        )
    if not can_redistribute_twice():
        raise NotImplementedError(
            f"{where} that is a DTensor, whose changes of placement PyTorch {torch.__version__} "
            "cannot differentiate twice: install a version that diffopt was tested with, or shard "
            "the plain module with diffopt.distributed.shard"
        )
    if not has_plain_placements(x):
        raise NotImplementedError(
            f"{where} that is a DTensor placed as {tuple(x.placements)}: pass parameters whose "
            "placements are Shard(dim) and Replicate()"
        )
    if x.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"{where} that is a DTensor on {x.device_mesh}, to which this process does not belong: "
            "call unroll on the processes of the mesh alone"
        )


def _reasons(module: nn.Module) -> Iterator[str]:
    name = type(module).__name__
    if (
        type(module).__module__.startswith("torch.nn.modules.")
        and not module._backward_hooks
        and "scale_grad_by_freq" not in module.__dict__
    ):
        return  # a layer of PyTorch's own, of which there is nothing to be said
    if isinstance(module, nn.DataParallel):
        yield (
            f"is wrapped in {name}, whose replicas would not see the fast weights: pass the "
            "module inside, model.module"
        )
    if isinstance(module, nn.parallel.DistributedDataParallel):
        yield (
            f"is wrapped in {name}, which would not average the inner gradients: pass the module "
            "itself with group=, unroll(module, ..., group=group), or, where tasks are split over "
            "the processes, wrap a module whose forward calls unroll"
        )
    if _SHARDED & {base.__name__ for base in type(module).__mro__}:
        yield (
            "is sharded by FSDP, whose gathering of weights PyTorch cannot differentiate twice: "
            "pass it unsharded, or shard it with diffopt.distributed.shard"
        )
    scripted = isinstance(module, torch.jit.ScriptModule)
    if scripted and any(True for _ in chain(module.parameters(), module.buffers())):
        yield (
            f"is a {name}, which holds its parameters where no others can stand: pass the module "
            "it was scripted from"
        )
    if getattr(module, "max_norm", None) is not None and hasattr(module, "scale_grad_by_freq"):
        yield (
            "changes its weights in place (max_norm): scale its output instead, or divide the "
            "weights by their norms in a parametrization"
        )
    if getattr(module, "scale_grad_by_freq", False):
        yield (
            "scales every gradient that passes it (scale_grad_by_freq), also those of the "
            "meta-gradient: scale the inner gradient in grad_transform"
        )
    if module._backward_hooks and module._is_full_backward_hook is False:
        yield (
            "has a hook of register_backward_hook, which would act on the meta-gradient as well: "
            "use register_full_backward_hook"
        )
