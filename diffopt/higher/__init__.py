"""The plug for ``higher``: its loops with these optimizers, or without its memory.

Importing this module

* registers every optimizer of ``diffopt`` with ``higher``, and those of ``torch.optim`` that
  ``higher`` has no rule for (``AdamW``, ``NAdam``, ``RAdam``): they work wherever one of
  ``higher``'s own does, in ``innerloop_ctx``, ``get_diff_optim`` and ``create_diff_optim``;
* teaches ``diffopt.unroll`` the pairs ``(fmodel, dopt)`` that ``innerloop_ctx`` yields, whichever
  optimizer ``dopt`` stands for.

``higher``: Grefenstette et al., "Generalized inner loop meta-learning" (2019).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffopt import optim
from diffopt._model.slots import ModuleSlots
from diffopt._unroll.problem import InnerProblem, adapt, frozen
from diffopt._unroll.unrolled import Unrolled
from diffopt.higher.rules import EarlierAdam, ItsOwnRule, native
from diffopt.higher.slots import FastSlots
from diffopt.optim import Optimizer
from diffopt.optim.base import as_tensors
from diffopt.optim.convert import convert, registered
from diffopt.optim.options import SWITCHES

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of its own source, when first compiled
        import higher
except ModuleNotFoundError as error:
    if error.name != "higher":
        raise
    raise ImportError("diffopt.higher needs the package higher: pip install higher") from error

__all__ = ["DifferentiableOptimizer"]

Override = dict[str, list[Any]]
Grads = Sequence[Tensor | None]
GradCallback = Callable[[Grads], Grads]


class DifferentiableOptimizer(higher.optim.DifferentiableOptimizer):
    """Any ``diffopt`` optimizer as ``higher`` wants it: one class, as the rule is stated already.

    Made by ``higher``, not by hand. It differs from ``higher``'s own in that nothing is cut: the
    tensors among the options and in the state of ``other`` stay connected to the caller's graph,
    which a deep copy of the param groups would end. An option may be a callable of the step
    number, which counts the calls of ``step`` and the steps of an unroll, from 0.

    For an optimizer class of your own, which ``diffopt`` knows by ``diffopt.register`` or as a
    subclass of ``diffopt.Optimizer``, call ``higher.register_optim(YourClass,
    diffopt.higher.DifferentiableOptimizer)``. With ``torch.optim.Adam`` for ``YourClass``,
    ``higher`` takes today's Adam in place of its own.

    Args:
        other: the optimizer; its options and its present state are the start.
        reference_params: the parameters of the model, in its order.
        fmodel: the patched module whose weights are updated.
        device: where the state goes.
        override: options to take instead, by name, as a list of one value or of one a param group.
            A switch (``amsgrad``, ``nesterov``, ...) given as a tensor counts as its truth value.
        grad_callback: a function of the list of all gradients.
        track_higher_grads: whether steps are recorded, for second derivatives.

    Raises:
        TypeError: ``diffopt`` does not know the class of ``other``, or ``override`` has a value of
            a wrong kind.
        ValueError: ``override`` names an option that the optimizer does not have.
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: nn.Module | None = None,
        device: torch.device | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
        **kwargs: Any,
    ) -> None:
        opt = convert(other)
        self.rule = frozen(opt)
        self.steps = 0
        # The base class makes a deep copy of the groups, and takes the rest as it finds it. Without
        # tracking it would have frozen weights require grad after a step, so they are left out.
        groups = _Groups(
            {**group, "params": [p for p in group["params"] if p.requires_grad]}
            for group in opt.param_groups
        )
        source = SimpleNamespace(param_groups=groups, state={})
        super().__init__(
            source,
            reference_params,
            fmodel=fmodel,
            device=device,
            override=override,
            grad_callback=grad_callback,
            track_higher_grads=track_higher_grads,
            **kwargs,
        )
        for entries_by_index, group in zip(self.state, groups, strict=True):
            for i, p in enumerate(group["params"]):
                if p in opt.state:
                    entries_by_index[i] = {k: _own_copy(x, device) for k, x in opt.state[p].items()}
        self.rule.param_groups = self.param_groups  # where an override goes, also a later one

    def _apply_override(self, override: Override) -> None:
        name = type(self.rule).__name__
        for key, values in override.items():
            if key not in self.rule.defaults:
                raise ValueError(
                    f"override has {key!r}, which is no option of {name}: those are "
                    f"{', '.join(self.rule.defaults)}"
                )
            if key not in SWITCHES:
                for value in values:
                    self.rule._check_kind(key, value)
        super()._apply_override(
            {key: [_plain(key, value) for value in values] for key, values in override.items()}
        )

    def _update(self, grouped_grads: Sequence[Grads], **kwargs: Any) -> None:
        where = {
            f"parameter {i} of param group {g}": (g, i)
            for g, grads in enumerate(grouped_grads)
            for i, grad in enumerate(grads)
            if grad is not None
        }
        groups = [[n for n, (h, _) in where.items() if h == g] for g in range(len(grouped_grads))]
        hyper = self.rule.hyperparameters(self.steps)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._track_higher_grads):
            params = {n: self.param_groups[g]["params"][i] for n, (g, i) in where.items()}
            state = {
                n: self.state[g].get(i) or self.rule._init(hyper[g], params[n])
                for n, (g, i) in where.items()
            }
            grads = {n: grouped_grads[g][i] for n, (g, i) in where.items()}
            params, state = self.rule.update(params, grads, state, groups=groups, hyper=hyper)
        for n, (g, i) in where.items():
            self.param_groups[g]["params"][i] = params[n]
            self.state[g][i] = state[n]
        self.steps += 1


class _Groups(list[dict[str, Any]]):
    """Param groups whose deep copy shares the options."""

    def __deepcopy__(self, memo: Any) -> list[dict[str, Any]]:
        return [dict(group) for group in self]


def _own_copy(x: Tensor, device: torch.device | None) -> Tensor:
    """A copy of a state entry; numbers (0-d) stay where they are, which is on the CPU for steps."""
    x = x.clone()
    return x.to(device) if x.dim() else x


def _plain(key: str, value: Any) -> Any:
    """An option's value; a switch, which has no derivative, as a bool."""
    return bool(value) if key in SWITCHES and isinstance(value, Tensor) else value


class _PatchedProblem(InnerProblem):
    """What ``innerloop_ctx`` yields, as an inner problem.

    The names are those of the patched module, which are the original's; the values are its newest
    fast weights.
    """

    model: Any

    def __init__(self, fmodel: Any, dopt: Any) -> None:
        newest = list(fmodel.fast_params)
        # A call with params=, or fast_params assigned, has left older values in the submodules.
        higher.patch._update_patched_params(fmodel, [fmodel._expand_params(newest)], 0)
        params = dict(fmodel.named_parameters())
        names = {x: name for name, x in params.items()}
        self._fast_names = [names[x] for x in newest]
        self._dopt = dopt
        indices = dopt._group_to_param_list
        super().__init__(
            fmodel,
            _rule(dopt, [[newest[i] for i in group] for group in indices]),
            params,
            [[self._fast_names[i] for i in group] for group in indices],
            {
                self._fast_names[group[i]]: as_tensors(entries)
                for group, held in zip(indices, dopt.state, strict=True)
                for i, entries in held.items()
            },
        )
        self.connected = dopt._track_higher_grads
        if isinstance(dopt, DifferentiableOptimizer):
            self.first_step = dopt.steps
        if dopt._grad_callback is not None:
            self.grad_transform = _transform(dopt._grad_callback, self._fast_names)

    def slots(self, carried: Collection[str] = ()) -> ModuleSlots:
        return FastSlots(self.model, self.inner, self.constants, carried, self._fast_names)

    def deliver(self, result: Unrolled) -> None:
        """Leave ``fmodel`` and ``dopt`` as a loop of ``dopt.step`` would have."""
        moved = {name: x for name, x in result.buffers.items() if name in self.params}
        final = {**self.params, **moved, **result.params}
        for name in self.inner:
            if not final[name].requires_grad:
                final[name] = final[name].detach().requires_grad_()
        self.model.update_params([final[name] for name in self._fast_names])
        final_buffers = {name: x.clone() for name, x in result.buffers.items()}
        ModuleSlots(self.model, {}, {}).write_buffers(final_buffers)
        ours = isinstance(self._dopt, DifferentiableOptimizer)
        groups = zip(self._dopt.param_groups, self._dopt.state, self.groups, strict=True)
        for group, held, names in groups:
            group["params"] = [final[name] for name in names]
            for i, name in enumerate(names):
                entries = result.opt_state.get(name)
                if entries:
                    held[i] = dict(entries) if ours else native(entries)
        if ours:
            self._dopt.steps = result.step


def _transform(callback: GradCallback, fast_names: list[str]) -> Callable[[Any], Any]:
    """A ``grad_callback``, which takes all gradients in a row, as a ``grad_transform``."""

    def transform(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changed = callback(tuple(grads.get(name) for name in fast_names))
        named = zip(fast_names, changed, strict=True)
        return {name: x for name, x in named if name in grads and x is not None}

    return transform


_RULES: dict[type, Callable[..., Optimizer]] = {
    higher.optim.DifferentiableAdadelta: optim.Adadelta,
    higher.optim.DifferentiableAdagrad: optim.Adagrad,
    higher.optim.DifferentiableAdam: EarlierAdam,
    higher.optim.DifferentiableAdamax: optim.Adamax,
    higher.optim.DifferentiableASGD: optim.ASGD,
    higher.optim.DifferentiableRMSprop: optim.RMSprop,
    higher.optim.DifferentiableRprop: optim.Rprop,
    higher.optim.DifferentiableSGD: optim.SGD,
}


def _rule(dopt: Any, params: list[list[Tensor]]) -> Optimizer:
    """The rule by which ``dopt`` steps, with its present options."""
    if isinstance(dopt, DifferentiableOptimizer):
        return dopt.rule
    groups = [
        {**{key: _plain(key, x) for key, x in group.items()}, "params": own}
        for group, own in zip(dopt.param_groups, params, strict=True)
    ]
    if type(dopt) not in _RULES:
        return ItsOwnRule(dopt, groups)
    for option in ("maximize", "decoupled_weight_decay"):
        if any(group.get(option) for group in groups):
            raise NotImplementedError(
                f"{option}=True has no effect in higher's {type(dopt).__name__}: give "
                "innerloop_ctx a diffopt optimizer, where it has"
            )
    return _RULES[type(dopt)](groups, differentiable=True)


def _patched_problem(model: Any, opt: Any, tasks: int | None) -> InnerProblem:
    if not isinstance(model, higher.patch._MonkeyPatchBase):
        raise TypeError(
            f"opt comes from higher, and model is a plain {type(model).__name__}: pass the fmodel "
            "and the optimizer that innerloop_ctx yields, or none of them"
        )
    if not isinstance(opt, higher.optim.DifferentiableOptimizer):
        raise TypeError(
            f"model was patched by higher, and opt is a {type(opt).__name__}: pass the fmodel and "
            "the optimizer that innerloop_ctx yields, or none of them"
        )
    if getattr(model, "_fast_params", None) is None:
        raise ValueError(
            f"model, a {type(model).__name__}, holds no fast weights: pass the module that "
            "innerloop_ctx yields, not a part of it"
        )
    if opt._fmodel is not None and opt._fmodel is not model:
        raise ValueError(
            "opt updates another fmodel than the one given: pass the two that the same "
            "innerloop_ctx yields"
        )
    if tasks is not None:
        raise NotImplementedError(
            f"tasks={tasks} would give every weight a task dimension, which a module patched by "
            "higher cannot hold: unroll the model and its optimizer themselves"
        )
    return _PatchedProblem(model, opt)


def _register() -> None:
    ours = [x for x in vars(optim).values() if isinstance(x, type) and issubclass(x, Optimizer)]
    ours.remove(Optimizer)
    missing = [cls for cls in registered() if cls not in higher.optim._opt_mapping]
    for cls in (*ours, *missing):
        higher.register_optim(cls, DifferentiableOptimizer)
    adapt((higher.patch._MonkeyPatchBase, higher.optim.DifferentiableOptimizer), _patched_problem)


_register()
