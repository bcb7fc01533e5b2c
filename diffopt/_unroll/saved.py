"""An unroll's result written into a module and an optimizer, and into a state dict and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffopt.optim import load_state_into
from diffopt.optim.convert import all_of
from diffopt.schedule import check_kind

if TYPE_CHECKING:
    from diffopt._unroll.unrolled import Unrolled

_KEYS = {"params", "buffers", "opt_state", "losses", "step"}


def write_into(fast: Unrolled, model: Any, opt: Any) -> None:
    """``Unrolled.load_into``."""
    _check_kinds(model, opt)
    targets: list[tuple[Tensor, Tensor]] = []
    owned = dict(model.named_parameters())
    for kind, ours, theirs in (
        ("parameter", fast.params, owned),
        ("buffer", fast.buffers, {**owned, **dict(model.named_buffers())}),
    ):
        for name, x in ours.items():
            if name not in theirs:
                raise ValueError(f"load_into: the model has no {kind} {name!r}")
            if theirs[name].shape != x.shape:
                raise ValueError(
                    f"load_into: {kind} {name!r} has shape {tuple(x.shape)} here and "
                    f"{tuple(theirs[name].shape)} in the model"
                )
            targets.append((theirs[name], x))
    if opt is not None:
        of_opt = {p for o in all_of(opt) for group in o.param_groups for p in group["params"]}
        trained = fast._slots.inner.keys()  # the rest was carried on for a later unroll
        for name in fast.opt_state:
            if owned[name] not in of_opt and name in trained:
                raise ValueError(
                    f"load_into: opt does not hold the model's parameter {name!r}: build it "
                    "over the parameters of that model"
                )
        states = {owned[name]: x for name, x in fast.opt_state.items() if owned[name] in of_opt}
        load_state_into(opt, states, steps=fast.step)
    with torch.no_grad():
        for target, x in targets:
            if target is not x:
                target.copy_(x)


def _check_kinds(model: Any, opt: Any) -> None:
    if not issubclass(type(model), nn.Module):  # isinstance holds for a part of a result, too
        kind = type(model).__name__ + (" of an Unrolled" if isinstance(model, nn.Module) else "")
        raise TypeError(
            f"load_into: model is a {kind}: pass the torch.nn.Module that the "
            "values are to be written into, such as the one that was unrolled"
        )
    advice = "pass a torch.optim or diffopt optimizer over the model's parameters, or leave it out"
    for each in () if opt is None else all_of(opt):
        check_kind("load_into: opt", each, torch.optim.Optimizer, advice)


def state_dict(fast: Unrolled) -> dict[str, Any]:
    """``Unrolled.state_dict``."""
    cut = fast.detach()
    return {
        "params": cut.params,
        "buffers": cut.buffers,
        "opt_state": cut.opt_state,
        "losses": cut.losses,
        "step": cut.step,
        "generators": dict(cut._generators),
    }


def load_state_dict(fast: Unrolled, loaded: Any) -> None:
    """``Unrolled.load_state_dict``."""
    if not isinstance(loaded, Mapping):
        raise TypeError(
            f"load_state_dict: got a {type(loaded).__name__}: pass what Unrolled.state_dict() gave"
        )
    if set(loaded) - {"generators"} != _KEYS:  # written before there were generators in it
        raise ValueError(
            f"load_state_dict: keys are {sorted(loaded)}, expected {sorted(_KEYS)}, with or "
            "without 'generators', as Unrolled.state_dict() gives them"
        )
    fitted = {key: _fitted(key, getattr(fast, key), loaded[key]) for key in ("params", "buffers")}
    opt_state = loaded["opt_state"]
    if set(opt_state) != set(fast.opt_state):
        raise ValueError(
            f"load_state_dict: optimizer state is for {sorted(opt_state)}, here for "
            f"{sorted(fast.opt_state)}"
        )
    for name, entries in opt_state.items():
        for key, x in entries.items():  # an optimizer may have more of them after a first step
            here = fast.opt_state[name].get(key, x)
            _check_shape(f"{key} of {name!r}", here, x)
    generators = dict(loaded.get("generators", {}))
    set_generators(generators)  # before the rest, as it may refuse
    fast._generators = generators
    fast.params, fast.buffers = fitted["params"], fitted["buffers"]
    fast.opt_state = {
        name: {key: _beside(key, x, fast.params[name]) for key, x in entries.items()}
        for name, entries in opt_state.items()
    }
    fast.losses = _like(loaded["losses"], fast.losses)
    fast.step = int(loaded["step"])
    fast.aux = []


def _fitted(
    key: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if set(ours) != set(theirs):
        raise ValueError(
            f"load_state_dict: {key} differ by {sorted(set(ours) ^ set(theirs))}: load "
            "into an Unrolled of the same model and optimizer"
        )
    for name, x in theirs.items():
        _check_shape(repr(name), ours[name], x)
    return {name: _like(x, ours[name]) for name, x in theirs.items()}


def _check_shape(what: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise ValueError(
            f"load_state_dict: {what} has shape {tuple(ours.shape)} here and "
            f"{tuple(theirs.shape)} in the state dict"
        )


def _like(x: Tensor, other: Tensor) -> Tensor:
    return x.detach().to(device=other.device, dtype=other.dtype, copy=True)


def _beside(key: str, x: Tensor, param: Tensor) -> Tensor:
    """Optimizer state lives with its parameter, the step count on the CPU."""
    device = x.device if key == "step" else param.device
    return x.detach().to(device=device, copy=True)


# PyTorch's own generators.


def generators_now(devices: Iterable[torch.device]) -> dict[str, Tensor]:
    """The states of the generators of the CPU and of the devices, as byte tensors on the CPU."""
    states = {"cpu": torch.get_rng_state()}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            index, module = device.index or 0, torch.get_device_module(device.type)
            if hasattr(module, "get_rng_state"):
                states[f"{device.type}:{index}"] = module.get_rng_state(index)
    return states


def set_generators(states: Mapping[str, Tensor]) -> None:
    """Put the generators into these states; skip the devices that this machine lacks."""
    for name, state in states.items():
        device = torch.device(name)
        if device.type == "cpu":
            torch.set_rng_state(state.cpu())
            continue
        module = torch.get_device_module(device.type)
        if module.is_available() and (device.index or 0) < module.device_count():
            module.set_rng_state(state.cpu(), device.index or 0)
