"""The Jacobian-vector product of one inner step: tangents carried forward.

``pushed`` evaluates the step on dual numbers: forward mode over the reverse mode that gives the
inner gradient. ``pushed_by_transposition`` needs reverse mode alone: with v ↦ vᵀJ, which is linear,
differentiating ⟨vᵀJ, ẋ⟩ in v gives J ẋ. It serves where an operation has no forward derivative.
``pushed_by_differences`` takes no derivative of the step at all: the others are checked by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from diffopt._step.capture import Captured
from diffopt._step.graph import end_of
from diffopt._step.step import InnerStep
from diffopt._torch.autograd import load_decompositions
from diffopt._values.outputs import attached
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path, map_tensors, tensors_in, vjp

#: Tangents of a state, by path; a missing one is zero.
Tangent = Cotangent
#: Tangents of captured tensors.
ByTensor = Mapping[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Pushed:
    """Tangents of what a step gives.

    Attributes:
        state: of the next state.
        loss: of the loss; None for zero.
        aux: of the extras, by index among their tensors; a missing one is zero.
    """

    state: Tangent
    loss: Tensor | None
    aux: Mapping[int, Tensor]

    def flat(self) -> dict[Path, Tensor | None]:
        """All of them, by path."""
        aux: dict[Path, Tensor | None] = {("aux", str(i)): dx for i, dx in self.aux.items()}
        return {**self.state, ("loss",): self.loss, **aux}


def pushed(step: InnerStep, state: State, t: int, tangent: Tangent, captured: ByTensor) -> Pushed:
    """The tangents of what step ``t`` gives.

    Args:
        tangent: of the state.
        captured: tangents of tensors that the step uses without being given them. Where it hands
            one to PyTorch, a dual number takes its place.

    Raises:
        RuntimeError: an operation has no forward derivative, or took a captured tensor from out of
            sight, as a compiled or scripted function does.
    """
    load_decompositions()
    with forward_ad.dual_level(), torch.enable_grad():
        substitutes = {x: _dual(x, dx) for x, dx in captured.items()}
        duals = {
            path: _dual(x, tangent[path]) if path in tangent else x.detach().requires_grad_()
            for path, x in step.differentiable(state).items()
        }
        start = state.replace(duals)
        with _Substitution(substitutes) as substitution:
            own = [*start.params.values(), *duals.values(), *substitutes.values()]
            evaluated = step.evaluate(start, t, own, False)
            loss, buffers, grads = evaluated.loss, evaluated.buffers, evaluated.grads
            aux = attached(map_tensors(substitution.replaced, evaluated.aux))
            hyper = [map_tensors(substitution.replaced, options) for options in evaluated.hyper]
            _check_all_replaced(captured, _walkable([loss, buffers, grads, hyper, aux]), own)
            with torch.no_grad():
                params, opt = step.update(hyper, start.params, grads, start.opt)
        result = State(params, opt, buffers).tensors()
        tangents = {path: dx for path, x in result.items() if (dx := _tangent_of(x)) is not None}
        outputs = {i: dx for i, x in aux.items() if (dx := _tangent_of(x)) is not None}
        return Pushed(tangents, _tangent_of(loss), outputs)


def pushed_by_transposition(
    step: InnerStep,
    state: State,
    t: int,
    tangents: Sequence[Tangent],
    edges: Sequence[Any],
    edge_tangents: Sequence[Sequence[Tensor | None]],
) -> list[Pushed]:
    """What ``pushed`` gives, for several tangents at once.

    Args:
        tangents: of the state, one for each direction.
        edges: the captured tensors, or their gradient edges.
        edge_tangents: theirs, for each direction.
    """
    leaves = {p: x.detach().requires_grad_() for p, x in step.differentiable(state).items()}
    with torch.enable_grad():
        result = step(state.replace(leaves), t)
        outputs: dict[Path, Tensor] = {
            path: x for path, x in result.state.tensors().items() if x.requires_grad
        }
        aux = attached(result.aux)
        results = [*outputs.values(), *aux.values(), result.loss]
        dummies = [torch.zeros_like(x, requires_grad=True) for x in results]
        pulled = torch.autograd.grad(
            results, [*leaves.values(), *edges], dummies, create_graph=True, allow_unused=True
        )
    pushed = []
    for tangent, others in zip(tangents, edge_tangents, strict=True):
        directions = [*(tangent.get(path) for path in leaves), *others]
        pairs = [
            (g, dx)
            for g, dx in zip(pulled, directions, strict=True)
            if g is not None and dx is not None and g.requires_grad
        ]
        given_back = iter(vjp(pairs, dummies, retain_graph=True))
        after = {path: dx for path in outputs if (dx := next(given_back)) is not None}
        extras = {i: dx for i in aux if (dx := next(given_back)) is not None}
        pushed.append(Pushed(after, next(given_back), extras))
    return pushed


def pushed_by_differences(
    step: InnerStep, state: State, t: int, tangent: Tangent, captured: ByTensor, h: float
) -> Iterator[Pushed]:
    """The two ends of central differences with step width ``h``, halved and signed.

    Their sum is what ``pushed`` gives, but for h² of truncation and 1e-16 / h of rounding. The
    generators have to be put back before each.
    """
    for sign in (1, -1):
        moved = {
            path: x.detach() + sign * h * tangent[path]
            for path, x in step.differentiable(state).items()
            if path in tangent
        }
        substitutes = {x: x.detach() + sign * h * dx for x, dx in captured.items()}
        with torch.no_grad(), _Substitution(substitutes) as substitution:
            result = step(state.replace(moved), t)
        aux = map_tensors(substitution.replaced, result.aux)
        outputs = dict(enumerate(tensors_in(aux)))
        extras = {i: sign * outputs[i].detach() / (2 * h) for i in result.attached}
        tensors = step.differentiable(result.state)
        scaled = {path: sign * x / (2 * h) for path, x in tensors.items()}
        yield Pushed(scaled, sign * result.loss / (2 * h), extras)


def _dual(x: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(x.detach().requires_grad_(), tangent)  # type: ignore[no-untyped-call]
    return dual


def _tangent_of(x: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(x).tangent  # type: ignore[no-untyped-call]
    return None if tangent is None or tangent._is_zerotensor() else tangent.detach()


def _walkable(tree: Any) -> list[Tensor]:
    return [x for x in tensors_in(tree) if x.requires_grad]


def _check_all_replaced(captured: ByTensor, roots: Iterable[Tensor], own: Iterable[Tensor]) -> None:
    """Raise where a captured tensor itself is in the graph, and not the one in its place."""
    if not captured:
        return
    walk = Captured()
    walk.offer(captured)
    if walk.walk(roots, own).captured & {end_of(x) for x in captured}:
        raise RuntimeError("a captured tensor was used out of sight")


class _Substitution(TorchFunctionMode):
    """Hands other tensors to PyTorch's functions than they are called with."""

    def __init__(self, substitutes: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self._substitutes = substitutes

    def replaced(self, x: Tensor) -> Tensor:
        return self._substitutes.get(x, x)

    def _replaced_in(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._substitutes.get(value, value)
        if type(value) in (list, tuple):
            return type(value)(map(self._replaced_in, value))
        return value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._substitutes:
            args = tuple(map(self._replaced_in, args))
            kwargs = {key: self._replaced_in(value) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))
