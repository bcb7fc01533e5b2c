"""Gradient descent, with or without momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from diffopt.optim import lists as L
from diffopt.optim import terms as T
from diffopt.optim.base import Optimizer
from diffopt.optim.lists import Tensors
from diffopt.optim.options import ANY, LR, MOMENTUM, WEIGHT_DECAY, Value, arguments, within
from diffopt.optim.scalars import is_zero
from diffopt.optim.terms import Cotangents, Entries, Hyper, Pullback


class SGD(Optimizer):
    """Stochastic gradient descent: ``torch.optim.SGD``, differentiable.

    With gradient g, learning rate γ, momentum μ, dampening τ and weight decay λ::

        g ← −g                   (maximize)
        g ← g + λ θ
        b ← μ b + (1 − τ) g      (b ← g at the first step)
        d = g + μ b  (nesterov)  or  b
        θ ← θ − γ d

    The derivative exists everywhere. Momentum as in Sutskever et al., "On the importance of
    initialization and momentum in deep learning" (ICML 2013), with the learning rate outside of
    the buffer.

    State: ``momentum_buffer``, of the parameter's shape and dtype, where momentum is not the
    number 0. It starts at zero, from which the first step makes it g; with dampening it is absent
    before the first step. A tensor momentum or dampening counts as not 0.

    Cost: a forward pass over the parameters per line; one copy of the parameters as state.

    Args:
        lr: γ.
        momentum: μ.
        dampening: τ.
        weight_decay: λ.
        nesterov: look ahead along the buffer.

    Raises:
        ValueError: a number is negative, or nesterov has no momentum or some dampening.

    Examples:
        >>> import torch
        >>> w, lr = torch.tensor([1.0]), torch.tensor(0.1, requires_grad=True)
        >>> opt = SGD([w], lr=lr)
        >>> new, state = opt.update({"w": w}, {"w": torch.tensor([2.0])}, opt.init({"w": w}))
        >>> new["w"]
        tensor([0.8000], grad_fn=<AddBackward0>)
    """

    elementwise = True
    ranges = within(lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, dampening=ANY)

    def __init__(
        self,
        params: ParamsT,
        lr: Value = 1e-3,
        momentum: Value = 0,
        dampening: Value = 0,
        weight_decay: Value = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))
        if nesterov and (momentum == 0 or (isinstance(dampening, (int, float)) and dampening != 0)):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def _init(self, hyper: Hyper, param: Tensor) -> Entries:
        if is_zero(hyper["momentum"]) or not is_zero(hyper["dampening"]):
            return {}
        return {"momentum_buffer": T.zeros(param)}

    def _update(
        self, hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
    ) -> tuple[Tensors, list[Entries]]:
        lr, momentum = hyper["lr"], hyper["momentum"]
        params, grads = T.decayed(hyper, params, grads)
        if is_zero(momentum):
            return L.add(params, grads, -lr), states
        buffers = self._accumulated(hyper, grads, states)
        directions = L.add(grads, buffers, momentum) if hyper["nesterov"] else buffers
        states = T.with_entries(states, {"momentum_buffer": buffers})
        return L.add(params, directions, -lr), states

    def _vjp(self, pullback: Pullback) -> Cotangents | None:
        hyper, params, states = pullback.hyper, pullback.params, pullback.states
        lr, momentum, keep = hyper["lr"], hyper["momentum"], 1 - hyper["dampening"]
        cot_directions = L.scale(pullback.cot_params, -lr)
        if momentum == 0:
            before_decay = T.decayed_vjp(hyper, pullback.cot_params, cot_directions)
            return Cotangents(*before_decay, pullback.cot_states)
        started = ["momentum_buffer" in s for s in states]
        if any(started) != all(started):
            return None
        cot_buffers = T.cotangents(pullback.cot_states, "momentum_buffer", params)
        if hyper["nesterov"]:
            cot_buffers = T.plus(cot_buffers, L.scale(cot_directions, momentum))
        else:
            cot_buffers = T.plus(cot_buffers, cot_directions)
        cot_grads = L.scale(cot_buffers, keep) if all(started) and keep != 1 else cot_buffers
        if hyper["nesterov"]:
            cot_grads = L.add(cot_grads, cot_directions)
        before: list[Entries] = [{} for _ in states]
        if all(started):
            scaled = L.scale(cot_buffers, momentum)
            before = [{"momentum_buffer": c} for c in scaled]
        return Cotangents(*T.decayed_vjp(hyper, pullback.cot_params, cot_grads), before)

    def _vjp_reads_gradients(self, states: Sequence[Mapping[str, Tensor]]) -> bool:
        return len({"momentum_buffer" in s for s in states}) > 1

    def _accumulated(self, hyper: Hyper, grads: Tensors, states: list[Entries]) -> Tensors:
        """b ← μ b + (1 − τ) g, and g itself where there is no b yet."""
        buffers = list(grads)
        old = [i for i, s in enumerate(states) if "momentum_buffer" in s]
        if old:
            moved = L.scale([states[i]["momentum_buffer"] for i in old], hyper["momentum"])
            moved = L.add(moved, [grads[i] for i in old], 1 - hyper["dampening"])
            for i, buffer in zip(old, moved, strict=True):
                buffers[i] = buffer
        return buffers


class Momentum(SGD):
    """``SGD`` whose ``momentum`` defaults to 0.9."""

    def __init__(
        self,
        params: ParamsT,
        lr: Value = 1e-3,
        momentum: Value = 0.9,
        *options: Any,
        **named: Any,
    ) -> None:
        super().__init__(params, lr, momentum, *options, **named)
