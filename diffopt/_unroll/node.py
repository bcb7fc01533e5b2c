"""The whole loop as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt._compile.environment import Unchanged
from diffopt._loop.loop import Loop
from diffopt._values.state import State
from diffopt._values.tree import Path
from diffopt.adjoint import Adjoint


def run_connected(
    loop: Loop, adjoint: Adjoint, guarded: Sequence[Tensor], seen: Unchanged
) -> tuple[State, Tensor]:
    """Run ``loop`` and connect its results to the caller's graph.

    Args:
        guarded: further tensors that the way back will read again: that they were not changed in
            place meanwhile is checked, as for every input.
        seen: tensors that the steps may read again; those that they change themselves are left
            alone.

    Returns:
        the final state and the losses, shape (T,).
    """
    with loop.session():
        final, kept = adjoint.forward(loop)
    seen.settle()
    final = _owned(final, loop)
    losses = _losses(loop)
    values = final.tensors()
    results = _Unrolling.apply(  # type: ignore[no-untyped-call]
        loop,
        adjoint,
        kept,
        list(loop.inputs),
        (list(values), (losses, *values.values()), set(loop.step.differentiable(final))),
        (list(guarded), seen),
        *loop.inputs.values(),
        *loop.captured.tensors,
    )
    connected = dict(zip(values, results[1:], strict=True))
    return final.replace(connected), results[0]


def run_detached(loop: Loop) -> tuple[State, Tensor]:
    """Run ``loop`` for its results alone: nothing is kept."""
    state = loop.start
    with loop.session():
        for t in range(loop.steps):
            state = loop.first(state, t)
    return _owned(state, loop), _losses(loop)


def _losses(loop: Loop) -> Tensor:
    losses = loop.losses.all()
    return next(iter(loop.start.params.values())).new_zeros(0) if losses is None else losses


def _owned(final: State, loop: Loop) -> State:
    """The caller may change results and start in place: they share no memory."""
    return final if loop.steps else final.apart_from(final)


class _Unrolling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loop: Loop,
        adjoint: Adjoint,
        kept: Any,
        start_paths: list[Path],
        outcome: tuple[list[Path], tuple[Tensor, ...], set[Path]],
        guards: tuple[list[Tensor], Unchanged],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        paths, results, differentiable = outcome
        ctx.loop, ctx.adjoint, ctx.kept = loop, adjoint, kept
        ctx.start_paths, ctx.paths = start_paths, paths
        ctx.inputs = len(inputs)
        guarded, ctx.seen = guards
        ctx.save_for_backward(*inputs, *guarded)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(x for path, x in zip(paths, results[1:], strict=True) if path not in differentiable)
        )
        return results

    @staticmethod
    def backward(ctx: Any, losses: Tensor | None, *cotangents: Tensor | None) -> Any:
        inputs = ctx.saved_tensors[: ctx.inputs]  # also checks that nothing was changed in place
        ctx.seen.check()
        loop, adjoint, n, kept = ctx.loop, ctx.adjoint, len(ctx.start_paths), ctx.kept
        if kept is None:
            raise RuntimeError(
                "a backward pass through this unroll was interrupted, and what it needs is partly "
                "used up: call diffopt.unroll again, or backward(retain_graph=True) the first time"
            )
        cotangent = {
            path: g for path, g in zip(ctx.paths, cotangents, strict=True) if g is not None
        }
        if torch.is_grad_enabled():
            before, captured = adjoint.differentiable_backward(
                loop,
                kept,
                dict(zip(ctx.start_paths, inputs[:n], strict=True)),
                inputs[n:],
                cotangent,
                losses,
            )
        else:
            keep = _keeps_graph()
            if not keep:
                ctx.loop = ctx.kept = None  # as autograd frees what it saved
            with loop.session(), loop.generators.undisturbed():
                before, captured = adjoint.backward(loop, kept, cotangent, losses, keep=keep)
        return (*(None,) * 6, *(before.get(path) for path in ctx.start_paths), *captured)


def _keeps_graph() -> bool:
    """Whether the backward pass now running was asked to retain the graph."""
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:  # pragma: no cover - a PyTorch without it: keep, to be safe
        return True
