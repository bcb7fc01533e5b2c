"""The one table of optimizers and options that every property test runs over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt.optim


@dataclass(frozen=True)
class Case:
    """An optimizer with its options, as ``diffopt`` and as ``torch.optim`` make it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        words = [key if value is True else f"{key}={value}" for key, value in self.options.items()]
        return "-".join([self.name, *words]).replace(" ", "")

    def ours(self, params: Iterable[Any], **more: Any) -> diffopt.optim.Optimizer:
        opt: diffopt.optim.Optimizer = getattr(diffopt.optim, self.name)(
            params, **{**self.options, **more}
        )
        return opt

    def theirs(self, params: Iterable[Any], **more: Any) -> torch.optim.Optimizer:
        if self.name == "Momentum":
            return torch.optim.SGD(params, **{"momentum": 0.9, **self.options, **more})
        opt: torch.optim.Optimizer = getattr(torch.optim, self.name)(
            params, **{**self.options, **more}
        )
        return opt


_TABLE: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "nesterov": True},
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.2, "weight_decay": 0.2, "maximize": True},
        {"lr": 0.1, "weight_decay": 0.2},
    ],
    "Momentum": [{"lr": 0.05}],
    "Adam": [
        {"lr": 0.1},
        {"lr": 0.1, "betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.2},
        {"lr": 0.1, "amsgrad": True, "betas": (0.8, 0.7)},
        {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True},
    ],
    "AdamW": [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.3, "amsgrad": True, "maximize": True},
    ],
    "RMSprop": [
        {"lr": 0.1},
        {"lr": 0.1, "alpha": 0.7, "eps": 1e-3, "weight_decay": 0.2},
        {"lr": 0.1, "alpha": 0.7, "momentum": 0.8, "maximize": True},
        {"lr": 0.1, "alpha": 0.7, "centered": True},
        {"lr": 0.1, "alpha": 0.7, "centered": True, "momentum": 0.5, "weight_decay": 0.1},
    ],
    "Adadelta": [
        {},
        {"lr": 0.5, "rho": 0.7, "eps": 1e-2, "weight_decay": 0.2, "maximize": True},
    ],
    "Adagrad": [
        {"lr": 0.1},
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.2, "maximize": True},
        {"lr": 0.1, "initial_accumulator_value": 0.3, "eps": 1e-3},
    ],
    "Adamax": [
        {"lr": 0.1},
        {"lr": 0.1, "betas": (0.7, 0.8), "eps": 1e-2, "weight_decay": 0.2, "maximize": True},
    ],
    "ASGD": [
        {"lr": 0.1},
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 2.5, "weight_decay": 0.2},
        {"lr": 0.2, "t0": 1.0, "maximize": True},
    ],
    "Rprop": [
        {"lr": 0.1},
        {"lr": 0.1, "etas": (0.4, 1.5), "step_sizes": (0.05, 0.3), "maximize": True},
    ],
    "NAdam": [
        {"lr": 0.1},
        {"lr": 0.1, "betas": (0.7, 0.8), "weight_decay": 0.2, "momentum_decay": 0.3},
        {"lr": 0.1, "weight_decay": 0.2, "decoupled_weight_decay": True, "maximize": True},
    ],
    "RAdam": [
        {"lr": 0.1},
        {"lr": 0.1, "betas": (0.7, 0.8), "eps": 1e-3, "weight_decay": 0.2},
        {"lr": 0.1, "weight_decay": 0.2, "decoupled_weight_decay": True, "maximize": True},
        {"lr": 0.1, "betas": (0.9, 0.6)},
    ],
}

CASES = [Case(name, options) for name, table in _TABLE.items() for options in table]
OPTIMIZERS = {case.name: case for case in CASES}

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_optimizer = pytest.mark.parametrize("case", OPTIMIZERS.values(), ids=OPTIMIZERS)
# PyTorch's forward mode compiles its decompositions with torch.jit.script, and warns of it.

Named = dict[str, Tensor]


class Lars(diffopt.Optimizer):
    """θ ← θ − γ ‖θ‖ / (‖g‖ + 10⁻³) g (You et al., 2017): a norm for each parameter."""

    def __init__(self, params: Any, lr: Any = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    def _init(self, hyper: Any, param: Tensor) -> Any:
        return {}

    def _update(self, hyper: Any, params: Any, grads: Any, states: Any) -> Any:
        moved = [
            p - hyper["lr"] * (p * p).sum().sqrt() / ((g * g).sum().sqrt() + 1e-3) * g
            for p, g in zip(params, grads, strict=True)
        ]
        return moved, states


def some_params(dtype: torch.dtype = torch.float64) -> Named:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (3,), "b": (2, 3), "c": ()}
    return {n: torch.randn(s, dtype=dtype, generator=generator) for n, s in shapes.items()}


def grads_at(t: int, params: Named) -> Named:
    generator = torch.Generator().manual_seed(10 + t)
    return {
        n: 0.5 * p.detach() + torch.randn(p.shape, dtype=p.dtype, generator=generator)
        for n, p in params.items()
    }


def step_in_place(opt: torch.optim.Optimizer, params: Named, times: range) -> None:
    for t in times:
        for (_, p), grad in zip(params.items(), grads_at(t, params).values(), strict=True):
            p.grad = grad
        opt.step()


def step_purely(
    opt: diffopt.optim.Optimizer, params: Named, state: Any, times: range
) -> tuple[Named, diffopt.optim.base.OptState]:
    for t in times:
        params, state = opt.update(params, grads_at(t, params), state, step=t)
    return params, state


def assert_same(actual: Any, expected: Any, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
