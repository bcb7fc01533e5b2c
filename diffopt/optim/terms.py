"""The terms that several rules share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from diffopt.optim import lists as L
from diffopt.optim.lists import Tensors, fit
from diffopt.optim.options import items_of
from diffopt.optim.scalars import Coefficient, Scalar, as_numbers, is_zero

#: The options of one param group, callables already called.
Hyper = Mapping[str, Any]
#: The state of one parameter.
Entries = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Pullback:
    """The update of one param group, and cotangents of its results to carry back through it.

    ``hyper``, ``params``, ``grads`` and ``states`` are the arguments of the update. Entries missing
    from ``cot_states`` stand for zero.
    """

    hyper: Hyper
    params: Tensors
    grads: Tensors
    states: list[Entries]
    cot_params: Tensors
    cot_states: list[Entries]


@dataclass(frozen=True, slots=True)
class Cotangents:
    """What a pullback gives: cotangents of the arguments of the update."""

    params: Tensors
    grads: Tensors
    states: list[Entries]


class Options(dict[str, Any]):
    """The options of one param group at a step, which do not change."""

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors among the options."""
        return _tensors_among(self)


def tensors_of(options: Sequence[Hyper]) -> list[Tensor]:
    """The tensors among the options of all param groups."""
    return [
        x
        for hyper in options
        for x in (hyper.tensors if isinstance(hyper, Options) else _tensors_among(hyper))
    ]


def _tensors_among(hyper: Hyper) -> list[Tensor]:
    items = chain.from_iterable(map(items_of, hyper.values()))
    return [item for item in items if isinstance(item, Tensor)]


def scalar_dtype() -> torch.dtype:
    """The dtype of step counts and other 0-d state, as in ``torch.optim``."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def zeros(param: Tensor) -> Tensor:
    """State of the parameter's own shape, dtype, device and memory format."""
    return torch.zeros_like(param, memory_format=torch.preserve_format)


def count() -> Tensor:
    """A step count of zero, on the CPU, where reading it does not wait for an accelerator."""
    return torch.zeros((), dtype=scalar_dtype(), device="cpu")


def column(states: Sequence[Entries], key: str, params: Tensors) -> Tensors:
    """One entry of every state; zeros where an option has only now brought it into use."""
    return [s[key] if key in s else zeros(p) for s, p in zip(states, params, strict=True)]


def advance(states: Sequence[Entries]) -> tuple[Tensors, Coefficient]:
    """The step counts after this step, as state and as numbers."""
    steps = L.shift([s["step"] for s in states], 1.0)
    return steps, as_numbers(steps)


def with_entries(states: Sequence[Entries], columns: Mapping[str, Tensors]) -> list[Entries]:
    """The states with some entries replaced, and all others kept."""
    return [
        {**s, **dict(zip(columns, row, strict=True))}
        for s, *row in zip(states, *columns.values(), strict=True)
    ]


def stored(value: Scalar, param: Tensor, dtype: torch.dtype) -> Tensor:
    """A number computed by the rule as an entry of the state, on the parameter's device."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=dtype, device=param.device)
    if value.numel() == 1:
        return value.reshape(()).to(param.device, dtype)
    return value.to(param.device, param.dtype)


def filled(value: Scalar, param: Tensor) -> Tensor:
    """State of the parameter's shape that holds ``value``, differentiable in it."""
    return zeros(param) + fit(value, param)


def decayed(hyper: Hyper, params: Tensors, grads: Tensors) -> tuple[Tensors, Tensors]:
    """Parameters and gradients after ``maximize`` and weight decay.

    g ← −g (maximize); then g ← g + λ θ, or θ ← (1 − γ λ) θ where the decay is decoupled.
    """
    if hyper["maximize"]:
        grads = L.neg(grads)
    decay: Scalar = hyper["weight_decay"]
    if is_zero(decay):
        return params, grads
    if hyper.get("decoupled_weight_decay"):
        return L.scale(params, 1 - hyper["lr"] * decay), grads
    return params, L.add(grads, params, decay)


def decayed_vjp(hyper: Hyper, cot_params: Tensors, cot_grads: Tensors) -> tuple[Tensors, Tensors]:
    """Carry cotangents of ``decayed``'s results back to its arguments."""
    decay: float = hyper["weight_decay"]
    if decay and hyper.get("decoupled_weight_decay"):
        cot_params = L.scale(cot_params, 1 - hyper["lr"] * decay)
    elif decay:
        cot_params = L.add(cot_params, cot_grads, decay)
    return cot_params, L.neg(cot_grads) if hyper["maximize"] else cot_grads


def cotangents(cot_states: Sequence[Entries], key: str, params: Tensors) -> Tensors | None:
    """One entry of every state's cotangent, or None where no cotangent has the entry."""
    return column(cot_states, key, params) if any(key in c for c in cot_states) else None


def plus(ys: Tensors | None, xs: Tensors, c: Coefficient = 1.0) -> Tensors:
    """y + c·x, where y may stand for zero. x is given up."""
    if ys is None:
        return xs if isinstance(c, float) and c == 1.0 else L.scale(xs, c, give_up=True)
    return L.add(ys, xs, c, give_up_ys=True)


def average_of_squares(averages: Tensors, grads: Tensors, beta: Scalar) -> Tensors:
    """β v + (1 − β) g²."""
    return L.addcmul(L.scale(averages, beta), grads, grads, 1 - beta, give_up=True)
