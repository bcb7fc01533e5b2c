"""Averaged stochastic gradient descent."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from diffopt.optim import lists as L
from diffopt.optim import terms as T
from diffopt.optim.base import Optimizer
from diffopt.optim.lists import Tensors
from diffopt.optim.options import ANY, LR, WEIGHT_DECAY, Value, arguments, within
from diffopt.optim.scalars import Coefficient, as_numbers, at, at_least_one, each_of
from diffopt.optim.terms import Entries, Hyper


class ASGD(Optimizer):
    """Averaged stochastic gradient descent: ``torch.optim.ASGD``, differentiable.

    With gradient g, learning rate γ, decay λ, power α and start of averaging t₀, at step
    t = 1, 2, ...::

        g ← −g                    (maximize)
        g ← g + weight_decay θ
        θ ← (1 − λ η) θ − η g
        a ← a + μ (θ − a)
        η ← γ / (1 + λ γ t)^α
        μ ← 1 / max(1, t − t₀)

    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (SIAM J. Control
    Optim. 1992). The derivative in t₀ is that of μ: 0 while t − t₀ ≤ 1. A learning rate serves the
    step after the one it is given at, as η; the first step takes the one given to it.

    State: ``step``, ``eta`` η and ``mu`` μ (0-d), ``ax`` a, of the parameter's shape and dtype; all
    on the parameter's device. ``eta`` is absent before the first step. An elementwise ``lr``,
    ``lambd`` or ``alpha`` makes ``eta`` elementwise, too, and ``t0`` ``mu``.

    Cost: about five passes over the parameters; one copy of them as state.

    Args:
        lr: γ.
        lambd: λ.
        alpha: α.
        t0: t₀.
        weight_decay: factor of θ added to the gradient.

    Raises:
        ValueError: lr or weight_decay is negative.
    """

    elementwise = True
    ranges = within(lr=LR, weight_decay=WEIGHT_DECAY, lambd=ANY, alpha=ANY, t0=ANY)

    def __init__(
        self,
        params: ParamsT,
        lr: Value = 1e-2,
        lambd: Value = 1e-4,
        alpha: Value = 0.75,
        t0: Value = 1e6,
        weight_decay: Value = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(params, arguments(locals()))

    def _init(self, hyper: Hyper, param: Tensor) -> Entries:
        return {
            "step": T.count().to(param.device),
            "mu": T.stored(1.0, param, T.scalar_dtype()),
            "ax": T.zeros(param),
        }

    def _update(
        self, hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
    ) -> tuple[Tensors, list[Entries]]:
        lr, lambd, alpha, t0 = hyper["lr"], hyper["lambd"], hyper["alpha"], hyper["t0"]
        params, grads = T.decayed(hyper, params, grads)
        steps, t = T.advance(states)
        etas = [
            s["eta"] if "eta" in s else T.stored(lr, p, s["mu"].dtype)
            for s, p in zip(states, params, strict=True)
        ]
        eta = as_numbers(etas)
        mu = as_numbers([s["mu"] for s in states])
        params = L.scale(params, at(eta, lambda eta: 1 - lambd * eta))
        params = L.add(params, grads, at(eta, lambda eta: -eta))
        averages = L.lerp(T.column(states, "ax", params), params, mu)
        new_eta = at(t, lambda t: lr / (1 + lambd * lr * t) ** alpha)
        new_mu = at(t, lambda t: 1 / at_least_one(t - t0))
        new = {
            "step": steps,
            "eta": _entries(new_eta, params, states),
            "mu": _entries(new_mu, params, states),
            "ax": averages,
        }
        return params, T.with_entries(states, new)


def _entries(value: Coefficient, params: Tensors, states: list[Entries]) -> Tensors:
    values = each_of(value, len(params))
    return [T.stored(v, p, s["mu"].dtype) for v, p, s in zip(values, params, states, strict=True)]
