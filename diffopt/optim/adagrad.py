"""Adagrad."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from diffopt.optim import lists as L
from diffopt.optim import terms as T
from diffopt.optim.base import Optimizer
from diffopt.optim.lists import Tensors
from diffopt.optim.options import EPS, LR, WEIGHT_DECAY, Value, arguments, at_least_0, within
from diffopt.optim.scalars import at
from diffopt.optim.terms import Entries, Hyper


class Adagrad(Optimizer):
    """Adagrad: ``torch.optim.Adagrad``, differentiable.

    With gradient g, learning rate γ, its decay η and weight decay λ, at step t = 1, 2, ...::

        g ← −g                    (maximize)
        g ← g + λ θ
        v ← v + g²
        θ ← θ − γ / (1 + (t − 1) η) · g / (√v + ε)

    Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and stochastic
    optimization" (JMLR 2011). The derivative of √v at v = 0 is taken as 0, the limit of its product
    with g, so that a weight which never had a gradient has a finite derivative (with ε > 0).

    State: ``step`` (0-d, on the CPU) and ``sum`` v, of the parameter's shape and dtype. ``sum``
    starts at ``initial_accumulator_value``, and is where that option's derivative flows.

    Cost: about four passes over the parameters; one copy of the parameters as state.

    Args:
        lr: γ.
        lr_decay: η.
        weight_decay: λ.
        initial_accumulator_value: v before the first step.
        eps: ε.

    Raises:
        ValueError: a number is negative.
    """

    elementwise = True
    ranges = within(
        lr=LR,
        lr_decay=at_least_0("lr_decay value"),
        weight_decay=WEIGHT_DECAY,
        initial_accumulator_value=at_least_0("initial_accumulator_value value"),
        eps=EPS,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: Value = 1e-2,
        lr_decay: Value = 0,
        weight_decay: Value = 0,
        initial_accumulator_value: Value = 0,
        eps: Value = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))

    def _init(self, hyper: Hyper, param: Tensor) -> Entries:
        return {"step": T.count(), "sum": T.filled(hyper["initial_accumulator_value"], param)}

    def _update(
        self, hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
    ) -> tuple[Tensors, list[Entries]]:
        lr, decay = hyper["lr"], hyper["lr_decay"]
        params, grads = T.decayed(hyper, params, grads)
        steps, t = T.advance(states)
        v = L.addcmul(T.column(states, "sum", params), grads, grads)
        scale = L.shift(L.sqrt(v), hyper["eps"])
        params = L.addcdiv(params, grads, scale, at(t, lambda t: -lr / (1 + (t - 1) * decay)))
        return params, T.with_entries(states, {"step": steps, "sum": v})
