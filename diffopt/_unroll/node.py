"""The whole loop as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt._derivatives.sharded import unsharded
from diffopt._loop.executor import pass_through
from diffopt._loop.extras import AuxKey, connected
from diffopt._loop.loop import Loop
from diffopt._loop.warned import Warned
from diffopt._step.unchanged import Unchanged
from diffopt._torch.engine import keeps_graph, shielded
from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import State
from diffopt._values.tree import Path
from diffopt.adjoint import Adjoint


@dataclass
class _Run:
    """A loop that has been run; a node has none once what it needs has been used up.

    Attributes:
        loop, adjoint: what was run, and how its derivative is computed.
        kept: what the adjoint needs for that.
        paths: of the tensors of the final state. Not the tensors, which hold this object.
        aux_keys: of the tensors of the extras that derivatives flow to.
        used: tensors that the steps may read again.
        warned: what was shown of warnings in the first pass.
    """

    loop: Loop
    adjoint: Adjoint
    kept: Any
    paths: list[Path]
    aux_keys: list[AuxKey]
    used: Unchanged
    warned: Warned


#: The final state, the losses, shape (T,), and the extras.
Results = tuple[State, Tensor, list[Any]]


def run_connected(loop: Loop, adjoint: Adjoint, guarded: Sequence[Tensor]) -> Results:
    """Run ``loop`` and connect its results to the caller's graph.

    Args:
        guarded: further tensors that the way back will read again: that they were not changed in
            place meanwhile is checked, as for every input.
    """
    warned = Warned()
    with loop.together(), loop.first_session(), warned.first():
        final, kept = adjoint.forward(loop)
    loop.options.end()  # they may hold the results, which will hold the loop
    used = loop.observer.end()
    final = _owned(final, loop)
    values = final.tensors()
    trees, attached = loop.extras.take()
    run = _Run(loop, adjoint, kept, list(values), list(attached), used, warned)
    flowing = loop.step.differentiable(final).keys()
    apply: Any = _Unrolling.apply
    with shielded():
        results = apply(
            run,
            list(guarded),
            [_losses(loop), *values.values(), *attached.values()],
            [x for path, x in values.items() if path not in flowing],
            *loop.inputs.values(),
            *loop.captured.tensors,
        )
    flat = iter(results)
    losses = next(flat)
    state = final.replace({path: next(flat) for path in values})
    return state, losses, connected(trees, {key: next(flat) for key in attached})


def run_detached(loop: Loop) -> Results:
    """Run ``loop`` for its results alone: nothing is kept."""
    with loop.together(), loop.first_session():
        state = pass_through(loop)
    loop.observer.end()
    return _owned(state, loop), _losses(loop), loop.extras.take()[0]


def _losses(loop: Loop) -> Tensor:
    losses = loop.losses.all()
    return next(iter(loop.start.params.values())).new_zeros(0) if losses is None else losses.clone()


def _owned(final: State, loop: Loop) -> State:
    """The caller may change results and start in place: they share no memory."""
    return final if loop.steps else final.apart_from(final)


class _Unrolling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: _Run,
        guarded: list[Tensor],
        results: list[Tensor],
        constants: list[Tensor],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.inputs = run, len(inputs)
        ctx.save_for_backward(*inputs, *guarded)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*constants)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, losses: Tensor | None, *cotangents: Tensor | None) -> Any:
        inputs = ctx.saved_tensors[: ctx.inputs]  # also checks that nothing was changed in place
        run: _Run | None = ctx.run
        if run is None:
            raise RuntimeError(
                "a backward pass through this unroll was interrupted, and what it needs is partly "
                "used up: call diffopt.unroll again, or backward(retain_graph=True) the first time"
            )
        loop, adjoint = run.loop, run.adjoint
        with loop.together(), run.warned.again():
            run.used.check()
            flat = iter(cotangents)
            cotangent = {path: g for path in run.paths if (g := next(flat)) is not None}
            aux: dict[int, dict[int, Tensor]] = {}
            for t, i in run.aux_keys:
                if (g := next(flat)) is not None:
                    aux.setdefault(t, {})[i] = g
            outputs = OutputCotangents(losses, aux)
            try:
                if torch.is_grad_enabled():
                    n = len(loop.inputs)
                    before, captured = adjoint.differentiable_backward(
                        loop,
                        run.kept,
                        dict(zip(loop.inputs, inputs[:n], strict=True)),
                        inputs[n:],
                        cotangent,
                        outputs,
                    )
                else:
                    keep = keeps_graph()
                    if not keep:
                        ctx.run = None  # as autograd frees what it saved
                    with loop.session(), loop.generators.undisturbed():
                        before, captured = adjoint.backward(
                            loop, run.kept, cotangent, outputs, keep=keep
                        )
            except Exception:
                if loop.ledger is None:  # which says more
                    loop.settle()  # a step that is not what it was is the better reason
                raise
            loop.settle()
        cotangents_of_inputs = [*(before.get(path) for path in loop.inputs), *captured]
        return (*(None,) * 4, *unsharded(cotangents_of_inputs, inputs))
