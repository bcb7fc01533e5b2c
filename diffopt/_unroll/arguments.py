"""The arguments of ``unroll``, checked: each error says what was passed and what to write."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from diffopt._loop import progress as _progress
from diffopt._step.loss import loss_and_aux
from diffopt._step.transform import arguments_of
from diffopt._torch.autograd import graph_was_freed, in_forward_mode
from diffopt._torch.functorch import active_transform
from diffopt._unroll.stand_in import StandIn
from diffopt._values.tree import tensors_in
from diffopt.adjoint import Adjoint, MemoryBudget, Segmented, Solver
from diffopt.optim import Optimizer
from diffopt.optim.scalars import has_tangent
from diffopt.schedule import check_kind

LossFn = Callable[..., Any]


def chosen_adjoint(segment: int | None, adjoint: Any, verify: bool) -> Adjoint:
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
        kind, such = type(adjoint).__name__, "diffopt.Segmented()"
        if isinstance(adjoint, type):
            kind, such = "class", _example(adjoint) if issubclass(adjoint, Adjoint) else such
        elif isinstance(adjoint, Solver):
            such = f"diffopt.Implicit({adjoint!r})"
        raise TypeError(f"adjoint is a {kind}: pass an object such as {such}")
    return adjoint


def check_graphs(opt: Optimizer) -> None:
    """Warn of an option computed from others whose graph a backward pass has used up.

    Values are still right; a backward pass, which may never come, will fail in PyTorch.
    """
    for rule, group in zip(opt.rules, opt.param_groups, strict=True):
        for key in rule.defaults:
            for x in tensors_in(group[key]):
                if x.grad_fn is not None and graph_was_freed(x.grad_fn):
                    warnings.warn(
                        f"{type(rule).__name__}: {key} is a tensor computed from others, and a "
                        "backward pass has freed the graph that it was computed by, so backward "
                        f"through this unroll will fail: give a callable, {key}=lambda t: "
                        f"log_{key}.exp(), or make the optimizer anew for each unroll",
                        RuntimeWarning,
                        stacklevel=4,
                    )


def _example(cls: type) -> str:
    """A call that makes an object of a class of this package."""
    required = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
    return f"diffopt.{cls.__name__}({', '.join(f'{p.name}=...' for p in required)})"


def check_options(
    functions: Mapping[str, Any], switches: Mapping[str, Any], max_cotangent_norm: Any, tasks: Any
) -> None:
    """Raise where an option is of a wrong kind or value.

    Args:
        functions, switches: those that are functions or None, and those that are bools, by name.
    """
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} is a {type(value).__name__}: pass a function")
    grad_transform = functions["grad_transform"]
    if grad_transform is not None and arguments_of(grad_transform) not in (0, 1, 3):
        raise TypeError(
            f"grad_transform takes {arguments_of(grad_transform)} arguments: it is called with the "
            "gradients alone, f(grads), or as f(grads, model, batch)"
        )
    if max_cotangent_norm is not None:
        check_kind("max_cotangent_norm", max_cotangent_norm, Real, "pass a number")
        if not float(max_cotangent_norm) > 0:
            raise ValueError(
                f"max_cotangent_norm={max_cotangent_norm} would stop every gradient: pass a "
                "number above 0, or None for no bound"
            )
    for name, value in switches.items():
        check_kind(name, value, bool, "pass True or False")
    if tasks is not None:
        check_kind("tasks", tasks, int, "pass how many there are, an int")
        if tasks < 1:
            raise ValueError(f"tasks={tasks}: pass 1 or more, or None for no task dimension")
    if switches["progress"]:
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
    if isinstance(steps, (nn.Module, StandIn)):
        raise TypeError(
            f"steps is a {type(steps).__name__}: pass the number of steps, or a list of batches; "
            "what to continue from is initial="
        )
    if type(steps) is tuple and len(steps) == 2 and all(isinstance(x, Tensor) for x in steps):
        shapes = " and ".join(str(tuple(x.shape)) for x in steps)
        raise TypeError(
            f"steps is a tuple of two tensors, of shapes {shapes}, which looks like one batch "
            "(x, y): pass [(x, y)] * T for T steps with it, or the list [a, b] if they are two "
            "batches"
        )
    if isinstance(steps, (itertools.cycle, itertools.count)):
        raise ValueError(
            f"steps is an itertools.{type(steps).__name__}, which never ends: pass "
            "itertools.islice(steps, T) for T steps"
        )
    if isinstance(steps, (MutableSequence, tuple, IterableDataset)):
        return tuple(steps)  # the caller may change a list before the backward pass
    if hasattr(steps, "__getitem__") and hasattr(steps, "__len__"):
        indexable: Sequence[Any] = steps
        return indexable
    if isinstance(steps, Iterable):
        batches = tuple(steps)
        if not batches and isinstance(steps, Iterator):
            raise ValueError(
                f"steps is a {type(steps).__name__} that yields nothing: it was used up before, as "
                "an iterator serves once. Pass a list, or a new iterator for each call"
            )
        return batches
    raise TypeError(
        f"steps is a {type(steps).__name__}: pass the number of steps, or batches to iterate over"
    )


def own_loss(model: nn.Module, batch: Any) -> Any:
    """The loss that the model returns for a batch; a mapping is given to it by keyword."""
    if isinstance(batch, Mapping):
        return _checked_loss(model, f"model(**{type(batch).__name__})", lambda: model(**batch))
    return _checked_loss(model, f"model({type(batch).__name__})", lambda: model(batch))


def own_loss_without_batch(model: nn.Module, step: int) -> Any:
    """The loss that the model returns for no argument."""
    return _checked_loss(model, "model()", model)


def _checked_loss(model: nn.Module, call: str, called: Callable[[], Any]) -> Any:
    """Call the model for its loss; where it returns none, ``loss_fn`` was likely forgotten."""
    forgotten = (
        f"loss_fn was left out, so {call} of the {type(model).__name__} has to return the loss"
    )
    example = "pass loss_fn, such as lambda model, batch: F.mse_loss(model(batch[0]), batch[1])"
    try:
        out = called()
    except TypeError as error:
        raise TypeError(f"{forgotten}, but it raises {error}: {example}") from error
    try:
        loss_and_aux(out, 0)
    except (TypeError, ValueError) as error:
        _, _, what = str(error).partition("the loss of step 0 ")
        what = what.partition(":")[0]
        if not isinstance(out, Tensor) and getattr(out, "loss", out) is None:
            what = "has None for loss, as where the batch has no labels"
        raise type(error)(f"{forgotten}, but what it returns {what}: {example}") from error
    return out


# What stands around the call.


def check_surroundings(tensors: Iterable[Tensor]) -> None:
    """Refuse transforms around the unroll, which would be applied to a part of it only.

    Args:
        tensors: parameters, buffers, batches and hyperparameters: those that may be dual numbers.
    """
    transform = active_transform()
    if transform is not None:
        raise NotImplementedError(
            f"torch.func.{transform} is active around diffopt.unroll, which computes its own "
            "derivative and cannot be transformed: use torch.autograd.grad and "
            "torch.autograd.functional for derivatives, diffopt.ForwardMode for those of forward "
            "mode, and tasks=N to map over many tasks"
        )
    for x in tensors if in_forward_mode() else ():
        if has_tangent(x):
            raise NotImplementedError(
                f"a tensor of shape {tuple(x.shape)} that diffopt.unroll is given is a dual number "
                "(torch.autograd.forward_ad), and its tangent would be lost on the way: use "
                "adjoint=diffopt.ForwardMode([...]) for derivatives in forward mode"
            )
