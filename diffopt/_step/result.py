"""What a step gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffopt._step.graph import Graph
from diffopt._step.unread import LARGE, Unread, is_large, shadow
from diffopt._torch.operations import flattened
from diffopt._values.state import State
from diffopt.optim.terms import Hyper


@dataclass(frozen=True, slots=True)
class Checked:
    """What a step has to give again when it is computed again.

    Attributes:
        loss: before the update.
        hyper: the hyperparameters that callables gave, in order.
        grads: the norms of the gradients that the update was given; of large matrices, those of
            their ``shadow``.
        aux: the norms of the extras that derivatives flow to.
    """

    loss: Tensor
    hyper: Sequence[float | Tensor] = ()
    grads: Sequence[Tensor] = ()
    aux: Sequence[Tensor] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """The next state, the loss before the update, and the user's extras.

    Attributes:
        checked: what the step has to give again when it is computed again.
        graph: where the graph of the step begins and ends.
        attached: indices among the tensors of ``aux`` of those that derivatives flow to.
    """

    state: State
    loss: Tensor
    aux: Any
    checked: Checked
    graph: Graph
    attached: Sequence[int]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A loss at a state, and what the update is made of besides.

    Attributes:
        loss: before the update.
        aux: the user's extras.
        attached: the tensors of these that derivatives flow to, by index among their tensors.
        buffers: as the evaluation left them.
        hyper: the hyperparameters of the step, by param group.
        raw: the gradients of the loss, by parameter name; None where it does not depend on it.
        grads: those that the update is given.
        checked: what is compared when the step is computed again.
        graph: where the graph of all that begins.
        token: of gradients that were averaged over processes, a zero for a derivative to start
            from as well (``Group.averaged``).
        unread: the weights whose gradients were left out. They are None in ``raw`` and ``grads``.
    """

    loss: Tensor
    aux: Any
    attached: dict[int, Tensor]
    buffers: dict[str, Tensor]
    hyper: Sequence[Hyper]
    raw: Mapping[str, Tensor | None]
    grads: Mapping[str, Tensor | None]
    checked: Checked
    graph: Graph
    token: Tensor | None = None
    unread: Mapping[str, Unread] = field(default_factory=dict)


def norms_of(tensors: Iterable[Tensor | None], *, of_shadows: bool = False) -> Sequence[Tensor]:
    """Norms of the dense ones: of all together where they are few numbers, else of each.

    Args:
        of_shadows: of a large matrix, take that of its ``shadow``.
    """
    dense, count, alike = [], 0, True
    for x in tensors:
        if x is not None and x.layout is torch.strided:
            dense.append(x)
            count += x.numel()
            alike = alike and x.is_cpu and x.dtype is dense[0].dtype
    if not dense:
        return ()
    if alike and count < LARGE:
        return (torch.linalg.vector_norm(flattened(dense)),)
    if of_shadows:
        dense = [shadow(x) if is_large(x) else x for x in dense]
    return torch._foreach_norm(dense)


def present(grads: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The gradients that there are."""
    return {name: g for name, g in grads.items() if g is not None}


def other_extras(step: int) -> RuntimeError:
    """The error for a step that, computed again, returns other extras than at first."""
    return RuntimeError(
        f"step {step}, computed again, returns other tensors in aux than in the forward pass, so "
        "that no gradient can be delivered through them: let loss_fn return the same ones whenever "
        "it is called with the same model and batch"
    )


def small(value: Any) -> Any:
    """A hyperparameter, or its norm where it is a large tensor, to be kept for every step."""
    if isinstance(value, tuple):
        return tuple(map(small, value))
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return value if value.numel() == 1 else torch.linalg.vector_norm(value)
