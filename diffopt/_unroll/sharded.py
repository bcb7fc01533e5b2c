"""An unroll of parameters that are ``DTensor``s: what is refused, and the rules' options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from diffopt._derivatives.sharded import Processes, holds_several, spread
from diffopt._loop.durable import Durable
from diffopt._model.shards import Shards
from diffopt._step.group import Group
from diffopt._torch.dtensors import is_dtensor
from diffopt._unroll.problem import InnerProblem, frozen
from diffopt.adjoint import Adjoint, ForwardMode, Implicit
from diffopt.optim import Joint, Muon, Optimizer
from diffopt.optim.mapped import is_elementwise


def share_out(
    problem: InnerProblem, adjoint: Adjoint, group: Any, tasks: int | None, compile: bool
) -> None:
    """Have ``problem`` update parameters that are ``DTensor``s by their parts.

    What flows to an option is the sum over the processes of what flows to it from their parts, and
    not from parameters that each has whole. So the param groups are split by who holds parts.

    Raises:
        NotImplementedError: such parameters do not serve an argument, a rule does not act entry by
            entry, or an option has entries.
    """
    shards = Shards.among(problem.inner, problem.constants)
    if shards is None:
        return
    name = next(name for name, x in problem.params.items() if is_dtensor(x))
    for reason in _reasons(problem, adjoint, tasks, compile):
        raise NotImplementedError(f"parameter {name!r} is a DTensor: {reason}")
    if group is not None:
        _check_apart(name, group, shards)
    over = {name: layout.over for name, layout in shards.layouts.items()}
    opt, names = problem.opt, iter(problem.groups)
    if isinstance(opt, Joint):
        opt.optimizers = [frozen(rule) for rule in opt.optimizers]
        pairs = [_split(rule, names, over) for rule in opt.optimizers]
        opt.param_groups = [group for rule in opt.optimizers for group in rule.param_groups]
        problem.groups = [group for groups in pairs for group in groups]
    else:
        problem.groups = _split(opt, names, over)


def _reasons(
    problem: InnerProblem, adjoint: Any, tasks: int | None, compile: bool
) -> Sequence[str]:
    kinds: list[Any] = []
    while adjoint is not None:
        kinds += [adjoint, getattr(adjoint, "storage", None)]
        adjoint = getattr(adjoint, "inner", None)
    refused = {
        "compile=True would have to compile its exchanges between processes with the step. Leave "
        "compile out": compile,
        "tasks maps the loss by torch.vmap, which cannot map its exchanges between processes. Call "
        "unroll once for each task": tasks is not None,
        "diffopt.ForwardMode carries dual numbers along, which it cannot be. Use another adjoint, "
        "such as diffopt.Segmented()": any(isinstance(x, ForwardMode) for x in kinds),
        "diffopt.Implicit solves a linear system whose inner products would be of each process's "
        "part. Use another adjoint, such as diffopt.Segmented()": any(
            isinstance(x, Implicit) and any(map(is_dtensor, problem.inner.values())) for x in kinds
        ),
        "Durable could take up the processes at different steps. Use a folder as storage, or save "
        "the outer loop's state between unrolls": any(isinstance(x, Durable) for x in kinds),
        "a module of another library has no place for it. Unroll the model itself": (
            type(problem) is not InnerProblem
        ),
    }
    return [reason for reason, holds in refused.items() if holds]


def _check_apart(name: str, group: Group, shards: Shards) -> None:
    """Refuse a group whose processes hold different parts of the parameters."""
    for over in shards.meshes:
        if holds_several(over.mesh, group.processes):
            raise NotImplementedError(
                f"parameter {name!r} is a DTensor on {over.mesh}, and the processes of group hold "
                "different parts of it, which have no mean: pass the process group of another "
                'dimension of the devices, such as mesh["data"].get_group(), or no group'
            )


def _split(rule: Optimizer, groups: Any, over: Mapping[str, Processes | None]) -> list[list[str]]:
    """Split the param groups of ``rule``; gives the names in each."""
    split: list[dict[str, Any]] = []
    named: list[list[str]] = []
    for group in rule.param_groups:
        names = next(groups)
        by_holders: dict[Processes | None, list[int]] = {}
        for i, name in enumerate(names):
            by_holders.setdefault(over.get(name), []).append(i)
        for holders, chosen in by_holders.items():
            part = {**group, "params": [group["params"][i] for i in chosen]}
            if "param_names" in group:
                part["param_names"] = [group["param_names"][i] for i in chosen]
            of_part = [names[i] for i in chosen]
            if holders is not None:
                _check_rule(rule, of_part[0])
                for key in rule.defaults:
                    part[key] = _spread(part[key], holders, f"{type(rule).__name__}: {key}")
            split.append(part)
            named.append(of_part)
        if not names:
            split.append(dict(group))
            named.append([])
    rule.param_groups = split
    return named


def _check_rule(rule: Optimizer, name: str) -> None:
    if not is_elementwise(rule) or isinstance(rule, Muon):
        raise NotImplementedError(
            f"parameter {name!r} is a DTensor of which each process holds a part, and the rule of "
            f"{type(rule).__name__} is not said to update each entry by itself: use one that does, "
            "such as diffopt.AdamW, or replicate the parameter, placements=[Replicate()]; a class "
            "of your own that does may declare `elementwise = True`"
        )


def _spread(value: Any, over: Processes, where: str) -> Any:
    """An option as it is used with parts of tensors."""
    if isinstance(value, (tuple, list)):
        return tuple(_spread(x, over, where) for x in value)
    if isinstance(value, Tensor):
        if is_dtensor(value) or value.numel() != 1:
            raise NotImplementedError(
                f"{where} is a {type(value).__name__} of shape {tuple(value.shape)}, and the "
                "parameters of the group are DTensors of which each process holds a part: pass a "
                "0-d tensor, the same on all processes"
            )
        return spread(value, over) if value.requires_grad else value
    if callable(value):
        return lambda step: _spread(value(step), over, where)
    return value
