"""The state that a loop starts from, connected to the caller's graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from diffopt._model.precision import Precision
from diffopt._model.slots import ModuleSlots
from diffopt._unroll.problem import InnerProblem
from diffopt._unroll.unrolled import Unrolled
from diffopt._values.state import State
from diffopt._values.tree import Path
from diffopt.optim.mapped import init_over_tasks
from diffopt.optim.terms import Entries
from diffopt.schedule import check_kind

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
    opt_state: Mapping[str, Entries]
    if isinstance(initial, Unrolled):
        values = {**initial.params, **initial.buffers}
        opt_state = {name: initial.opt_state.get(name, {}) for name in inner}
        leads = set() if initial.tasks is None else {*values}
        opt_leads = set() if initial.tasks is None else {*initial.opt_state}
    else:
        values = _checked_values(initial, problem, buffers, tasks)
        opt_state = {name: x for name, x in problem.opt_state.items() if name in inner}
        originals = {**inner, **buffers}
        leads = {name for name, x in values.items() if x.dim() > originals[name].dim()}
        opt_leads = set()
    params = {name: values.get(name, x) for name, x in inner.items()}
    buffers = {name: values.get(name, x) for name, x in buffers.items()}
    state = State(params, opt_state, buffers)
    if tasks is not None:
        state = _spread(state, tasks, leads, opt_leads)
    state = Precision(inner).widened(state)
    first = init_over_tasks(problem.opt, tasks, state.params, groups=problem.inner_groups)
    entries = {name: _entries(first[name], state.opt.get(name, {})) for name in inner}
    return State(state.params, entries, state.buffers)


def buffers_at_start(slots: ModuleSlots, initial: Initial) -> dict[str, Tensor]:
    """The buffers at position 0, with the model's values where it has them.

    Steps may register or fill buffers, and remove them: then an earlier result has more or fewer.
    """
    if not isinstance(initial, Unrolled):
        return slots.buffers
    removed = initial._slots.buffers.keys() - initial.buffers.keys()
    added = {name: x for name, x in initial.buffers.items() if slots.has_place(name)}
    return {**added, **{name: x for name, x in slots.buffers.items() if name not in removed}}


def take_over(problem: InnerProblem, initial: Initial, tasks: int | None) -> None:
    """Let what an earlier unroll trained, and this one does not, stand in the model meanwhile.

    So blocks of a model can be trained in turn: each unroll continues from the last one, which had
    another optimizer, and the results carry the values and the optimizer state of all.
    """
    if not isinstance(initial, Unrolled):
        return
    _check_continues(initial, problem, tasks)
    others = {name: initial.params[name] for name in initial._inner if name not in problem.inner}
    if others and type(problem).slots is not InnerProblem.slots:
        raise NotImplementedError(
            f"initial has trained {next(iter(others))!r}, which opt does not hold, and a module of "
            "another library has no place for it: unroll the model itself"
        )
    if others and tasks is not None:
        raise ValueError(
            f"initial has trained {next(iter(others))!r}, which opt does not hold, and with "
            f"tasks={tasks} there is no constant for each task: build opt over all parameters that "
            "initial has trained, with lr=0 for those that are to stay"
        )
    problem.params = {**problem.params, **others}
    problem.taken_over = others
    problem.carried = {
        name: initial.opt_state[name] for name in others if name in initial.opt_state
    }


def _entries(first: Entries, present: Mapping[str, Tensor]) -> Entries:
    """The state that a parameter has, where it is of the optimizer's kind, or else a fresh one."""
    return {**first, **present} if first.keys() <= present.keys() else first


def _spread(state: State, tasks: int, leads: Collection[str], opt_leads: Collection[str]) -> State:
    """The state once for each task, without copying it; what is one number for all stays so.

    Args:
        leads: names of the parameters and buffers that have a value for each task already.
        opt_leads: names of those whose optimizer state has.
    """

    def is_for_all(path: Path, x: Tensor) -> bool:
        kind, name, *_ = path
        return (x.dim() > 0 and name not in opt_leads) if kind == "opt" else name not in leads

    shared = {path: x for path, x in state.tensors().items() if is_for_all(path, x)}
    return state.replace({path: x.expand(tasks, *x.shape) for path, x in shared.items()})


def _check_continues(initial: Unrolled, problem: InnerProblem, tasks: int | None) -> None:
    if initial.tasks is not None and initial.tasks != tasks:
        raise ValueError(
            f"initial was unrolled with tasks={initial.tasks}, and cannot be continued with "
            f"tasks={tasks}: pass tasks={initial.tasks}"
        )
    for name, x in initial.params.items():
        original = problem.params.get(name)
        lead = () if initial.tasks is None or x is original else (initial.tasks,)
        if original is None or x.shape != (*lead, *original.shape):
            here = "the model has no such"
            if original is not None:
                here = f"{tuple(original.shape)} in the model"
            raise ValueError(
                f"initial has no value that fits parameter {name!r}: it has shape "
                f"{tuple(x.shape)} there, and {here}: continue with the model that initial was "
                "unrolled from, or one built alike"
            )


def _checked_values(
    initial: Any, problem: InnerProblem, buffers: Mapping[str, Tensor], tasks: int | None
) -> dict[str, Tensor]:
    """Check the initial values, and name them as the loop does."""
    if initial is None:
        return {}
    advice = "pass an Unrolled, or a dict of tensors by parameter name"
    check_kind("initial", initial, Mapping, advice)
    if {"params", "opt_state"} <= set(initial):
        raise ValueError(
            "initial is the state_dict() of an Unrolled: write "
            "fast = diffopt.unroll(model, opt, 0); fast.load_state_dict(...), and pass initial=fast"
        )
    aliases = _aliases(problem)
    originals = {**problem.inner, **buffers}
    values: dict[str, Tensor] = {}
    for key, x in initial.items():
        name = aliases.get(key, key)
        if name not in originals:
            raise ValueError(
                f"initial has a value for {key!r}, which is not an inner variable: use names of "
                "the optimizer's parameters that require grad, such as "
                f"{next(iter(problem.inner))!r}, and of the model's buffers"
            )
        _check_value(key, x, originals[name], tasks)
        if name in values and values[name] is not x and not torch.equal(values[name], x):
            raise ValueError(
                f"initial has different values for {name!r} and {key!r}, which are one tensor in "
                "the model: give one of them"
            )
        values[name] = x
    return values


def _aliases(problem: InnerProblem) -> dict[str, str]:
    """The further names that a state dict has for tensors that are held at several places."""
    model, first, aliases = problem.model, dict[int, str](), dict[str, str]()
    for name, x in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        aliases[name] = first.setdefault(id(x), name)
    return aliases


def _check_value(name: str, x: Any, original: Tensor, tasks: int | None) -> None:
    check_kind(f"initial[{name!r}]", x, Tensor, "pass a tensor")
    shapes = [tuple(original.shape)]
    if tasks is not None:
        shapes.append((tasks, *original.shape))
    if tuple(x.shape) not in shapes:
        raise ValueError(
            f"initial[{name!r}] has shape {tuple(x.shape)}, the parameter has "
            + " or, with one value a task, ".join(map(str, shapes))
            + ": pass a value of that shape"
        )
    if (x.dtype, x.device) != (original.dtype, original.device):
        raise ValueError(
            f"initial[{name!r}] is {x.dtype} on {x.device}, the parameter {original.dtype} on "
            f"{original.device}: convert it with .to('{original.device}', {original.dtype})"
        )
