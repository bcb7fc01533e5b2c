"""Adam and AdamW, either with AMSGrad."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from diffopt.optim import fused
from diffopt.optim import lists as L
from diffopt.optim import terms as T
from diffopt.optim.base import Optimizer
from diffopt.optim.lists import Tensors
from diffopt.optim.options import BETAS, EPS, LR, WEIGHT_DECAY, Value, arguments, within
from diffopt.optim.scalars import Coefficient, at
from diffopt.optim.terms import Cotangents, Entries, Hyper, Pullback


class Adam(Optimizer):
    """Adam: ``torch.optim.Adam``, differentiable.

    With gradient g, learning rate γ, decay rates β₁, β₂ and weight decay λ, at step t = 1, 2, ...::

        g ← −g                               (maximize)
        g ← g + λ θ   or   θ ← (1 − γ λ) θ   (decoupled_weight_decay)
        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        w ← max(w, v)  (amsgrad)   or   w = v
        θ ← θ − γ / (1 − β₁ᵗ) · m / (√w / √(1 − β₂ᵗ) + ε)

    Kingma and Ba, "Adam: a method for stochastic optimization" (ICLR 2015); AMSGrad: Reddi et al.,
    "On the convergence of Adam and beyond" (ICLR 2018).

    The derivative of √w at w = 0 is taken as 0, the limit of its product with m, so that a weight
    which never had a gradient has a finite derivative (with ε > 0). Where AMSGrad's two second
    moments are equal, each gets half of the derivative.

    State: ``step`` (0-d, on the CPU), ``exp_avg`` m and ``exp_avg_sq`` v, with amsgrad
    ``max_exp_avg_sq`` w; each but the first of the parameter's shape and dtype.

    Cost: about ten passes over the parameters; two (amsgrad: three) copies of the parameters as
    state.

    Args:
        lr: γ.
        betas: (β₁, β₂), each a number, a tensor or a callable.
        eps: ε.
        weight_decay: λ.
        amsgrad: divide by the largest second moment so far.
        decoupled_weight_decay: decay the parameters, not their gradients: AdamW.

    Raises:
        ValueError: a number is negative, or a beta not below 1.
    """

    elementwise = True
    ranges = within(lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)

    def __init__(
        self,
        params: ParamsT,
        lr: Value = 1e-3,
        betas: tuple[Value, Value] = (0.9, 0.999),
        eps: Value = 1e-8,
        weight_decay: Value = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        super().__init__(params, arguments(locals()))

    def _init(self, hyper: Hyper, param: Tensor) -> Entries:
        state = init_moments(param)
        if hyper["amsgrad"]:
            state["max_exp_avg_sq"] = T.zeros(param)
        return state

    def _update(
        self, hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
    ) -> tuple[Tensors, list[Entries]]:
        in_one = fused.adam(hyper, params, grads, states)
        if in_one is not None:
            return in_one
        lr, (beta1, beta2), eps = hyper["lr"], hyper["betas"], hyper["eps"]
        params, grads = T.decayed(hyper, params, grads)
        new, t = moments(hyper, params, grads, states)
        v = new["exp_avg_sq"]
        if hyper["amsgrad"]:
            v = L.maximum(T.column(states, "max_exp_avg_sq", params), v)
            new["max_exp_avg_sq"] = v
        root = L.divide(L.sqrt(v), at(t, lambda t: (1 - beta2**t) ** 0.5), give_up=True)
        rate = at(t, lambda t: -lr / (1 - beta1**t))
        params = L.addcdiv(params, new["exp_avg"], L.shift(root, eps, give_up=True), rate)
        return params, T.with_entries(states, new)

    def _vjp(self, pullback: Pullback) -> Cotangents | None:
        hyper, params, states = pullback.hyper, pullback.params, pullback.states
        cot_params, cot_states = pullback.cot_params, pullback.cot_states
        if hyper["amsgrad"]:
            return None
        lr, (beta1, beta2), eps = hyper["lr"], hyper["betas"], hyper["eps"]
        _, grads = T.decayed(hyper, params, pullback.grads)
        new, t = moments(hyper, params, grads, states)
        m, root = new["exp_avg"], L.sqrt(new["exp_avg_sq"], give_up=True)
        # θ' = θ + r m / s with s = √v + c ε, c = √(1 − β₂ᵗ), r = −γ c / (1 − β₁ᵗ)
        s = L.shift(root, at(t, lambda t: eps * (1 - beta2**t) ** 0.5))
        quotient = L.div(cot_params, s)
        through_v = L.div(L.mul(m, quotient, give_up=True), s, give_up=True)
        through_v = L.divide_by_roots(through_v, root)
        half = at(t, lambda t: 0.5 * lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t))
        cot_v = T.plus(T.cotangents(cot_states, "exp_avg_sq", params), through_v, half)
        rate = at(t, lambda t: -lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t))
        cot_m = T.plus(T.cotangents(cot_states, "exp_avg", params), quotient, rate)
        # m = β₁ m₋ + (1 − β₁) g,  v = β₂ v₋ + (1 − β₂) g²
        cot_grads = L.scale(cot_m, 1 - beta1, into=s)
        cot_grads = L.addcmul(cot_grads, grads, cot_v, 2 * (1 - beta2), give_up=True)
        before = {
            "exp_avg": L.scale(cot_m, beta1, give_up=True),
            "exp_avg_sq": L.scale(cot_v, beta2, give_up=True),
        }
        cot_params, cot_grads = T.decayed_vjp(hyper, cot_params, cot_grads)
        return Cotangents(cot_params, cot_grads, T.with_entries([{} for _ in states], before))


class AdamW(Adam):
    """Adam with decoupled weight decay, θ ← (1 − γ λ) θ: ``torch.optim.AdamW``, differentiable.

    Loshchilov and Hutter, "Decoupled weight decay regularization" (ICLR 2019). All else is
    ``Adam``'s.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Value = 1e-3,
        betas: tuple[Value, Value] = (0.9, 0.999),
        eps: Value = 1e-8,
        weight_decay: Value = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, **arguments(locals()), decoupled_weight_decay=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # also where a checkpoint of Adam is loaded
            group["decoupled_weight_decay"] = True


def init_moments(param: Tensor) -> Entries:
    """The state that Adam, NAdam and RAdam have in common."""
    return {"step": T.count(), "exp_avg": T.zeros(param), "exp_avg_sq": T.zeros(param)}


def moments(
    hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
) -> tuple[dict[str, Tensors], Coefficient]:
    """That state after this step, by entry, and the step counts as numbers."""
    beta1, beta2 = hyper["betas"]
    steps, t = T.advance(states)
    m = L.lerp(T.column(states, "exp_avg", params), grads, 1 - beta1)
    v = T.average_of_squares(T.column(states, "exp_avg_sq", params), grads, beta2)
    return {"step": steps, "exp_avg": m, "exp_avg_sq": v}, t
