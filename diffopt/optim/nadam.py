"""Adam with Nesterov momentum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from diffopt.optim import lists as L
from diffopt.optim import terms as T
from diffopt.optim.adam import Adam, init_moments, moments
from diffopt.optim.base import Optimizer
from diffopt.optim.lists import Tensors
from diffopt.optim.options import Value, arguments, at_least_0, within
from diffopt.optim.scalars import Scalar, as_numbers, at, each_of
from diffopt.optim.terms import Entries, Hyper


class NAdam(Optimizer):
    """Adam with Nesterov momentum: ``torch.optim.NAdam``, differentiable.

    With gradient g, learning rate γ, decay rates β₁, β₂, momentum decay ψ and weight decay λ, at
    step t = 1, 2, ...::

        g ← −g                               (maximize)
        g ← g + λ θ   or   θ ← (1 − γ λ) θ   (decoupled_weight_decay)
        μₜ = β₁ (1 − 0.96^(t ψ) / 2)
        Π ← Π μₜ
        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        n = (1 − μₜ) / (1 − Π) · g + μₜ₊₁ / (1 − Π μₜ₊₁) · m
        θ ← θ − γ n / (√v / √(1 − β₂ᵗ) + ε)

    Dozat, "Incorporating Nesterov momentum into Adam" (ICLR workshop 2016). The derivative of √v
    at v = 0 is taken as 0, as for ``Adam``.

    State: ``step`` and ``mu_product`` Π (0-d, on the CPU), ``exp_avg`` m and ``exp_avg_sq`` v, of
    the parameter's shape and dtype. An elementwise β₁ or ψ makes ``mu_product`` elementwise, too.

    Cost: about ten passes over the parameters; two copies of the parameters as state.

    Args:
        lr: γ.
        betas: (β₁, β₂), each a number, a tensor or a callable.
        eps: ε.
        weight_decay: λ.
        momentum_decay: ψ.
        decoupled_weight_decay: decay the parameters, not their gradients.

    Raises:
        ValueError: a number is negative, or a beta not below 1.
    """

    elementwise = True
    ranges = within(**Adam.ranges, momentum_decay=at_least_0("momentum_decay value"))

    def __init__(
        self,
        params: ParamsT,
        lr: Value = 2e-3,
        betas: tuple[Value, Value] = (0.9, 0.999),
        eps: Value = 1e-8,
        weight_decay: Value = 0,
        momentum_decay: Value = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(params, arguments(locals()))

    def _init(self, hyper: Hyper, param: Tensor) -> Entries:
        return {**init_moments(param), "mu_product": torch.ones((), dtype=T.scalar_dtype())}

    def _update(
        self, hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
    ) -> tuple[Tensors, list[Entries]]:
        lr, (beta1, beta2) = hyper["lr"], hyper["betas"]
        decay = hyper["momentum_decay"]

        def momentum(t: Scalar) -> Scalar:
            mu: Scalar = beta1 * (1.0 - 0.5 * 0.96 ** (t * decay))
            return mu

        params, grads = T.decayed(hyper, params, grads)
        new, t = moments(hyper, params, grads, states)
        ts = each_of(t, len(params))
        products = L.scale([s["mu_product"] for s in states], at(ts, momentum))
        scale = L.divide(L.sqrt(new["exp_avg_sq"]), at(t, lambda t: (1 - beta2**t) ** 0.5))
        scale = L.shift(scale, hyper["eps"])
        now: list[Scalar] = []
        ahead: list[Scalar] = []
        for product, t in zip(each_of(as_numbers(products), len(ts)), ts, strict=True):
            mu, mu_next = momentum(t), momentum(t + 1)
            now.append(-lr * (1.0 - mu) / (1.0 - product))
            ahead.append(-lr * mu_next / (1.0 - product * mu_next))
        params = L.addcdiv(params, grads, scale, now)
        params = L.addcdiv(params, new["exp_avg"], scale, ahead)
        return params, T.with_entries(states, {**new, "mu_product": products})
