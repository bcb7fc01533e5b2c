"""What all optimizers share: param groups around one pure rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from diffopt.optim import options
from diffopt.optim.groups import Grads, Groups, Params, States, names_of_groups
from diffopt.optim.lists import Tensors
from diffopt.optim.options import SWITCHES, Ranges
from diffopt.optim.saving import packed, restored
from diffopt.optim.terms import Cotangents, Entries, Hyper, Options, Pullback, tensors_of

#: The state of every parameter, by name.
OptState = dict[str, Entries]

_RULE = {"_update", "_update_groups", "update"}  # the methods that make another rule
_STEPS = "steps"  # the key in `state_dict()` for the number of `step()` calls


class Optimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose step is also available as a pure function.

    A subclass states its rule once, in ``_init`` (one parameter) and ``_update`` (the parameters
    of a group). ``init`` and ``update`` apply it to dicts by parameter name and write into
    nothing; ``step`` applies the same rule to the parameters the optimizer was built with, in
    place.

    Every numeric option may be a number, a tensor (0-d, or broadcastable against each parameter of
    its group; it may require grad) or a callable from the 0-based step number to either, also
    inside a tuple such as ``betas``. ``step()`` counts its own calls for it. Numbers, what
    callables return, and tensors on the CPU are checked at every step; a learning rate for each
    entry may be negative, as its direction is learned, too, in Meta-SGD.

    The constructors are those of their namesakes in ``torch.optim``. ``params`` are parameters,
    named parameters, or dicts that define param groups. ``maximize`` ascends. The options that only
    choose a kernel there (``foreach``, ``fused``, ``capturable``) have no effect;
    ``differentiable`` only lifts the demand that parameters are leaves.

    Attributes:
        elementwise: each entry of a parameter is updated by itself, so that the rule may be given
            the parameters of several tasks at once, which lead with a task dimension. Where the
            class that states the rule does not say so, the rule is mapped over the tasks.
        ranges: the range of each numeric option.

    Raises:
        TypeError: an option is of a wrong kind.
        ValueError: a number is out of its range, or a tensor does not broadcast to a parameter.
    """

    elementwise: ClassVar[bool] = False
    ranges: ClassVar[Ranges] = {}

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._steps = 0
        self._continued = False  # whether an unroll has counted the steps: `load_state_into`
        super().__init__(params, defaults)

    # The rule, to be stated by each subclass.

    def _init(self, hyper: Hyper, param: Tensor) -> Entries:
        """The state of ``param`` before its first step."""
        raise NotImplementedError

    def _update(
        self, hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
    ) -> tuple[Tensors, list[Entries]]:
        """The group's parameters and states after one step."""
        raise NotImplementedError

    def _vjp(self, pullback: Pullback) -> Cotangents | None:
        """Carry cotangents of ``_update``'s results back to params, grads and states.

        Optional: a rule that is differentiated often states its derivative by hand, for options
        that are numbers, and returns None for options that the derivative does not cover.
        """
        return None

    def _vjp_reads_gradients(self, states: Sequence[Mapping[str, Tensor]]) -> bool:
        """Whether ``_vjp`` needs more of the gradients than their shapes, or returns None."""
        return True

    @property
    def is_pure(self) -> bool:
        """Whether the rule depends on nothing but its arguments, as all of this package's do.

        Of another class's rule, the graph of a whole step is kept for its derivative.
        """
        cls = type(self)
        methods = (cls._update, cls._update_groups, cls.update, cls.hyperparameters)
        return all((method.__module__ or "").startswith("diffopt.optim.") for method in methods)

    @property
    def rules(self) -> Sequence[Optimizer]:
        """The rule of each param group: this one, unless several optimizers are joined."""
        return [self] * len(self.param_groups)

    @property
    def first_step(self) -> int:
        """The number of an unroll's first step: 0, or where the unroll left off that was loaded."""
        return self._steps if self._continued else 0

    @classmethod
    @lru_cache(maxsize=256)  # asked for at every step
    def _declares(cls, name: str) -> bool:
        """Whether an attribute belongs to the rule, not to another one that it inherits from."""
        for base in cls.__mro__:
            if name in base.__dict__:
                return base is not Optimizer
            if not _RULE.isdisjoint(base.__dict__):
                return False
        return False

    # The rule as a pure function of dicts by name.

    def hyperparameters(self, step: int) -> list[dict[str, Any]]:
        """The options of each param group at a step: callables called, tensors as they are.

        Raises:
            TypeError: a callable returned no number or tensor.
            ValueError: a value is out of its range; no tensor on an accelerator is looked at.
        """
        return [
            rule._options_at(group, step)
            for rule, group in zip(self.rules, self.param_groups, strict=True)
        ]

    def at_start(self) -> list[Hyper]:
        """The options before the first step: a callable is called where its value is asked for."""
        return [
            _AtStart(rule, group) for rule, group in zip(self.rules, self.param_groups, strict=True)
        ]

    def init(
        self,
        params: Params,
        *,
        groups: Groups | None = None,
        hyper: Sequence[Hyper] | None = None,
    ) -> OptState:
        """The state before the first step, by parameter name and then by ``torch.optim``'s keys.

        An entry that depends on the first gradient, or on the learning rate at that moment, is
        absent until then: ``momentum_buffer`` with dampening, ``eta`` of ASGD, ``step_size`` of
        Rprop.

        Args:
            params: tensors by name.
            groups: the names of each param group. Default: as the optimizer knows them, from
                ``model.named_parameters()`` or from having a single group.
            hyper: what to take for ``self.at_start()``.

        Raises:
            NotImplementedError: a parameter is complex.
            ValueError: the names cannot be assigned to the param groups.
        """
        every = self.at_start() if hyper is None else hyper
        return self._init_groups(params, self._names(params, groups), every)

    def _init_groups(self, params: Params, groups: Groups, hyper: Sequence[Hyper]) -> OptState:
        state: OptState = {}
        for names, option in zip(groups, hyper, strict=True):
            group = {name: params[name] for name in names}
            options.check_shapes(type(self).__name__, option, group)
            for name, param in group.items():
                _refuse_complex(param, name)
                state[name] = self._init(option, param)
        return {name: state[name] for name in params if name in state}

    def update(
        self,
        params: Params,
        grads: Grads,
        state: States,
        *,
        step: int = 0,
        groups: Groups | None = None,
        hyper: Sequence[Hyper] | None = None,
    ) -> tuple[dict[str, Tensor], OptState]:
        """Parameters and state after one step: differentiable in everything, in place in nothing.

        A parameter whose gradient is None or missing is returned as it is, and so is its state.

        Args:
            params: tensors by name.
            grads: their gradients, by name.
            state: what ``init`` or the last ``update`` returned.
            step: the step number that callable hyperparameters are called with.
            groups: as for ``init``.
            hyper: what to take for ``self.hyperparameters(step)``.

        Raises:
            NotImplementedError: a gradient is sparse.
            ValueError: names are missing, or a hyperparameter does not broadcast to a parameter.
        """
        every = self.hyperparameters(step) if hyper is None else hyper
        return self._update_groups(params, grads, state, self._names(params, groups), every)

    def _update_groups(
        self, params: Params, grads: Grads, state: States, groups: Groups, hyper: Sequence[Hyper]
    ) -> tuple[dict[str, Tensor], OptState]:
        new_params = dict(params)
        new_state: dict[str, Any] = dict(state)
        for names, option in zip(groups, hyper, strict=True):
            present = {name: g for name in names if (g := grads.get(name)) is not None}
            if not present:
                continue
            for name, grad in present.items():
                if grad.layout is not torch.strided:
                    raise NotImplementedError(
                        f"the gradient of {name!r} is sparse ({grad.layout}): "
                        "use a dense one, such as nn.Embedding(..., sparse=False) gives"
                    )
                if name not in state:
                    raise ValueError(
                        f"the state has no entry for {name!r}: start from init(params)"
                    )
            updated = {name: params[name] for name in present}
            if tensors_of([option]):
                options.check_shapes(type(self).__name__, option, updated)
            values, entries = self._update(
                option,
                list(updated.values()),
                list(present.values()),
                [dict(state[name]) for name in present],
            )
            new_params.update(zip(present, values, strict=True))
            new_state.update(zip(present, entries, strict=True))
        return new_params, new_state

    # The rule applied in place, as an everyday optimizer.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, in place, from each parameter's ``.grad``.

        Args:
            closure: computes the loss and its gradients anew; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = itertools.count()
        live: dict[str, Tensor] = {}
        groups: list[list[str]] = []
        for group in self.param_groups:
            indexed = [(f"parameter {next(number)}", p) for p in group["params"]]
            updated = {name: p for name, p in indexed if p.grad is not None}
            live.update(updated)
            groups.append(list(updated))
        with torch.no_grad():
            hyper = self.hyperparameters(self._steps)
            state = {}
            for names, own_hyper in zip(groups, hyper, strict=True):
                for name in names:
                    present = as_tensors(self.state.get(live[name], {}))
                    state[name] = present or self._init(own_hyper, live[name])
            grads = {name: p.grad for name, p in live.items()}
            values, states = self.update(live, grads, state, groups=groups, hyper=hyper)
            for name, p in live.items():
                p.copy_(values[name])
                # A first momentum is the gradient itself, and .grad is overwritten by the next.
                self.state[p] = {
                    key: x.clone() if x is grads[name] else x for key, x in states[name].items()
                }
        self._steps += 1
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim``; complex parameters and ill-typed options are refused."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            del self.param_groups[-1]
            raise

    def _check_kind(self, key: str, value: Any) -> None:
        options.check_kinds(type(self).__name__, self.ranges, key, value)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        for key in self.defaults:
            self._check_kind(key, group[key])
        names = group.get("param_names") or [str(i) for i in range(len(group["params"]))]
        params = dict(zip(names, group["params"], strict=True))
        for name, p in params.items():
            _refuse_complex(p, name)
        group_options = {key: group[key] for key in self.defaults}
        options.check_shapes(type(self).__name__, group_options, params)

    # Saving.

    def state_dict(self) -> dict[str, Any]:
        """As in ``torch.optim``, and the number of ``step()`` calls.

        A tensor hyperparameter is stored as its detached value, a callable as None.
        """
        state = super().state_dict()
        state["param_groups"] = [
            {key: packed(value) if key in self.defaults else value for key, value in g.items()}
            for g in state["param_groups"]
        ]
        state[_STEPS] = self._steps
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this optimizer, or of its ``torch.optim`` namesake, returned.

        What ties hyperparameters to the rest of the program stays: a callable of this instance is
        kept, a tensor that requires grad gets the stored value copied into it if it is a leaf, and
        is kept if it is computed from others.
        """
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, old in zip(self.param_groups, before, strict=True):
            for key in self.defaults.keys() - SWITCHES:
                group[key] = restored(old[key], group[key])
        counts = [float(s["step"]) for s in self.state.values() if "step" in s]
        self._steps = int(state_dict.get(_STEPS, max(counts, default=0)))

    def __getstate__(self) -> dict[str, Any]:
        counts = {"_steps": self._steps, "_continued": self._continued}
        return {**super().__getstate__(), **counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_steps", 0)
        self.__dict__.setdefault("_continued", False)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    # From torch.optim.

    @classmethod
    def from_torch(cls, opt: torch.optim.Optimizer) -> Self:
        """This optimizer with the param groups and the present state of a ``torch.optim`` one.

        Option values, tensors included, and state tensors are taken by reference. The constructor
        is called with the param groups, which hold all options of ``opt``, and nothing else.
        """
        make: Any = cls
        groups = [dict(group) for group in opt.param_groups]
        over_results = {"differentiable": True} if opt.defaults.get("differentiable") else {}
        new: Self = make(groups, **over_results)
        for p, entries in opt.state.items():
            new.state[p] = as_tensors(entries)
        return new

    # Helpers.

    def _names(self, params: Params, groups: Groups | None) -> Groups:
        return names_of_groups(type(self).__name__, self.param_groups, params, groups)

    def _options_at(self, group: Mapping[str, Any], step: int) -> dict[str, Any]:
        rule = type(self).__name__
        return Options(options.values_at(rule, self.ranges, self.defaults, group, step))


class _AtStart(dict[str, Any]):
    def __init__(self, rule: Optimizer, group: Mapping[str, Any]) -> None:
        super().__init__({key: group[key] for key in rule.defaults})
        self._rule = rule

    def __getitem__(self, key: str) -> Any:
        rule, value = self._rule, super().__getitem__(key)
        return options.values_at(type(rule).__name__, rule.ranges, (key,), {key: value}, 0)[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401


def _refuse_complex(param: Tensor, name: str) -> None:
    if param.is_complex():
        raise NotImplementedError(
            f"parameter {name!r} is complex: optimize its torch.view_as_real instead"
        )


def as_tensors(entries: Mapping[str, Any]) -> Entries:
    """State entries as tensors; PyTorch keeps None and numbers among the entries, too."""
    return {
        key: x if isinstance(x, Tensor) else torch.tensor(float(x))
        for key, x in entries.items()
        if x is not None
    }
