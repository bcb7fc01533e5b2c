"""The plug for ``higher``: its loops with these optimizers, or without its memory.

Importing this module

* registers every optimizer of ``diffopt`` with ``higher``, and those of ``torch.optim`` that
  ``higher`` has no rule for (``AdamW``, ``NAdam``, ``RAdam``): they work wherever one of
  ``higher``'s own does, in ``innerloop_ctx``, ``get_diff_optim`` and ``create_diff_optim``;
* lets a list of optimizers over disjoint parameters stand where ``higher`` takes one;
* teaches ``diffopt.unroll`` the pairs ``(fmodel, dopt)`` that ``innerloop_ctx`` yields, whichever
  optimizer ``dopt`` stands for, and ``(fmodel, [dopt, ...])`` for several over one ``fmodel``.

``higher``: Grefenstette et al., "Generalized inner loop meta-learning" (2019).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffopt import optim
from diffopt._model.slots import ModuleSlots
from diffopt._unroll.problem import InnerProblem, adapt, frozen
from diffopt._unroll.unrolled import Unrolled
from diffopt.higher.rules import EarlierAdam, ItsOwnRule, native
from diffopt.higher.several import GradCallback, Grads, check_together, transform_of
from diffopt.higher.slots import FastSlots
from diffopt.optim import Joint, Optimizer
from diffopt.optim.base import as_tensors
from diffopt.optim.convert import Optimizers, all_of, convert, registered
from diffopt.optim.options import SWITCHES
from diffopt.optim.unchanged import UnchangedOptions

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
        other: the optimizer, or a list of them over disjoint parameters, which then step at once;
            the options and the present state are the start. All in a list step by the rules of
            ``diffopt``, and their param groups are numbered on.
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
        ValueError: ``override`` names an option that the optimizer does not have, or one of a list;
            two optimizers of a list hold the same parameter.
    """

    def __init__(
        self,
        other: Optimizers,
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
        for state, group in zip(self.state, groups, strict=True):
            for i, p in enumerate(group["params"]):
                if p in opt.state:
                    state[i] = {key: _copied(x, device) for key, x in opt.state[p].items()}
        self.rule.param_groups = self.param_groups  # where an override goes, also a later one

    def _apply_override(self, override: Override) -> None:
        for key, values in override.items():
            for i, rule in enumerate(self.rule.rules):
                if key not in rule.defaults:
                    raise ValueError(
                        f"override has {key!r}, which is no option of {type(rule).__name__}: those "
                        f"are {', '.join(rule.defaults)}"
                    )
                if key not in SWITCHES:
                    for value in values if len(values) == 1 else values[i : i + 1]:
                        rule._check_kind(key, value)
        super()._apply_override(
            {key: [_untensored(key, x) for x in values] for key, values in override.items()}
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
                n: self.state[g].get(i) or self.rule.rules[g]._init(hyper[g], params[n])
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


def _copied(x: Tensor, device: torch.device | None) -> Tensor:
    """A copy of a state entry; numbers (0-d) stay where they are, which is on the CPU for steps."""
    x = x.clone()
    return x.to(device) if x.dim() else x


def _untensored(key: str, value: Any) -> Any:
    """An option's value; a switch, which has no derivative, as a bool."""
    return bool(value) if key in SWITCHES and isinstance(value, Tensor) else value


class _PatchedProblem(InnerProblem):
    """What ``innerloop_ctx`` yields, as an inner problem.

    The names are those of the patched module, which are the original's; the values are its newest
    fast weights.
    """

    model: Any

    def __init__(self, fmodel: Any, dopts: Sequence[Any]) -> None:
        newest = list(fmodel.fast_params)
        # A call with params=, or fast_params assigned, has left older values in the submodules.
        higher.patch._update_patched_params(fmodel, [fmodel._expand_params(newest)], 0)
        params = dict(fmodel.named_parameters())
        names = {x: name for name, x in params.items()}
        self._fast_names = [names[x] for x in newest]
        self._dopts = dopts
        rules = [
            _rule(dopt, [[newest[i] for i in group] for group in dopt._group_to_param_list])
            for dopt in dopts
        ]
        groups = [
            [[self._fast_names[i] for i in group] for group in dopt._group_to_param_list]
            for dopt in dopts
        ]
        super().__init__(
            fmodel,
            rules[0] if len(rules) == 1 else Joint(rules, names),
            params,
            [*chain.from_iterable(groups)],
            {
                names[i]: as_tensors(entries)
                for dopt, of_dopt in zip(dopts, groups, strict=True)
                for names, state in zip(of_dopt, dopt.state, strict=True)
                for i, entries in state.items()
            },
        )
        self.options = UnchangedOptions(dopts)
        self.connected = dopts[0]._track_higher_grads
        self.first_step = max((x.steps for x in dopts if _is_ours(x)), default=self.first_step)
        callbacks = [dopt._grad_callback for dopt in dopts]
        if any(callbacks):
            of_each = [{*chain.from_iterable(of_dopt)} for of_dopt in groups]
            self.grad_transform = transform_of(callbacks, of_each, self._fast_names)

    def slots(self, carried: Collection[str]) -> ModuleSlots:
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
        left = iter(self.groups)
        for dopt in self._dopts:
            for group, state in zip(dopt.param_groups, dopt.state, strict=True):
                names = next(left)
                group["params"] = [final[name] for name in names]
                for i, name in enumerate(names):
                    entries = result.opt_state.get(name)
                    if entries:
                        state[i] = dict(entries) if _is_ours(dopt) else native(entries)
            if _is_ours(dopt):
                dopt.steps = result.step


def _is_ours(dopt: Any) -> bool:
    return isinstance(dopt, DifferentiableOptimizer)


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
    if _is_ours(dopt):
        rule = frozen(dopt.rule)  # apart from dopt, which will hold the final weights
        for group, newest in zip(rule.param_groups, params, strict=True):
            group["params"] = newest
        return rule
    groups = [
        {**{key: _untensored(key, x) for key, x in group.items()}, "params": newest}
        for group, newest in zip(dopt.param_groups, params, strict=True)
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
    dopts: list[Any] = list(all_of(opt))
    if not isinstance(model, higher.patch._MonkeyPatchBase):
        raise TypeError(
            f"opt comes from higher, and model is a plain {type(model).__name__}: pass the fmodel "
            "and the optimizer that innerloop_ctx yields, or none of them"
        )
    for dopt in dopts:
        if not isinstance(dopt, higher.optim.DifferentiableOptimizer):
            raise TypeError(
                f"model was patched by higher, and opt is a {type(dopt).__name__}: pass the fmodel "
                "and the optimizer that innerloop_ctx yields, or none of them"
            )
    if getattr(model, "_fast_params", None) is None:
        raise ValueError(
            f"model, a {type(model).__name__}, holds no fast weights: pass the module that "
            "innerloop_ctx yields, not a part of it"
        )
    if any(dopt._fmodel is not None and dopt._fmodel is not model for dopt in dopts):
        raise ValueError(
            "opt updates another fmodel than the one given: pass the two that the same "
            "innerloop_ctx yields, or make each optimizer of a list by "
            "higher.get_diff_optim(opt, model.parameters(), fmodel=fmodel)"
        )
    check_together(dopts, [dopt for dopt in dopts if _is_ours(dopt)])
    if tasks is not None:
        raise NotImplementedError(
            f"tasks={tasks} would give every weight a task dimension, which a module patched by "
            "higher cannot hold: unroll the model and its optimizer themselves"
        )
    return _PatchedProblem(model, dopts)


def _register() -> None:
    ours = [x for x in vars(optim).values() if isinstance(x, type) and issubclass(x, Optimizer)]
    ours.remove(Optimizer)
    missing = [cls for cls in registered() if cls not in higher.optim._opt_mapping]
    for cls in (*ours, *missing, list, tuple):
        higher.register_optim(cls, DifferentiableOptimizer)
    adapt((higher.patch._MonkeyPatchBase, higher.optim.DifferentiableOptimizer), _patched_problem)


_register()
