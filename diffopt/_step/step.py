"""One inner training step as a pure function of the state.

A step maps the state ``s = (params, optimizer state, buffers)`` to the next one,

    g  = grad_transform(dL(params, buffers, batch_t)/dparams)
    s' = update(params, g, optimizer state; hyperparameters at t),

and yields the loss L before the update. ``loss_fn`` sees the user's own module, holding the
values of ``s``. Its derivative is a ``Linearization``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from diffopt._derivatives.table import beyond_second_derivatives, refuse_missing
from diffopt._model.standing import InnerHooks
from diffopt._step.capture import Graph, comes_to
from diffopt._step.group import Group
from diffopt._step.linearization import Linearization, Split, Whole
from diffopt._step.loss import InnerLoss
from diffopt._step.observe import Observer
from diffopt._step.result import Checked, Evaluated, StepResult, present
from diffopt._torch.autograd import in_forward_mode, present_sequence
from diffopt._torch.collectives import no_collectives
from diffopt._torch.engine import gradient
from diffopt._values.outputs import attached
from diffopt._values.state import State
from diffopt._values.tree import Path
from diffopt.optim import Optimizer
from diffopt.optim.mapped import update_over_tasks
from diffopt.optim.options import is_scheduled
from diffopt.optim.terms import Hyper, tensors_of
from diffopt.optim.vjp import is_known

#: ``f(grads)``, or ``f(grads, model, batch)``, to the gradients that the update is given.
GradTransform = Callable[..., Mapping[str, Tensor]]

_NOTHING = nullcontext()


class InnerStep:
    """The step of one unroll, with everything but the state bound.

    Args:
        loss: the user's loss, as a function of values.
        opt: the rule; ``groups`` says which names belong to which of its param groups.
        first_step: the step number of position 0, for schedules and messages.
        grad_transform: the user's change to the inner gradients, or None.
        first_order: take each inner gradient as a constant.
        group: the processes that take the step together, over which its gradients are averaged.

    Attributes:
        only_gradient: whether it is there for its loss and the gradient of that alone.
    """

    only_gradient = False

    def __init__(
        self,
        loss: InnerLoss,
        opt: Optimizer,
        groups: Sequence[Sequence[str]],
        *,
        first_step: int = 0,
        grad_transform: GradTransform | None = None,
        first_order: bool = False,
        group: Group | None = None,
    ) -> None:
        self.group = group
        self.loss = loss
        self.opt = opt
        self.groups = groups
        self.first_step = first_step
        self.grad_transform = grad_transform
        self.first_order = first_order
        self.hooks = InnerHooks()
        self._takes_model = grad_transform is not None and arguments_of(grad_transform) == 3
        self._called = [
            (i, key)
            for i, (rule, group) in enumerate(zip(opt.rules, opt.param_groups, strict=True))
            for key in rule.defaults
            if is_scheduled(group[key])
        ]
        self._constants: Sequence[Hyper] | None = None
        self._is_pure = opt.is_pure and all(rule.is_pure for rule in opt.rules)

    def of_first_order(self) -> InnerStep:
        """This step with its inner gradients taken as constants."""
        step = copy(self)
        step.first_order = True
        return step

    def session(self, standing: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """Where steps are taken, of the context in which values may stand in the module."""
        return standing

    def later(self, by: int) -> Self:
        """This step with the positions counted from ``by`` on."""
        step = copy(self)
        step.loss = self.loss.later(by)
        step.first_step = self.first_step + by
        return step

    def __call__(self, state: State, t: int, observer: Observer | None = None) -> StepResult:
        """Take step ``t``. The result carries a graph exactly where grad mode is enabled."""
        connected = torch.is_grad_enabled()
        # An alias, so that a hook that the loss registers on a parameter stays within the step.
        params = {
            name: x.view_as(x) if connected and x.requires_grad else x.detach().requires_grad_()
            for name, x in state.params.items()
        }
        own = list(params.values())
        if connected:
            own += [x for x in state.each() if x.requires_grad]
        given = state.params
        state = State(params, state.opt, state.buffers)
        with beyond_second_derivatives(connected):
            found = self.evaluate(state, t, own, connected, observer)
        grads = found.grads
        if not connected:
            params = {n: x.detach() if x.requires_grad else x for n, x in given.items()}
            grads = {
                n: g.detach() if g is not None and g.requires_grad else g for n, g in grads.items()
            }
        seen = None if self._is_pure else observer  # a pure rule uses nothing but its arguments
        shown = seen is not None and not self.is_known(found.hyper)
        with torch.set_grad_enabled(connected or shown), seen or _NOTHING:
            new_params, new_opt = self.update(found.hyper, params, grads, state.opt)
        new = State(new_params, new_opt, found.buffers)
        if shown:
            found.graph.roots["update"] = _learning(new.tensors().values())
        checked = self._with_update(found.checked, new)
        if connected:
            return StepResult(new, found.loss, found.aux, checked, found.graph, [*found.attached])
        new, loss = new.detach(), found.loss.detach()
        return StepResult(new, loss, found.aux, checked, found.graph, [*found.attached])

    def evaluate(
        self,
        state: State,
        t: int,
        own: Sequence[Tensor],
        connected: bool,
        observer: Observer | None = None,
    ) -> Evaluated:
        """The loss and its gradients, with their graph if ``connected``."""
        if self.group is not None:
            self.group.at(self.first_step + t)
        if observer is not None:
            observer.begin(self.first_step + t, own, present_sequence())
        return self.evaluate_as_begun(state, t, own, connected, observer)

    def evaluate_as_begun(
        self,
        state: State,
        t: int,
        own: Sequence[Tensor],
        connected: bool,
        observer: Observer | None = None,
    ) -> Evaluated:
        """``evaluate``, of a step that ``observer`` has been told of."""
        number = self.first_step + t
        used: Mapping[int, Tensor] | None = None
        token = None
        with self.hooks, torch.enable_grad(), no_collectives():
            loss, aux, left = self.loss(state.params, state.buffers, t, observer or _NOTHING)
            if any(x.is_leaf and x.grad is not None for x in state.params.values()):
                raise RuntimeError(
                    f"the loss of step {number} was differentiated into .grad, as where loss_fn "
                    "calls loss.backward(): leave that out and return the loss, whose gradient "
                    "diffopt.unroll takes itself"
                )
            with observer or _NOTHING:
                hyper = () if self.only_gradient else self.options_at(number)
                if observer is not None:
                    observer.see(tensors_of(hyper))
                    observer.refuse_duals([loss, *tensors_of(hyper)])
                with _NOTHING if observer is None else observer.gradient() as used:
                    raw = self._gradients(loss, state.params, number, connected)
        if self.group is not None:
            raw, token = self._averaged(raw, state.params, number, connected)
        leaves: Sequence[Tensor] = ()
        grads: Mapping[str, Tensor | None] = raw
        if self.grad_transform is not None:
            with self.hooks, torch.enable_grad(), no_collectives(), observer or _NOTHING:
                leaves, given = _given(raw, connected)
                if observer is not None:
                    observer.transforms(given)
                grads = self._transformed(given, state.params, left, t)
        graph = Graph([*own, *leaves], in_gradient=[*(used or {}).values()])
        graph.roots["loss"] = [loss, *_learning(left.values())]
        outputs = attached(aux)
        self.note_roots(graph, outputs, hyper, grads)
        checked = self._checked(loss, outputs.values(), hyper, grads, connected)
        return Evaluated(loss, aux, outputs, left, hyper, raw, grads, checked, graph, token)

    def note_roots(
        self,
        graph: Graph,
        outputs: Mapping[int, Tensor],
        hyper: Sequence[Hyper],
        grads: Mapping[str, Tensor | None],
    ) -> None:
        """Note where the parts of a step's graph beside the loss begin."""
        if outputs:
            graph.roots["aux"] = [*outputs.values()]
        graph.roots["hyper"] = _learning(tensors_of(hyper))
        if self.grad_transform is not None:
            graph.roots["transform"] = _learning(present(grads).values())

    def options_at(self, number: int) -> Sequence[Hyper]:
        """The hyperparameters of a step."""
        if self._called or not self._is_pure:
            return [*self.opt.hyperparameters(number)]
        if self._constants is None:  # a change to them is an error: `UnchangedOptions`
            self._constants = self.opt.hyperparameters(number)
        return self._constants

    def _gradients(
        self, loss: Tensor, params: Mapping[str, Tensor], number: int, connected: bool
    ) -> dict[str, Tensor | None]:
        found: Sequence[Tensor | None] = ()
        if loss.requires_grad:
            try:
                found = gradient(
                    self.loss.total(loss),
                    list(params.values()),
                    create_graph=connected and not self.first_order,
                    # A transform may take gradients of what the loss has computed.
                    retain_graph=connected or self.grad_transform is not None,
                )
            except RuntimeError as error:
                refuse_missing(error, number)
                if "backward through the graph a second time" in str(error):
                    raise RuntimeError(
                        f"the graph of the loss of step {number} was freed before its gradient was "
                        "taken, as where loss_fn calls loss.backward(): leave that out and return "
                        "the loss, whose gradient diffopt.unroll takes itself"
                    ) from error
                raise
        raw = dict(zip(params, found or [None] * len(params), strict=True))
        if not self.only_gradient:
            self.check_gradient(raw, number)
        return raw

    def check_gradient(self, raw: Mapping[str, Tensor | None], number: int) -> None:
        """Raise where the loss of step ``number`` has no gradient."""
        if all(g is None for g in raw.values()):
            raise ValueError(
                f"the loss of step {number} does not depend on any inner variable: compute it "
                "with the module that loss_fn is given, whose parameters are being trained, and "
                "do not detach it"
            )

    def _averaged(
        self,
        grads: Mapping[str, Tensor | None],
        params: Mapping[str, Tensor],
        number: int,
        connected: bool,
    ) -> tuple[dict[str, Tensor | None], Tensor | None]:
        """``Group.averaged``, with a graph where one is wanted."""
        assert self.group is not None
        own = next(iter(params.values())) if connected and not self.first_order else None
        with torch.set_grad_enabled(own is not None):
            found = self.group.averaged(grads, number, own, weight=self.share_at(number))
        return found.grads, found.token

    def share_at(self, number: int) -> float | Tensor | None:
        """The weight of this process's share of a step's batch; None: gradients are added up."""
        return 1.0

    def _transformed(
        self,
        given: dict[str, Tensor],
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        t: int,
    ) -> Mapping[str, Tensor | None]:
        """The gradients as the update is given them."""
        assert self.grad_transform is not None
        if self._takes_model:
            changed = self.loss.transform_with_model(self.grad_transform, given, params, buffers, t)
        else:
            changed = self.loss.transform_grads(self.grad_transform, given)
        return _checked_grads(changed, params)

    @property
    def kind(self) -> Any:
        """Equal for steps that keep the same of what they compute."""
        return type(self)

    def is_known(self, hyper: Sequence[Hyper]) -> bool:
        """Whether the rule is a function of its arguments alone, whose derivative is known."""
        return self._is_pure or is_known(self.opt, hyper, self.loss.tasks)

    def _checked(
        self,
        loss: Tensor,
        outputs: Iterable[Tensor],
        hyper: Sequence[Hyper],
        grads: Mapping[str, Tensor | None],
        connected: bool,
    ) -> Checked:
        if in_forward_mode():  # of dual numbers, norms cannot be taken, and nothing is compared
            return Checked(loss.detach())
        given = [g for g in grads.values() if g is not None and g.layout is torch.strided]
        if connected or self.grad_transform is not None:
            given = [g.detach() for g in given]
        norms = torch._foreach_norm(given) if given else ()
        extras = [x.detach() for x in outputs if x.layout is torch.strided]
        return Checked(
            loss.detach(),
            [small(hyper[i][key]) for i, key in self._called],
            norms,
            torch._foreach_norm(extras) if extras else (),
        )

    def _with_update(self, checked: Checked, after: State) -> Checked:
        """The norms of the new parameters as well, where the rule may use what nobody can see."""
        if self._is_pure:
            return checked
        norms = torch._foreach_norm([x.detach() for x in after.params.values()])
        return replace(checked, grads=(*checked.grads, *norms))

    def update(
        self,
        hyper: Sequence[Hyper],
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor | None],
        opt_state: Mapping[str, Mapping[str, Tensor]],
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Apply the rule."""
        new, opt = update_over_tasks(
            self.opt, self.loss.tasks, params, grads, opt_state, hyper=hyper, groups=self.groups
        )
        return self.loss.precision.rounded(new, grads), opt

    def differentiable(self, state: State) -> dict[Path, Tensor]:
        """The tensors of ``state`` that derivatives flow through.

        Of the buffers only those that were computed with gradients, or given requiring grad: for
        running statistics there is nothing to carry back.
        """
        return {
            path: x
            for path, x in state.differentiable().items()
            if path[0] != "buffers" or path[1] in self.loss.buffers.tracked
        }

    def linearize(self, state: State, t: int, observer: Observer | None = None) -> Linearization:
        """Evaluate step ``t`` and keep its graph, for vector-Jacobian products."""
        state, leaves = self.on_leaves(state)
        since = present_sequence()
        found = self.evaluate(state, t, [*leaves.values()], True, observer)
        return self.linearized(state, t, leaves, found, since, observer)

    def on_leaves(self, state: State) -> tuple[State, dict[Path, Tensor]]:
        """``state`` with leaves in it to differentiate with respect to, the optimizer's apart."""
        evaluated = State(state.params, {}, state.buffers)
        leaves = {path: _leaf(x) for path, x in self.differentiable(evaluated).items()}
        evaluated = evaluated.replace(leaves)
        return State(evaluated.params, state.opt, evaluated.buffers), leaves

    def linearized(
        self,
        state: State,
        t: int,
        leaves: dict[Path, Tensor],
        found: Evaluated,
        since: int,
        observer: Observer | None,
    ) -> Linearization:
        """The linearization of an evaluation, whose nodes are numbered from ``since`` on."""
        number, own = self.first_step + t, list(leaves.values())
        known = self.is_known(found.hyper)
        if known and not comes_to(found.graph.roots["hyper"], own, since):
            return Split(self, number, state, leaves, found)
        flowing = self.differentiable(State({}, state.opt, {}))
        opt = {path: _leaf(x) for path, x in flowing.items()}
        found.graph.own = [*found.graph.own, *opt.values()]
        with observer or _NOTHING:
            whole = Whole(self, number, state.replace(opt), leaves | opt, found)
        whole.checked = self._with_update(found.checked, whole.after)
        if not known:
            found.graph.roots["update"] = _learning(whole.after.tensors().values())
        return whole


def arguments_of(function: Callable[..., Any]) -> int:
    """How many arguments a function has to be given; 1 where there is no telling."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _given(
    raw: Mapping[str, Tensor | None], connected: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradients that a transform is given, and the leaves that they come from if any.

    Without their graph, too, a transform may differentiate them and change them in place.
    """
    if connected:
        return [], present(raw)
    leaves = {name: _leaf(g) for name, g in present(raw).items()}
    return [*leaves.values()], {name: x.clone() for name, x in leaves.items()}


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _learning(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.requires_grad]


def small(value: Any) -> Any:
    """A hyperparameter, or its norm where it is a large tensor, to be kept for every step."""
    if isinstance(value, tuple):
        return tuple(map(small, value))
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return value if value.numel() == 1 else torch.linalg.vector_norm(value)


def _checked_grads(
    grads: Mapping[str, Tensor], params: Mapping[str, Tensor]
) -> Mapping[str, Tensor | None]:
    if not isinstance(grads, Mapping):
        raise TypeError(
            f"grad_transform returned a {type(grads).__name__}: it has to return a dict of "
            "gradients by parameter name, as it was given"
        )
    for name, g in grads.items():
        if name not in params:
            raise ValueError(
                f"grad_transform returned a gradient for {name!r}, which is not an inner "
                f"variable: keep the names it was given"
            )
        if g is not None and not isinstance(g, Tensor):
            raise TypeError(
                f"grad_transform returned a {type(g).__name__} for {name!r}: return a tensor, or "
                "leave the name out where the parameter is to stay as it is"
            )
        if g is not None and g.shape != params[name].shape:
            raise ValueError(
                f"grad_transform returned a gradient of shape {tuple(g.shape)} for {name!r}, "
                f"which has shape {tuple(params[name].shape)}: keep the shapes it was given"
            )
        if g is not None and g.dtype != params[name].dtype:
            raise ValueError(
                f"grad_transform returned a gradient of {g.dtype} for {name!r}, which was given in "
                f"{params[name].dtype}: convert it back with .to({params[name].dtype})"
            )
    return grads
