"""The vector-Jacobian product of an optimizer's update.

A rule may state its own (``Optimizer._vjp``): a dozen passes over the parameters instead of the
graph of the update, which has twice as many nodes. It counts where every option is a plain number;
otherwise, and for rules that state none, autograd differentiates the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from diffopt.optim.terms import Entries, Hyper, tensors_of, zeros

if TYPE_CHECKING:
    from diffopt.optim.base import Optimizer

ByName = dict[str, Tensor]
StateByName = dict[str, Entries]


class UpdateCotangents(NamedTuple):
    """What flows back through an update; a missing name stands for zero."""

    params: ByName
    grads: ByName
    state: StateByName
    seen: list[Tensor | None]


def update_vjp(
    opt: Optimizer,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor | None],
    state: Mapping[str, Mapping[str, Tensor]],
    cot_params: Mapping[str, Tensor],
    cot_state: Mapping[str, Mapping[str, Tensor]],
    *,
    hyper: Sequence[Hyper],
    groups: Sequence[Sequence[str]],
    seen: Sequence[Any] = (),
    retain_graph: bool = False,
) -> UpdateCotangents:
    """Carry cotangents of ``opt.update``'s results back to its arguments.

    Args:
        opt: the rule.
        params, grads, state: the arguments of the update; their graphs are not looked at.
        cot_params, cot_state: cotangents of its results, by name.
        hyper, groups: as for ``update``.
        seen: further tensors or gradient edges to differentiate with respect to, those that
            hyperparameters are made of.
        retain_graph: keep the graphs behind ``seen``.
    """
    by_hand = _by_hand(opt, params, grads, state, cot_params, cot_state, hyper, groups)
    if by_hand is not None:
        return by_hand._replace(seen=[None] * len(seen))
    return _by_autograd(
        opt, params, grads, state, cot_params, cot_state, hyper, groups, seen, retain_graph
    )


def reads_gradients(
    opt: Optimizer,
    grads: Mapping[str, Tensor],
    state: Mapping[str, Mapping[str, Tensor]],
    *,
    hyper: Sequence[Hyper],
    groups: Sequence[Sequence[str]],
) -> bool:
    """Whether ``update_vjp`` looks at the values of the gradients."""
    return not states_own_vjp(type(opt)) or any(
        tensors_of([options]) or opt._vjp_reads_gradients([state[n] for n in names if n in grads])
        for names, options in zip(groups, hyper, strict=True)
    )


def _by_hand(
    opt: Optimizer,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor | None],
    state: Mapping[str, Mapping[str, Tensor]],
    cot_params: Mapping[str, Tensor],
    cot_state: Mapping[str, Mapping[str, Tensor]],
    options: Sequence[Hyper],
    groups: Sequence[Sequence[str]],
) -> UpdateCotangents | None:
    if not states_own_vjp(type(opt)):
        return None
    found = UpdateCotangents(dict(cot_params), {}, {n: dict(s) for n, s in cot_state.items()}, [])
    for names, hyper in zip(groups, options, strict=True):
        given = [n for n in names if grads.get(n) is not None]
        flowing = [n for n in given if n in cot_params or cot_state.get(n)]
        if not flowing:
            continue
        if tensors_of([hyper]):
            return None
        own = [params[n] for n in flowing]
        result = opt._vjp(
            hyper,
            own,
            [g for n in flowing if (g := grads[n]) is not None],
            [dict(state[n]) for n in flowing],
            [cot_params[n] if n in cot_params else zeros(params[n]) for n in flowing],
            [dict(cot_state.get(n, {})) for n in flowing],
        )
        if result is None:
            return None
        for name, p, g, s in zip(flowing, *result, strict=True):
            found.params[name], found.grads[name], found.state[name] = p, g, s
    return found


def states_own_vjp(rule: type) -> bool:
    """Whether ``_vjp`` belongs to the rule, not to another one that it inherits from."""
    for cls in rule.__mro__:
        if "_vjp" in cls.__dict__:
            return True
        if "_update" in cls.__dict__ or "update" in cls.__dict__:
            return False
    return False


def _by_autograd(
    opt: Optimizer,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor | None],
    state: Mapping[str, Mapping[str, Tensor]],
    cot_params: Mapping[str, Tensor],
    cot_state: Mapping[str, Mapping[str, Tensor]],
    options: Sequence[Hyper],
    groups: Sequence[Sequence[str]],
    seen: Sequence[Any],
    retain_graph: bool,
) -> UpdateCotangents:
    p = {name: _leaf(x) for name, x in params.items()}
    g = {name: x if x is None else _leaf(x) for name, x in grads.items()}
    s = {name: {k: _state_leaf(k, x) for k, x in held.items()} for name, held in state.items()}
    with torch.enable_grad():
        new_params, new_state = opt.update(p, g, s, hyper=options, groups=groups)
    pairs = [(x, cot_params[n]) for n, x in new_params.items() if n in cot_params]
    for name, held in new_state.items():
        given = cot_state.get(name, {})
        pairs.extend((x, given[key]) for key, x in held.items() if key in given)
    pairs = [(x, c) for x, c in pairs if x.requires_grad]
    leaves: list[Any] = [
        *p.values(),
        *(x for x in g.values() if x is not None),
        *(x for _, _, x in _flowing(s)),
    ]
    found: Sequence[Tensor | None] = [None] * (len(leaves) + len(seen))
    if pairs:
        found = torch.autograd.grad(
            [x for x, _ in pairs],
            [*leaves, *seen],
            [c for _, c in pairs],
            retain_graph=retain_graph,
            allow_unused=True,
        )
    cots = iter(found)
    to_params = {n: c for n in p if (c := next(cots)) is not None}
    to_grads = {n: c for n, x in g.items() if x is not None and (c := next(cots)) is not None}
    to_state: StateByName = {name: {} for name in s}
    for name, key, _ in _flowing(s):
        if (c := next(cots)) is not None:
            to_state[name][key] = c
    return UpdateCotangents(to_params, to_grads, to_state, list(cots))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _state_leaf(key: str, x: Tensor) -> Tensor:
    return _leaf(x) if x.is_floating_point() and key != "step" else x


def _flowing(state: StateByName) -> Iterator[tuple[str, str, Tensor]]:
    """The entries that carry derivatives."""
    for name, entries in state.items():
        for key, x in entries.items():
            if x.requires_grad:
                yield name, key, x
