"""Muon."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from diffopt._torch.functorch import in_functorch
from diffopt.optim import lists as L
from diffopt.optim import terms as T
from diffopt.optim.base import Optimizer
from diffopt.optim.lists import Tensors, fit
from diffopt.optim.options import ANY, EPS, LR, MOMENTUM, WEIGHT_DECAY, Value, arguments, within
from diffopt.optim.scalars import Scalar
from diffopt.optim.terms import Entries, Hyper

_MOST_STEPS = 100  # of the iteration, as in torch.optim


class Muon(Optimizer):
    """Momentum, orthogonalised by Newton-Schulz: ``torch.optim.Muon``, differentiable.

    For matrices. With gradient g, learning rate γ, momentum μ, weight decay λ and coefficients
    a, b, c::

        m ← μ m + (1 − μ) g
        d = μ m + (1 − μ) g  (nesterov)  or  m
        x = d / max(‖d‖, ε)                 (of dᵀ, where d has more rows than columns)
        x ← a x + (b x xᵀ + c (x xᵀ)²) x    (ns_steps times)
        θ ← (1 − γ λ) θ − γ r x,  r = √max(1, rows / columns)  (adjust_lr_fn "original", or None)
                                  r = 0.2 √max(rows, columns)  ("match_rms_adamw")

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); Liu et al.,
    "Muon is scalable for LLM training" (2025).

    As in ``torch.optim``, x is computed in bfloat16, whatever the parameter's dtype. Rounding makes
    x a function of steps, whose derivative is zero. The derivative here is that of the iteration
    above at the values that were rounded, computed in the parameter's dtype: every rounding counts
    as the identity, as for parameters in bfloat16. Finite differences of the rounded iteration are
    noise of about 1 %; a subclass with ``iteration_dtype = torch.float64`` is smooth. At a zero
    gradient the derivative is that of d / ε, which is large and finite.

    State: ``momentum_buffer`` m, of the parameter's shape and dtype.

    Cost: 3 ``ns_steps`` matrix products in bfloat16; where a derivative is recorded, as many more
    in the parameter's dtype. One copy of the parameters as state.

    Args:
        lr: γ.
        weight_decay: λ.
        momentum: μ.
        nesterov: look ahead along the buffer.
        ns_coefficients: (a, b, c), each a number, a tensor or a callable.
        eps: ε.
        ns_steps: how often the iteration is applied; below 100.
        adjust_lr_fn: "original", "match_rms_adamw", or None for the first.

    Raises:
        ValueError: a parameter is no matrix.
    """

    # The rule reads the last two dimensions alone: tasks, which lead, do not mix.
    elementwise = True
    ranges = within(
        lr=LR, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM, ns_coefficients=(ANY,) * 3, eps=EPS
    )
    #: What the iteration is rounded to.
    iteration_dtype: ClassVar[torch.dtype] = torch.bfloat16

    def __init__(
        self,
        params: ParamsT,
        lr: Value = 1e-3,
        weight_decay: Value = 0.1,
        momentum: Value = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[Value, Value, Value] = (3.4445, -4.775, 2.0315),
        eps: Value = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        adjust, steps = group["adjust_lr_fn"], group["ns_steps"]
        if adjust not in (None, "original", "match_rms_adamw"):
            raise ValueError(
                f"Adjust learning rate function {adjust} is not supported: pass 'original', "
                "'match_rms_adamw' or None"
            )
        if not 0 <= steps < _MOST_STEPS:
            raise ValueError(f"Muon: ns_steps is {steps}: pass at least 0 and below {_MOST_STEPS}")
        for p in group["params"]:
            if p.dim() != 2:
                raise ValueError(
                    "Muon only supports 2D parameters whereas we found a parameter with size: "
                    f"{p.size()}: give the others to an optimizer of their own, such as "
                    "unroll(model, [Muon(matrices), AdamW(others)], ...)"
                )

    def _init(self, hyper: Hyper, param: Tensor) -> Entries:
        return {"momentum_buffer": T.zeros(param)}

    def _update(
        self, hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
    ) -> tuple[Tensors, list[Entries]]:
        lr, momentum, adjust = hyper["lr"], hyper["momentum"], hyper["adjust_lr_fn"]
        buffers = L.lerp(T.column(states, "momentum_buffer", params), grads, 1 - momentum)
        moved = L.lerp(grads, buffers, momentum) if hyper["nesterov"] else buffers
        directions = [_orthogonalised(x, hyper, self.iteration_dtype) for x in moved]
        rates = [-lr * _ratio(adjust, *p.shape[-2:]) for p in params]
        params = L.scale(params, 1 - lr * hyper["weight_decay"])
        params = L.add(params, directions, rates)
        return params, T.with_entries(states, {"momentum_buffer": buffers})


def _ratio(adjust: str | None, rows: int, columns: int) -> float:
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def _orthogonalised(x: Tensor, hyper: Hyper, dtype: torch.dtype) -> Tensor:
    """The iteration, with every result rounded to ``dtype``."""
    a, b, c = hyper["ns_coefficients"]
    eps = hyper["eps"]
    tall = x.size(-2) > x.size(-1)
    for value in (a, b, c, eps):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"Muon: ns_coefficients and eps are one number each for a matrix, not {value!r}"
            )
    x = _rounded(dtype, lambda x: x, x.mT if tall else x)
    norm = _rounded(dtype, _smooth_norm, x, low=_norm)
    x = _rounded(dtype, torch.div, x, _rounded(dtype, _at_least, norm, scalars=(eps,)))
    for _ in range(hyper["ns_steps"]):
        gram = _rounded(dtype, lambda x: x @ x.mT, x)
        change = _rounded(dtype, _added, gram, gram, gram, scalars=(b, c))
        x = _rounded(dtype, _added, x, change, x, scalars=(a, 1))
    return x.mT if tall else x


def _rounded(
    dtype: torch.dtype,
    exact: Callable[..., Tensor],
    *xs: Tensor,
    scalars: tuple[Scalar, ...] = (),
    low: Callable[..., Tensor] | None = None,
) -> Tensor:
    """``low(*xs, *scalars)``, computed in ``dtype``, with the derivative of ``exact``.

    ``xs`` hold values of ``dtype`` already. With a scalar that is a tensor, which no fused
    operation takes, ``exact`` is computed and then rounded.
    """
    tensors = [s for s in scalars if isinstance(s, Tensor)]
    recorded = in_functorch() or L.carry_derivative([*xs, *tensors])
    wide = exact(*xs, *scalars) if recorded or tensors else xs[0]
    if tensors:
        value = wide.detach().to(dtype).to(wide.dtype)
    else:
        value = (low or exact)(*(x.detach().to(dtype) for x in xs), *scalars).to(wide.dtype)
    return value + (wide - wide.detach()) if recorded else value


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return norm


def _smooth_norm(x: Tensor) -> Tensor:
    """The same, with every derivative 0 at 0."""
    return L.sqrt([(x * x).sum((-2, -1), keepdim=True)])[0]


def _at_least(x: Tensor, least: Scalar) -> Tensor:
    least = fit(least, x)
    return torch.maximum(x, least) if isinstance(least, Tensor) else x.clamp(min=least)


def _added(x: Tensor, y: Tensor, z: Tensor, beta: Scalar, alpha: Scalar) -> Tensor:
    """β x + α y z."""
    if isinstance(beta, Tensor) or isinstance(alpha, Tensor):
        return fit(beta, x) * x + fit(alpha, x) * (y @ z)
    add = torch.addmm if x.dim() == 2 else torch.baddbmm
    return add(x, y, z, beta=beta, alpha=alpha)
