"""The vector-Jacobian product of an optimizer's update.

A rule may state the product by hand (``Optimizer._vjp``): a dozen passes over the parameters,
where the graph of the update has twice as many nodes. The product by hand serves param groups whose
options are all numbers. Autograd differentiates the update of other groups and of other rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt._values.tree import vjp
from diffopt.optim.base import Optimizer, OptState
from diffopt.optim.groups import Grads, Groups, Params, States
from diffopt.optim.mapped import is_elementwise, update_over_tasks
from diffopt.optim.terms import Hyper, Pullback, tensors_of, zeros


class UpdateCotangents(NamedTuple):
    """What flows back through an update; a missing name stands for zero."""

    params: dict[str, Tensor]
    grads: dict[str, Tensor]
    state: OptState
    captured: list[Tensor | None]


def update_vjp(
    opt: Optimizer,
    params: Params,
    grads: Grads,
    state: States,
    cot_params: Params,
    cot_state: States,
    *,
    hyper: Sequence[Hyper],
    groups: Groups,
    tasks: int | None = None,
    captured: Sequence[Any] = (),
    retain_graph: bool = False,
) -> UpdateCotangents:
    """Carry cotangents of ``update_over_tasks``'s results back to its arguments.

    Args:
        opt: the rule.
        params, grads, state: the arguments of the update; their graphs are not looked at.
        cot_params, cot_state: cotangents of its results, by name.
        hyper, groups, tasks: as for ``update_over_tasks``.
        captured: further tensors or gradient edges to differentiate with respect to, those that
            hyperparameters are made of.
        retain_graph: keep the graphs behind ``captured``.
    """
    update = _Update(opt, tasks, params, grads, state, cot_params, cot_state)
    cotangents = UpdateCotangents(
        dict(cot_params),
        {},
        {name: dict(entries) for name, entries in cot_state.items()},
        [None] * len(captured),
    )
    remaining: list[list[str]] = []  # of each group, the names that autograd has to see to
    for rule, names, options in zip(opt.rules, groups, hyper, strict=True):
        flowing = [
            n for n in names if grads.get(n) is not None and (n in cot_params or cot_state.get(n))
        ]
        by_hand = flowing and has_own_vjp(rule, options, tasks)
        result = rule._vjp(update.pullback(flowing, options)) if by_hand else None
        remaining.append([] if result else flowing)
        if result:
            cotangents.params.update(zip(flowing, result.params, strict=True))
            cotangents.grads.update(zip(flowing, result.grads, strict=True))
            cotangents.state.update(zip(flowing, result.states, strict=True))
    if any(remaining):
        rest = _by_autograd(update, hyper, remaining, captured, retain_graph)
        for name in chain.from_iterable(remaining):
            cotangents.params.pop(name, None)
            cotangents.state.pop(name, None)
        cotangents.params.update(rest.params)
        cotangents.grads.update(rest.grads)
        cotangents.state.update(rest.state)
        cotangents.captured[:] = rest.captured
    return cotangents


def has_own_vjp(rule: Optimizer, hyper: Hyper, tasks: int | None) -> bool:
    """Whether the derivative that a rule states by hand counts for its update with ``hyper``."""
    if tensors_of([hyper]) or not rule._declares("_vjp"):
        return False
    return tasks is None or is_elementwise(rule)


def is_known(opt: Optimizer, hyper: Sequence[Hyper], tasks: int | None) -> bool:
    """Whether every rule is a function of its arguments alone, whose derivative is known."""
    return all(
        rule.is_pure or has_own_vjp(rule, options, tasks)
        for rule, options in zip(opt.rules, hyper, strict=True)
    )


def reads_gradients(
    opt: Optimizer,
    grads: Params,
    state: States,
    *,
    hyper: Sequence[Hyper],
    groups: Groups,
    tasks: int | None = None,
) -> bool:
    """Whether ``update_vjp`` looks at the values of the gradients."""
    return any(
        not has_own_vjp(rule, options, tasks)
        or rule._vjp_reads_gradients([state[n] for n in names if n in grads])
        for rule, names, options in zip(opt.rules, groups, hyper, strict=True)
    )


@dataclass(frozen=True, slots=True)
class _Update:
    """The arguments of an update, and cotangents of its results."""

    opt: Optimizer
    tasks: int | None
    params: Params
    grads: Grads
    state: States
    cot_params: Params
    cot_state: States

    def pullback(self, names: Sequence[str], hyper: Hyper) -> Pullback:
        """The part of one param group: of the parameters ``names``, all of which have gradients."""
        params, cot_params = self.params, self.cot_params
        return Pullback(
            hyper,
            [params[n] for n in names],
            [g for n in names if (g := self.grads[n]) is not None],
            [dict(self.state[n]) for n in names],
            [cot_params[n] if n in cot_params else zeros(params[n]) for n in names],
            [dict(self.cot_state.get(n, {})) for n in names],
        )


def _by_autograd(
    update: _Update,
    hyper: Sequence[Hyper],
    groups: Groups,
    captured: Sequence[Any],
    retain_graph: bool,
) -> UpdateCotangents:
    """``update_vjp`` by the graph of the update, for the names in ``groups``, with gradients."""
    names = list(chain.from_iterable(groups))
    params = {name: _leaf(update.params[name]) for name in names}
    grads = {name: _leaf(g) for name in names if (g := update.grads[name]) is not None}
    state = {
        name: {key: _state_leaf(key, x) for key, x in update.state[name].items()} for name in names
    }
    with torch.enable_grad():
        new_params, new_state = update_over_tasks(
            update.opt, update.tasks, params, grads, state, hyper=hyper, groups=groups
        )
    pairs = [(x, update.cot_params[n]) for n, x in new_params.items() if n in update.cot_params]
    for name, entries in new_state.items():
        cot_entries = update.cot_state.get(name, {})
        pairs.extend((x, cot_entries[key]) for key, x in entries.items() if key in cot_entries)
    inputs: list[Any] = [
        *params.values(),
        *grads.values(),
        *(x for _, _, x in _flowing(state)),
        *captured,
    ]
    flowing = ((x, c) for x, c in pairs if x.requires_grad)
    cots = iter(vjp(flowing, inputs, retain_graph=retain_graph))
    to_params = {n: c for n in params if (c := next(cots)) is not None}
    to_grads = {n: c for n in grads if (c := next(cots)) is not None}
    to_state: OptState = {name: {} for name in state}
    for name, key, _ in _flowing(state):
        if (c := next(cots)) is not None:
            to_state[name][key] = c
    return UpdateCotangents(to_params, to_grads, to_state, list(cots))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _state_leaf(key: str, x: Tensor) -> Tensor:
    return _leaf(x) if x.is_floating_point() and key != "step" else x


def _flowing(state: OptState) -> Iterator[tuple[str, str, Tensor]]:
    """The entries that carry derivatives."""
    for name, entries in state.items():
        for key, x in entries.items():
            if x.requires_grad:
                yield name, key, x
