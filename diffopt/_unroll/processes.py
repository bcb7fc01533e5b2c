"""An unroll that several processes take together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from torch import Tensor

from diffopt._loop.durable import Durable
from diffopt._step.group import Group
from diffopt.adjoint import Adjoint, ForwardMode, Implicit

P = ParamSpec("P")
R = TypeVar("R")


def meeting(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with its keyword ``group``, a process group, as a ``Group``.

    An error before the processes have agreed is one on all of them.
    """

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if options.get("group") is None:
            return function(*args, **options)
        group = Group(options["group"])
        options["group"] = group
        with group.meeting():
            return function(*args, **options)

    return call


def agree(group: Group, params: Mapping[str, Tensor], adjoint: Adjoint, **terms: Any) -> None:
    """Make sure that all processes are about to take the same steps.

    Raises:
        RuntimeError: they are not.
        NotImplementedError: the adjoint does not serve a group.
    """
    kind = type(adjoint).__name__
    if isinstance(adjoint, (ForwardMode, Implicit)):
        raise NotImplementedError(
            f"{kind} with group: it takes no vector-Jacobian product of a step, in which the "
            "processes' parts are averaged. Use diffopt.Segmented(), or average by "
            "diffopt.distributed.mean(loss, group) inside loss_fn"
        )
    storage = getattr(adjoint, "storage", None)
    terms["intervals_of_Durable"] = storage.every if isinstance(storage, Durable) else None
    if is_dataclass(adjoint) and "storage" in {f.name for f in fields(adjoint)}:
        adjoint = replace(cast(Any, adjoint), storage=None)  # each process may have its own
    group.agree(params, {"adjoints": adjoint, **{k.replace("_", " "): v for k, v in terms.items()}})
