"""Rules for the parameters of several tasks at once, which lead with a task dimension.

An elementwise rule updates each number by itself, and takes such parameters as they are. Any other
rule would mix the tasks (a norm of the parameter, a mean over its rows), and so would options that
differ between the tasks: ``torch.vmap`` then maps the rule, which sees one task. State with a
dimension leads with the tasks, too; all tasks share 0-dimensional state, such as step counts.

Limits: what ``torch.vmap`` cannot map (control flow by a tensor's value, ``.item()``) is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt._torch.functorch import is_batched
from diffopt._torch.pytree import tree_flatten, tree_unflatten
from diffopt.optim.base import Optimizer, OptState
from diffopt.optim.groups import Grads, Groups, Params, States
from diffopt.optim.options import broadcasts, items_of
from diffopt.optim.terms import Hyper, tensors_of


def is_elementwise(rule: Optimizer) -> bool:
    """Whether the class that states the rule says that it updates each number by itself."""
    return rule._declares("elementwise") and rule.elementwise


def init_over_tasks(
    opt: Optimizer,
    tasks: int | None,
    params: Params,
    *,
    groups: Groups,
    hyper: Sequence[Hyper] | None = None,
) -> OptState:
    """``opt.init``, for parameters that lead with the tasks unless ``tasks`` is None."""
    state: OptState = {}
    if hyper is None:  # whether the tasks differ, the values tell
        hyper = opt.at_start() if tasks is None else opt.hyperparameters(0)
    for part in _parts(opt, groups, hyper):
        initial = {name: params[name] for name in chain.from_iterable(part.groups)}
        state.update(_applied(part, tasks, part.rule.init, initial))
    return {name: state[name] for name in params if name in state}


def update_over_tasks(
    opt: Optimizer,
    tasks: int | None,
    params: Params,
    grads: Grads,
    state: States,
    *,
    hyper: Sequence[Hyper],
    groups: Groups,
) -> tuple[dict[str, Tensor], OptState]:
    """``opt.update``, for tensors that lead with the tasks unless ``tasks`` is None.

    A tensor among ``hyper`` holds, under tasks, one value for each task, or for each entry of the
    parameters, or for both: a shape (N,), one that broadcasts against them, or N before such a one.

    Raises:
        ValueError: a tensor's shape says both that its values are the tasks' and the entries'.
        RuntimeError: ``torch.vmap`` cannot map the rule.
    """
    if tasks is None and opt.rules[0] is opt:
        return opt.update(params, grads, state, hyper=hyper, groups=groups)
    new_params = dict(params)
    new_state: dict[str, Any] = dict(state)
    for part in _parts(opt, groups, hyper):
        updating = [[n for n in group if grads.get(n) is not None] for group in part.groups]
        part, names = part._replace(groups=updating), list(chain.from_iterable(updating))
        if not names:
            continue
        updated = {name: params[name] for name in names}
        entries = {name: dict(state[name]) for name in names if name in state}
        present = {name: grads[name] for name in names}
        rule = part.rule
        values, new_entries = _applied(part, tasks, rule.update, updated, present, entries)
        new_params.update(values)
        new_state.update(new_entries)
    return new_params, new_state


class _Part(NamedTuple):
    """The param groups of one rule, in the rule's order."""

    rule: Optimizer
    groups: Groups
    hyper: Sequence[Hyper]


def _parts(opt: Optimizer, groups: Groups, hyper: Sequence[Hyper]) -> list[_Part]:
    every = groupby(zip(opt.rules, groups, hyper, strict=True), key=lambda group: id(group[0]))
    of_rules = (zip(*of_rule, strict=True) for _, of_rule in every)
    return [_Part(rules[0], names, options) for rules, names, options in of_rules]


def _applied(
    part: _Part, tasks: int | None, method: Callable[..., Any], params: Params, *rest: Any
) -> Any:
    """The rule's ``init`` or ``update``, mapped over the tasks where it has to be."""

    def call(hyper: Sequence[Hyper], *arguments: Any) -> Any:
        return method(*arguments, groups=part.groups, hyper=hyper)

    if tasks is None or not _is_mapped(part, params, *rest[1:]):
        return call(part.hyper, params, *rest)
    hyper = [dict(options) for options in part.hyper]
    arguments, spec = tree_flatten((hyper, params, *rest))
    of_hyper = _dims(part, tasks, params)
    of_rest = arguments[len(of_hyper) :]
    dims = [*of_hyper, *(0 if isinstance(x, Tensor) and x.dim() else None for x in of_rest)]
    results: list[Any] = []

    def one(*leaves: Any) -> list[Tensor]:
        leaves_out, out_spec = tree_flatten(call(*tree_unflatten(list(leaves), spec)))
        shared = [None if x.dim() or is_batched(x) else x for x in leaves_out]
        results[:] = [shared, out_spec]
        return [x for x, same in zip(leaves_out, shared, strict=True) if same is None]

    try:
        outputs = iter(torch.vmap(one, in_dims=tuple(dims), randomness="different")(*arguments))
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        name = type(part.rule).__name__
        raise RuntimeError(
            f"the rule of {name} cannot be mapped over the tasks of tasks={tasks}: write it in "
            "operations on tensors, without .item() or an if that reads a tensor; or, if it "
            f"updates each entry of a parameter by itself, declare `elementwise = True` in the "
            f"class. PyTorch says: {error}"
        ) from error
    shared, out_spec = results
    leaves = [next(outputs) if same is None else same for same in shared]
    return tree_unflatten(leaves, out_spec)


def _is_mapped(part: _Part, params: Params, state: States | None = None) -> bool:
    """Whether tasks differ in more than the entries of their parameters."""
    if not is_elementwise(part.rule):
        return True
    return any(x.dim() and x.numel() > 1 for x in tensors_of(part.hyper)) or any(
        x.dim() and x.shape != params[name].shape
        for name, entries in (state or {}).items()
        for x in entries.values()
    )


def _dims(part: _Part, tasks: int, params: Params) -> list[int | None]:
    """Which dimension of each leaf among the options holds the tasks, if one does."""
    dims: list[int | None] = []
    for names, options in zip(part.groups, part.hyper, strict=True):
        shapes = {name: params[name].shape[1:] for name in names}
        for key, value in options.items():
            dims += [_dim(part.rule, key, x, tasks, shapes) for x in items_of(value)]
    return dims


def _dim(
    rule: Optimizer, key: str, x: Any, tasks: int, shapes: Mapping[str, torch.Size]
) -> int | None:
    if not isinstance(x, Tensor) or not x.dim() or x.numel() == 1:
        return None
    leads = x.shape[0] == tasks and all(
        broadcasts(x.shape[1:], s) or x[0].numel() == 1 for s in shapes.values()
    )
    if not leads or tasks == 1:
        return 0 if leads else None
    ambiguous = [name for name, s in shapes.items() if broadcasts(x.shape, s)]
    if len(ambiguous) == len(shapes) and shapes:
        ones = ", ".join("1" for _ in range(max(len(s) for s in shapes.values())))
        raise ValueError(
            f"{type(rule).__name__}: with tasks={tasks}, {key} of shape {tuple(x.shape)} may hold "
            f"one value for each task or for entries of parameter {ambiguous[0]!r}: for the tasks "
            f"write {key}=lambda t: value.reshape({tasks}, {ones}), for the entries "
            f"{key}=lambda t: value.expand({tasks}, *parameter.shape)"
        )
    return 0
