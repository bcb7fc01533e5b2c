"""The names of the parameters of each param group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

#: The arguments of an update, by parameter name.
Params = Mapping[str, Tensor]
Grads = Mapping[str, Tensor | None]
States = Mapping[str, Mapping[str, Tensor]]
#: The names of each param group.
Groups = Sequence[Sequence[str]]


def names_of_groups(
    rule: str, param_groups: Sequence[Mapping[str, Any]], params: Params, groups: Groups | None
) -> Groups:
    """The names of each param group: ``groups``, or as the optimizer knows its parameters.

    Raises:
        ValueError: the names cannot be assigned to the param groups.
    """
    if groups is not None:
        if len(groups) != len(param_groups) or not all(
            map(params.__contains__, chain.from_iterable(groups))
        ):
            missing = [name for name in chain.from_iterable(groups) if name not in params]
            raise ValueError(
                "groups= must list the parameter names of each of the "
                f"{len(param_groups)} param groups; got {len(groups)} lists"
                + (f", with {missing[0]!r}, which params does not have" if missing else "")
            )
        return groups
    sizes = [len(group["params"]) for group in param_groups]
    names = [group.get("param_names", ()) for group in param_groups]
    if set(chain.from_iterable(names)) == set(params):
        return names
    if len(sizes) == 1:
        return [list(params)]
    if len(params) == sum(sizes) and not any(names):
        order = iter(params)
        return [[next(order) for _ in range(size)] for size in sizes]
    raise ValueError(
        f"cannot tell which of {len(sizes)} param groups each of {len(params)} parameters "
        f"belongs to: build {rule} from model.named_parameters(), "
        "or pass groups=, a list of names for each param group"
    )
