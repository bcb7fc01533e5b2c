"""Resilient backpropagation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from diffopt.optim import lists as L
from diffopt.optim import terms as T
from diffopt.optim.base import Optimizer
from diffopt.optim.lists import Tensors, fit
from diffopt.optim.options import ANY, LR, Range, Value, arguments, within
from diffopt.optim.scalars import Scalar
from diffopt.optim.terms import Entries, Hyper

_ETAS = "eta values", "", True  # as torch.optim's error has it


class Rprop(Optimizer):
    """Resilient backpropagation: ``torch.optim.Rprop``, differentiable.

    With gradient g, the last one p, and the factors η⁻ < 1 < η⁺, elementwise::

        g ← −g                                       (maximize)
        s ← s · (η⁺ where g p > 0, η⁻ where g p < 0, 1 elsewhere), within [s_min, s_max]
        g ← 0 where g p < 0
        θ ← θ − s · sign(g)
        p ← g

    Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning" (ICNN
    1993).

    Only the sign of a gradient counts: the derivative of the parameters in every gradient is 0
    wherever it exists, so nothing flows through the inner losses, and meta-gradients reach the
    initial parameters (as the identity), ``lr``, ``etas`` and ``step_sizes``. Where a gradient or a
    product g p is 0 the step jumps, and the derivative is taken as 0 there, too; where s meets a
    bound, the derivative is the bound's. The sign of a NaN gradient is 0, as in ``torch.optim``.

    State: ``step`` (0-d, on the CPU), ``prev`` p and ``step_size`` s, of the parameter's shape and
    dtype. ``step_size`` is absent before the first step, which starts it at the ``lr`` given to it.

    Cost: about eight passes over the parameters; two copies of the parameters as state.

    Args:
        lr: s before the first step.
        etas: (η⁻, η⁺), each a number, a tensor or a callable.
        step_sizes: (s_min, s_max), likewise.

    Raises:
        ValueError: lr is negative, or not 0 < η⁻ < 1 < η⁺.
    """

    elementwise = True
    ranges = within(
        lr=LR,
        etas=(
            Range("above 0 and below 1", lambda low, high: 0 < low <= high < 1, *_ETAS),
            Range("above 1", lambda low, high: 1 < low <= high < math.inf, *_ETAS),
        ),
        step_sizes=(ANY, ANY),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: Value = 1e-2,
        etas: tuple[Value, Value] = (0.5, 1.2),
        step_sizes: tuple[Value, Value] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(params, arguments(locals()))

    def _init(self, hyper: Hyper, param: Tensor) -> Entries:
        return {"step": T.count(), "prev": T.zeros(param)}

    def _update(
        self, hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
    ) -> tuple[Tensors, list[Entries]]:
        minus, plus = hyper["etas"]
        if hyper["maximize"]:
            grads = L.neg(grads)
        steps, _ = T.advance(states)
        signs = [x.sign() for x in L.mul(grads, T.column(states, "prev", params))]
        factors = [_by_sign(s, fit(minus, s), fit(plus, s)) for s in signs]
        sizes = [
            s["step_size"] if "step_size" in s else T.filled(hyper["lr"], p)
            for s, p in zip(states, params, strict=True)
        ]
        sizes = [_between(x, *hyper["step_sizes"]) for x in L.mul(sizes, factors)]
        grads = [g.masked_fill(s < 0, 0.0) for g, s in zip(grads, signs, strict=True)]
        params = L.addcmul(params, [g.sign() for g in grads], sizes, -1.0)
        return params, T.with_entries(states, {"step": steps, "prev": grads, "step_size": sizes})


def _by_sign(sign: Tensor, minus: Scalar, plus: Scalar) -> Tensor:
    return torch.where(sign > 0, plus, torch.where(sign < 0, minus, torch.ones_like(sign)))


def _between(x: Tensor, low: Scalar, high: Scalar) -> Tensor:
    low, high = fit(low, x), fit(high, x)
    x = torch.maximum(x, low) if isinstance(low, Tensor) else x.clamp(min=low)
    return torch.minimum(x, high) if isinstance(high, Tensor) else x.clamp(max=high)
