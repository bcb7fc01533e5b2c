"""RMSprop."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from diffopt.optim import lists as L
from diffopt.optim import terms as T
from diffopt.optim.base import Optimizer
from diffopt.optim.lists import Tensors
from diffopt.optim.options import EPS, LR, MOMENTUM, WEIGHT_DECAY, Value, arguments, up_to_1, within
from diffopt.optim.scalars import is_zero
from diffopt.optim.terms import Cotangents, Entries, Hyper, Pullback


class RMSprop(Optimizer):
    """RMSprop: ``torch.optim.RMSprop``, differentiable.

    With gradient g, learning rate γ, smoothing α, momentum μ and weight decay λ::

        g ← −g                             (maximize)
        g ← g + λ θ
        v ← α v + (1 − α) g²
        a ← α a + (1 − α) g;  w = v − a²   (centered)   or   w = v
        d = g / (√w + ε)
        b ← μ b + d;  d = b                (momentum)
        θ ← θ − γ d

    Tieleman and Hinton, "Lecture 6.5: rmsprop" (Coursera, 2012); centered: Graves, "Generating
    sequences with recurrent neural networks" (2013).

    The derivative of √w at w = 0 is taken as 0, the limit of its product with g, so that a weight
    which never had a gradient has a finite derivative (with ε > 0). Centered, w may round to less
    than 0 where the gradient never changes: the step is then NaN, as in ``torch.optim``.

    State: ``step`` (0-d, on the CPU), ``square_avg`` v, with momentum ``momentum_buffer`` b,
    centered ``grad_avg`` a; each but the first of the parameter's shape and dtype.

    Cost: six to ten passes over the parameters; one to three copies of the parameters as state.

    Args:
        lr: γ.
        alpha: α.
        eps: ε.
        weight_decay: λ.
        momentum: μ. A tensor counts as not 0.
        centered: divide by an estimate of the standard deviation.

    Raises:
        ValueError: a number is negative.
    """

    elementwise = True
    ranges = within(
        lr=LR, eps=EPS, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, alpha=up_to_1("alpha value")
    )

    def __init__(
        self,
        params: ParamsT,
        lr: Value = 1e-2,
        alpha: Value = 0.99,
        eps: Value = 1e-8,
        weight_decay: Value = 0,
        momentum: Value = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(params, arguments(locals()))

    def _init(self, hyper: Hyper, param: Tensor) -> Entries:
        state = {"step": T.count(), "square_avg": T.zeros(param)}
        if not is_zero(hyper["momentum"]):
            state["momentum_buffer"] = T.zeros(param)
        if hyper["centered"]:
            state["grad_avg"] = T.zeros(param)
        return state

    def _update(
        self, hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
    ) -> tuple[Tensors, list[Entries]]:
        lr, alpha, momentum = hyper["lr"], hyper["alpha"], hyper["momentum"]
        params, grads = T.decayed(hyper, params, grads)
        steps, _ = T.advance(states)
        v = T.average_of_squares(T.column(states, "square_avg", params), grads, alpha)
        new = {"step": steps, "square_avg": v}
        if hyper["centered"]:
            average = L.lerp(T.column(states, "grad_avg", params), grads, 1 - alpha)
            new["grad_avg"] = average
            v = L.addcmul(v, average, average, -1.0)
        scale = L.shift(L.sqrt(v), hyper["eps"])
        if is_zero(momentum):
            params = L.addcdiv(params, grads, scale, -lr)
        else:
            buffers = L.scale(T.column(states, "momentum_buffer", params), momentum)
            new["momentum_buffer"] = L.addcdiv(buffers, grads, scale)
            params = L.add(params, new["momentum_buffer"], -lr)
        return params, T.with_entries(states, new)

    def _vjp(self, pullback: Pullback) -> Cotangents | None:
        hyper, params, states = pullback.hyper, pullback.params, pullback.states
        cot_params, cot_states = pullback.cot_params, pullback.cot_states
        if hyper["centered"]:
            return None
        lr, alpha, momentum = hyper["lr"], hyper["alpha"], hyper["momentum"]
        _, grads = T.decayed(hyper, params, pullback.grads)
        v = T.average_of_squares(T.column(states, "square_avg", params), grads, alpha)
        root = L.sqrt(v, give_up=True)
        scale = L.shift(root, hyper["eps"])
        cot_directions = L.scale(cot_params, -lr)
        before: dict[str, Tensors] = {}
        if momentum != 0:
            cot_buffers = T.cotangents(cot_states, "momentum_buffer", params)
            cot_directions = T.plus(cot_buffers, cot_directions)
            before["momentum_buffer"] = L.scale(cot_directions, momentum)
        # d = g / s, s = √v + ε
        quotient = L.div(cot_directions, scale)
        through_v = L.div(L.mul(quotient, grads), scale, give_up=True)
        through_v = L.divide_by_roots(through_v, root)
        cot_v = T.plus(T.cotangents(cot_states, "square_avg", params), through_v, -0.5)
        # v = α v₋ + (1 − α) g²
        cot_grads = L.addcmul(quotient, grads, cot_v, 2 * (1 - alpha), give_up=True)
        before["square_avg"] = L.scale(cot_v, alpha, give_up=True)
        cot_params, cot_grads = T.decayed_vjp(hyper, cot_params, cot_grads)
        return Cotangents(cot_params, cot_grads, T.with_entries([{} for _ in states], before))
