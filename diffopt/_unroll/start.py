"""The state that a loop starts from, connected to the caller's graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffopt._model.precision import Precision
from diffopt._unroll.problem import InnerProblem
from diffopt._unroll.unrolled import Unrolled
from diffopt._values.state import State
from diffopt.optim.mapped import init_over_tasks

Initial = Unrolled | Mapping[str, Tensor] | None


def start_state(
    problem: InnerProblem,
    buffers: Mapping[str, Tensor],
    initial: Initial,
    tasks: int | None,
) -> State:
    """Parameters, optimizer state and buffers at position 0.

    Args:
        problem: knows the present values of all but the buffers.
        buffers: the model's own, by name.
        initial: what the caller wants to start from instead.
        tasks: N, where every tensor is to lead with the task dimension.
    """
    inner = problem.inner
    # A copy, so that using the model before the backward pass does not disturb the recomputation.
    buffers = {name: x if x.requires_grad else x.clone() for name, x in buffers.items()}
    if isinstance(initial, Unrolled):
        _check_continues(initial, inner, tasks)
        params = {name: initial.params[name] for name in inner}
        buffers.update({name: x for name, x in initial.buffers.items() if name in buffers})
        state = State(params, {name: initial.opt_state.get(name, {}) for name in inner}, buffers)
        fresh = initial.tasks is None
    else:
        _check_initial(initial, inner, tasks)
        held = {name: x for name, x in problem.opt_state.items() if name in inner}
        state = State({**inner, **(initial or {})}, held, buffers)
        fresh = True
    if tasks is not None and fresh:
        state = _spread(state, inner, tasks)
    state = Precision(inner).widened(state)
    first = init_over_tasks(problem.opt, tasks, state.params, groups=problem.inner_groups)
    entries = {name: {**first[name], **state.opt.get(name, {})} for name in inner}
    return State(state.params, entries, state.buffers)


def _spread(state: State, inner: Mapping[str, Tensor], tasks: int) -> State:
    """The state once for each task, without copying it; what is one number for all stays so."""

    def each(x: Tensor) -> Tensor:
        return x.expand(tasks, *x.shape)

    return State(
        {n: each(x) if x.dim() == inner[n].dim() else x for n, x in state.params.items()},
        {
            name: {key: each(x) if x.dim() else x for key, x in entries.items()}
            for name, entries in state.opt.items()
        },
        {name: each(x) for name, x in state.buffers.items()},
    )


def _check_continues(initial: Unrolled, inner: Mapping[str, Tensor], tasks: int | None) -> None:
    if initial.tasks is not None and initial.tasks != tasks:
        raise ValueError(
            f"initial was unrolled with tasks={initial.tasks}, and cannot be continued with "
            f"tasks={tasks}: pass tasks={initial.tasks}"
        )
    for name, x in inner.items():
        shape = x.shape if initial.tasks is None else (initial.tasks, *x.shape)
        if name not in initial.params or initial.params[name].shape != shape:
            raise ValueError(
                f"initial has no value that fits parameter {name!r}: continue with the same "
                "model and with an optimizer over the same parameters"
            )


def _check_initial(initial: Any, inner: Mapping[str, Tensor], tasks: int | None) -> None:
    if initial is None:
        return
    if not isinstance(initial, Mapping):
        raise TypeError(
            f"initial is a {type(initial).__name__}: pass an Unrolled, or a dict of tensors by "
            "parameter name"
        )
    for name, x in initial.items():
        if name not in inner:
            raise ValueError(
                f"initial has a value for {name!r}, which is not an inner variable: use names of "
                f"the optimizer's parameters that require grad, such as {next(iter(inner))!r}"
            )
        if not isinstance(x, Tensor):
            raise TypeError(f"initial[{name!r}] is a {type(x).__name__}: pass a tensor")
        shapes = [tuple(inner[name].shape)]
        if tasks is not None:
            shapes.append((tasks, *inner[name].shape))
        if tuple(x.shape) not in shapes:
            raise ValueError(
                f"initial[{name!r}] has shape {tuple(x.shape)}, the parameter has "
                + " or, with one value a task, ".join(map(str, shapes))
                + ": pass a value of that shape"
            )
        wanted = inner[name]
        if (x.dtype, x.device) != (wanted.dtype, wanted.device):
            raise ValueError(
                f"initial[{name!r}] is {x.dtype} on {x.device}, the parameter {wanted.dtype} on "
                f"{wanted.device}: convert it with .to('{wanted.device}', {wanted.dtype})"
            )
