"""The derivative of the derivative: the way back through the loop as a differentiable function.

When a backward pass is itself recorded (``create_graph=True``, or an unroll inside an unroll), the
loop is replayed with every step recomputed on demand: forward once more, which connects the states
with one another, then back, one vector-Jacobian product a step. What flows back is bounded between
the steps by ordinary differentiable operations. So the states, T of them, and the cotangents, as
many, are functions of the start and of one another, and no more than one step's graph is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from diffopt._loop.loop import Loop
from diffopt._loop.recompute import Seen, recomputed
from diffopt._loop.way_back import CapturedSum
from diffopt._step.result import StepResult, other_extras
from diffopt._values.outputs import OutputCotangents, StepCotangents
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path, tensors_in, vjp


@dataclass(frozen=True)
class _Step:
    """A step that was replayed.

    Attributes:
        inputs: aliases of the differentiable tensors of the state before it, and of nothing else.
            An alias tells a tensor apart from another that was computed from it.
        captured: aliases of the captured tensors that the step uses, in the order of
            ``Captured.at``.
        after: the state after it, a recomputed function of ``inputs`` and ``captured``.
        loss: likewise.
        aux: likewise, the extras that something flows back to.
    """

    inputs: dict[Path, Tensor]
    captured: list[Tensor]
    after: State
    loss: Tensor
    aux: dict[int, Tensor]


def differentiable_backward(
    loop: Loop,
    generators: tuple[Tensor, ...],
    start: Mapping[Path, Tensor],
    captured: Sequence[Tensor],
    cotangent: Cotangent,
    outputs: OutputCotangents,
) -> tuple[Cotangent, list[Tensor | None]]:
    """What ``run_backward`` computes, connected to ``start``, ``captured`` and the cotangents.

    Args:
        generators: where they stood at the start.
        start: the differentiable tensors of the start, connected to the caller's graph; what is
            missing is a constant.

    Cost: T states and T cotangents are held, and the graph of one step at a time.
    """
    with torch.enable_grad():
        state = loop.start.replace(start)
        steps = []
        for t in range(loop.steps):
            wanted = list(outputs.at(t).aux)
            step, generators = _replayed(loop, t, generators, state, captured, wanted)
            steps.append(step)
            state = step.after
        total = CapturedSum(loop.captured)
        while steps:
            t, step = len(steps) - 1, steps.pop()
            cotangent, to_captured = _vjp(step, loop.bounded(t, cotangent), outputs.at(t))
            total.add(loop.captured.at(t), to_captured)
    return {path: g for path, g in cotangent.items() if path in start}, total.total


def _replayed(
    loop: Loop,
    t: int,
    generators: tuple[Tensor, ...],
    state: State,
    captured: Sequence[Tensor],
    wanted: Sequence[int],
) -> tuple[_Step, tuple[Tensor, ...]]:
    """Take step ``t`` from ``state``, with the generators as given: they are also where it ends.

    Args:
        wanted: indices among the tensors of its extras of those that something flows back to.
    """
    inputs = {path: x.view_as(x) for path, x in loop.step.differentiable(state).items()}
    used = [captured[i] for i in loop.captured.at(t)]
    used = [x.view_as(x) for x in used]
    constant = state.detach()
    template: list[State] = []
    ends: list[tuple[Tensor, ...]] = []

    def function(*values: Tensor) -> tuple[Tensor | None, ...]:
        loop.generators.set(generators)
        before = constant.replace(dict(zip(inputs, values, strict=True)))
        result = loop.connected(before, t)
        if not template:
            template.append(result.state.detach())
            loop.compare(t, result)
            ends.append(loop.generators.get())
        flowing = loop.step.differentiable(result.state)
        return (result.loss, *_extras(result, wanted, loop.step.first_step + t), *flowing.values())

    @contextmanager
    def context() -> Iterator[bool]:
        with (
            loop.together_again(),
            loop.session(),
            loop.generators.undisturbed(),
            loop.captured.sealed(t) as shared,
        ):
            yield shared

    seen = Seen(loop.captured.edges(t), context)
    loss, *rest = recomputed(function, seen, used, list(inputs.values()))
    assert loss is not None
    aux, flowing = dict(zip(wanted, rest, strict=False)), rest[len(wanted) :]
    new = {
        path: x
        for path, x in zip(loop.step.differentiable(template[0]), flowing, strict=True)
        if x is not None
    }
    aux_values = {i: x for i, x in aux.items() if x is not None}
    return _Step(inputs, used, template[0].replace(new), loss, aux_values), ends[0]


def _extras(result: StepResult, wanted: Sequence[int], number: int) -> list[Tensor]:
    tensors = list(tensors_in(result.aux)) if wanted else []
    if not set(wanted) <= set(result.attached):
        raise other_extras(number)
    return [tensors[i] for i in wanted]


def _vjp(
    step: _Step, cotangent: Cotangent, cotangents: StepCotangents
) -> tuple[Cotangent, list[Tensor | None]]:
    """One vector-Jacobian product, a function of the step's inputs and of the cotangents.

    Returns:
        the cotangents of ``step.inputs`` and of ``step.captured``.
    """
    outputs = step.after.tensors()
    pairs = [(outputs[path], c) for path, c in cotangent.items()]
    if cotangents.loss is not None:
        pairs.append((step.loss, cotangents.loss))
    pairs += [(step.aux[i], c) for i, c in cotangents.aux.items()]
    pairs = [(x, c) for x, c in pairs if x.requires_grad]
    sources = [x for x in (*step.inputs.values(), *step.captured) if x.requires_grad]
    pulled = dict(zip(sources, vjp(pairs, sources, create_graph=True), strict=True))
    before = {path: g for path, x in step.inputs.items() if (g := pulled.get(x)) is not None}
    return before, [pulled.get(x) for x in step.captured]
