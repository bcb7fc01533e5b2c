"""The arguments of ``unroll``, checked: each error says what was passed and what to write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableSequence, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from diffopt._loop import progress as _progress
from diffopt.adjoint import Adjoint, MemoryBudget, Segmented

LossFn = Callable[..., Any]


def chosen_adjoint(segment: int | None, adjoint: Adjoint | None, verify: bool) -> Adjoint:
    """The adjoint that the two arguments ask for."""
    if segment is not None and adjoint is not None:
        raise ValueError(
            f"both segment={segment!r} and adjoint={adjoint!r} were given, and segment=k is short "
            "for adjoint=diffopt.Segmented(k): pass one of them"
        )
    if adjoint is None and segment is None:
        return Segmented(1) if verify else MemoryBudget()
    if adjoint is None:
        return Segmented(segment)
    if not isinstance(adjoint, Adjoint):
        raise TypeError(
            f"adjoint is a {type(adjoint).__name__}: pass an object such as diffopt.Segmented()"
        )
    return adjoint


def check_options(
    loss_fn: Any,
    grad_transform: Any,
    max_cotangent_norm: Any,
    verify: Any,
    tasks: Any,
    compile: Any,
    progress: bool,
) -> None:
    """Raise where an option is of a wrong kind or value."""
    for name, value in (("loss_fn", loss_fn), ("grad_transform", grad_transform)):
        if value is not None and not callable(value):
            raise TypeError(f"{name} is a {type(value).__name__}: pass a function")
    if max_cotangent_norm is not None:
        if isinstance(max_cotangent_norm, bool) or not isinstance(max_cotangent_norm, Real):
            raise TypeError(
                f"max_cotangent_norm is a {type(max_cotangent_norm).__name__}: pass a number"
            )
        if not float(max_cotangent_norm) > 0:
            raise ValueError(
                f"max_cotangent_norm={max_cotangent_norm} would stop every gradient: pass a "
                "number above 0, or None for no bound"
            )
    for name, value in (("verify", verify), ("progress", progress)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} is a {type(value).__name__}: pass True or False")
    if tasks is not None:
        if isinstance(tasks, bool) or not isinstance(tasks, int):
            raise TypeError(f"tasks is a {type(tasks).__name__}: pass how many there are, an int")
        if tasks < 1:
            raise ValueError(f"tasks={tasks}: pass 1 or more, or None for no task dimension")
    if not isinstance(compile, bool):
        raise TypeError(f"compile is a {type(compile).__name__}: pass True or False")
    if progress:
        _progress.check_available()


def plain_int(steps: Any) -> Any:
    """NumPy's integers as Python's; anything else as it is."""
    return int(steps) if type(steps) is not bool and isinstance(steps, Integral) else steps


def batches_of(steps: Any) -> Sequence[Any]:
    """The batches as something that can be indexed; nothing where ``steps`` is an int."""
    if isinstance(steps, (bool, str, bytes, Mapping)):
        raise TypeError(
            f"steps is a {type(steps).__name__}: pass the number of steps, or a list of batches "
            "(for one batch used T times, [batch] * T)"
        )
    if isinstance(steps, int):
        if steps < 0:
            raise ValueError(f"steps={steps} is negative: pass 0 or more")
        return ()
    if isinstance(steps, Tensor) and not steps.dim():
        raise TypeError(
            "steps is a 0-d tensor: pass the number of steps as an int, int(steps), or one tensor "
            "whose first dimension is the batches'"
        )
    if isinstance(steps, (MutableSequence, tuple, IterableDataset)):
        return tuple(steps)  # the caller may change a list before the backward pass
    if hasattr(steps, "__getitem__") and hasattr(steps, "__len__"):
        indexable: Sequence[Any] = steps
        return indexable
    if isinstance(steps, Iterable):
        return tuple(steps)
    raise TypeError(
        f"steps is a {type(steps).__name__}: pass the number of steps, or batches to iterate over"
    )


def own_loss(model: nn.Module, batch: Any) -> Any:
    """The loss that the model returns for a batch."""
    return model(batch)


def own_loss_without_batch(model: nn.Module, step: int) -> Any:
    """The loss that the model returns for no argument."""
    return model()
