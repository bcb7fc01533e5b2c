"""From ``torch.optim`` optimizers and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from diffopt.optim.adadelta import Adadelta
from diffopt.optim.adagrad import Adagrad
from diffopt.optim.adam import Adam, AdamW
from diffopt.optim.adamax import Adamax
from diffopt.optim.asgd import ASGD
from diffopt.optim.base import Optimizer
from diffopt.optim.joint import Joint
from diffopt.optim.muon import Muon
from diffopt.optim.nadam import NAdam
from diffopt.optim.radam import RAdam
from diffopt.optim.rmsprop import RMSprop
from diffopt.optim.rprop import Rprop
from diffopt.optim.sgd import SGD

Convert = Callable[[Any], Optimizer]

_RULES = Adadelta, Adagrad, Adam, Adamax, AdamW, ASGD, Muon, NAdam, RAdam, RMSprop, Rprop, SGD
_REGISTRY: dict[type, Convert] = {
    getattr(torch.optim, rule.__name__): rule.from_torch
    for rule in _RULES
    if hasattr(torch.optim, rule.__name__)  # PyTorch has Muon since 2.9
}

#: One optimizer, or several over disjoint parameters.
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def register(torch_class: type, convert: Convert) -> None:
    """Teach ``diffopt`` an optimizer class.

    Args:
        torch_class: the class. Its subclasses are not included: they may step differently.
        convert: makes a diffopt optimizer from an instance, with its param groups and its present
            state. A class that steps as a known one does may use that one's ``from_torch``.

    Raises:
        TypeError: ``torch_class`` is not a class, or ``convert`` not callable.

    Examples:
        >>> import torch
        >>> class Mine(torch.optim.SGD):
        ...     pass
        >>> register(Mine, SGD.from_torch)
        >>> type(convert(Mine([torch.zeros(1)], lr=0.1))).__name__
        'SGD'
    """
    if not isinstance(torch_class, type):
        raise TypeError(f"register(torch_class, convert): {torch_class!r} is not a class")
    if not callable(convert):
        raise TypeError(f"register(torch_class, convert): {convert!r} is not callable")
    _REGISTRY[torch_class] = convert


def registered() -> list[type]:
    """The optimizer classes that ``convert`` knows."""
    return list(_REGISTRY)


def convert(opt: Any, names: Mapping[Tensor, str] | None = None) -> Optimizer:
    """The diffopt optimizer with the param groups and the present state of ``opt``.

    A diffopt optimizer is returned as it is, and a list of optimizers as one. Tensors are shared
    with ``opt``, not copied: what it changes in place later, autograd's version counters notice.

    Args:
        opt: an optimizer, or a list of them over disjoint parameters.
        names: of the parameters, for messages.

    Raises:
        TypeError: the class of ``opt`` is not known (a subclass of a known one is not).
        ValueError: two optimizers of a list hold the same parameter.
    """
    if isinstance(opt, (list, tuple)):
        wrong = next((x for x in opt if not isinstance(x, torch.optim.Optimizer)), None)
        if wrong is not None:
            raise TypeError(
                f"opt is a {type(opt).__name__} that holds a {_name(type(wrong))}: pass a diffopt "
                "or torch.optim optimizer, or a list of them"
            )
        return Joint([convert(each) for each in opt], names)
    if isinstance(opt, Optimizer):
        return opt
    cls = type(opt)
    make = _REGISTRY.get(cls)
    if make is None:
        if not isinstance(opt, torch.optim.Optimizer):
            what = f"the class {opt.__name__}" if isinstance(opt, type) else f"a {cls.__name__}"
            raise TypeError(
                f"opt is {what}: pass a diffopt or torch.optim optimizer of the model's parameters"
            )
        base = next((b.__name__ for b in cls.__mro__ if b in _REGISTRY), None)
        raise TypeError(
            f"diffopt does not know how {_name(cls)} steps: call "
            f"diffopt.register({cls.__name__}, fn), where fn(instance) returns a diffopt optimizer"
            + (
                f"; if it steps as {base} does, fn is diffopt.optim.{base}.from_torch"
                if base
                else ""
            )
        )
    new = make(opt)
    if not isinstance(new, Optimizer):
        raise TypeError(
            f"the function registered for {cls.__name__} must return a diffopt optimizer, "
            f"not {type(new).__name__}"
        )
    return new


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def all_of(opt: Optimizers) -> Sequence[torch.optim.Optimizer]:
    """The optimizers of a list, or the only one."""
    return opt if isinstance(opt, (list, tuple)) else [opt]  # type: ignore[list-item]


def load_state_into(
    opt: Optimizers,
    states: Mapping[Tensor, Mapping[str, Tensor]],
    *,
    steps: int | None = None,
) -> None:
    """Write optimizer state back, so that ``opt`` continues as if it had taken the steps itself.

    Args:
        opt: a ``torch.optim`` or diffopt optimizer, or a list of them.
        states: for each of its parameters, the state by ``torch.optim``'s names. It is copied.
        steps: the step number to continue from, for the callable hyperparameters of a diffopt one.

    Raises:
        ValueError: an entry is missing that ``opt`` starts with, so that it could not go on from
            there; ``opt`` is unchanged then.
    """
    for each in all_of(opt):
        _check_entries(each, states)
    for each in all_of(opt):
        _load_into(each, states)
        if steps is not None and isinstance(each, Optimizer):
            each._steps, each._continued = steps, True


def _load_into(opt: torch.optim.Optimizer, states: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    for group in opt.param_groups:
        on_device = bool(group.get("capturable") or group.get("fused"))
        for p in group["params"]:
            if p not in states:
                continue
            entries = {key: x.detach().clone() for key, x in states[p].items()}
            fresh = "step" in entries and not entries["step"].any()
            # Not stepped yet: torch.optim makes the state with the first gradient; that of Adagrad,
            # before PyTorch 2.13, when it is made itself.
            if fresh and not isinstance(opt, torch.optim.Adagrad):
                if opt.state.get(p, {}).get("step"):
                    del opt.state[p]
                continue
            for key, x in entries.items():
                if key in ("step", "mu_product") and on_device:
                    entries[key] = x.to(p.device)
                elif x.shape == p.shape and p.dtype in (torch.bfloat16, torch.float16):
                    entries[key] = x.to(p.dtype)  # an unroll holds these in float32
            opt.state[p] = entries


def _check_entries(
    opt: torch.optim.Optimizer, states: Mapping[Tensor, Mapping[str, Tensor]]
) -> None:
    rule, number = convert(opt), count()
    groups = [[str(next(number)) for _ in group["params"]] for group in rule.param_groups]
    tensors = [p for group in rule.param_groups for p in group["params"]]
    params = dict(zip(chain.from_iterable(groups), tensors, strict=True))
    for name, first in rule.init(params, groups=groups).items():
        present = states.get(params[name], first)
        missing = first.keys() - present.keys()
        if missing:
            raise ValueError(
                f"the optimizer state to load holds {sorted(present)}, and "
                f"{type(opt).__name__} also needs {sorted(missing)}: pass an optimizer of the "
                "class and with the options that the state was made with"
            )
