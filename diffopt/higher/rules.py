"""The rules of ``higher``'s own optimizers that differ from today's ``torch.optim``.

Nothing here imports ``higher``: what it has is passed in.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from diffopt.optim import Adam, Optimizer
from diffopt.optim.base import OptState, as_tensors
from diffopt.optim.groups import Grads, Groups, Params, States
from diffopt.optim.lists import Tensors
from diffopt.optim.scalars import at
from diffopt.optim.terms import Cotangents, Entries, Hyper, Pullback, advance


class EarlierAdam(Adam):
    """Adam as ``higher`` has it, ε inside of the bias correction, where PyTorch once had it.

    θ ← θ − γ √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε), which is Adam with ε / √(1 − β₂ᵗ) for ε.
    """

    is_pure = True
    elementwise = True

    def _update(
        self, hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
    ) -> tuple[Tensors, list[Entries]]:
        return super()._update(_corrected(hyper, states), params, grads, states)

    def _vjp(self, pullback: Pullback) -> Cotangents | None:
        corrected = _corrected(pullback.hyper, pullback.states)
        if isinstance(corrected["eps"], Sequence):
            return None  # parameters whose step counts differ: stated by hand for one ε only
        return super()._vjp(replace(pullback, hyper=corrected))


def _corrected(hyper: Hyper, states: list[Entries]) -> Hyper:
    (_, beta2), eps = hyper["betas"], hyper["eps"]
    _, t = advance(states)
    return {**hyper, "eps": at(t, lambda t: eps / (1 - beta2**t) ** 0.5)}


class ItsOwnRule(Optimizer):
    """The rule of a differentiable optimizer that ``diffopt`` has none for: its own ``_update``.

    Its state has to be tensors and numbers.
    """

    def __init__(self, dopt: Any, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"differentiable": True})
        self._dopt = copy.copy(dopt)
        # The final weights, which it will hold, lead back here: see the slots of a patched module.
        self._dopt._fmodel, self._dopt.param_groups, self._dopt.state = None, [], []

    def _init_groups(self, params: Params, groups: Groups, hyper: Sequence[Hyper]) -> OptState:
        return {name: {} for name in params}

    def _update_groups(
        self, params: Params, grads: Grads, state: States, groups: Groups, hyper: Sequence[Hyper]
    ) -> tuple[dict[str, Tensor], OptState]:
        dopt = copy.copy(self._dopt)
        dopt.param_groups = [
            {**group, "params": [params[name] for name in names]}
            for group, names in zip(self.param_groups, groups, strict=True)
        ]
        dopt.state = [
            defaultdict(dict, {i: native(state[n]) for i, n in enumerate(names) if state[n]})
            for names in groups
        ]
        dopt._update([[grads.get(name) for name in names] for names in groups])
        new_params = dict(params)
        new_state = {name: dict(entries) for name, entries in state.items()}
        for group, of_group, names in zip(dopt.param_groups, dopt.state, groups, strict=True):
            new_params.update(zip(names, group["params"], strict=True))
            new_state.update({names[i]: as_tensors(entries) for i, entries in of_group.items()})
        return new_params, new_state


def native(entries: Mapping[str, Tensor]) -> dict[str, Any]:
    """State as ``higher``'s own optimizers hold it, which count steps in place."""
    return {key: int(x) if key == "step" else x for key, x in entries.items()}
