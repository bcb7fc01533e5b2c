"""Carry tangents along with the steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt import schedule
from diffopt._derivatives.table import with_second_derivatives
from diffopt._loop.loop import Loop
from diffopt._loop.replay import differentiable_backward
from diffopt._step.graph import first_behind
from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path, add, is_differentiable
from diffopt.adjoint._base import Adjoint, refuse_way_back
from diffopt.adjoint._tangents import Tangents, stands_for
from diffopt.schedule import Plan, check_kind


@dataclass(frozen=True, eq=False, repr=False)
class ForwardMode(Adjoint):
    """Exact derivatives with respect to a few numbers, in memory that does not depend on T.

    The forward pass carries, beside the state, its derivative along each element of ``wrt``; the
    backward pass multiplies these with what flows back to the result (Franceschi, Donini, Frasconi
    and Pontil, "Forward and reverse gradient-based hyperparameter optimization", ICML 2017). A
    step's tangent comes from forward mode over the reverse mode of the inner gradient, and where an
    operation has no forward derivative, from differentiating the step in reverse twice.

    Gradients are delivered to ``wrt`` alone: nothing else gets one. A tensor in ``wrt`` that no
    step uses gets zeros.

    Args:
        wrt: tensors that require grad: hyperparameters, anything that the loss uses, initial
            parameters. Each as the steps use it: of ``lr = log_lr.exp()``, computed before the
            call, ``lr``; of ``lr=lambda t: log_lr.exp()``, ``log_lr``.

    Raises:
        TypeError: ``wrt`` is not made of tensors.
        ValueError: a tensor does not require grad, or has an influence through another tensor
            computed before the call; or ``max_cotangent_norm`` or ``monitor`` is given.
        NotImplementedError: a tensor is a parameter in bfloat16 or float16.

    Cost: for n elements n tangents, each as large as the state; each step is evaluated n + 1 times,
    the n at about three times the price. Differentiating the result again runs all steps once more
    and holds T states.
    """

    wrt: Sequence[Tensor]

    def __init__(self, wrt: Iterable[Tensor]) -> None:
        if isinstance(wrt, Tensor) or not isinstance(wrt, Iterable):
            raise TypeError(f"wrt is a {type(wrt).__name__}: pass a list of tensors, wrt=[...]")
        tensors = list({id(x): x for x in wrt}.values())
        for i, x in enumerate(tensors):
            check_kind(f"wrt[{i}]", x, Tensor, "pass a list of tensors")
            if not x.requires_grad or not is_differentiable(x):
                raise ValueError(
                    f"wrt[{i}], of shape {tuple(x.shape)}, does not require grad, so there is no "
                    "gradient to deliver: pass tensors with requires_grad=True"
                )
        object.__setattr__(self, "wrt", tuple(tensors))

    def __repr__(self) -> str:
        return f"ForwardMode(wrt=<{len(self.wrt)} tensors, {self._elements} elements>)"

    @property
    def _elements(self) -> int:
        return sum(x.numel() for x in self.wrt)

    def plan(self, steps: int) -> Plan:
        """One way, with a tangent for each element at the price of a step stored and reversed."""
        return schedule.one_way(steps, more_work=3.0 * steps * self._elements)

    def forward(self, loop: Loop) -> tuple[State, Any]:
        refuse_way_back(self, loop)
        loop.captured.include(self.wrt)
        generators = loop.generators.get()
        tangents = Tangents(loop, self.wrt)
        state = loop.start
        for t in range(loop.steps):
            before = loop.generators.get()
            following = loop.first(state, t)
            after = loop.generators.get()
            with with_second_derivatives:  # these evaluations are not observed
                tangents.push(state, t, before)
            loop.generators.set(after)
            state = following
        self._check_no_detours(loop)
        return state, _Carried(generators, tangents)

    def _check_no_detours(self, loop: Loop) -> None:
        for x in (*loop.captured.tensors, *loop.inputs.values()):
            i = first_behind(x, self.wrt)
            if i is None or stands_for(x, self.wrt[i], loop.tasks):
                continue
            if self.wrt[i].dtype in (torch.bfloat16, torch.float16):
                raise NotImplementedError(
                    f"wrt[{i}] is in {self.wrt[i].dtype}, and of parameters in low "
                    "precision the unroll trains copies in float32: convert the model to float32 "
                    "for ForwardMode, or use another adjoint"
                )
            raise ValueError(
                f"wrt[{i}] has an influence through a tensor of shape {tuple(x.shape)} "
                "that was computed from it before the call: pass that one in wrt, or let the "
                "steps compute it, such as by lr=lambda t: log_lr.exp()"
            )

    def backward(
        self,
        loop: Loop,
        kept: _Carried,
        cotangent: Cotangent,
        outputs: OutputCotangents,
        *,
        keep: bool,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        return {}, self._delivered(loop, kept.tangents.product(cotangent, outputs))

    def differentiable_backward(
        self,
        loop: Loop,
        kept: _Carried,
        start: Mapping[Path, Tensor],
        captured: Sequence[Tensor],
        cotangent: Cotangent,
        outputs: OutputCotangents,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        of_start, of_captured = differentiable_backward(
            loop, kept.generators, start, captured, cotangent, outputs
        )
        totals = []
        for w, index in zip(self.wrt, loop.captured.include(self.wrt), strict=True):
            total = of_captured[index]
            for path, x in loop.inputs.items():
                if stands_for(x, w, loop.tasks):
                    c = of_start.get(path)
                    total = add(total, c if c is None or c.shape == w.shape else c.sum(0))
            totals.append(torch.zeros_like(w) if total is None else total)
        return {}, self._delivered(loop, totals)

    def _delivered(self, loop: Loop, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        delivered: list[Tensor | None] = [None] * len(loop.captured.tensors)
        for index, g in zip(loop.captured.include(self.wrt), gradients, strict=True):
            delivered[index] = g
        return delivered


@dataclass(frozen=True)
class _Carried:
    """The generators' states before the first step, and the tangents of the results."""

    generators: tuple[Tensor, ...]
    tangents: Tangents
