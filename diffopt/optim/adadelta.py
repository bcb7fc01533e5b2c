"""Adadelta."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from diffopt.optim import lists as L
from diffopt.optim import terms as T
from diffopt.optim.base import Optimizer
from diffopt.optim.lists import Tensors
from diffopt.optim.options import EPS, LR, WEIGHT_DECAY, Value, arguments, up_to_1, within
from diffopt.optim.terms import Entries, Hyper


class Adadelta(Optimizer):
    """Adadelta: ``torch.optim.Adadelta``, differentiable.

    With gradient g, learning rate γ, smoothing ρ and weight decay λ::

        g ← −g                    (maximize)
        g ← g + λ θ
        v ← ρ v + (1 − ρ) g²
        d = √(u + ε) / √(v + ε) · g
        u ← ρ u + (1 − ρ) d²
        θ ← θ − γ d

    Zeiler, "ADADELTA: an adaptive learning rate method" (2012). The derivative exists everywhere
    (with ε > 0).

    State: ``step`` (0-d, on the CPU), ``square_avg`` v and ``acc_delta`` u, of the parameter's
    shape and dtype.

    Cost: about ten passes over the parameters; two copies of the parameters as state.

    Args:
        lr: γ.
        rho: ρ.
        eps: ε.
        weight_decay: λ.

    Raises:
        ValueError: a number is negative, or rho above 1.
    """

    elementwise = True
    ranges = within(lr=LR, rho=up_to_1("rho value"), eps=EPS, weight_decay=WEIGHT_DECAY)

    def __init__(
        self,
        params: ParamsT,
        lr: Value = 1.0,
        rho: Value = 0.9,
        eps: Value = 1e-6,
        weight_decay: Value = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(params, arguments(locals()))

    def _init(self, hyper: Hyper, param: Tensor) -> Entries:
        return {"step": T.count(), "square_avg": T.zeros(param), "acc_delta": T.zeros(param)}

    def _update(
        self, hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
    ) -> tuple[Tensors, list[Entries]]:
        rho, eps = hyper["rho"], hyper["eps"]
        params, grads = T.decayed(hyper, params, grads)
        steps, _ = T.advance(states)
        v = T.average_of_squares(T.column(states, "square_avg", params), grads, rho)
        u = T.column(states, "acc_delta", params)
        ratio = L.div(L.sqrt(L.shift(u, eps)), L.sqrt(L.shift(v, eps)))
        deltas = L.mul(ratio, grads)
        new = {"step": steps, "square_avg": v, "acc_delta": T.average_of_squares(u, deltas, rho)}
        return L.add(params, deltas, -hyper["lr"]), T.with_entries(states, new)
