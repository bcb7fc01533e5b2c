"""Rectified Adam."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from diffopt.optim import lists as L
from diffopt.optim import terms as T
from diffopt.optim.adam import init_moments, moments
from diffopt.optim.base import Optimizer
from diffopt.optim.lists import Tensors
from diffopt.optim.options import BETAS, EPS, LR, WEIGHT_DECAY, Value, arguments, within
from diffopt.optim.scalars import Scalar, at, is_zero, select
from diffopt.optim.terms import Entries, Hyper


class RAdam(Optimizer):
    """Rectified Adam: ``torch.optim.RAdam``, differentiable.

    With gradient g, learning rate γ, decay rates β₁, β₂ and weight decay λ, at step t = 1, 2, ...::

        g ← −g                               (maximize)
        g ← g + λ θ   or   θ ← (1 − γ λ) θ   (decoupled_weight_decay)
        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        ρ∞ = 2 / (1 − β₂) − 1,   ρ = ρ∞ − 2 t β₂ᵗ / (1 − β₂ᵗ)
        r = √((ρ − 4) (ρ − 2) ρ∞ / ((ρ∞ − 4) (ρ∞ − 2) ρ))
        a = r √(1 − β₂ᵗ) / (√v + ε)  if ρ > 5,  else 1
        θ ← θ − γ / (1 − β₁ᵗ) · a m

    Liu et al., "On the variance of the adaptive learning rate and beyond" (ICLR 2020). The
    derivative of √v at v = 0 is taken as 0, as for ``Adam``. Where ρ passes 5, which is a matter of
    t and β₂ alone, the step jumps; the derivative in β₂ is that of the side it is on.

    State: ``step`` (0-d, on the CPU), ``exp_avg`` m and ``exp_avg_sq`` v, of the parameter's shape
    and dtype.

    Cost: about ten passes over the parameters; two copies of the parameters as state.

    Args:
        lr: γ.
        betas: (β₁, β₂), each a number, a tensor or a callable.
        eps: ε.
        weight_decay: λ.
        decoupled_weight_decay: decay the parameters, not their gradients.

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
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(params, arguments(locals()))

    def _init(self, hyper: Hyper, param: Tensor) -> Entries:
        return init_moments(param)

    def _update(
        self, hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
    ) -> tuple[Tensors, list[Entries]]:
        lr, (beta1, beta2) = hyper["lr"], hyper["betas"]

        def adaptive(t: Scalar) -> Scalar:
            """The coefficient of m / (√v + ε): 0 while the step is not rectified."""
            rectified, rectifier = _rectifier(beta2, t)
            rate = -lr / (1 - beta1**t) * rectifier * (1 - beta2**t) ** 0.5
            return select(rectified, rate, 0.0)

        def unrectified(t: Scalar) -> Scalar:
            """The coefficient of m: 0 once the step is rectified."""
            return select(_rectifier(beta2, t)[0], 0.0, -lr / (1 - beta1**t))

        params, grads = T.decayed(hyper, params, grads)
        new, t = moments(hyper, params, grads, states)
        m, rates, unrectified_rates = new["exp_avg"], at(t, adaptive), at(t, unrectified)
        if not is_zero(unrectified_rates):
            params = L.add(params, m, unrectified_rates)
        if not is_zero(rates):
            scale = L.shift(L.sqrt(new["exp_avg_sq"]), hyper["eps"])
            params = L.addcdiv(params, m, scale, rates)
        return params, T.with_entries(states, new)


def _rectifier(beta2: Scalar, t: Scalar) -> tuple[bool | Tensor, Scalar]:
    """Whether ρ > 5, and r, which is 1 where it is not (and would not be real)."""
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * t * beta2**t / (1 - beta2**t)
    rectified = length > 5.0
    limit, length = select(rectified, limit, 6.0), select(rectified, length, 6.0)
    ratio = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
    return rectified, ratio**0.5
