"""The user's change to the inner gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from diffopt._step.result import present

#: ``f(grads)``, or ``f(grads, model, batch)``, to the gradients that the update is given.
GradTransform = Callable[..., Mapping[str, Tensor]]


def arguments_of(function: Callable[..., Any]) -> int:
    """How many arguments a function has to be given; 1 where there is no telling."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def given_to_transform(
    raw: Mapping[str, Tensor | None], connected: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradients that a transform is given, and the leaves that they come from if any.

    Without their graph, too, a transform may differentiate them and change them in place.
    """
    if connected:
        return [], present(raw)
    leaves = {name: g.detach().requires_grad_() for name, g in present(raw).items()}
    return [*leaves.values()], {name: x.clone() for name, x in leaves.items()}


def check_transformed(grads: Any, params: Mapping[str, Tensor]) -> Mapping[str, Tensor | None]:
    """What ``grad_transform`` returned, checked.

    Raises:
        TypeError: it is no dict of tensors.
        ValueError: a name is no inner variable's, or a shape or dtype has changed.
    """
    if not isinstance(grads, Mapping):
        raise TypeError(
            f"grad_transform returned a {type(grads).__name__}: it has to return a dict of "
            "gradients by parameter name, as it was given"
        )
    for name, g in grads.items():
        if name not in params:
            raise ValueError(
                f"grad_transform returned a gradient for {name!r}, which is not an inner "
                f"variable: keep the names it was given"
            )
        if g is not None and not isinstance(g, Tensor):
            raise TypeError(
                f"grad_transform returned a {type(g).__name__} for {name!r}: return a tensor, or "
                "leave the name out where the parameter is to stay as it is"
            )
        if g is not None and g.shape != params[name].shape:
            raise ValueError(
                f"grad_transform returned a gradient of shape {tuple(g.shape)} for {name!r}, "
                f"which has shape {tuple(params[name].shape)}: keep the shapes it was given"
            )
        if g is not None and g.dtype != params[name].dtype:
            raise ValueError(
                f"grad_transform returned a gradient of {g.dtype} for {name!r}, which was given in "
                f"{params[name].dtype}: convert it back with .to({params[name].dtype})"
            )
    return grads
