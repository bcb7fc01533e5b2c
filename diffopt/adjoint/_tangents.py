"""The tangents that ``ForwardMode`` carries along with the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffopt._loop.loop import Loop
from diffopt._step.graph import end_of, is_same
from diffopt._step.tangent import (
    Pushed,
    Tangent,
    pushed,
    pushed_by_differences,
    pushed_by_transposition,
)
from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path, add


def stands_for(x: Tensor, w: Tensor, tasks: int | None) -> bool:
    """Whether ``x`` is ``w``, or ``w`` once for each task."""
    if is_same(x, w):
        return True
    if tasks is None or x.shape != (tasks, *w.shape) or x.grad_fn is None:
        return False
    if type(x.grad_fn).__name__ != "ExpandBackward0":
        return False
    node, output = x.grad_fn.next_functions[0]
    return getattr(node, "variable", None) is w if w.is_leaf else (node, output) == end_of(w)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A step's arguments, with tangents to carry over the step.

    Attributes:
        state, t: the state before the step, and its position.
        generators: their states before the step.
        tangents: of the state, one for each direction.
        captured: of the captured tensors, for each direction.
    """

    state: State
    t: int
    generators: tuple[Tensor, ...]
    tangents: Sequence[Tangent]
    captured: Sequence[Mapping[Tensor, Tensor]]


class Tangents:
    """The tangents of the state, one for each element of ``wrt``, and of losses and extras."""

    def __init__(self, loop: Loop, wrt: Sequence[Tensor]) -> None:
        self._loop = loop
        self._wrt = wrt
        self._directions = [(i, j) for i, w in enumerate(wrt) for j in range(w.numel())]
        self._index = loop.captured.include(wrt)
        self._states: list[Tangent] = [
            {
                path: self._unit(i, j).expand(x.shape)
                for path, x in loop.inputs.items()
                if stands_for(x, wrt[i], loop.tasks)
            }
            for i, j in self._directions
        ]
        self._outputs: list[dict[int, Pushed]] = [{} for _ in self._directions]
        self._dual: bool | None = None  # whether forward mode serves; not tried yet

    def _unit(self, i: int, j: int) -> Tensor:
        w = self._wrt[i]
        unit = w.new_zeros(w.numel())
        unit[j] = 1
        return unit.view(w.shape)

    def push(self, state: State, t: int, generators: tuple[Tensor, ...]) -> None:
        """Carry the tangents over step ``t``, which starts with the generators as they are given.

        The loop has taken the step already, so that it is known what it uses.
        """
        used = set(self._loop.captured.at(t))
        moving = [
            d
            for d, (i, _) in enumerate(self._directions)
            if self._states[d] or self._index[i] in used
        ]
        if not moving:
            return
        if self._dual is None:
            self._dual = self._duals_serve(state, t, generators)
        tangents = [self._states[d] for d in moving]
        captured = [self._captured_unit(d, used) for d in moving]
        pushed = self._pushed(_Inputs(state, t, generators, tangents, captured))
        for d, tangent in zip(moving, pushed, strict=True):
            self._states[d] = tangent.state
            self._outputs[d][t] = replace(tangent, state={})

    def _captured_unit(self, d: int, used: set[int]) -> dict[Tensor, Tensor]:
        i, j = self._directions[d]
        index = self._index[i]
        return {self._loop.captured.tensors[index]: self._unit(i, j)} if index in used else {}

    def _pushed(self, inputs: _Inputs) -> list[Pushed]:
        if self._dual:
            try:
                return self._by_duals(inputs)
            except RuntimeError:
                self._dual = False
        return self._by_transposition(inputs)

    def _by_duals(self, inputs: _Inputs) -> list[Pushed]:
        step, results = self._loop.step, []
        for tangent, captured in zip(inputs.tangents, inputs.captured, strict=True):
            self._loop.generators.set(inputs.generators)
            results.append(pushed(step, inputs.state, inputs.t, tangent, captured))
        return results

    def _by_transposition(self, inputs: _Inputs) -> list[Pushed]:
        loop, t = self._loop, inputs.t
        loop.generators.set(inputs.generators)
        used = [loop.captured.tensors[i] for i in loop.captured.at(t)]
        captured = [[tangents.get(x) for x in used] for tangents in inputs.captured]
        with loop.captured.sealed(t):
            return pushed_by_transposition(
                loop.step, inputs.state, t, inputs.tangents, loop.captured.edges(t), captured
            )

    def _duals_serve(self, state: State, t: int, generators: tuple[Tensor, ...]) -> bool:
        """Whether forward mode is there for all operations of a step, and right.

        A forward derivative is a formula of its own: where it is not that of the reverse
        derivative (written by hand, or a convention at a kink), the result would not be the
        gradient that every other adjoint gives. So both ways are compared once, along random
        directions.
        """
        with self._loop.generators.undisturbed():
            tangent = {
                path: torch.randn_like(x)
                for path, x in self._loop.step.differentiable(state).items()
            }
            used = set(self._loop.captured.at(t)) & set(self._index)
            tensors = [self._loop.captured.tensors[i] for i in used]
            captured = {x: torch.randn_like(x) for x in tensors}
            inputs = _Inputs(state, t, generators, [tangent], [captured])
            try:
                (by_duals,) = self._by_duals(inputs)
            except RuntimeError:
                return False
            try:
                (expected,) = self._by_transposition(inputs)
            except (RuntimeError, NotImplementedError) as error:  # no second derivative in reverse
                self._check_by_differences(inputs, by_duals, error)
                return True
        return _close(by_duals.flat(), expected.flat())

    def _check_by_differences(self, inputs: _Inputs, by_duals: Pushed, reverse: Exception) -> None:
        """Raise where forward mode cannot be compared with reverse mode, and is wrong.

        Central differences show it. In less than double precision they are too coarse.
        """
        step, state, t = self._loop.step, inputs.state, inputs.t
        (tangent,), (captured,) = inputs.tangents, inputs.captured
        why = (
            f"ForwardMode could not be checked at step {step.first_step + t}, of which an "
            f"operation has no second derivative in reverse mode ({str(reverse).splitlines()[0]})"
        )
        if any(x.dtype != torch.float64 for x in step.differentiable(state).values()):
            raise NotImplementedError(
                f"{why}: convert the model and its data to float64, where finite differences are "
                "a check, or write the step in operations that have one"
            ) from reverse
        for h in (1e-6, 1e-5):  # a kink may lie between the ends of one
            ends = pushed_by_differences(step, state, t, tangent, captured, h)
            total: dict[Path, Tensor | None] = {}
            for _ in range(2):
                self._loop.generators.set(inputs.generators)
                for path, x in next(ends).flat().items():
                    total[path] = add(total.get(path), x)
            if _close(total, by_duals.flat(), 1e-7):
                return
        raise NotImplementedError(
            f"{why}, and finite differences say that its forward derivative is wrong: a custom "
            "Function has a jvp that is not its derivative, or an operation drops tangents. Mend "
            "it, or write the step in operations that can be differentiated twice in reverse mode"
        ) from reverse

    def product(self, cotangent: Cotangent, outputs: OutputCotangents) -> list[Tensor]:
        """What flows to each of ``wrt``."""
        parts: list[list[Tensor]] = [[] for _ in self._wrt]
        for (i, _), tangent, steps in zip(
            self._directions, self._states, self._outputs, strict=True
        ):
            pairs = [(dx, cotangent[path]) for path, dx in tangent.items() if path in cotangent]
            for t, step in steps.items():
                c = outputs.at(t)
                if c.loss is not None and step.loss is not None:
                    pairs.append((step.loss, c.loss))
                pairs.extend((dx, c.aux[k]) for k, dx in step.aux.items() if k in c.aux)
            w = self._wrt[i]
            total = w.new_zeros(())
            for dx, cot in pairs:
                product = dx * cot.conj() if cot.is_complex() else dx * cot
                product = product.real if product.is_complex() else product
                total = total + product.sum().to(w.device, w.dtype)
            parts[i].append(total)
        return [
            torch.stack(part).view(w.shape) if part else w.new_zeros(w.shape)
            for part, w in zip(parts, self._wrt, strict=True)
        ]


def _close(
    a: Mapping[Path, Tensor | None],
    b: Mapping[Path, Tensor | None],
    tolerance: float | None = None,
) -> bool:
    """Whether tangents agree: to the square root of their precision, or to ``tolerance``."""
    for path in a.keys() | b.keys():
        x, y = a.get(path), b.get(path)
        x = torch.zeros_like(y) if x is None and y is not None else x
        y = torch.zeros_like(x) if y is None and x is not None else y
        if x is None or y is None:
            continue
        relative = torch.finfo(x.dtype).eps ** 0.5 if tolerance is None else tolerance
        bound = relative * max(float(x.norm()), float(y.norm()), 1.0)
        if not (x - y).norm() <= bound:
            return False
    return True
