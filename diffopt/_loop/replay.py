"""The derivative of the derivative: the way back through the loop as a differentiable function.

When a backward pass is itself recorded (``create_graph=True``, or an unroll inside an unroll), the
loop is replayed with every step recomputed on demand. States are held, T of them and then T
cotangents, and the graph of one step at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffopt._loop.loop import Loop, clip_norm
from diffopt._loop.recompute import Seen, recomputed
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path


def differentiable_backward(
    loop: Loop,
    generators: tuple[Tensor, ...],
    start: Mapping[Path, Tensor],
    captured: Sequence[Tensor],
    cotangent: Cotangent,
    loss_cotangents: Tensor | None,
) -> tuple[Cotangent, list[Tensor | None]]:
    """What ``run_backward`` computes, connected to ``start``, ``captured`` and the cotangents.

    Args:
        generators: where they stood at the start.
        start: the differentiable tensors of the start, connected to the caller's graph; what is
            missing is a constant.
    """
    with torch.enable_grad():
        # Aliases, so that a tensor behind another one is told apart from it.
        leaves = {path: x.view_as(x) for path, x in start.items()}
        seen = [x.view_as(x) for x in captured]
        state, losses = _forward(loop, generators, loop.start.replace(leaves), seen)
        outputs = state.tensors()
        pairs = [(x, cotangent[p]) for p, x in outputs.items() if cotangent.get(p) is not None]
        if loss_cotangents is not None:
            pairs.extend(zip(losses, loss_cotangents, strict=True))
        pairs = [(x, c) for x, c in pairs if x.requires_grad]
        inputs = [x for x in [*leaves.values(), *seen] if x.requires_grad]
        found: dict[Tensor, Tensor | None] = {}
        if pairs and inputs:
            grads = torch.autograd.grad(
                [x for x, _ in pairs],
                inputs,
                [c for _, c in pairs],
                create_graph=True,
                allow_unused=True,
            )
            found = dict(zip(inputs, grads, strict=True))
    before = {path: g for path, x in leaves.items() if (g := found.get(x)) is not None}
    return before, [found.get(x) for x in seen]


def _forward(
    loop: Loop,
    generators: tuple[Tensor, ...],
    state: State,
    captured: Sequence[Tensor],
) -> tuple[State, list[Tensor]]:
    losses = []
    for t in range(loop.steps):
        state, loss, generators = _step(loop, t, generators, state, captured)
        params = clip_cotangent(state.params, loop.max_cotangent_norm, loop.tasks)
        state = State(params, state.opt, state.buffers)
        losses.append(loss)
    return state, losses


def _step(
    loop: Loop,
    t: int,
    generators: tuple[Tensor, ...],
    state: State,
    captured: Sequence[Tensor],
) -> tuple[State, Tensor, tuple[Tensor, ...]]:
    paths = list(loop.step.differentiable(state))
    values = state.tensors()
    constant = state.detach()
    template: list[State] = []
    after: list[tuple[Tensor, ...]] = []

    def function(*leaves: Tensor) -> tuple[Tensor | None, ...]:
        loop.generators.set(generators)
        given = constant.replace(dict(zip(paths, leaves, strict=True)))
        result = loop.step(given, t, loop.checked(t))
        if not template:
            template.append(result.state.detach())
            loop.compare(t, result)
            after.append(loop.generators.get())
        flowing = loop.step.differentiable(result.state)
        return (result.loss, *flowing.values())

    @contextmanager
    def context() -> Iterator[bool]:
        with (
            loop.session(),
            loop.generators.undisturbed(),
            loop.captured.sealed(t) as shared,
        ):
            yield shared

    seen = Seen(loop.captured.edges(t), context)
    used = [captured[i] for i in loop.captured.at(t)]
    loss, *flowing = recomputed(function, seen, used, [values[path] for path in paths])
    assert loss is not None
    new: dict[Path, Any] = dict(zip(loop.step.differentiable(template[0]), flowing, strict=True))
    return template[0].replace(new), loss, after[0]


def clip_cotangent(
    params: Mapping[str, Tensor], max_norm: float | None, tasks: int | None
) -> Mapping[str, Tensor]:
    """``params``, with a bound on what flows back to them."""
    if max_norm is None:
        return params
    clipped = _ClipCotangent.apply((max_norm, tasks), *params.values())  # type: ignore[no-untyped-call]
    return dict(zip(params, clipped, strict=True))


class _ClipCotangent(torch.autograd.Function):
    """The identity; its backward bounds the joint norm of what flows back."""

    @staticmethod
    def forward(ctx: Any, bound: tuple[float, int | None], *tensors: Tensor) -> Any:
        ctx.bound = bound
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return (None, *clip_norm(cotangents, *ctx.bound))
