"""Several optimizers over disjoint parameters as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from diffopt.optim.base import Optimizer, OptState
from diffopt.optim.groups import Grads, Groups, Params, States
from diffopt.optim.mapped import init_over_tasks, update_over_tasks
from diffopt.optim.terms import Hyper


class Joint(Optimizer):
    """Several optimizers, each of which updates its own parameters.

    What ``unroll`` makes of a list of optimizers, such as Muon for matrices and AdamW for the rest.
    The param groups and rules of the optimizers follow one another: the optimizer that holds a
    parameter gives the parameter's options, state and derivative.

    Args:
        optimizers: over disjoint parameters.
        names: of the parameters, for messages.

    Raises:
        ValueError: two optimizers hold the same parameter, or the list is empty.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], names: Mapping[Tensor, str] | None = None
    ) -> None:
        if not optimizers:
            raise ValueError("the list of optimizers is empty: pass at least one")
        self.optimizers = list(optimizers)
        self._check_disjoint(names or {})
        groups = [group for opt in optimizers for group in opt.param_groups]
        super().__init__([dict(groups[0])], {"differentiable": True})
        self.param_groups = groups
        for opt in optimizers:
            self.state.update(opt.state)

    def _check_disjoint(self, names: Mapping[Tensor, str]) -> None:
        holders: dict[Tensor, Optimizer] = {}
        for opt in self.optimizers:
            for group in opt.param_groups:
                param_names = group.get("param_names", ())
                for i, p in enumerate(group["params"]):
                    if p in holders:
                        name = param_names[i] if param_names else f"{i}, of shape {tuple(p.shape)}"
                        both = f"{type(holders[p]).__name__} and {type(opt).__name__}"
                        raise ValueError(
                            f"{both} both hold the parameter {names.get(p, name)!r}: give each "
                            "parameter to one optimizer"
                        )
                    holders[p] = opt

    @property
    def rules(self) -> Sequence[Optimizer]:
        return [rule for opt in self.optimizers for rule in opt.rules]

    @property
    def first_step(self) -> int:
        return max(opt.first_step for opt in self.optimizers)

    def _init_groups(self, params: Params, groups: Groups, hyper: Sequence[Hyper]) -> OptState:
        return init_over_tasks(self, None, params, groups=groups, hyper=hyper)

    def _update_groups(
        self, params: Params, grads: Grads, state: States, groups: Groups, hyper: Sequence[Hyper]
    ) -> tuple[dict[str, Tensor], OptState]:
        return update_over_tasks(self, None, params, grads, state, hyper=hyper, groups=groups)

    def step(self, closure: Callable[[], Any] | None = None) -> NoReturn:
        raise NotImplementedError("call step() of each of the optimizers that were joined")

    def state_dict(self) -> NoReturn:
        raise NotImplementedError("save state_dict() of each of the optimizers that were joined")

    def load_state_dict(self, state_dict: dict[str, Any]) -> NoReturn:
        raise NotImplementedError("load the state of each of the optimizers that were joined")
