"""Adamax."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from diffopt.optim import lists as L
from diffopt.optim import terms as T
from diffopt.optim.base import Optimizer
from diffopt.optim.lists import Tensors
from diffopt.optim.options import BETAS, EPS, LR, WEIGHT_DECAY, Value, arguments, within
from diffopt.optim.scalars import at
from diffopt.optim.terms import Entries, Hyper


class Adamax(Optimizer):
    """Adam with the infinity norm: ``torch.optim.Adamax``, differentiable.

    With gradient g, learning rate γ, decay rates β₁, β₂ and weight decay λ, at step t = 1, 2, ...::

        g ← −g                    (maximize)
        g ← g + λ θ
        m ← β₁ m + (1 − β₁) g
        u ← max(β₂ u, |g| + ε)
        θ ← θ − γ / (1 − β₁ᵗ) · m / u

    Kingma and Ba, "Adam: a method for stochastic optimization" (ICLR 2015), section 7.

    The norm has kinks: the derivative of |g| at g = 0 is taken as 0, and where the two arguments of
    max are equal each gets half. The larger one gets all of it, so u, and with it the scale of the
    step, has derivative 0 in every gradient but the largest recent one.

    State: ``step`` (0-d, on the CPU), ``exp_avg`` m and ``exp_inf`` u, of the parameter's shape and
    dtype.

    Cost: about six passes over the parameters; two copies of the parameters as state.

    Args:
        lr: γ.
        betas: (β₁, β₂), each a number, a tensor or a callable.
        eps: ε.
        weight_decay: λ.

    Raises:
        ValueError: a number is negative, or a beta not below 1.
    """

    elementwise = True
    ranges = within(lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)

    def __init__(
        self,
        params: ParamsT,
        lr: Value = 2e-3,
        betas: tuple[Value, Value] = (0.9, 0.999),
        eps: Value = 1e-8,
        weight_decay: Value = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(params, arguments(locals()))

    def _init(self, hyper: Hyper, param: Tensor) -> Entries:
        return {"step": T.count(), "exp_avg": T.zeros(param), "exp_inf": T.zeros(param)}

    def _update(
        self, hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
    ) -> tuple[Tensors, list[Entries]]:
        lr, (beta1, beta2) = hyper["lr"], hyper["betas"]
        params, grads = T.decayed(hyper, params, grads)
        steps, t = T.advance(states)
        m = L.lerp(T.column(states, "exp_avg", params), grads, 1 - beta1)
        old = L.scale(T.column(states, "exp_inf", params), beta2)
        u = L.maximum(old, L.shift(L.magnitude(grads), hyper["eps"]))
        params = L.addcdiv(params, m, u, at(t, lambda t: -lr / (1 - beta1**t)))
        return params, T.with_entries(states, {"step": steps, "exp_avg": m, "exp_inf": u})
