"""What an unroll trains: which module, by which rule, under which names.

For a module and an optimizer of PyTorch that is read off the two. A library that has modules and
optimizers of its own, with their own place for the weights, is adapted by a subclass of
``InnerProblem`` and a call of ``adapt``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffopt._model.refused import check_model
from diffopt._model.slots import ModuleSlots
from diffopt._step.transform import GradTransform
from diffopt._unroll.unrolled import Unrolled
from diffopt.optim import Optimizer, convert
from diffopt.optim.base import as_tensors
from diffopt.optim.terms import Entries
from diffopt.optim.unchanged import UnchangedOptions
from diffopt.schedule import check_kind


@dataclass
class InnerProblem:
    """The inner problem of one unroll.

    Attributes:
        model: the module that ``loss_fn`` sees.
        opt: the rule; its options are taken as they are now.
        params: all of the model's parameters, by name.
        groups: the names in each param group of ``opt``.
        opt_state: the state that the optimizer has, by parameter name.
        inner: the trained parameters: the optimizer's that require grad.
        first_step: the number of the first step.
        grad_transform: what the optimizer does to the gradients by itself, or None.
        connected: whether the results are wanted with a graph.
        options: those of the optimizers that the caller passed.
        taken_over: values that are to stand for some of the parameters that are not trained.
        carried: the optimizer state of those, to be handed on.
    """

    model: Any
    opt: Optimizer
    params: Mapping[str, Tensor]
    groups: list[list[str]]
    opt_state: Mapping[str, Entries]
    grad_transform: GradTransform | None = None
    connected: bool = True
    taken_over: Mapping[str, Tensor] = field(default_factory=dict)
    carried: Mapping[str, Entries] = field(default_factory=dict)

    def __post_init__(self) -> None:
        params, names = self.params, [name for group in self.groups for name in group]
        self.options = UnchangedOptions([self.opt])
        self.first_step = self.opt.first_step
        self.opt = frozen(self.opt)
        self.inner = {name: params[name] for name in names if params[name].requires_grad}
        if not self.inner:
            raise ValueError(
                "none of the optimizer's parameters requires grad, so there is nothing to train: "
                "pass those to be trained with requires_grad=True"
            )

    @property
    def inner_groups(self) -> list[list[str]]:
        """``groups`` without the parameters that do not require grad."""
        return [[name for name in names if name in self.inner] for names in self.groups]

    @property
    def constants(self) -> dict[str, Tensor]:
        """The parameters that are not trained."""
        return {name: x for name, x in self.params.items() if name not in self.inner}

    def slots(self, carried: Collection[str]) -> ModuleSlots:
        """Where the module holds the trained parameters and the buffers.

        Args:
            carried: names of buffers, and of parameters that move like them, in an earlier result.
        """
        return ModuleSlots(self.model, self.inner, self.constants, carried, self.taken_over)

    def deliver(self, result: Unrolled) -> None:
        """Hand the result to the objects the caller passed. PyTorch's own stay as they were."""


Make = Callable[[Any, Any, int | None], InnerProblem]

_ADAPTERS: list[tuple[tuple[type, ...], Make]] = []
_ADAPTED_BY = {"higher": "diffopt.higher"}  # package: the module here that adapts it


def adapt(kinds: tuple[type, ...], make: Make) -> None:
    """Have ``make(model, opt, tasks)`` state the problem where either is of one of ``kinds``."""
    _ADAPTERS.append((kinds, make))


def inner_problem(model: Any, opt: Any, tasks: int | None) -> InnerProblem:
    """The inner problem that the arguments of ``unroll`` state."""
    several = opt if isinstance(opt, (list, tuple)) else [opt]
    for kinds, make in _ADAPTERS:
        if any(isinstance(argument, kinds) for argument in (model, *several)):
            return make(model, opt, tasks)
    for what, argument in (("model", model), *(("opt", each) for each in several)):
        for base in type(argument).__mro__:
            package = base.__module__.partition(".")[0]
            if package in _ADAPTED_BY:
                raise TypeError(
                    f"{what} is a {type(argument).__name__} of {package}, which diffopt knows only "
                    f"after `import {_ADAPTED_BY[package]}`"
                )
    _check_model(model)
    params = dict(model.named_parameters())
    names = {x: name for name, x in params.items()}
    rule = convert(opt, names)
    groups = _names_by_group(names, rule)
    state = {names[x]: as_tensors(entries) for x, entries in rule.state.items() if x in names}
    problem = InnerProblem(model, rule, params, groups, state)
    problem.options = UnchangedOptions(several)
    return problem


def frozen(opt: Optimizer) -> Optimizer:
    """The optimizer with the options it has now, whatever a scheduler does to it later."""
    copy = object.__new__(type(opt))
    copy.__dict__.update(opt.__dict__)
    copy.param_groups = [dict(group) for group in opt.param_groups]
    return copy


def _check_model(model: Any) -> None:
    if isinstance(model, Unrolled) or (
        isinstance(model, nn.Module) and not issubclass(type(model), nn.Module)
    ):
        raise TypeError(
            f"model is a {type(model).__name__} of trained values: pass the model itself, and "
            "initial=fast to continue from them"
        )
    check_kind("model", model, nn.Module, "pass a torch.nn.Module")
    check_model(model)


def _names_by_group(names: Mapping[Tensor, str], opt: torch.optim.Optimizer) -> list[list[str]]:
    for i, group in enumerate(opt.param_groups):
        for j, x in enumerate(group["params"]):
            if x not in names:
                param_names = group.get("param_names", ())
                which = repr(param_names[j]) if len(param_names) > j else f"{j} of param group {i}"
                raise ValueError(
                    f"the optimizer's parameter {which}, of shape {tuple(x.shape)}, is not one of "
                    "the model's: build the optimizer over parameters of the model that is "
                    "unrolled, after moving it to its device"
                )
    return [[names[x] for x in group["params"]] for group in opt.param_groups]
