"""How far a meta-gradient tells the truth: the outer loss along it, against a straight line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt._unroll.saved import generators_now, set_generators
from diffopt._values.tree import is_differentiable, tensors_in


@dataclass(frozen=True)
class Metasmoothness:
    """The outer loss L at three points on a line, z, z + h v and z + 2 h v.

    ``curvature`` and ``agreement`` are definitions 1 and 2 of the paper; ``slope``, ``deviation``
    and ``kept`` are not from there.

    Attributes:
        step: h.
        losses: L at the three points.
        slope: the derivative of L along v at z, by the meta-gradient; −‖g‖ for the default v.
        agreement: the paper's *empirical metasmoothness*, of the outputs that were returned beside
            the loss; None where there were none. Over their entries, with Δ₁ and Δ₂ the changes
            from point to point::

                Σ |Δ₁ + Δ₂| sign(Δ₁) sign(Δ₂) / Σ |Δ₁ + Δ₂|

            1 where every one goes on the way it went, −1 where every one turns back.
    """

    step: float
    losses: tuple[float, float, float]
    slope: float
    agreement: float | None

    @property
    def curvature(self) -> float:
        """|L(z + 2hv) − 2 L(z + hv) + L(z)| / h², the paper's *metasmoothness*; 0 for a line.

        The second derivative along v, by differences; at most β where L is β-smooth.
        """
        first, second, third = self.losses
        return abs(third - 2 * second + first) / self.step**2

    @property
    def deviation(self) -> float:
        """The change of the slope against the slopes, from 0 (a line) to 1 (no trend at all)::

            |Δ₂ − Δ₁| / (|Δ₁| + |Δ₂|),   Δ₁ = L(z + hv) − L(z),  Δ₂ = L(z + 2hv) − L(z + hv)

        0 where the loss does not change at all.
        """
        first, second, third = self.losses
        one, two = second - first, third - second
        total = abs(one) + abs(two)
        return abs(two - one) / total if total else 0.0

    @property
    def kept(self) -> float:
        """What the step brings of what the meta-gradient promises: Δ₁ / (h · slope).

        1 where the loss is linear; 0 where nothing is gained; negative where the step makes it
        worse: h is too long for this gradient, or the gradient is not worth following.
        """
        first, second, _ = self.losses
        return (second - first) / (self.step * self.slope)


def metasmoothness(
    outer: Callable[..., Any],
    tensors: Iterable[Tensor],
    *,
    step: float,
    direction: Sequence[Tensor] | None = None,
) -> Metasmoothness:
    """Measure how far the outer loss is from linear along its meta-gradient.

    An exact meta-gradient can still be useless: where training is chaotic, the outer loss is so
    rough in the hyperparameters that its slope holds for far less than a step. This asks before
    the outer optimizer does. With z the tensors, g the gradient of the outer loss L at z and
    v = −g / ‖g‖ (the norm of all tensors together), L is evaluated at z, z + h v and z + 2 h v.

    After Engstrom et al., "Optimizing ML training with metagradient descent" (2025), who choose
    training routines that are smooth in this sense (wider networks, average pooling, normalization
    before activations, small outputs) before they follow their gradients. Their v is random, which
    asks about the routine: pass it as ``direction``. The default asks about the step to be taken.

    Args:
        outer: ``outer(*tensors)`` gives the outer loss, a scalar, as a function of the tensors it
            is given: it trains, by ``diffopt.unroll`` or otherwise, and evaluates. It may also
            give ``(loss, outputs)`` with a pytree of tensors, such as ``fast.params``, whose
            ``agreement`` is measured, too. Called three times; the random numbers of PyTorch are
            the same each time.
        tensors: z, the point: meta-parameters, such as log learning rates or initial weights. They
            are not changed.
        step: h, the distance between the points, in the units of z: what an outer step moves.
        direction: v, a tensor for each of z, taken as it is. Default: −g / ‖g‖.

    Raises:
        TypeError: ``outer`` is not callable, or does not give a tensor; a tensor is none.
        ValueError: the loss is no scalar or depends on none of the tensors; the gradient is zero
            or not finite; ``step`` is not above 0; a direction does not fit.

    Cost: three times that of ``outer``, and one backward pass.

    Examples:
        >>> import torch, diffopt
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.eye(2), torch.ones(2, 1)
        >>> def outer(log_lr):
        ...     inner = diffopt.SGD(model.parameters(), lr=lambda t: log_lr.exp())
        ...     loss_fn = lambda model, t: (model(x) - y).square().mean()
        ...     fast = diffopt.unroll(model, inner, 5, loss_fn)
        ...     return loss_fn(fast, 5), fast.params
        >>> found = diffopt.metasmoothness(outer, [torch.tensor(-3.0)], step=0.1)
        >>> found.deviation < 0.1, found.kept > 0.9, found.agreement
        (True, True, 1.0)
    """
    points = list(tensors)
    _check(outer, points, step)
    generators = generators_now({x.device for x in points})
    start = [x.detach().clone().requires_grad_() for x in points]
    loss, outputs = _evaluated(outer, start)
    after = generators_now({x.device for x in points})
    grads = _gradients(loss, start)
    if direction is None:
        norm = torch.stack([g.double().square().sum().cpu() for g in grads]).sum().sqrt()
        if not norm:
            raise ValueError(
                "the meta-gradient is zero, so there is no direction to follow: the outer loss "
                "does not change with these tensors here; pass direction= to look along another"
            )
        direction = [g * (-1 / norm).to(g.device, g.dtype) for g in grads]
    _check_direction(direction, points)
    slope = sum(
        float((g.double() * v.double()).sum()) for g, v in zip(grads, direction, strict=True)
    )
    losses, outcomes = [loss.item()], [outputs]
    try:
        for i in (1, 2):
            set_generators(generators)
            moved = [
                (x.detach() + i * step * v).requires_grad_()
                for x, v in zip(points, direction, strict=True)
            ]
            loss, outputs = _evaluated(outer, moved)
            losses.append(loss.item())
            outcomes.append(outputs)
    finally:
        set_generators(after)
    first, second, third = losses
    return Metasmoothness(step, (first, second, third), slope, _agreement(outcomes))


def _evaluated(outer: Callable[..., Any], point: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss, and what is given beside it, cut from the graph."""
    with torch.enable_grad():
        loss = outer(*point)
    outputs: list[Tensor] = []
    if isinstance(loss, tuple) and len(loss) == 2:
        loss, beside = loss
        outputs = [x.detach() for x in tensors_in(beside) if is_differentiable(x)]
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"outer gives a {type(loss).__name__}: return the outer loss, a scalar tensor, or the "
            "pair (loss, outputs)"
        )
    if loss.numel() != 1:
        raise ValueError(f"the outer loss has shape {tuple(loss.shape)}: reduce it to a scalar")
    return loss, outputs


def _gradients(loss: Tensor, start: list[Tensor]) -> list[Tensor]:
    gradients: Sequence[Tensor | None] = [None] * len(start)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss.reshape(()), start, allow_unused=True)
    if all(g is None for g in gradients):
        raise ValueError(
            "the outer loss depends on none of the tensors: compute it from the arguments that "
            "outer is given, and not from tensors it finds elsewhere"
        )
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(start, gradients, strict=True)]
    for i, g in enumerate(grads):
        if not g.isfinite().all():
            raise ValueError(
                f"the meta-gradient of tensors[{i}] is not finite: see with monitor= of "
                "diffopt.unroll at which step it ceases to be"
            )
    return grads


def _agreement(outcomes: list[list[Tensor]]) -> float | None:
    if not outcomes[0]:
        return None
    agreeing = total = 0.0
    moved = False
    for a, b, c in zip(*outcomes, strict=True):
        one, two, size = b - a, c - b, (c - a).abs()
        agreeing += float((size * one.sgn() * two.sgn()).double().sum())
        total += float(size.double().sum())
        moved |= bool(one.any())
    if total:
        return agreeing / total
    return -1.0 if moved else 1.0  # all came back exactly; nothing moved


def _check(outer: Any, points: list[Any], step: float) -> None:
    if not callable(outer):
        raise TypeError(
            f"outer is a {type(outer).__name__}: pass a function of the tensors that gives the "
            "outer loss"
        )
    if not points:
        raise ValueError("tensors is empty: pass those that the outer loss is a function of")
    for i, x in enumerate(points):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"tensors[{i}] is a {kind}: pass tensors of floating point numbers")
    if not step > 0:
        raise ValueError(f"step={step}: pass the distance between the points, above 0")


def _check_direction(direction: Sequence[Tensor], points: list[Tensor]) -> None:
    shapes = [tuple(v.shape) for v in direction]
    if shapes != [tuple(x.shape) for x in points]:
        raise ValueError(
            f"direction has shapes {shapes}, and the tensors "
            f"{[tuple(x.shape) for x in points]}: pass a tensor for each, of its shape"
        )
