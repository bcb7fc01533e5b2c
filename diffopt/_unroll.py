"""``diffopt.unroll``: differentiate through training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffopt import _progress
from diffopt._capture import Captured
from diffopt._generators import Generators
from diffopt._loop import Loop
from diffopt._modes import Modes
from diffopt._module import ModuleSlots
from diffopt._node import run_connected, run_detached
from diffopt._state import State
from diffopt._step import GradTransform, InnerStep
from diffopt._tree import generators_in, tensors_in
from diffopt._unrolled import Unrolled
from diffopt.adjoint import Adjoint, Segmented
from diffopt.optim import Optimizer, convert

LossFn = Callable[..., Any]


def unroll(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    steps: int | Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    segment: int | None = None,
    adjoint: Adjoint | None = None,
    initial: Unrolled | Mapping[str, Tensor] | None = None,
    grad_transform: GradTransform | None = None,
    max_cotangent_norm: float | None = None,
    progress: bool = False,
) -> Unrolled:
    """Train ``model`` for some steps, as a differentiable function of everything it is made of.

    The gradient of whatever is computed from the result reaches the initial parameters,
    optimizer state, hyperparameters, tensors in the batches, the model's other parameters, and
    every tensor that ``loss_fn`` or ``grad_transform`` captured, through ``backward()`` and
    ``torch.autograd.grad`` alike. It is exact, and differentiable again.

    Args:
        model: any module. It is afterwards what it was, also when ``loss_fn`` raises.
        opt: a ``diffopt`` or ``torch.optim`` optimizer over some or all of the model's
            parameters: the inner variables. Its state and param groups are the start.
        steps: an int T: ``loss_fn(model, t)`` is called with t = 0, ..., T-1. Or batches:
            ``loss_fn(model, batch)`` is called with each; a batch is any pytree. What cannot be
            indexed is read into a list; what can, but is no list or tuple, is indexed anew
            whenever a step is computed.
        loss_fn: returns a scalar loss or ``(loss, aux)``. Its ``model`` is the user's own module
            holding the current fast weights. It may run several times for a step, so it has to be
            a function of the model, the batch, captured tensors and random numbers. None: the
            model returns its own loss, from ``model(batch)`` or, for an int, ``model()``.
        segment: short for ``adjoint=diffopt.Segmented(segment)``.
        adjoint: how the derivative is computed. Default: ``diffopt.Segmented()``.
        initial: an earlier ``Unrolled`` to continue from (its optimizer state wins over
            ``opt``'s), or initial values by parameter name for some or all inner variables.
        grad_transform: ``f(grads)``, a differentiable change to the dict of inner gradients.
        max_cotangent_norm: before each step's vector-Jacobian product, scale the cotangent of
            the updated parameters to at most this joint norm, against exploding meta-gradients.
        progress: show a tqdm bar, forward and backward.

    Returns:
        the trained values. Under ``torch.no_grad()`` they carry no graph and nothing is kept.

    Raises:
        TypeError: a wrong kind of argument, such as an optimizer class that is not known.
        ValueError: a wrong value, such as a loss that is not a scalar or that does not depend
            on any inner variable, or an optimizer parameter that is not the model's.
        NotImplementedError: what is refused, such as a model wrapped in ``DataParallel``.

    Cost: by the adjoint. With the default about 2√T states are held and one step's graph, and
    each step is computed about three times in all.

    Example:
        >>> import torch, diffopt
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> x, y = torch.ones(4, 2), torch.zeros(4, 1)
        >>> loss_fn = lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean()
        >>> inner = diffopt.SGD(model.parameters(), lr=lr)
        >>> fast = diffopt.unroll(model, inner, [(x, y)] * 5, loss_fn)
        >>> loss_fn(fast, (x, y)).backward()
        >>> model.weight.grad.shape, lr.grad.shape
        (torch.Size([1, 2]), torch.Size([]))
    """
    _check_model(model)
    adjoint = _chosen_adjoint(segment, adjoint)
    _check_options(loss_fn, grad_transform, max_cotangent_norm, progress)
    rule = _frozen(convert(opt))
    groups = _names_by_group(model, rule)
    owned = dict(model.named_parameters())
    inner = {name: owned[name] for names in groups for name in names if owned[name].requires_grad}
    if not inner:
        raise ValueError(
            "none of the optimizer's parameters requires grad, so there is nothing to train: "
            "pass those to be trained with requires_grad=True"
        )
    inner_groups = [[name for name in names if name in inner] for names in groups]

    slots = ModuleSlots(model, inner)
    start = _start(rule, inner_groups, slots, inner, initial)
    first_step = initial.step if isinstance(initial, Unrolled) else 0
    batches = _batches(steps)
    count = steps if isinstance(steps, int) else len(batches)
    inputs = [x for batch in _distinct(batches) for x in tensors_in(batch)]
    hyper = [x for group in rule.param_groups for x in tensors_in(_options(group))]
    constants = [x for name, x in owned.items() if name not in inner]
    devices = {x.device for x in (*inner.values(), *slots.buffers.values(), *inputs)}

    connected = torch.is_grad_enabled()
    captured = None
    if connected:
        captured = Captured()
        captured.offer([*inputs, *hyper, *constants])
    step = InnerStep(
        slots,
        _loss_of(model, loss_fn, steps, batches, first_step),
        rule,
        inner_groups,
        first_step=first_step,
        grad_transform=grad_transform,
    )
    loop = Loop(
        step,
        start.detach(),
        count,
        captured=captured,
        generators=Generators(
            devices, (g for batch in _distinct(batches) for g in generators_in(batch))
        ),
        modes=Modes(model, devices),
        progress=_progress.Progress(count, progress),
        max_cotangent_norm=max_cotangent_norm,
    )
    if connected:
        final, losses = run_connected(
            loop, adjoint, step.differentiable(start), [*inputs, *hyper, *constants]
        )
    else:
        final, losses = run_detached(loop)
    frozen = {name: owned[name] for names in groups for name in names if name not in inner}
    order = [name for name in owned if name in inner or name in frozen]
    return Unrolled(slots, final, frozen, order, losses, loop.aux, first_step + count)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass a torch.nn.Module")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise NotImplementedError(
            f"model is wrapped in {type(model).__name__}, whose replicas would not see the fast "
            "weights: pass the module inside, model.module"
        )


def _chosen_adjoint(segment: int | None, adjoint: Adjoint | None) -> Adjoint:
    if segment is not None and adjoint is not None:
        raise ValueError(
            f"both segment={segment!r} and adjoint={adjoint!r} were given, and segment=k is short "
            "for adjoint=diffopt.Segmented(k): pass one of them"
        )
    if adjoint is None:
        return Segmented(segment)
    if not isinstance(adjoint, Adjoint):
        raise TypeError(
            f"adjoint is a {type(adjoint).__name__}: pass an object such as diffopt.Segmented()"
        )
    return adjoint


def _check_options(
    loss_fn: Any, grad_transform: Any, max_cotangent_norm: Any, progress: bool
) -> None:
    for name, value in (("loss_fn", loss_fn), ("grad_transform", grad_transform)):
        if value is not None and not callable(value):
            raise TypeError(f"{name} is a {type(value).__name__}: pass a function")
    if max_cotangent_norm is not None:
        if isinstance(max_cotangent_norm, bool) or not isinstance(max_cotangent_norm, (int, float)):
            raise TypeError(
                f"max_cotangent_norm is a {type(max_cotangent_norm).__name__}: pass a number"
            )
        if not max_cotangent_norm > 0:
            raise ValueError(
                f"max_cotangent_norm={max_cotangent_norm} would stop every gradient: pass a "
                "number above 0, or None for no bound"
            )
    if progress:
        _progress.check_available()


def _frozen(opt: Optimizer) -> Optimizer:
    """The optimizer with the options it has now, whatever a scheduler does to it later."""
    frozen = object.__new__(type(opt))
    frozen.__dict__.update(opt.__dict__)
    frozen.param_groups = [dict(group) for group in opt.param_groups]
    return frozen


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _names_by_group(model: nn.Module, opt: Optimizer) -> list[list[str]]:
    names = {id(x): name for name, x in model.named_parameters()}
    for i, group in enumerate(opt.param_groups):
        for j, x in enumerate(group["params"]):
            if id(x) not in names:
                given = group.get("param_names", ())
                which = repr(given[j]) if len(given) > j else f"{j} of param group {i}"
                raise ValueError(
                    f"the optimizer's parameter {which}, of shape {tuple(x.shape)}, is not one of "
                    "the model's: build the optimizer over parameters of the model that is "
                    "unrolled, after moving it to its device"
                )
    return [[names[id(x)] for x in group["params"]] for group in opt.param_groups]


def _start(
    opt: Optimizer,
    groups: list[list[str]],
    slots: ModuleSlots,
    inner: Mapping[str, Tensor],
    initial: Unrolled | Mapping[str, Tensor] | None,
) -> State:
    """The state at position 0, connected to the caller's graph."""
    params = dict(inner)
    # A copy, so that using the model before the backward pass does not disturb the recomputation.
    buffers = {name: x if x.requires_grad else x.clone() for name, x in slots.buffers.items()}
    if isinstance(initial, Unrolled):
        for name in inner:
            if name not in initial.params or initial.params[name].shape != inner[name].shape:
                raise ValueError(
                    f"initial has no value that fits parameter {name!r}: continue with the same "
                    "model and with an optimizer over the same parameters"
                )
        params = {name: initial.params[name] for name in inner}
        buffers.update({n: x for n, x in initial.buffers.items() if n in buffers})
        own = opt.init(params, groups=groups)
        return State(params, {n: initial.opt_state.get(n, own[n]) for n in inner}, buffers)
    if initial is not None:
        _check_initial(initial, inner)
        params.update(initial)
    names = {id(x): name for name, x in inner.items()}
    state = opt.init(params, groups=groups)
    for x, entries in opt.state.items():
        if id(x) in names:
            state[names[id(x)]].update({k: v for k, v in entries.items() if v is not None})
    return State(params, state, buffers)


def _check_initial(initial: Any, inner: Mapping[str, Tensor]) -> None:
    if not isinstance(initial, Mapping):
        raise TypeError(
            f"initial is a {type(initial).__name__}: pass an Unrolled, or a dict of tensors by "
            "parameter name"
        )
    for name, x in initial.items():
        if name not in inner:
            raise ValueError(
                f"initial has a value for {name!r}, which is not an inner variable: use names of "
                f"the optimizer's parameters that require grad, such as {next(iter(inner))!r}"
            )
        if not isinstance(x, Tensor):
            raise TypeError(f"initial[{name!r}] is a {type(x).__name__}: pass a tensor")
        if x.shape != inner[name].shape:
            raise ValueError(
                f"initial[{name!r}] has shape {tuple(x.shape)}, the parameter has "
                f"{tuple(inner[name].shape)}"
            )


def _batches(steps: Any) -> Sequence[Any]:
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
    if isinstance(steps, (list, tuple)):
        return tuple(steps)
    if hasattr(steps, "__getitem__") and hasattr(steps, "__len__"):
        indexable: Sequence[Any] = steps
        return indexable
    if isinstance(steps, Iterable):
        return list(steps)
    raise TypeError(
        f"steps is a {type(steps).__name__}: pass the number of steps, or batches to iterate over"
    )


def _distinct(batches: Any) -> list[Any]:
    """The batches that exist already, each once; those indexed on demand are left alone."""
    if isinstance(batches, Tensor):
        return [batches]
    if not isinstance(batches, (list, tuple)):
        return []
    return list({id(batch): batch for batch in batches}.values())


def _loss_of(
    model: nn.Module,
    loss_fn: LossFn | None,
    steps: Any,
    batches: Sequence[Any],
    first_step: int,
) -> Callable[[int], Any]:
    if isinstance(steps, int):
        if loss_fn is None:
            return lambda t: model()
        return lambda t: loss_fn(model, first_step + t)
    if loss_fn is None:
        return lambda t: model(batches[t])
    return lambda t: loss_fn(model, batches[t])
